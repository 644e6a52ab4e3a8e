//! Generated code of `proto/`, and the descriptors of Envoy's types to show messages as JSON.

mod codec;
mod json;

pub use codec::Codec;
pub use json::message_json;

/// The API of Disco, version 1.
#[allow(
    unreachable_pub,
    missing_debug_implementations,
    unused_qualifications,
    clippy::wildcard_imports,
    clippy::large_enum_variant,
    clippy::allow_attributes_without_reason,
    reason = "generated"
)]
pub mod v1 {
    tonic::include_proto!("disco.v1");
}

/// What Disco uses of etcd's API, version 3.
#[allow(
    unreachable_pub,
    missing_debug_implementations,
    unused_qualifications,
    clippy::wildcard_imports,
    clippy::allow_attributes_without_reason,
    reason = "generated"
)]
pub mod etcd {
    tonic::include_proto!("etcdserverpb");
}

/// The compiled descriptors of `proto/` and of the services that are Envoy's, for gRPC reflection. The latter are empty if the
/// build found none.
pub const DESCRIPTORS: [&[u8]; 2] = [
    include_bytes!(concat!(env!("OUT_DIR"), "/disco.bin")),
    include_bytes!(concat!(env!("OUT_DIR"), "/services.bin")),
];

/// The compiled descriptors of Envoy's types.
const ENVOY_DESCRIPTORS: &[u8] = include_bytes!(concat!(env!("OUT_DIR"), "/envoy.bin"));
