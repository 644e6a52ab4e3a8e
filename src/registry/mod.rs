//! The only way in for writes from outside: register, renew, update, drain, deregister, and the leases that keep what is
//! registered.
//!
//! A write is committed to the store first and answered once it is durable and visible in the catalog. The catalog is a
//! mirror of the store, kept by one task here, also in processes that take no writes. Renewals touch neither: leases live in
//! the memory of one process, and start anew, whole, when it is another one, so that a restart never expires anybody.
//!
//! Nobody is removed in masses without evidence: where too many leases end at once, each instance is asked, and one that
//! does not refuse a connection is held: it stays as it is, marked as stale.

mod ask;
mod batch;
mod cache;
mod check;
mod error;
mod flaps;
mod forward;
mod guard;
mod health;
mod held;
mod history;
mod keeper;
mod leases;
mod leave;
mod live;
mod locks;
mod losses;
mod membership;
mod mirror;
mod record;
mod register;
mod services;
mod sessions;
#[cfg(test)]
mod sim;
mod snapshot;
#[cfg(test)]
mod tests;
mod write;

use std::{sync::Arc, time::Duration};

pub use cache::Cache;
pub use check::{health_to_proto, raw_check, verdict_from_proto};
pub use error::Error;
pub use forward::{FORWARDED, Forward, GrpcForward};
pub use guard::Guards;
pub use held::Released;
pub use history::{Entry, HistoryLimits, What};
pub use locks::{Board, Locks, lock_to_proto};
pub use membership::{Member, Membership};
pub use mirror::{Mirror, Patience};
pub use record::{instance_to_proto, lease_to_proto, live_to_proto};
pub use sessions::{Ended, Session};
pub use snapshot::{Restored, kept, restore};
pub use write::Accepted;

use crate::{
    catalog,
    model::{Instance, InstanceKey, Limits, Members},
    rt::Tasks,
    store::Store,
    telemetry::{Metrics, Stage},
};
use leases::Leases;
use tokio::sync::watch;

/// Settings of the registry.
#[derive(Debug, Clone)]
pub struct Config {
    /// Bounds on what may be registered.
    pub limits: Limits,
    /// How long an instance outlives a session whose connection fell silent, and one that was registered before a restart
    /// of Disco: the time its owner has to come back.
    pub session_grace: Duration,
    /// How long a service without instances stays known.
    pub empty_service_retention: Duration,
    /// When to doubt that instances are gone.
    pub guards: Guards,
    /// How much of what happened is kept.
    pub history: HistoryLimits,
}

impl Default for Config {
    fn default() -> Self {
        Self {
            limits: Limits::default(),
            session_grace: Duration::from_secs(10),
            empty_service_retention: Duration::from_secs(60 * 60),
            guards: Guards::default(),
            history: HistoryLimits::default(),
        }
    }
}

/// Handle to the registry. Cheap to clone.
#[derive(Debug, Clone)]
pub struct Registry {
    inner: Arc<Inner>,
    /// For whom this handle acts.
    by: Arc<str>,
}

#[derive(Debug)]
struct Inner {
    config: Config,
    store: Arc<dyn Store>,
    catalog: catalog::Reader,
    members: watch::Receiver<Members>,
    leases: Leases<InstanceKey>,
    door: leave::Door,
    network: Network,
    held: held::Held,
    flaps: flaps::Flaps,
    history: history::History,
    said: live::Said,
    metrics: RegistryMetrics,
    tasks: Tasks,
}

/// The way to others.
#[derive(Debug)]
struct Network {
    /// To instances that may be gone.
    ask: Arc<dyn ask::Ask>,
    /// To the other processes, if there are any.
    forward: Option<Arc<dyn Forward>>,
}

#[derive(Debug)]
struct RegistryMetrics {
    writes: prometheus_client::metrics::counter::Counter,
    stored: prometheus_client::metrics::histogram::Histogram,
    refused: prometheus_client::metrics::counter::Counter,
    renewals: prometheus_client::metrics::counter::Counter,
    expired: prometheus_client::metrics::counter::Counter,
    trips: prometheus_client::metrics::counter::Counter,
    published: prometheus_client::metrics::counter::Counter,
    dampings: prometheus_client::metrics::counter::Counter,
}

