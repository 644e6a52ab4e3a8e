//! What a registration makes of what is there.

use std::sync::Arc;

use tokio::time::Instant;

use super::{Accepted, Error, Inner, Registry, leases::Holder, write::Decision};
use crate::{
    catalog::Snapshot,
    model::{Group, Health, Incarnation, Instance, Lease, Registration, Revision, ServiceId, State},
    rt,
};

impl Registry {
    /// Registers an instance or, where it is registered, updates and renews it. Its lease is the registration's TTL.
    ///
    /// # Errors
    /// [`Error::Conflict`] when another incarnation, or a session, holds the id; [`Error::Limit`]; [`Error::Store`].
    pub async fn register(&self, registration: Registration) -> Result<Accepted, Error> {
        let holder = Holder::Ttl(registration.ttl);
        let snapshot = self.inner.catalog.latest();
        if let Some(present) =
            snapshot.instance(&registration.key).filter(|present| !self.inner.keeps(present))
        {
            self.inner.member()?;
            let next = merge(&registration, Some(present), holder);
            if let Some(accepted) = self.register_there(&next).await {
                self.inner.metrics.renewals.inc();
                return Ok(accepted);
            }
        }
        self.register_held(registration, holder).await
    }

    pub(super) async fn register_held(
        &self,
        registration: Registration,
        holder: Holder,
    ) -> Result<Accepted, Error> {
        let (inner, by) = (Arc::clone(&self.inner), Arc::clone(&self.by));
        self.count(self.detached(async move { inner.register(registration, holder, &by).await }).await)
    }
}

impl Inner {
    async fn register(
        &self,
        registration: Registration,
        holder: Holder,
        by: &str,
    ) -> Result<Accepted, Error> {
        let key = registration.key.clone();
        let own = self.member()?;
        let accepted = self
            .write(&key, by, |present| {
                self.admit(&registration, present)?;
                let mut next = merge(&registration, present, holder);
                next.owner = Some(own.clone());
                let Some(present) = present.filter(|present| present.incarnation == next.incarnation) else {
                    next.damped = self.damping(&self.catalog.latest(), &key);
                    return Ok(Decision::Put(next.into()));
                };
                // The lease comes before the write, so that a removal under way sees it or loses to the write. Where the old
                // lease was over there has to be a write for it to lose to.
                let held = self.leases.hold(key.clone(), next.incarnation, holder, Instant::now());
                next.revision = present.revision;
                Ok(if held && next == **present {
                    Decision::Keep(Arc::clone(present))
                } else {
                    Decision::Put(next.into())
                })
            })
            .await?;
        self.leases.hold(key, accepted.instance.incarnation, holder, Instant::now());
        Ok(accepted)
    }

    /// Whether the registration may replace what is there.
    fn admit(&self, registration: &Registration, present: Option<&Arc<Instance>>) -> Result<(), Error> {
        let limits = &self.config.limits;
        let Some(present) = present else {
            let snapshot = self.catalog.latest();
            match snapshot.service(&registration.key.service) {
                Some(service) if service.instances().len() >= limits.instances_per_service => {
                    return Err(Error::limit(
                        "service",
                        format!(
                            "{} has {} instances, the most that one service may have; limits.instances_per_service raises it",
                            service.id, limits.instances_per_service
                        ),
                    ));
                }
                None if is_group(&snapshot, &registration.key.service) => {
                    return Err(Error::conflict(
                        "service",
                        format!(
                            "{} stands for some of the instances of a replicated service: choose another name or namespace",
                            registration.key.service
                        ),
                    ));
                }
                None if snapshot.services().len() >= limits.services => {
                    return Err(Error::limit(
                        "service",
                        format!(
                            "there are {} services, the most that there may be; limits.services raises it",
                            limits.services
                        ),
                    ));
                }
                _ => return Ok(()),
            }
        };
        let moved = (registration.address, registration.port) != (present.address, present.port);
        let abandoned = self.keeps(present) && self.leases.abandoned(&present.key);
        match following(registration, Some(present)) {
            None if present.lease == Lease::Session && !abandoned => Err(Error::conflict(
                "incarnation",
                format!(
                    "instance {} is held by a session (incarnation {}): change it with an update, or use another id",
                    present.key, present.incarnation
                ),
            )),
            Some(given) if given < present.incarnation => Err(Error::conflict(
                "incarnation",
                format!(
                    "{given} is older than incarnation {} of instance {}, which replaced it: use another id, or start anew",
                    present.incarnation, present.key
                ),
            )),
            // A later run at the same address is a restart: two processes cannot hold one port. Anywhere else it is a
            // second process that was given the same id.
            Some(given) if given > present.incarnation && moved && !abandoned => {
                if let Some(owner) = present.owner.as_ref().filter(|_| !self.keeps(present)) {
                    return Err(Error::Elsewhere { key: present.key.clone(), owner: owner.clone() });
                }
                Err(Error::conflict(
                    "incarnation",
                    format!(
                        "instance {} is alive at {}:{} as incarnation {}: give this one another id, or deregister that one first",
                        present.key, present.address, present.port, present.incarnation
                    ),
                ))
            }
            _ => Ok(()),
        }
    }
}

