use std::{
    collections::{BTreeMap, BTreeSet},
    env,
    net::{SocketAddr, TcpStream},
    path::Path,
    process::Command,
};

use anyhow::Context as _;

use super::{Disco, PATIENCE, Process, free_port, request, sibling, tool};

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
        let flags: &[&str] = match protocol {
            Protocol::Delta => &[],
            Protocol::Sotw => &["--sotw"],
        };
        Self::start_with(disco, port, flags)
    }

    /// Starts one that takes calls on `port`, with further flags of `disco envoy run`.
    pub(crate) fn start_with(disco: &Disco, port: u16, flags: &[&str]) -> anyhow::Result<Self> {
        let admin_port = free_port()?;
        let mut command = disco.command()?;
        command.args(["envoy", "run", "--service", "caller"]);
        command.args(["--admin-port", &admin_port.to_string(), "--outbound-port", &port.to_string()]);
        command.args(flags);
        let envoy = tool("envoy")?;
        let folders = [envoy.parent().map(Path::to_owned).context("no folder")?].into_iter();
        let path = env::var_os("PATH").unwrap_or_default();
        command.env("PATH", env::join_paths(folders.chain(env::split_paths(&path)))?);

        let mut process = Process::start("envoy", disco.folder(), &mut command)?;
        let [admin, proxy] = [admin_port, port].map(|port| SocketAddr::from(([127, 0, 0, 1], port)));
        process.wait_for("listener", PATIENCE, |_| TcpStream::connect(proxy).ok())?;
        Ok(Self { process, admin, proxy })
    }

    /// Starts one that asks for clusters and listeners by services of their own, and for the rest by ADS.
    pub(crate) fn start_per_type(disco: &Disco, protocol: Protocol) -> anyhow::Result<Self> {
        let (admin_port, port) = (free_port()?, free_port()?);
        let (api, flag) = match protocol {
            Protocol::Delta => ("DELTA_GRPC", None),
            Protocol::Sotw => ("GRPC", Some("--sotw")),
        };
        let mut command = disco.command()?;
        command.args(["envoy", "bootstrap", "--node-id", "per-type"]).args(flag);
        command.args(["--admin-port", &admin_port.to_string(), "--outbound-port", &port.to_string()]);
        let bootstrap = String::from_utf8(command.output()?.stdout)?;
        let ads = "_config: { ads: {}, resource_api_version: V3 }";
        anyhow::ensure!(bootstrap.matches(ads).count() == 2, "{bootstrap}");
        let own = format!(
            "_config: {{ resource_api_version: V3, api_config_source: {{ api_type: {api}, transport_api_version: V3, \
             grpc_services: [ {{ envoy_grpc: {{ cluster_name: disco_servers }} }} ] }} }}"
        );
        let file = disco.folder().join("per-type.yaml");
        std::fs::write(&file, bootstrap.replace(ads, &own))?;

        let mut command = Command::new(tool("envoy")?);
        command.arg("-c").arg(file).args(["--log-level", "warn", "--use-dynamic-base-id"]);
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

    /// The names of its clusters.
    pub(crate) fn clusters(&self) -> anyhow::Result<BTreeSet<String>> {
        let clusters = request(self.admin, "GET", "/clusters", b"")?.body;
        let names = clusters.lines().filter_map(|line| line.split_once("::"));
        Ok(names.map(|(name, _)| name.to_owned()).collect())
    }

    /// The addresses of the hosts of a cluster.
    pub(crate) fn hosts(&self, cluster: &str) -> anyhow::Result<BTreeSet<String>> {
        let clusters = request(self.admin, "GET", "/clusters", b"")?.body;
        let lines = clusters.lines().filter_map(|line| line.strip_prefix(cluster)?.strip_prefix("::"));
        let hosts = lines.filter_map(|line| line.strip_suffix("::health_flags::healthy"));
        Ok(hosts.map(str::to_owned).collect())
    }

    /// Calls the greeter once, addressed as `authority`: what it says, or else why it failed.
    pub(crate) fn call(&self, authority: &str) -> anyhow::Result<Result<String, String>> {
        let mut command = Command::new(sibling("examples/greeter-client")?);
        let output = command.args(["--proxy", &self.proxy.to_string(), "--service", authority]).output()?;
        let text = |bytes: Vec<u8>| String::from_utf8_lossy(&bytes).into_owned();
        Ok(if output.status.success() { Ok(text(output.stdout)) } else { Err(text(output.stderr)) })
    }

    pub(crate) fn output(&self) -> String {
        self.process.output()
    }
}
