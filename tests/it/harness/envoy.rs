use std::{
    collections::BTreeMap,
    env,
    net::{SocketAddr, TcpStream},
    path::Path,
};

use anyhow::Context as _;

use super::{Disco, PATIENCE, Process, free_port, request, tool};

/// How Envoy asks for its resources.
#[derive(Debug, Clone, Copy)]
pub(crate) enum Protocol {
    Delta,
    Sotw,
}

/// An Envoy under `disco envoy run`.
#[derive(Debug)]
pub(crate) struct Envoy {
    process: Process,
    pub(crate) admin: SocketAddr,
    /// Where it takes outbound calls.
    pub(crate) proxy: SocketAddr,
}

impl Envoy {
    /// Starts one on ports of its own and waits until it takes calls.
    pub(crate) fn start(disco: &Disco, protocol: Protocol) -> anyhow::Result<Self> {
        Self::start_on(disco, protocol, free_port()?)
    }

    /// Starts one that takes calls on `port`.
    pub(crate) fn start_on(disco: &Disco, protocol: Protocol, port: u16) -> anyhow::Result<Self> {
        let (admin_port, port) = (free_port()?, port);
        let mut command = disco.command()?;
        command.args(["envoy", "run", "--service", "caller"]);
        command.args(["--admin-port", &admin_port.to_string(), "--outbound-port", &port.to_string()]);
        if matches!(protocol, Protocol::Sotw) {
            command.arg("--sotw");
        }
        let envoy = tool("envoy")?;
        let folders = [envoy.parent().map(Path::to_owned).context("no folder")?].into_iter();
        let path = env::var_os("PATH").unwrap_or_default();
        command.env("PATH", env::join_paths(folders.chain(env::split_paths(&path)))?);

        let mut process = Process::start("envoy", disco.folder(), &mut command)?;
        let [admin, proxy] = [admin_port, port].map(|port| SocketAddr::from(([127, 0, 0, 1], port)));
        process.wait_for("listener", PATIENCE, |_| TcpStream::connect(proxy).ok())?;
        Ok(Self { process, admin, proxy })
    }

    /// How many updates of each kind it has taken so far, e.g. of `cluster_manager.cds`.
    pub(crate) fn updates(&self) -> anyhow::Result<BTreeMap<String, u64>> {
        let stats = request(self.admin, "GET", "/stats?filter=update_success$", b"")?.body;
        let pairs = stats.lines().filter_map(|line| line.rsplit_once(": "));
        pairs.map(|(name, value)| Ok((name.to_owned(), value.trim().parse()?))).collect()
    }

    pub(crate) fn output(&self) -> String {
        self.process.output()
    }
}
