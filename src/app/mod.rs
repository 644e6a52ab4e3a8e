//! The composition root: builds the rooms, starts their tasks, and owns the order of start-up and shutdown.
//!
//! Start: store, catalog and registry (everything read back), views, then the listeners. Shutdown: not ready any more; stop
//! accepting and end streams (proxies and owners go to another server); wait for what is under way; stop the tasks; flush
//! the store.

mod listen;
mod loads;
mod observe;
mod settings;
mod views;

use std::{net::SocketAddr, sync::Arc, time::Duration};

use tokio::{
    net::TcpListener,
    signal::unix::{SignalKind, signal},
    sync::{Mutex, mpsc},
};
use tonic::service::RoutesBuilder;

use crate::{
    api::Api,
    catalog,
    config::{Config, Role, Store as StoreConfig},
    registry::{self, Registry},
    rt::{Readiness, Shutdown, Tasks},
    store::{self, FileStore, MemoryStore, Store},
    telemetry::{LogFilter, Metrics},
    xds::{AdsServer, LoadReports, Loads, Proxies},
};
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
    #[error(
        "cannot listen on {address} ({field}): {source}; choose another port there, or 0 for any free one"
    )]
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
    /// What the store holds cannot be read.
    #[error("the registry cannot start: {0}")]
    Registry(#[from] registry::Error),
    /// The log filter is wrong.
    #[error("log.filter {0}")]
    Log(String),
    /// A server ended by itself.
    #[error("the {name} server ended: {reason}")]
    Server {
        /// Which.
        name: &'static str,
        /// Why.
        reason: String,
    },
    /// Signals cannot be listened to.
    #[error("signals cannot be listened to: {0}")]
    Signals(std::io::Error),
}

/// Runs until SIGTERM or SIGINT, or until something fails that it cannot run without. `ready` is called once, when the
/// process serves.
///
/// # Errors
/// When it could not start, or a server ended by itself.
pub async fn run(config: Config, ready: impl FnOnce(&Addresses)) -> Result<(), Error> {
    let log = LogFilter::start(&config.log.filter, config.log.format).map_err(Error::Log)?;
    listen::raise_descriptor_limit();
    let mut terminate = signal(SignalKind::terminate()).map_err(Error::Signals)?;
    let mut interrupt = signal(SignalKind::interrupt()).map_err(Error::Signals)?;

    let running = Running::start(&config, log).await?;
    ready(&running.addresses);
    let result = tokio::select! {
        _ = terminate.recv() => Ok(()),
        _ = interrupt.recv() => Ok(()),
        error = running.failed() => Err(error),
    };
    running.stop(config.shutdown.drain).await;
    result
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
    failures: Mutex<mpsc::Receiver<Error>>,
}

impl Running {
    async fn start(config: &Config, log: LogFilter) -> Result<Self, Error> {
        let (edges, core) = (Tasks::new(Shutdown::default()), Tasks::new(Shutdown::default()));
        let (readiness, metrics) = (Readiness::default(), Metrics::default());
        let (synced, listening) = (readiness.gate("registry"), readiness.gate("listeners"));

        // Bound before the store is read: a port that is taken should not cost a restart its wait, and connections that
        // come meanwhile wait in the backlog.
        let has = |role| config.roles.contains(&role);
        let grpc = listen::bind("listen.grpc", config.listen.grpc, has(Role::Registry) || has(Role::Xds))?;
        let http = listen::bind("listen.http", config.listen.http, has(Role::Admin))?;
        let address = |listener: &Option<TcpListener>| listener.as_ref().and_then(|l| l.local_addr().ok());
        let addresses = Addresses { grpc: address(&grpc), http: address(&http) };

        let store = open_store(&config.store, &metrics)?;
        let (writer, reader) = catalog::catalog();
        let registry = Registry::start(
            settings::registry(config),
            Arc::clone(&store),
            writer,
            reader.clone(),
            &metrics,
            &core,
            synced,
        )
        .await?;

        let proxies = Proxies::default();
        let loads = Loads::new(config.xds.load_report_interval);
        let load_reports = has(Role::Xds).then(|| {
            let known = Arc::new(loads::Known(reader.clone()));
            LoadReports::new(loads.clone(), known, settings::xds(config), edges.clone()).service()
        });
        let ads = has(Role::Xds).then(|| {
            let views = Arc::new(Views::new(reader, proxies.clone(), core.clone(), &metrics));
            let observer = Arc::new(observe::StreamMetrics::new(&metrics));
            AdsServer::observed(views, proxies.clone(), settings::xds(config), edges.clone(), observer)
        });
        let api = Api {
            config: Arc::new(settings::api(config)),
            registry,
            proxies,
            loads,
            readiness: readiness.clone(),
            metrics,
            log,
            tasks: edges.clone(),
        };

        let (failed, failures) = mpsc::channel(1);
        if let Some(listener) = grpc {
            let (health, health_service) = tonic_health::server::health_reporter();
            listen::follow_readiness(health, readiness.clone(), &edges);
            let mut routes = RoutesBuilder::default();
            routes.add_service(health_service).add_service(listen::reflection());
            if let Some(ads) = ads {
                ads.add_to(&mut routes);
                routes.add_service(api.client_status_service());
            }
            if let Some(load_reports) = load_reports {
                routes.add_service(load_reports);
            }
            if has(Role::Registry) {
                routes.add_service(api.registry_service());
            }
            routes.add_service(api.proxies_service());
            listen::serve_grpc(listener, routes.routes(), &edges, failed);
        }
        if let Some(listener) = http {
            listen::serve_http(listener, api.http(), &edges);
        }
        listening.open();
        let shown = |address: Option<SocketAddr>| address.map_or_else(|| "off".to_owned(), |a| a.to_string());
        tracing::info!(grpc = shown(addresses.grpc), http = shown(addresses.http), "serving");
        Ok(Self { addresses, readiness, edges, core, store, failures: Mutex::new(failures) })
    }

    /// Returns when a server ends by itself.
    async fn failed(&self) -> Error {
        match self.failures.lock().await.recv().await {
            Some(error) => error,
            None => std::future::pending().await,
        }
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
    }
}
