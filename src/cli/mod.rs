//! The command line: noun, then verb.
//!
//! Parses arguments, asks a Disco server over HTTP, and prints tables or JSON. Holds no logic of the mesh. Every command
//! ends as `Ok` or as one [`Failure`], which carries the exit code; clap's own usage errors end with 64.

mod failure;
#[cfg(test)]
mod tests;

use std::{fmt, process::ExitCode};

use clap::{Args, Parser, Subcommand};

pub use failure::Failure;

use crate::client::Http;

/// A service-mesh control plane: service registry and xDS server in one program.
#[derive(Debug, Parser)]
#[command(name = "disco", version, propagate_version = true, arg_required_else_help = true)]
struct Cli {
    #[command(flatten)]
    global: Global,
    #[command(subcommand)]
    command: Command,
}

/// Which server to ask.
#[derive(Clone, Args)]
pub struct Global {
    /// HTTP address of the server to ask
    #[arg(
        long,
        global = true,
        env = "DISCO_HTTP",
        default_value = "127.0.0.1:18080",
        value_name = "IP:PORT"
    )]
    pub http: String,
    /// gRPC address of the server to ask
    #[arg(
        long,
        global = true,
        env = "DISCO_GRPC",
        default_value = "127.0.0.1:18000",
        value_name = "IP:PORT"
    )]
    pub grpc: String,
    /// Token to show to the server
    #[arg(long, global = true, env = "DISCO_TOKEN", hide_env_values = true)]
    pub token: Option<String>,
}

impl Global {
    /// A client of the HTTP API.
    pub fn client(&self) -> Result<Http, Failure> {
        Http::new(&self.http, self.token.as_deref()).map_err(Failure::from)
    }
}

// Written by hand: the token must not end up in a log.
impl fmt::Debug for Global {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let token = self.token.as_ref().map(|_| "…");
        f.debug_struct("Global")
            .field("http", &self.http)
            .field("grpc", &self.grpc)
            .field("token", &token)
            .finish()
    }
}

#[derive(Debug, Subcommand)]
enum Command {
    // run: Run(run::Args),
    // envoy: Envoy(envoy::Args),
}

/// Runs the command that the arguments of the process name.
pub fn main() -> ExitCode {
    ExitCode::SUCCESS
}
