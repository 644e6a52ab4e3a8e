//! The configuration: as written in YAML, then as checked.
//!
//! [`Config::load`] reads a file and reports every problem at once, with line and column; a [`Config`] that exists is
//! right. `app` hands each room its part; no room reads this one.

mod check;
mod problem;
mod show;
mod store;
#[cfg(test)]
mod tests;
mod yaml;

use std::{
    collections::BTreeSet,
    fmt,
    fs::File,
    io::{self, Read as _},
    net::{IpAddr, Ipv4Addr, SocketAddr},
    path::{Path, PathBuf},
    time::Duration,
};

pub use crate::{
    registry::{Guards, HistoryLimits},
    telemetry::LogFormat,
};
pub use problem::ConfigError;

use crate::{
    model::{self, MemberId},
    store::EtcdConfig,
    xds::ResourceType,
};

/// What one process does. It runs nothing that it was not told to.
#[derive(Debug, Clone, PartialEq)]
pub struct Config {
    /// What this process is called among those that share its store, where the default does not do: `disco` when it has its
    /// store to itself.
    pub node: Option<MemberId>,
    /// The parts that run; never empty.
    pub roles: BTreeSet<Role>,
    /// Where it listens.
    pub listen: Listen,
    /// Whether it may listen beyond loopback without TLS and authentication.
    pub insecure: bool,
    /// Where accepted writes are kept.
    pub store: Store,
    /// Where it keeps what it could do without, such as the copy of what is registered that it serves while etcd is away.
    pub data_dir: PathBuf,
    /// Bounds on what clients may ask for.
    pub limits: Limits,
    /// How it ends.
    pub shutdown: Shutdown,
    /// What it logs.
    pub log: Log,
    /// The registry.
    pub registry: Registry,
    /// Health checks by this server.
    pub health: Health,
    /// When to doubt that instances are gone.
    pub guards: Guards,
    /// How much of what happened is kept.
    pub history: HistoryLimits,
    /// The xDS server.
    pub xds: Xds,
}

/// A part of Disco that a process may run.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Role {
    /// Takes registrations, leases and drains.
    Registry,
    /// Checks the health of instances.
    Discovery,
    /// Serves proxies.
    Xds,
    /// The HTTP API, metrics and health.
    Admin,
}

impl Role {
    /// All that this version has.
    pub const ALL: [Self; 4] = [Self::Registry, Self::Discovery, Self::Xds, Self::Admin];

    /// The name that the configuration uses.
    pub fn name(self) -> &'static str {
        match self {
            Self::Registry => "registry",
            Self::Discovery => "discovery",
            Self::Xds => "xds",
            Self::Admin => "admin",
        }
    }

    /// What it does, in a few words.
    pub fn does(self) -> &'static str {
        match self {
            Self::Registry => "takes registrations, leases and drains",
            Self::Discovery => "checks the health of instances that ask for it",
            Self::Xds => "serves proxies over ADS",
            Self::Admin => "HTTP API, metrics, health",
        }
    }
}

impl fmt::Display for Role {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.name())
    }
}

/// Where the process listens. Port 0 means any free one.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Listen {
    /// xDS, registry, health, reflection.
    pub grpc: SocketAddr,
    /// HTTP API, metrics.
    pub http: SocketAddr,
    /// Where the other processes that share the store reach gRPC, when that is not `grpc`.
    pub advertise: Option<SocketAddr>,
}

impl Default for Listen {
    fn default() -> Self {
        let loopback = |port| SocketAddr::new(IpAddr::V4(Ipv4Addr::LOCALHOST), port);
        Self { grpc: loopback(18000), http: loopback(18080), advertise: None }
    }
}

/// Where accepted writes are kept.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Store {
    /// Nowhere: gone with the process.
    Memory,
    /// In files of this process.
    File {
        /// Their directory; made when it is missing.
        dir: PathBuf,
        /// Whether to start although the middle of a file is damaged, without what is behind the damage.
        accept_loss: bool,
    },
    /// In an etcd cluster, shared with other processes.
    Etcd(EtcdConfig),
}

/// Bounds on what clients may ask for.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Limits {
    /// On registrations.
    pub registration: model::Limits,
    /// Largest body of an HTTP request in bytes.
    pub body: usize,
    /// Largest xDS request in bytes.
    pub xds_request: usize,
    /// Most resource names that one stream may subscribe to.
    pub names_per_stream: usize,
    /// Longest resource name in bytes.
    pub name_bytes: usize,
    /// gRPC connections at the same time; further ones are turned away.
    pub grpc_connections: usize,
    /// HTTP connections at the same time; further ones are turned away.
    pub http_connections: usize,
    /// HTTP requests that are worked on, or wait, at the same time; further ones are turned away.
    pub http_requests: usize,
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            registration: model::Limits::default(),
            body: 1 << 20,
            xds_request: 64 << 20,
            names_per_stream: 200_000,
            name_bytes: 2048,
            grpc_connections: 100_000,
            http_connections: 20_000,
            http_requests: 10_000,
        }
    }
}

/// How the process ends.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Shutdown {
    /// How long streams and requests may take to finish.
    pub drain: Duration,
}

impl Default for Shutdown {
    fn default() -> Self {
        Self { drain: Duration::from_secs(10) }
    }
}

/// What the process logs.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Log {
    /// Levels by module, e.g. `info,disco::xds=debug`.
    pub filter: String,
    /// How lines are written.
    pub format: LogFormat,
}

