//! Speaks to Disco servers: HTTP/JSON for the command line, gRPC for the session that holds a
//! registration, xDS to look at what any server sends.
//!
//! Servers are named by IP and port, never by a host name. Holds no state of the mesh: whatever it learns it hands to its
//! caller. Errors say what to do next.

mod ads;
mod http;
mod locks;
mod proxies;
mod servers;
mod session;
mod wire;

pub use ads::{Ads, Answer, Ask};
pub use http::{FieldError, Http, HttpError};
pub use locks::{LockError, Locks};
pub use proxies::{Acknowledged, wait_acknowledged};
pub use servers::Servers;
pub use session::{Session, SessionError, SessionState};
pub use wire::check_to_proto;

#[cfg(test)]
pub(crate) mod mock;