impl RegistryMetrics {
    fn new(metrics: &Metrics) -> Self {
        Self {
            writes: metrics.counter("registry_writes", "Accepted and durable changes"),
            stored: metrics.propagation(Stage::Stored),
            refused: metrics.counter("registry_refused", "Requests that were refused"),
            renewals: metrics.counter("registry_renewals", "Lease renewals"),
            published: metrics.counter("registry_published", "Live metadata that instances published"),
            dampings: metrics.counter(
                "registry_dampings",
                "New runs that were damped, because the instance comes and goes",
            ),
            expired: metrics.counter("registry_expired", "Instances removed because their lease ended"),
            trips: metrics.counter(
                "registry_guard_trips",
                "Times that too many instances of a service left to be believed",
            ),
        }
    }
}

impl Registry {
    /// Starts the tasks that keep the leases and the services of a catalog that a [`Mirror`] keeps. `members` are the
    /// processes with a registry over the same store, and `forward` the way to them.
    pub fn start(
        config: Config,
        store: Arc<dyn Store>,
        catalog: catalog::Reader,
        members: watch::Receiver<Members>,
        forward: Option<Arc<dyn Forward>>,
        metrics: &Metrics,
        tasks: &Tasks,
    ) -> Self {
        let network = Network { ask: Arc::new(ask::Tcp), forward };
        Self::start_over(network, config, store, catalog, members, metrics, tasks)
    }

    fn start_over(
        network: Network,
        config: Config,
        store: Arc<dyn Store>,
        catalog: catalog::Reader,
        members: watch::Receiver<Members>,
        metrics: &Metrics,
        tasks: &Tasks,
    ) -> Self {
        let inner = Arc::new(Inner {
            leases: Leases::new(config.session_grace),
            door: leave::Door::new(config.guards.clone()),
            network,
            held: held::Held::default(),
            flaps: flaps::Flaps::new(&config.guards),
            history: history::History::new(config.history.clone()),
            said: live::Said::default(),
            config,
            store,
            catalog,
            members,
            metrics: RegistryMetrics::new(metrics),
            tasks: tasks.clone(),
        });
        let known = inner.catalog.latest();
        inner.leases.reserve(known.instances());
        inner.settle_all(&known);
        metrics.collect(held::KeptMetrics(inner.catalog.clone()));

        let registry = Self { inner, by: "disco".into() };
        tasks.spawn_until_shutdown("lease-keeper", registry.clone().keep_leases(known));
        tasks.spawn_until_shutdown("lease-expiry", registry.clone().expire());
        tasks.spawn_until_shutdown("held-instances", registry.clone().ask_held());
        tasks.spawn_until_shutdown("damped-instances", registry.clone().undamp_in_time());
        tasks.spawn_until_shutdown("renewed-instances", registry.clone().free_renewed());
        tasks.spawn_until_shutdown("history", registry.clone().prune_history());
        tasks.spawn_until_shutdown("live-metadata", registry.clone().store_live());
        tasks.spawn_until_shutdown("empty-services", registry.clone().retire_empty_services());
        registry
    }

    /// A handle whose changes the history ascribes to `by`, such as the address of a caller.
    #[must_use]
    pub fn called_by(&self, by: impl Into<Arc<str>>) -> Self {
        Self { inner: Arc::clone(&self.inner), by: by.into() }
    }

    /// What is registered.
    pub fn catalog(&self) -> &catalog::Reader {
        &self.inner.catalog
    }

    /// Whether nobody holds the instance's lease any more, so that it ends after the grace unless its owner comes back. Only
    /// the process that counts the lease knows.
    pub fn is_abandoned(&self, instance: &Instance) -> bool {
        self.inner.keeps(instance) && self.inner.leases.abandoned(&instance.key)
    }

    /// Returns when the other processes count this one as dead: what it holds is theirs, and who is connected to it has to go
    /// to one of them.
    pub async fn left(&self) {
        let mut members = self.inner.members.clone();
        if members.wait_for(|members| !members.is_member()).await.is_err() {
            std::future::pending::<()>().await;
        }
    }

    /// Bounds on what may be registered.
    pub fn limits(&self) -> &Limits {
        &self.inner.config.limits
    }
}
