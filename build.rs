//! Compiles the protos in pure Rust, so that `cargo build` needs no protoc, and finds the descriptors of Envoy's types.

use std::{env, error::Error, fs, path::PathBuf, process::Command};

use prost::Message;
use protox::prost_reflect::prost_types::{
    DescriptorProto, EnumDescriptorProto, EnumOptions, FileDescriptorSet, MessageOptions,
};

const API: &[&str] = &["disco/v1/registry.proto", "disco/v1/proxies.proto", "disco/v1/locks.proto"];
const ETCD: &[&str] = &["etcd/rpc.proto"];
const GREETER: &[&str] = &["greeter.proto"];

#[allow(clippy::disallowed_methods, reason = "cargo speaks to build scripts through the environment")]
fn main() -> Result<(), Box<dyn Error>> {
    println!("cargo:rerun-if-changed=proto");
    println!("cargo:rerun-if-changed=examples/greeter/greeter.proto");
    let out = PathBuf::from(env::var_os("OUT_DIR").ok_or("cargo sets OUT_DIR")?);

    // Without them everything works but for the text of resources.
    let envoy = envoy_descriptors().unwrap_or_else(|error| {
        println!("cargo:warning=resources will be shown without their content: {error}");
        Vec::new()
    });
    fs::write(out.join("envoy.bin"), envoy)?;

    let api = protox::compile(API, ["proto"])?;
    fs::write(out.join("disco.bin"), api.encode_to_vec())?;
    tonic_prost_build::configure().btree_map(".").compile_fds(api)?;

    let etcd = protox::compile(ETCD, ["proto"])?;
    tonic_prost_build::configure().build_server(false).bytes(".").compile_fds(etcd)?;

    let greeter = protox::compile(GREETER, ["examples/greeter"])?;
    tonic_prost_build::configure().compile_fds(greeter)?;
    Ok(())
}

/// The descriptors that lie in the source of the crate `envoy-types`, which does not export them. Cargo knows where that is.
#[allow(clippy::disallowed_methods, reason = "cargo speaks to build scripts through the environment")]
fn envoy_descriptors() -> Result<Vec<u8>, Box<dyn Error>> {
    println!("cargo:rerun-if-changed=Cargo.lock");
    let cargo = env::var_os("CARGO").ok_or("cargo sets CARGO")?;
    let output = Command::new(cargo)
        .args(["metadata", "--format-version=1", "--offline", "--filter-platform"])
        .arg(env::var_os("TARGET").ok_or("cargo sets TARGET")?)
        .output()?;
    if !output.status.success() {
        return Err(format!("cargo metadata: {}", String::from_utf8_lossy(&output.stderr)).into());
    }
    let metadata: serde_json::Value = serde_json::from_slice(&output.stdout)?;
    let packages = metadata.get("packages").and_then(|packages| packages.as_array());
    let named = |package: &serde_json::Value, name| package.get("name").is_some_and(|it| it == name);
    let envoy = packages.into_iter().flatten().find(|package| named(package, "envoy-types"));
    let manifest = envoy.and_then(|package| package.get("manifest_path")?.as_str());
    let manifest = manifest.ok_or("cargo knows no envoy-types")?;
    let path = PathBuf::from(manifest).with_file_name("src/generated/types.bin");
    let whole = fs::read(&path).map_err(|error| format!("{}: {error}", path.display()))?;
    Ok(names_and_types(FileDescriptorSet::decode(whole.as_slice())?).encode_to_vec())
}

/// What it takes to show a message: without services, annotations and other options.
fn names_and_types(mut set: FileDescriptorSet) -> FileDescriptorSet {
    fn message(of: &mut DescriptorProto) {
        let map_entry = of.options.as_ref().and_then(|options| options.map_entry);
        of.options = map_entry.map(|it| MessageOptions { map_entry: Some(it), ..MessageOptions::default() });
        of.extension.clear();
        of.extension_range.clear();
        of.reserved_range.clear();
        of.reserved_name.clear();
        of.field.iter_mut().for_each(|field| {
            field.options = None;
            field.json_name = None;
        });
        of.oneof_decl.iter_mut().for_each(|oneof| oneof.options = None);
        of.enum_type.iter_mut().for_each(enumeration);
        of.nested_type.iter_mut().for_each(message);
    }
    fn enumeration(of: &mut EnumDescriptorProto) {
        let alias = of.options.as_ref().and_then(|options| options.allow_alias);
        of.options = alias.map(|it| EnumOptions { allow_alias: Some(it), ..EnumOptions::default() });
        of.reserved_range.clear();
        of.reserved_name.clear();
        of.value.iter_mut().for_each(|value| value.options = None);
    }
    for file in &mut set.file {
        file.service.clear();
        file.extension.clear();
        file.options = None;
        file.source_code_info = None;
        file.message_type.iter_mut().for_each(message);
        file.enum_type.iter_mut().for_each(enumeration);
    }
    set
}
