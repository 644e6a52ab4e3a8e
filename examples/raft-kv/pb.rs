//! Code generated of `raft_kv.proto` by `build.rs`.
#![allow(
    dead_code,
    unreachable_pub,
    missing_debug_implementations,
    unused_qualifications,
    clippy::wildcard_imports,
    clippy::allow_attributes_without_reason,
    reason = "generated"
)]

tonic::include_proto!("raft_kv.v1");