/// Which run it is. A new one follows the present one, also where the clock that it was numbered by went back.
fn following(registration: &Registration, present: Option<&Arc<Instance>>) -> Option<Incarnation> {
    let given = registration.incarnation;
    let before = present.map(|present| present.incarnation);
    match before {
        Some(before) if registration.new_run && given.is_some_and(|given| given < before) => {
            Some(Incarnation(before.0.saturating_add(1)))
        }
        _ => given,
    }
}

/// What the instance is after the registration. The same run keeps its state: a renewal does not end a drain.
fn merge(registration: &Registration, present: Option<&Arc<Instance>>, holder: Holder) -> Instance {
    let Registration {
        key,
        incarnation: _,
        new_run: _,
        address,
        port,
        locality,
        weight,
        metadata,
        ttl,
        check,
    } = registration.clone();
    let incarnation = following(registration, present);
    let now = rt::now();
    let by_clock = || {
        let since_epoch = now.duration_since(std::time::UNIX_EPOCH).unwrap_or_default();
        Incarnation(u64::try_from(since_epoch.as_millis()).unwrap_or(u64::MAX))
    };
    let same_run =
        present.filter(|present| incarnation.is_none() || incarnation == Some(present.incarnation));
    let registered_at = same_run.map_or(now, |present| present.registered_at);
    let health = match (&check, same_run) {
        (None, _) => Health::unchecked(registered_at),
        // Also under another check: what is known stands until that one says something else.
        (Some(_), Some(present)) if present.check.is_some() => present.health.clone(),
        // Proxies know of it.
        (Some(check), Some(_)) => Health { passed: true, ..Health::first(check, now) },
        (Some(check), None) => Health::first(check, now),
    };
    Instance {
        key,
        incarnation: same_run
            .map_or_else(|| incarnation.unwrap_or_else(by_clock), |present| present.incarnation),
        address,
        port,
        locality,
        weight,
        metadata,
        state: same_run.map_or(State::Serving, |present| present.state),
        lease: match holder {
            Holder::Ttl(_) => Lease::Ttl(ttl),
            Holder::Session(_) | Holder::Nobody => Lease::Session,
        },
        owner: None,
        revision: Revision::default(),
        registered_at,
        check: check.map(Arc::new),
        health,
        // Its owner vouches for it.
        stale: None,
        damped: same_run.and_then(|present| present.damped.clone()),
    }
}

/// Whether callers know some of the instances of another service by this name, such as `db.leader`: who took it would be sent what is
/// meant for them.
fn is_group(snapshot: &Snapshot, id: &ServiceId) -> bool {
    let group = Group::parse(id.as_str());
    group.and_then(|(of, _)| snapshot.service(&of)?.roles.as_ref()).is_some()
}
