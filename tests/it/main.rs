//! Tests of the whole program: the real `disco` binary, real Envoy, real gRPC clients.
//!
//! `make test` installs what they need. A tool that is missing fails the test that needs it.
#![allow(
    clippy::disallowed_methods,
    clippy::indexing_slicing,
    clippy::expect_used,
    clippy::panic,
    clippy::print_stderr,
    clippy::unwrap_used,
    reason = "tests; helpers do not count as such for the lints"
)]

mod ageing;
mod bad_input;
mod chaos;
mod databases;
mod guards;
mod ha;
mod harness;
mod health;
mod ledger;
mod leds;
mod leds_protocol;
mod live;
mod load_reports;
mod locks;
mod on_demand;
mod peer_lists;
mod peer_sets;
mod per_type;
mod plain_http;
mod raft_kv;
mod real_clients;
mod renew_many;
mod roles;
mod snapshot;
mod tidy;
mod validate;
mod views;
mod virtual_hosts;
