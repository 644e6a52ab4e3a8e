//! Compiles the protos in pure Rust, so that `cargo build` needs no protoc.

use std::{env, error::Error, fs, path::PathBuf};

use prost::Message;

const API: &[&str] = &["disco/v1/registry.proto", "disco/v1/proxies.proto"];
const GREETER: &[&str] = &["greeter.proto"];

#[allow(clippy::disallowed_methods, reason = "cargo speaks to build scripts through the environment")]
fn main() -> Result<(), Box<dyn Error>> {
    println!("cargo:rerun-if-changed=proto");
    println!("cargo:rerun-if-changed=examples/greeter/greeter.proto");
    let out = PathBuf::from(env::var_os("OUT_DIR").ok_or("cargo sets OUT_DIR")?);

    let api = protox::compile(API, ["proto"])?;
    fs::write(out.join("disco.bin"), api.encode_to_vec())?;
    tonic_prost_build::configure().btree_map(".").compile_fds(api)?;

    let greeter = protox::compile(GREETER, ["examples/greeter"])?;
    tonic_prost_build::configure().compile_fds(greeter)?;
    Ok(())
}
