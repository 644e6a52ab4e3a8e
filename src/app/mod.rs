//! The composition root: builds the rooms, starts their tasks, and owns the order of start-up and shutdown.
//!
//! Start: store, catalog and registry (everything read back), views, then the listeners. Shutdown: not ready any more; stop
//! accepting and end streams (proxies and owners go to another server); wait for what is under way; stop the tasks; flush
//! the store.

mod incoming;
mod listen;
mod loads;
mod observe;
mod serve;
mod settings;
mod verdicts;
mod views;

use std::{convert::Infallible, net::SocketAddr, sync::Arc, time::Duration};

use tokio::{
    signal::unix::{SignalKind, signal},
    sync::watch,
};
use tonic::{server::NamedService, service::RoutesBuilder};

use crate::{
    api::{Api, SYNCED},
    catalog,
    config::{Config, Role, Store as StoreConfig},
    health::{Checker, Duty},
    model::Members,
    peers::{Peers, observe::Observer},
    registry::{self, Forward, GrpcForward, Locks, Membership, Mirror, Patience, Registry},
    rt::{Readiness, Shutdown, Tasks},
    store::{self, EtcdStore, FileStore, MemoryStore, Store},
    telemetry::{LogFilter, Metrics},
    xds::{AdsServer, LoadReports, Loads, Proxies},
};
use incoming::Incoming;
use views::Views;

/// Where the process listens.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Addresses {
    /// xDS, registry, health, reflection; if a role needs it.
    pub grpc: Option<SocketAddr>,
    /// HTTP API, metrics; if a role needs it.
    pub http: Option<SocketAddr>,
}

