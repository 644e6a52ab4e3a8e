//! The command line: noun, then verb.
//!
//! Parses arguments, asks a Disco server over HTTP, and prints tables or JSON. Holds no logic of the mesh. Every command
//! ends as `Ok` or as one [`Failure`], which carries the exit code; clap's own usage errors end with 64.

mod check;
mod configuration;
mod envoy;
mod failure;
mod files;
mod instance;
mod lock;
mod output;
mod parse;
mod peers;
mod proxy;
mod rollout;
mod run;
mod server;
mod servers;
mod service;
mod snapshot;
#[cfg(test)]
mod tests;
mod xds;

use std::{ffi::OsString, fmt, process::ExitCode};

use clap::{
    Args, CommandFactory as _, FromArgMatches as _, Parser, Subcommand, error::ErrorKind, parser::ValueSource,
};

pub use failure::Failure;

use crate::client::Http;

/// A service-mesh control plane: service registry and xDS server in one program.
#[derive(Debug, Parser)]
#[command(
    name = "disco",
    version,
    arg_required_else_help = true,
    subcommand_required = true,
    after_help = "Start with:\n  disco dev\n\nExit codes:\n  0 done, 1 failed, 2 not yet or timed out, 64 usage, 65 bad data, \
                  79 a check found problems; `run` and `lock run` end as their command does"
)]
struct Cli {
    #[command(flatten)]
    global: Global,
    #[command(subcommand)]
    command: Command,
}

/// Which server to ask.
#[derive(Clone, Args)]
#[command(next_help_heading = "Server")]
pub struct Global {
    /// HTTP addresses of the servers, separated by commas: of the proxies all are asked, of the rest the first that can be reached
    #[arg(
        long,
        global = true,
        env = "DISCO_HTTP",
        default_value = "127.0.0.1:18080",
        value_name = "IP:PORT"
    )]
    pub http: String,
    /// gRPC addresses of the servers, separated by commas
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
    ///
    /// # Errors
    /// The address or the token cannot be used.
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
    /// Run everything on this machine, without a configuration
    #[command(after_help = "Examples:\n  disco dev\n  disco dev --data ./state --http-listen 127.0.0.1:0")]
    Dev(server::Dev),
    /// Run the roles that a configuration names
    #[command(after_help = "Example:\n  disco serve --config disco.yaml")]
    Serve(server::Serve),
    /// Run a command as an instance: register it once healthy, drain it before it stops
    #[command(long_about = run::LONG)]
    Run(Box<run::RunArgs>),
    /// Look whether everything is in order; ends with 79 when it is not
    #[command(after_help = "Example:\n  disco check && echo fine")]
    Check(check::Check),
    /// Services: list, show, load, history, release, live, remove
    #[command(subcommand, visible_alias = "services")]
    Service(service::Command),
    /// Instances of services: list, show, explain, register, publish, drain, deregister
    #[command(subcommand, visible_alias = "instances")]
    Instance(instance::Command),
    /// Connected proxies: list, status, resources, diff
    #[command(subcommand, visible_alias = "proxies")]
    Proxy(proxy::Command),
    /// Changes on their way to the proxies: status
    #[command(subcommand)]
    Rollout(rollout::Command),
    /// Locks for what must run exactly once: run, list, show, release
    #[command(subcommand, visible_alias = "locks")]
    Lock(lock::Command),
    /// The replicas of Raft and other databases: create, list, show, wait, render, verify, propose, finish, register, withdraw, report,
    /// refound
    #[command(subcommand)]
    Peers(peers::Command),
    /// Backups of everything that is registered: save, show, restore
    #[command(subcommand)]
    Snapshot(snapshot::Command),
    /// Speak xDS to any server: watch
    #[command(subcommand)]
    Xds(xds::Command),
    /// Envoy sidecars: bootstrap, run
    #[command(subcommand)]
    Envoy(envoy::EnvoyCommand),
    /// Configuration files: check, show
    #[command(subcommand)]
    Config(configuration::Command),
    /// Print a script that completes commands in a shell
    #[command(
        after_help = "Example:\n  disco completions bash > ~/.local/share/bash-completion/completions/disco"
    )]
    Completions {
        /// Which shell
        shell: clap_complete::Shell,
    },
}

/// Runs the command that the arguments of the process name.
pub fn main() -> ExitCode {
    let cli = match parse(std::env::args_os()) {
        Ok(cli) => cli,
        Err(error) => {
            // Help and version are answers; nobody is left to tell when they cannot be printed.
            let _ = error.print();
            return if error.use_stderr() { ExitCode::from(failure::USAGE) } else { ExitCode::SUCCESS };
        }
    };
    let runtime = match tokio::runtime::Builder::new_multi_thread().enable_all().build() {
        Ok(runtime) => runtime,
        Err(error) => return report(&Failure::failed(format!("cannot start threads: {error}"))),
    };
    let result = runtime.block_on(execute(cli));
    // A blocking call that hangs, such as a name look-up, must not keep the process.
    runtime.shutdown_background();
    result.unwrap_or_else(|failure| report(&failure))
}

/// Reads a command line. `dev` and `serve` are servers and ask none: an address given to them is a slip.
fn parse(arguments: impl IntoIterator<Item = OsString>) -> Result<Cli, clap::Error> {
    let mut command = Cli::command();
    let matches = command.try_get_matches_from_mut(arguments)?;
    if matches!(matches.subcommand_name(), Some("dev" | "serve")) {
        for name in ["http", "grpc"] {
            if matches.value_source(name) == Some(ValueSource::CommandLine) {
                let message =
                    format!("--{name} names a server to ask; where to listen is --{name}-listen IP:PORT");
                return Err(command.error(ErrorKind::ArgumentConflict, message));
            }
        }
    }
    Cli::from_arg_matches(&matches).map_err(|error| error.format(&mut command))
}

async fn execute(cli: Cli) -> Result<ExitCode, Failure> {
    let Cli { global, command } = cli;
    match command {
        Command::Dev(arguments) => Box::pin(server::dev(arguments)).await?,
        Command::Serve(arguments) => Box::pin(server::serve(arguments)).await?,
        Command::Run(arguments) => return Box::pin(run::run(*arguments, &global)).await.map(ExitCode::from),
        Command::Check(arguments) => check::run(arguments, &global).await?,
        Command::Service(command) => service::run(command, &global).await?,
        Command::Instance(command) => instance::run(command, &global).await?,
        Command::Proxy(command) => proxy::run(command, &global).await?,
        Command::Rollout(command) => rollout::run(command, &global).await?,
        Command::Lock(command) => return Box::pin(lock::run(command, &global)).await.map(ExitCode::from),
        Command::Peers(command) => Box::pin(peers::run(command, &global)).await?,
        Command::Snapshot(command) => snapshot::run(command, &global).await?,
        Command::Xds(command) => xds::run(command, &global).await?,
        Command::Envoy(command) => return envoy::envoy(command, &global).map(ExitCode::from),
        Command::Config(command) => configuration::run(command)?,
        Command::Completions { shell } => {
            let mut script = Vec::new();
            clap_complete::generate(shell, &mut Cli::command(), "disco", &mut script);
            output::print(&String::from_utf8_lossy(&script))?;
        }
    }
    Ok(ExitCode::SUCCESS)
}

fn report(failure: &Failure) -> ExitCode {
    if !failure.message.is_empty() {
        output::note(&format!("error: {failure}"));
    }
    failure.exit_code()
}
