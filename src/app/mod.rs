//! Placeholder: wires the rooms.

use std::{fmt, net::SocketAddr};

/// Where the process listens.
#[derive(Debug, Clone, Copy)]
pub struct Addresses {
    /// The gRPC port, if a role needs it.
    pub grpc: Option<SocketAddr>,
    /// The HTTP port, if a role needs it.
    pub http: Option<SocketAddr>,
}

/// Why the process ended.
#[derive(Debug)]
pub struct Error(String);

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl std::error::Error for Error {}

/// Runs until told to end.
pub async fn run(config: crate::config::Config, ready: impl FnOnce(&Addresses)) -> Result<(), Error> {
    ready(&Addresses { grpc: Some(config.listen.grpc), http: Some(config.listen.http) });
    Err(Error("the application is not built in".into()))
}
