//! Speaks to Disco servers over gRPC: the session that holds a registration, and what proxies have acknowledged.
//!
//! Servers are named by IP and port, never by a host name. Holds no state of the mesh: whatever it learns it hands to
//! its caller.

mod proxies;
mod servers;
mod session;

pub use proxies::{Acknowledged, wait_acknowledged};
pub use servers::Servers;
pub use session::{Session, SessionError, SessionState};

#[cfg(test)]
pub(crate) mod mock;
