use std::process::ExitStatus;

use anyhow::Context as _;
use rustix::process::{Signal, kill_process};

use super::{Disco, PATIENCE, Place, Process, free_port, sibling};

/// A `greeter-server` under `disco run`.
#[derive(Debug)]
pub(crate) struct Greeter {
    process: Process,
}

impl Greeter {
    /// Starts it as instance `id` of the service `greeter`. It registers itself once its health check passes.
    pub(crate) fn start(disco: &Disco, id: &str) -> anyhow::Result<Self> {
        Self::start_in(disco, id, "")
    }

    /// Starts it in this zone.
    pub(crate) fn start_in(disco: &Disco, id: &str, zone: &str) -> anyhow::Result<Self> {
        Self::start_at(disco, id, zone, &Place::here())
    }

    /// Starts it elsewhere.
    pub(crate) fn start_at(disco: &Disco, id: &str, zone: &str, place: &Place) -> anyhow::Result<Self> {
        let (port, ip) = (free_port()?.to_string(), place.ip.to_string());
        let mut command = disco.command_at(place)?;
        command.args(["run", "--service", "greeter", "--id", id, "--port", &port, "--zone", zone]);
        command.args(["--address", &ip, "--health", "grpc", "--"]);
        // It takes the port and its name from the environment that `disco run` gives it.
        command.arg(sibling("examples/greeter-server")?).args(["--address", &ip]);
        Ok(Self { process: Process::start(id, disco.folder(), &mut command)? })
    }

    /// Asks it to end, as a supervisor does: SIGTERM to `disco run`.
    pub(crate) fn terminate(&self) -> anyhow::Result<()> {
        self.process.signal(Signal::TERM)
    }

    /// Waits for the end of `disco run`.
    pub(crate) fn ended(&mut self) -> anyhow::Result<ExitStatus> {
        self.process.ended(PATIENCE)
    }

    /// Kills the server, not `disco run`, with -9.
    pub(crate) fn crash(&self) -> anyhow::Result<()> {
        let server = *self.process.descendants().first().context("the server does not run")?;
        Ok(kill_process(server, Signal::KILL)?)
    }

    /// Stops or continues `disco run`, and not the server.
    pub(crate) fn signal(&self, signal: Signal) -> anyhow::Result<()> {
        self.process.signal(signal)
    }

    /// What it and `disco run` wrote.
    pub(crate) fn output(&self) -> String {
        self.process.output()
    }
}
