//! Compiles the protos in pure Rust, so that `cargo build` needs no protoc, and finds the descriptors of Envoy's types.

use std::{
    collections::{BTreeMap, BTreeSet},
    env,
    error::Error,
    fs,
    path::PathBuf,
    process::Command,
};

use prost::Message;
use protox::prost_reflect::prost_types::{
    DescriptorProto, EnumDescriptorProto, EnumOptions, FileDescriptorProto, FileDescriptorSet, MessageOptions,
};

const API: &[&str] =
    &["disco/v1/registry.proto", "disco/v1/proxies.proto", "disco/v1/locks.proto", "disco/v1/peers.proto"];
const ETCD: &[&str] = &["etcd/rpc.proto"];
/// Services of Envoy's that Disco has or may have: gRPC reflection tells of them.
const SERVICES: &[&str] = &[
    "envoy/service/discovery/v3/ads.proto",
    "envoy/service/cluster/v3/cds.proto",
    "envoy/service/endpoint/v3/eds.proto",
    "envoy/service/endpoint/v3/leds.proto",
    "envoy/service/listener/v3/lds.proto",
    "envoy/service/route/v3/rds.proto",
    "envoy/service/secret/v3/sds.proto",
    "envoy/service/status/v3/csds.proto",
    "envoy/service/load_stats/v3/lrs.proto",
];
/// The services of the examples: a proto, and the folder that it is in.
const EXAMPLES: [(&str, &str); 2] =
    [("greeter.proto", "examples/greeter"), ("raft_kv.proto", "examples/raft-kv")];

#[allow(clippy::disallowed_methods, reason = "cargo speaks to build scripts through the environment")]
fn main() -> Result<(), Box<dyn Error>> {
    println!("cargo:rerun-if-changed=proto");
    for (file, folder) in EXAMPLES {
        println!("cargo:rerun-if-changed={folder}/{file}");
    }
    let out = PathBuf::from(env::var_os("OUT_DIR").ok_or("cargo sets OUT_DIR")?);

    // Without them everything works but for the text of resources.
    let envoy = envoy_descriptors().unwrap_or_else(|error| {
        println!("cargo:warning=resources will be shown without their content: {error}");
        FileDescriptorSet::default()
    });
    fs::write(out.join("services.bin"), services(&envoy).encode_to_vec())?;
    fs::write(out.join("envoy.bin"), names_and_types(envoy).encode_to_vec())?;

    let api = protox::compile(API, ["proto"])?;
    fs::write(out.join("disco.bin"), api.encode_to_vec())?;
    // With names, so that the codec can say what a message should have been.
    let mut config = tonic_prost_build::Config::new();
    config.enable_type_names();
    let codec = "crate::proto::Codec";
    tonic_prost_build::configure().btree_map(".").codec_path(codec).compile_fds_with_config(api, config)?;

    let etcd = protox::compile(ETCD, ["proto"])?;
    tonic_prost_build::configure().build_server(false).bytes(".").compile_fds(etcd)?;

    for (file, folder) in EXAMPLES {
        tonic_prost_build::configure().compile_fds(protox::compile([file], [folder])?)?;
    }
    Ok(())
}

/// The descriptors that lie in the source of the crate `envoy-types`, which does not export them. Cargo knows where that is.
#[allow(clippy::disallowed_methods, reason = "cargo speaks to build scripts through the environment")]
fn envoy_descriptors() -> Result<FileDescriptorSet, Box<dyn Error>> {
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
    Ok(FileDescriptorSet::decode(whole.as_slice())?)
}

/// The files of [`SERVICES`] and what their messages are made of, as small as it goes: without options, and so without the imports
/// that only those need.
fn services(whole: &FileDescriptorSet) -> FileDescriptorSet {
    let bare = names_and_types(whole.clone());
    let mut files: BTreeMap<String, FileDescriptorProto> = BTreeMap::new();
    let mut homes: BTreeMap<String, String> = BTreeMap::new();
    for (mut file, full) in bare.file.into_iter().zip(&whole.file) {
        if SERVICES.contains(&file.name()) {
            file.service.clone_from(&full.service);
            for service in &mut file.service {
                service.options = None;
                service.method.iter_mut().for_each(|method| method.options = None);
            }
        }
        let package = format!(".{}", file.package());
        file.enum_type
            .iter()
            .for_each(|it| drop(homes.insert(format!("{package}.{}", it.name()), file.name().into())));
        file.message_type.iter().for_each(|it| names(it, &package, file.name(), &mut homes));
        files.insert(file.name().to_owned(), file);
    }
    let mut kept = BTreeMap::new();
    let mut open: Vec<String> = SERVICES.iter().map(|&name| name.to_owned()).collect();
    while let Some(name) = open.pop() {
        let Some(mut file) = files.remove(&name) else { continue };
        let mut used = BTreeSet::new();
        file.message_type.iter().for_each(|message| references(message, &mut used));
        let methods = file.service.iter().flat_map(|service| &service.method);
        used.extend(
            methods.flat_map(|method| [method.input_type().to_owned(), method.output_type().to_owned()]),
        );
        let imports: BTreeSet<_> = used.iter().filter_map(|name| homes.get(name)).cloned().collect();
        file.dependency = imports.into_iter().filter(|import| *import != name).collect();
        (file.public_dependency, file.weak_dependency) = (Vec::new(), Vec::new());
        open.extend(file.dependency.iter().cloned());
        kept.insert(name, file);
    }
    FileDescriptorSet { file: kept.into_values().collect() }
}

/// Notes in which file a message is, and those within it.
fn names(message: &DescriptorProto, within: &str, file: &str, homes: &mut BTreeMap<String, String>) {
    let name = format!("{within}.{}", message.name());
    message.enum_type.iter().for_each(|it| drop(homes.insert(format!("{name}.{}", it.name()), file.into())));
    message.nested_type.iter().for_each(|it| names(it, &name, file, homes));
    homes.insert(name, file.to_owned());
}

/// The types of all fields.
fn references(message: &DescriptorProto, used: &mut BTreeSet<String>) {
    used.extend(message.field.iter().filter_map(|field| field.type_name.clone()));
    message.nested_type.iter().for_each(|it| references(it, used));
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
