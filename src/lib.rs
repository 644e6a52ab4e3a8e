//! Disco: a service-mesh control plane in one binary, a service registry and an xDS management server.
//!
//! ```text
//!  WRITERS                       TRUTH                     PROJECTIONS (pure)      EDGES
//!  registry --> store --> catalog, one writer ----> resources --> xds ------> Envoy, gRPC clients
//!                         immutable snapshot   \----------------> api ------> CLI, scripts
//!                         + bounded change list
//! ```
//!
//! Nothing on the right calls anything on the left: a request that arrives at the right edge enters again at the left.
//! A room may use only rooms of a lower layer; `tests/it/tidy.rs` holds the order. Read them from the top.

// Words.
pub mod model;
// Truth.
pub mod catalog;
// Writers.
pub mod health;
pub mod registry;
pub mod store;
// What databases are handed.
pub mod peers;
// Projections: pure functions of a snapshot.
pub mod resources;
// Edges.
pub mod api;
pub mod client;
pub mod xds;
// The program.
pub mod app;
pub mod cli;
pub mod config;
// General things that know nothing of the above.
pub mod proto;
pub mod rt;
pub mod telemetry;
