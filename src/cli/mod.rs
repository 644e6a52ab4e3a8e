//! The command line.

pub mod envoy;
pub mod run;

/// What every command takes.
#[derive(Debug, Clone)]
pub struct Global {
    /// HTTP address of the server.
    pub http: String,
    /// gRPC addresses of the servers, `ip:port`, separated by commas.
    pub grpc: String,
    /// Shown to the server.
    pub token: Option<String>,
}

/// Why a command did not do what it was asked.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Failure {
    /// The exit code of the process.
    pub code: u8,
    /// What went wrong and what to do next.
    pub message: String,
}

impl Failure {
    /// Exit code 1: it did not work.
    pub fn failed(message: impl Into<String>) -> Self {
        Self { code: 1, message: message.into() }
    }

    /// Exit code 64: the command line is wrong.
    pub fn usage(message: impl Into<String>) -> Self {
        Self { code: 64, message: message.into() }
    }
}
