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
        let (api, flags): (_, &[_]) = match protocol {
            Protocol::Delta => ("DELTA_GRPC", &[]),
            Protocol::Sotw => ("GRPC", &["--sotw"]),
        };
        Self::start_edited(disco, flags, |bootstrap, _| {
            let ads = "_config: { ads: {}, resource_api_version: V3 }";
            anyhow::ensure!(bootstrap.matches(ads).count() == 2, "{bootstrap}");
            Ok(bootstrap.replace(ads, &format!("_config: {}", own_service(api))))
        })
    }

    /// Starts one with a listener of its own, whose routes come one virtual host at a time: over ADS, or by their service. It asks
    /// for hosts that it does not know when they are called.
    pub(crate) fn start_virtual_hosts(disco: &Disco, ads: bool) -> anyhow::Result<Self> {
        Self::start_edited(disco, &[], |bootstrap, port| {
            let source =
                if ads { "{ ads: {}, resource_api_version: V3 }".into() } else { own_service("DELTA_GRPC") };
            let listeners = "  lds_config: { ads: {}, resource_api_version: V3 }\n";
            let resources = "static_resources:\n";
            let metadata = "  metadata:\n";
            for part in [listeners, resources, metadata] {
                anyhow::ensure!(bootstrap.matches(part).count() == 1, "{part} in {bootstrap}");
            }
            let listener = format!(
                "{resources}  listeners:
  - name: outbound
    address: {{ socket_address: {{ address: 127.0.0.1, port_value: {port} }} }}
    filter_chains:
    - filters:
      - name: envoy.filters.network.http_connection_manager
        typed_config:
          \"@type\": type.googleapis.com/envoy.extensions.filters.network.http_connection_manager.v3.HttpConnectionManager
          stat_prefix: outbound
          route_config: {{ name: outbound, vhds: {{ config_source: {source} }} }}
          http_filters:
          - name: envoy.filters.http.on_demand
            typed_config:
              \"@type\": type.googleapis.com/envoy.extensions.filters.http.on_demand.v3.OnDemand
          - name: envoy.filters.http.router
            typed_config:
              \"@type\": type.googleapis.com/envoy.extensions.filters.http.router.v3.Router
"
            );
            let bootstrap = bootstrap.replace(listeners, "").replace(resources, &listener);
            // Without it they are not offered over ADS, where the others would have no use for them.
            let asks = if ads { "  metadata:\n    disco.virtual_hosts: true\n" } else { metadata };
            Ok(bootstrap.replace(metadata, asks))
        })
    }

    /// Starts one whose bootstrap is that of `disco envoy bootstrap` with these flags, edited; told the port on which it is to
    /// take calls.
    fn start_edited(
        disco: &Disco,
        flags: &[&str],
        edit: impl FnOnce(&str, u16) -> anyhow::Result<String>,
    ) -> anyhow::Result<Self> {
        let (admin_port, port) = (free_port()?, free_port()?);
        let mut command = disco.command()?;
        command.args(["envoy", "bootstrap", "--node-id", "edited"]).args(flags);
        command.args(["--admin-port", &admin_port.to_string(), "--outbound-port", &port.to_string()]);
        let bootstrap = String::from_utf8(command.output()?.stdout)?;
        let file = disco.folder().join("edited.yaml");
        std::fs::write(&file, edit(&bootstrap, port)?)?;

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

/// The source that is the service of the type asked for.
fn own_service(api: &str) -> String {
    format!(
        "{{ resource_api_version: V3, api_config_source: {{ api_type: {api}, transport_api_version: V3, \
         grpc_services: [ {{ envoy_grpc: {{ cluster_name: disco_servers }} }} ] }} }}"
    )
}
