//! The only way in for writes from outside: register, renew, update, drain, deregister, and the leases that keep what is
//! registered.
//!
//! A write is committed to the store first and answered once it is durable and visible in the catalog. The catalog is a
//! mirror of the store, kept by one task here. Renewals touch neither: leases live in memory, and start anew, whole, when
//! the process does, so that a restart never expires anybody.
//!
//! Nobody is removed in masses without evidence: where too many leases end at once, each instance is asked, and one that
//! does not refuse a connection is held: it stays as it is, marked as stale.

mod ask;
mod batch;
mod error;
mod guard;
#[cfg(test)]
mod guard_tests;
mod held;
mod leases;
mod leave;
mod mirror;
mod record;
mod sessions;
#[cfg(test)]
mod tests;
mod write;

use std::{sync::Arc, time::Duration};

pub use error::Error;
pub use guard::Guards;
pub use record::{instance_to_proto, lease_to_proto};
pub use sessions::{Ended, Session};
pub use write::Accepted;

use crate::{
    catalog,
    model::{InstanceKey, Limits},
    rt::{Gate, Tasks},
    store::Store,
    telemetry::{Metrics, Stage},
};
use leases::Leases;

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
}

impl Default for Config {
    fn default() -> Self {
        Self {
            limits: Limits::default(),
            session_grace: Duration::from_secs(10),
            empty_service_retention: Duration::from_secs(60 * 60),
            guards: Guards::default(),
        }
    }
}

/// Handle to the registry. Cheap to clone.
#[derive(Debug, Clone)]
pub struct Registry {
    inner: Arc<Inner>,
}

#[derive(Debug)]
struct Inner {
    config: Config,
    store: Arc<dyn Store>,
    catalog: catalog::Reader,
    leases: Leases,
    door: leave::Door,
    held: held::Held,
    metrics: RegistryMetrics,
    tasks: Tasks,
}

#[derive(Debug)]
struct RegistryMetrics {
    writes: prometheus_client::metrics::counter::Counter,
    stored: prometheus_client::metrics::histogram::Histogram,
    refused: prometheus_client::metrics::counter::Counter,
    renewals: prometheus_client::metrics::counter::Counter,
    expired: prometheus_client::metrics::counter::Counter,
    trips: prometheus_client::metrics::counter::Counter,
}

impl RegistryMetrics {
    fn new(metrics: &Metrics) -> Self {
        Self {
            writes: metrics.counter("registry_writes", "Accepted and durable changes"),
            stored: metrics.propagation(Stage::Stored),
            refused: metrics.counter("registry_refused", "Requests that were refused"),
            renewals: metrics.counter("registry_renewals", "Lease renewals"),
            expired: metrics.counter("registry_expired", "Instances removed because their lease ended"),
            trips: metrics.counter(
                "registry_guard_trips",
                "Times that too many instances of a service left to be believed",
            ),
        }
    }
}

impl Registry {
    /// Reads the store into the catalog and starts the tasks that keep the catalog, the leases and the services; `synced`
    /// opens when the catalog holds everything.
    ///
    /// # Errors
    /// When the store cannot be read, or holds a record that this version does not understand.
    pub async fn start(
        config: Config,
        store: Arc<dyn Store>,
        writer: catalog::Writer,
        catalog: catalog::Reader,
        metrics: &Metrics,
        tasks: &Tasks,
        synced: Gate,
    ) -> Result<Self, Error> {
        let inner = Arc::new(Inner {
            leases: Leases::new(config.session_grace),
            door: leave::Door::new(config.guards.clone()),
            held: held::Held::default(),
            config,
            store: Arc::clone(&store),
            catalog,
            metrics: RegistryMetrics::new(metrics),
            tasks: tasks.clone(),
        });
        let mirror = mirror::Mirror::load(store, writer, inner.catalog.clone()).await?;
        for service in inner.catalog.latest().services() {
            // Stale ones had no lease before either.
            for instance in service.instances().filter(|instance| instance.stale.is_none()) {
                inner.leases.hold_after_restart(instance, tokio::time::Instant::now());
            }
        }
        metrics.collect(held::HeldMetric(inner.catalog.clone()));
        synced.open();

        tasks.spawn_until_shutdown("catalog-mirror", mirror.run());
        let registry = Self { inner };
        tasks.spawn_until_shutdown("lease-expiry", registry.clone().expire());
        tasks.spawn_until_shutdown("held-instances", registry.clone().ask_held());
        tasks.spawn_until_shutdown("renewed-instances", registry.clone().free_renewed());
        tasks.spawn_until_shutdown("empty-services", registry.clone().retire_empty_services());
        Ok(registry)
    }

    /// What is registered.
    pub fn catalog(&self) -> &catalog::Reader {
        &self.inner.catalog
    }

    /// Whether nobody holds the instance's lease any more, so that it ends after the grace unless its owner comes back.
    pub fn is_abandoned(&self, key: &InstanceKey) -> bool {
        self.inner.leases.abandoned(key)
    }

    /// Bounds on what may be registered.
    pub fn limits(&self) -> &Limits {
        &self.inner.config.limits
    }
}