impl Default for Log {
    fn default() -> Self {
        Self { filter: "info".into(), format: LogFormat::Text }
    }
}

/// Settings of the registry.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Registry {
    /// How long the instances of a session that broke off stay, for their owner to come back.
    pub session_grace: Duration,
    /// How long a service without instances stays known.
    pub empty_service_retention: Duration,
}

impl Default for Registry {
    fn default() -> Self {
        Self { session_grace: Duration::from_secs(10), empty_service_retention: Duration::from_secs(60 * 60) }
    }
}

/// Settings of the health checks.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Health {
    /// Checks under way at the same time.
    pub concurrency: usize,
    /// When nothing comes back from so many percent of the machines, silence makes no instance unhealthy.
    pub suspend_share: u8,
}

impl Default for Health {
    fn default() -> Self {
        Self { concurrency: 512, suspend_share: 50 }
    }
}

/// Settings of the xDS server.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Xds {
    /// How long the answer to a response is waited for before the next one is sent all the same.
    pub ack_timeout: Duration,
    /// How long listeners and routes wait for clusters to warm.
    pub warming_timeout: Duration,
    /// How long after a reconnect a removed cluster is kept while the proxy has not asked for its listeners and routes.
    pub reconnect_grace: Duration,
    /// How long a new stream may take to send its first request.
    pub first_request_timeout: Duration,
    /// How often clients are asked to report the calls that they make.
    pub load_report_interval: Duration,
    /// Streams at the same time; further ones are turned away.
    pub streams: usize,
    /// About how old a connection may get before its streams are to move to another one, maybe of another server; `None` for
    /// as old as it likes.
    pub max_connection_age: Option<Duration>,
    /// Types that are sent anew to a proxy that reconnects, whatever it says that it holds.
    pub resend_on_reconnect: Vec<ResourceType>,
    /// From so many instances on, a service's endpoints go to delta Envoys one by one (LEDS); 0 for never.
    pub leds_from: usize,
}

impl Default for Xds {
    fn default() -> Self {
        Self {
            ack_timeout: Duration::from_secs(60),
            warming_timeout: Duration::from_secs(20),
            reconnect_grace: Duration::from_secs(5),
            first_request_timeout: Duration::from_secs(30),
            load_report_interval: Duration::from_secs(10),
            streams: 50_000,
            max_connection_age: None,
            resend_on_reconnect: Vec::new(),
            leds_from: 1000,
        }
    }
}

/// What the command line says over the file.
#[derive(Debug, Clone, Default)]
pub struct Overrides {
    /// Over `listen.grpc`.
    pub grpc: Option<SocketAddr>,
    /// Over `listen.http`.
    pub http: Option<SocketAddr>,
    /// Over `store`: the directory of a file store.
    pub data: Option<PathBuf>,
    /// Sets `store.file.accept_loss`.
    pub accept_loss: bool,
    /// Over `log.filter`.
    pub log: Option<String>,
    /// Sets `insecure`.
    pub insecure: bool,
}

impl Default for Config {
    /// All roles, everything else as it is when a file does not say.
    fn default() -> Self {
        Self {
            node: None,
            roles: Role::ALL.into(),
            listen: Listen::default(),
            insecure: false,
            store: Store::File { dir: check::DEFAULT_DIR.into(), accept_loss: false },
            data_dir: check::DEFAULT_DIR.into(),
            limits: Limits::default(),
            shutdown: Shutdown::default(),
            log: Log::default(),
            registry: Registry::default(),
            health: Health::default(),
            guards: Guards::default(),
            history: HistoryLimits::default(),
            xds: Xds::default(),
        }
    }
}

impl Config {
    /// What `disco dev` runs: all roles on loopback, the store in memory unless `overrides` names a directory.
    ///
    /// # Errors
    /// The overrides are wrong, e.g. they listen beyond loopback without saying `insecure`.
    pub fn dev(overrides: &Overrides) -> Result<Self, ConfigError> {
        check::finish(Self { store: Store::Memory, ..Self::default() }, overrides)
    }

    /// Reads and checks a file.
    ///
    /// # Errors
    /// The file cannot be read, or everything that is wrong with it.
    pub fn load(path: &Path, overrides: &Overrides) -> Result<Self, ConfigError> {
        let name = path.display().to_string();
        let text = read(path)
            .map_err(|error| ConfigError::Unreadable { file: name.clone(), reason: error.to_string() })?;
        Self::parse(&name, &text, overrides)
    }

    /// Reads and checks the text of a file; `file` names it in problems.
    ///
    /// # Errors
    /// Everything that is wrong with it.
    pub fn parse(file: &str, text: &str, overrides: &Overrides) -> Result<Self, ConfigError> {
        check::parse(file, text, overrides)
    }

    /// The configuration as a file that says everything, also what was left to its default.
    pub fn to_yaml(&self) -> String {
        show::yaml(self)
    }
}

/// A configuration is small; a file that is not would only cost memory.
const LARGEST: u64 = 1 << 20;

fn read(path: &Path) -> io::Result<String> {
    let mut text = String::new();
    File::open(path)?.take(LARGEST + 1).read_to_string(&mut text)?;
    if text.len() as u64 > LARGEST {
        return Err(io::Error::other("it is larger than 1 MiB"));
    }
    Ok(text)
}
