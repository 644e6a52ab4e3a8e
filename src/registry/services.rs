//! Services without instances: removed when somebody asks, or after a time.

use std::{collections::BTreeMap, sync::Arc, time::Duration};

use tokio::time::Instant;

use super::{Error, Inner, Registry, record, write::ATTEMPTS};
use crate::{
    model::{Revision, ServiceId},
    store::{Condition, Op},
};

impl Registry {
    /// Removes a service that has no instances.
    ///
    /// # Errors
    /// [`Error::NoService`]; [`Error::Conflict`] while it has instances; [`Error::Store`].
    pub async fn remove_service(&self, id: ServiceId) -> Result<Revision, Error> {
        let inner = Arc::clone(&self.inner);
        self.count(self.detached(async move { inner.remove_service(&id).await }).await)
    }

    /// Forgets services that have had no instance for long.
    pub(super) async fn retire_empty_services(self) {
        let retention = self.inner.config.empty_service_retention;
        let mut empty_since: BTreeMap<ServiceId, Instant> = BTreeMap::new();
        let mut turns = tokio::time::interval((retention / 10).max(Duration::from_secs(1)));
        loop {
            let now = turns.tick().await;
            if !self.inner.members.borrow().is_mine("empty-services") {
                empty_since.clear();
                continue;
            }
            let snapshot = self.inner.catalog.latest();
            let empty = |id: &ServiceId| {
                snapshot.service(id).is_some_and(|s| s.instances().len() == 0 && s.roles.is_none())
            };
            empty_since.retain(|id, _| empty(id));
            for service in snapshot.services().filter(|service| empty(&service.id)) {
                let since = *empty_since.entry(service.id.clone()).or_insert(now);
                if now - since < retention {
                    continue;
                }
                match self.inner.remove_service(&service.id).await {
                    Ok(revision) => {
                        tracing::info!(service = %service.id, %revision, "forgotten: it has had no instance for long")
                    }
                    Err(error) => tracing::debug!(service = %service.id, %error, "an empty service stays"),
                }
            }
        }
    }
}

impl Inner {
    async fn remove_service(&self, id: &ServiceId) -> Result<Revision, Error> {
        let unknown = || Error::NoService(id.clone());
        let key = record::service_key(id);
        for _ in 0..ATTEMPTS {
            // Before the look at its instances: one that is registered after that look writes the service, too.
            let entry = self.store.get(&key).await.map_err(Error::Store)?.ok_or_else(unknown)?;
            self.catalog.reached(entry.revision).await;
            let snapshot = self.catalog.latest();
            let service = snapshot.service(id).ok_or_else(unknown)?;
            if service.roles.is_some() {
                let message = format!("{id} is replicated and has roles: remove its peer set first");
                return Err(Error::conflict("service", message));
            }
            let instances = service.instances().len();
            if instances > 0 {
                let noun = if instances == 1 { "instance" } else { "instances" };
                return Err(Error::conflict(
                    "service",
                    format!("{id} has {instances} {noun}: deregister what is left first"),
                ));
            }
            let op = Op::Delete { key: Arc::clone(&key), when: Condition::Unchanged(entry.revision) };
            match self.commit(vec![op], snapshot.revision()).await {
                Ok(revision) => return Ok(revision),
                Err(Some(error)) => return Err(error),
                Err(None) => {}
            }
        }
        Err(Error::conflict("service", format!("{id} is being written by many at once: try again")))
    }
}