/// Why the process does not run.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// An address cannot be listened on.
    #[error("cannot listen on {address}: {source}; choose another port in {field}, or 0 for any free one")]
    Listen {
        /// The setting that names it.
        field: &'static str,
        /// The address.
        address: SocketAddr,
        /// What the system said.
        source: std::io::Error,
    },
    /// The store cannot be opened.
    #[error(transparent)]
    Store(#[from] store::OpenError),
    /// The store in etcd cannot be used.
    #[error(transparent)]
    Etcd(#[from] store::EtcdError),
    /// What the store holds cannot be read.
    #[error("the registry cannot start: {0}")]
    Registry(#[from] registry::Error),
    /// The log filter is wrong.
    #[error("log.filter {0}")]
    Log(String),
    /// Signals cannot be listened to.
    #[error("signals cannot be listened to: {0}")]
    Signals(std::io::Error),
}

/// Runs until SIGTERM or SIGINT. `ready` is called once, when the
/// process serves.
///
/// # Errors
/// When it could not start.
pub async fn run(config: Config, ready: impl FnOnce(&Addresses)) -> Result<(), Error> {
    let log = LogFilter::start(&config.log.filter, config.log.format).map_err(Error::Log)?;
    listen::raise_descriptor_limit();
    let mut terminate = signal(SignalKind::terminate()).map_err(Error::Signals)?;
    let mut interrupt = signal(SignalKind::interrupt()).map_err(Error::Signals)?;

    let running = Running::start(&config, log).await?;
    ready(&running.addresses);
    tokio::select! {
        _ = terminate.recv() => {}
        _ = interrupt.recv() => {}
    }
    running.stop(config.shutdown.drain).await;
    Ok(())
}

/// A process that serves.
struct Running {
    addresses: Addresses,
    readiness: Readiness,
    /// Tasks of the edges: they end first.
    edges: Tasks,
    /// Tasks behind them.
    core: Tasks,
    store: Arc<dyn Store>,
}

impl Running {
    async fn start(config: &Config, log: LogFilter) -> Result<Self, Error> {
        let (edges, core) = (Tasks::new(Shutdown::default()), Tasks::new(Shutdown::default()));
        let (readiness, metrics) = (Readiness::default(), Metrics::default());
        let listening = readiness.gate("listeners");

        // Bound before the store is read: a port that is taken should not cost a restart its wait, and connections that
        // come meanwhile wait in the backlog.
        let has = |role| config.roles.contains(&role);
        let grpc = listen::bind(
            "listen.grpc (--grpc-listen)",
            config.listen.grpc,
            has(Role::Registry) || has(Role::Xds),
        )?;
        let http = listen::bind("listen.http (--http-listen)", config.listen.http, has(Role::Admin))?;
        let address = |incoming: &Option<Incoming>| incoming.as_ref().and_then(Incoming::address);
        let addresses = Addresses { grpc: address(&grpc), http: address(&http) };

        let store = open_store(&config.store, &metrics)?;
        let (writer, reader) = catalog::catalog();
        let node = settings::node(config, &addresses);
        let mirror = Mirror::new(Arc::clone(&store), writer, reader.clone());
        let patience = match config.store {
            StoreConfig::Etcd(_) => Patience::Wait(Some(settings::copy(config, &node))),
            StoreConfig::Memory | StoreConfig::File { .. } => Patience::None,
        };
        mirror.start(patience, &core, readiness.gate(SYNCED)).await?;
        metrics.collect(observe::CatalogMetrics(reader.clone()));
        let nodes = match config.store {
            StoreConfig::Etcd(_) => {
                let me = settings::member(config, &addresses, node.clone());
                Some(Membership::start(Arc::clone(&store), me, &core))
            }
            StoreConfig::Memory | StoreConfig::File { .. } => None,
        };
        let members = |role: Role| match &nodes {
            Some(nodes) => nodes.with_role(role.name(), &core),
            None => watch::channel(Members::alone(node.clone())).1,
        };
        if nodes.is_some() && has(Role::Registry) {
            listen::follow_membership(members(Role::Registry), readiness.clone(), &core);
        }
        let locks = has(Role::Registry)
            .then(|| Locks::start(Arc::clone(&store), members(Role::Registry), &metrics, &core));
        let peers = has(Role::Registry).then(|| {
            let (store, catalog) = (Arc::clone(&store), reader.clone());
            let peers = Peers::start(store, catalog, members(Role::Registry), &metrics, &core);
            core.spawn_until_shutdown("observe", Observer::new(peers.clone(), core.clone()).run());
            peers
        });
        let registry = (has(Role::Registry) || has(Role::Discovery)).then(|| {
            let (store, catalog) = (Arc::clone(&store), reader.clone());
            let members = members(Role::Registry);
            let forward = nodes.clone().map(|nodes| Arc::new(GrpcForward::new(nodes)) as Arc<dyn Forward>);
            Registry::start(settings::registry(config), store, catalog, members, forward, &metrics, &core)
        });
        let checks = registry.clone().filter(|_| has(Role::Discovery)).map(|registry| {
            let (settings, duty) = (settings::health(config), Duty::new(members(Role::Discovery)));
            let verdicts = Arc::new(verdicts::Verdicts(registry));
            let checker = Checker::new(settings, reader.clone(), duty, verdicts, &metrics, &core);
            let checks = checker.monitor();
            core.spawn_until_shutdown("health-checks", checker.run());
            checks
        });

        let proxies = Proxies::default();
        let loads = Loads::new(config.xds.load_report_interval);
        let load_reports = has(Role::Xds).then(|| {
            let known = Arc::new(loads::Known(reader.clone()));
            LoadReports::new(loads.clone(), known, settings::xds(config), edges.clone()).service()
        });
        let ads = has(Role::Xds).then(|| {
            let views =
                Views::new(reader.clone(), proxies.clone(), core.clone(), &metrics, config.xds.leds_from);
            let views = Arc::new(views);
            let observer = Arc::new(observe::StreamMetrics::new(&metrics));
            AdsServer::observed(views, proxies.clone(), settings::xds(config), edges.clone(), observer)
        });
        let api = Api {
            config: Arc::new(settings::api(config)),
            catalog: reader,
            nodes,
            registry: registry.filter(|_| has(Role::Registry)),
            locks,
            peers,
            checks: checks.unwrap_or_default(),
            proxies,
            loads,
            readiness: readiness.clone(),
            metrics: metrics.clone(),
            log,
            tasks: edges.clone(),
        };

        if let Some(incoming) = grpc {
            let (health, health_service) = tonic_health::server::health_reporter();
            listen::follow_readiness(health, readiness.clone(), &edges);
            let mut services = Services::default();
            services.add(health_service);
            if let Some(ads) = ads {
                ads.add_to(&mut services.routes);
                services.names.extend(AdsServer::services());
                services.add(api.client_status_service());
            }
            if let Some(load_reports) = load_reports {
                services.add(load_reports);
            }
            if let Some(registry) = api.registry_service() {
                services.add(registry);
            }
            if let Some(locks) = api.locks_service() {
                services.add(locks);
            }
            if let Some(peers) = api.peers_service() {
                services.add(peers);
            }
            services.add(api.proxies_service());
            let reflection = listen::reflection(&services.names);
            services.routes.add_service(reflection);
            let routes = listen::when_synced(services.routes.routes(), readiness.clone());
            let door = serve::Door::grpc(incoming, config.limits.grpc_connections, &metrics);
            serve::grpc(door, routes, config.xds.max_connection_age, &metrics, &edges);
        }
        if let Some(incoming) = http {
            let door = serve::Door::http(incoming, config.limits.http_connections, &metrics);
            serve::http(door, api.http(), &edges);
        }
        listening.open();
        let shown = |address: Option<SocketAddr>| address.map_or_else(|| "off".to_owned(), |a| a.to_string());
        tracing::info!(grpc = shown(addresses.grpc), http = shown(addresses.http), "serving");
        Ok(Self { addresses, readiness, edges, core, store })
    }

    async fn stop(self, drain: Duration) {
        tracing::info!("shutting down");
        self.readiness.close("shutting down");
        self.edges.shutdown().start();
        let left = self.edges.join(drain).await;
        if left > 0 {
            tracing::warn!(
                tasks = left,
                ?drain,
                "shutdown.drain is over; what is still under way is cut off"
            );
        }
        self.core.shutdown().start();
        let left = self.core.join(drain).await;
        if left > 0 {
            tracing::warn!(tasks = left, "tasks did not end in time");
        }
        if let Err(error) = self.store.close().await {
            tracing::error!(%error, "the store did not close cleanly; what was answered is durable all the same");
        }
        tracing::info!("bye");
    }
}

/// The gRPC services of the process and their names.
#[derive(Debug, Default)]
struct Services {
    routes: RoutesBuilder,
    names: Vec<&'static str>,
}

impl Services {
    fn add<S>(&mut self, service: S)
    where
        S: tower::Service<http::Request<tonic::body::Body>, Error = Infallible>
            + NamedService
            + Clone
            + Send
            + Sync
            + 'static,
        S::Response: axum::response::IntoResponse,
        S::Future: Send + 'static,
    {
        self.names.push(S::NAME);
        self.routes.add_service(service);
    }
}

fn open_store(config: &StoreConfig, metrics: &Metrics) -> Result<Arc<dyn Store>, Error> {
    match config {
        StoreConfig::Memory => Ok(Arc::new(MemoryStore::default())),
        StoreConfig::File { dir, accept_loss } => {
            let settings = store::Config { accept_loss: *accept_loss, ..store::Config::default() };
            // What it found and cut it has logged itself.
            let (store, _) = FileStore::open(dir, settings)?;
            let store = Arc::new(store);
            metrics.collect(observe::StoreMetrics(Arc::clone(&store)));
            Ok(store)
        }
        StoreConfig::Etcd(settings) => Ok(Arc::new(EtcdStore::open(settings)?)),
    }
}
