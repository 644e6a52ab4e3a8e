use std::{future::Future, sync::Arc, time::Duration};

use tokio::{sync::oneshot, time::Instant};

use super::{Error, Inner, Registry, history::What, leases::Holder, record};
use crate::{
    model::{Incarnation, Instance, InstanceKey, Lease, MemberId, Revision, State, Update},
    store::{Condition, Op, StoreError},
};

/// A write that is durable and visible in the catalog.
#[derive(Debug, Clone)]
pub struct Accepted {
    /// The change. Where the request changed nothing, the one that last touched the instance.
    pub revision: Revision,
    /// What the instance is now.
    pub instance: Arc<Instance>,
}

/// A commit that lost a race is tried again on what the winner left. Each loss means that somebody else's write was
/// accepted, so this many in a row is a key that many writers fight for.
pub(super) const ATTEMPTS: usize = 16;

/// What a request makes of the present state of one instance.
pub(super) enum Decision {
    /// It is so already.
    Keep(Arc<Instance>),
    /// Write this.
    Put(Box<Instance>),
}

impl Registry {
    /// Extends a TTL lease. Returns the TTL and the present revision; a renewal makes none, unless another process has counted
    /// the lease so far and cannot be told.
    ///
    /// # Errors
    /// [`Error::NotFound`] when the owner must register again; [`Error::Conflict`] when it is not a TTL lease of that
    /// incarnation.
    pub async fn renew(
        &self,
        key: InstanceKey,
        incarnation: Option<Incarnation>,
    ) -> Result<(Duration, Revision), Error> {
        let counted = match self.inner.renew(&key, incarnation) {
            Some(counted) => counted,
            None => match self.renew_there(&key, incarnation).await {
                Some(renewed) => Ok(renewed),
                None => return self.renew_here(key, incarnation).await,
            },
        };
        self.count_renewal(counted)
    }

    /// As [`Registry::renew`], without telling another process: one that had it from there has told this one.
    ///
    /// # Errors
    /// As [`Registry::renew`].
    pub async fn renew_here(
        &self,
        key: InstanceKey,
        incarnation: Option<Incarnation>,
    ) -> Result<(Duration, Revision), Error> {
        let renewed = match self.inner.renew(&key, incarnation) {
            Some(renewed) => renewed,
            None => {
                let (inner, by) = (Arc::clone(&self.inner), Arc::clone(&self.by));
                self.detached(async move { inner.take_over(&key, incarnation, &by).await }).await
            }
        };
        self.count_renewal(renewed)
    }

    fn count_renewal<T>(&self, renewed: Result<T, Error>) -> Result<T, Error> {
        if renewed.is_ok() {
            self.inner.metrics.renewals.inc();
        }
        self.count(renewed)
    }

    /// Changes the fields that are given.
    ///
    /// # Errors
    /// [`Error::NotFound`], [`Error::Conflict`] when another incarnation is registered, [`Error::Store`].
    pub async fn update(
        &self,
        key: InstanceKey,
        incarnation: Option<Incarnation>,
        update: Update,
    ) -> Result<Accepted, Error> {
        self.change(key, incarnation, move |instance| {
            let Update { weight, metadata } = update.clone();
            instance.weight = weight.unwrap_or(instance.weight);
            if let Some(metadata) = metadata {
                instance.metadata = metadata;
            }
        })
        .await
    }

    /// Takes an instance out of load balancing; it stays registered.
    ///
    /// # Errors
    /// As [`Registry::update`].
    pub async fn drain(&self, key: InstanceKey, incarnation: Option<Incarnation>) -> Result<Accepted, Error> {
        self.change(key, incarnation, |instance| instance.state = State::Draining).await
    }

    async fn change(
        &self,
        key: InstanceKey,
        incarnation: Option<Incarnation>,
        edit: impl Fn(&mut Instance) + Send + Sync + 'static,
    ) -> Result<Accepted, Error> {
        let (inner, by) = (Arc::clone(&self.inner), Arc::clone(&self.by));
        let result = self.detached(async move {
            inner
                .write(&key, &by, |present| {
                    let present = present.ok_or_else(|| Error::NotFound(key.clone()))?;
                    expect_incarnation(present, incarnation)?;
                    let mut next = (**present).clone();
                    edit(&mut next);
                    Ok(if next == **present {
                        Decision::Keep(Arc::clone(present))
                    } else {
                        Decision::Put(next.into())
                    })
                })
                .await
        });
        self.count(result.await)
    }

    /// Removes an instance. Removing one that is not there succeeds, with the present revision.
    ///
    /// # Errors
    /// [`Error::Conflict`] when another incarnation is registered, [`Error::Store`].
    pub async fn deregister(
        &self,
        key: InstanceKey,
        incarnation: Option<Incarnation>,
    ) -> Result<Revision, Error> {
        let (inner, by) = (Arc::clone(&self.inner), Arc::clone(&self.by));
        self.count(self.detached(async move { inner.remove(&key, incarnation, &by).await }).await)
    }

    /// Runs a write to its end even if the caller goes away: a commit must never be left without its lease.
    pub(super) async fn detached<T: Send + 'static>(
        &self,
        work: impl Future<Output = Result<T, Error>> + Send + 'static,
    ) -> Result<T, Error> {
        let (answer, answered) = oneshot::channel();
        self.inner.tasks.spawn("registry-write", async move {
            // Nobody may be waiting any more; the write stands all the same.
            let _ = answer.send(work.await);
        });
        answered.await.unwrap_or(Err(Error::ShuttingDown))
    }

    pub(super) fn count<T>(&self, result: Result<T, Error>) -> Result<T, Error> {
        if result.is_err() {
            self.inner.metrics.refused.inc();
        }
        result
    }
}

impl Inner {
    /// This process, as long as the others count on it.
    pub(super) fn member(&self) -> Result<MemberId, Error> {
        let members = self.members.borrow();
        if members.is_member() { Ok(members.own.clone()) } else { Err(Error::Isolated) }
    }

    /// `None` when another process counts the lease.
    fn renew(
        &self,
        key: &InstanceKey,
        incarnation: Option<Incarnation>,
    ) -> Option<Result<(Duration, Revision), Error>> {
        let renew = || {
            self.member()?;
            let snapshot = self.catalog.latest();
            let present = snapshot.instance(key).ok_or_else(|| Error::NotFound(key.clone()))?;
            expect_incarnation(present, incarnation)?;
            let counted_here = self.keeps(present);
            match self.leases.renew(key, present.incarnation, Instant::now()) {
                Some(ttl) => Ok(Some((ttl, snapshot.revision()))),
                None if counted_here && present.stale.is_some() => match present.lease {
                    Lease::Ttl(ttl) => {
                        self.revive(key.clone(), present.incarnation, ttl);
                        Ok(Some((ttl, snapshot.revision())))
                    }
                    Lease::Session => Err(Error::NotFound(key.clone())),
                },
                // Over, and its removal under way.
                None if counted_here && !self.leases.held(key, present.incarnation) => {
                    Err(Error::NotFound(key.clone()))
                }
                None if counted_here || present.lease == Lease::Session => {
                    let message = format!(
                        "instance {key} is held by a session, which needs no renewals; only a TTL lease is renewed"
                    );
                    Err(Error::conflict("instance", message))
                }
                None => Ok(None),
            }
        };
        renew().transpose()
    }

    /// Becomes the owner of an instance whose owner came here.
    async fn take_over(
        &self,
        key: &InstanceKey,
        incarnation: Option<Incarnation>,
        by: &str,
    ) -> Result<(Duration, Revision), Error> {
        let own = self.member()?;
        let accepted = self
            .write(key, by, |present| {
                let present = present.ok_or_else(|| Error::NotFound(key.clone()))?;
                expect_incarnation(present, incarnation)?;
                Ok(Decision::Put(
                    Instance { owner: Some(own.clone()), stale: None, ..(**present).clone() }.into(),
                ))
            })
            .await?;
        let Lease::Ttl(ttl) = accepted.instance.lease else { return Err(Error::NotFound(key.clone())) };
        self.leases.hold(key.clone(), accepted.instance.incarnation, Holder::Ttl(ttl), Instant::now());
        Ok((ttl, accepted.revision))
    }

    async fn remove(
        &self,
        key: &InstanceKey,
        incarnation: Option<Incarnation>,
        by: &str,
    ) -> Result<Revision, Error> {
        for _ in 0..ATTEMPTS {
            let snapshot = self.catalog.latest();
            let Some(present) = snapshot.instance(key) else {
                // This process may be behind; what is answered must be true of the store.
                let stored = self.store.get(&record::instance_key(key)).await.map_err(Error::Store)?;
                let Some(stored) = stored else { return Ok(snapshot.revision()) };
                self.catalog.reached(stored.revision).await;
                continue;
            };
            expect_incarnation(present, incarnation)?;
            let mut ops = removal(present);
            ops.extend(self.unsay(key));
            ops.extend(self.history.note(present, What::Deregistered, by, ""));
            match self.commit(ops, snapshot.revision()).await {
                Ok(revision) => {
                    self.released(key, present.incarnation);
                    return Ok(revision);
                }
                Err(Some(error)) => return Err(error),
                Err(None) => {}
            }
        }
        Err(contended(key))
    }

    pub(super) fn released(&self, key: &InstanceKey, incarnation: Incarnation) {
        self.leases.release(key, incarnation, || self.catalog.latest().instance(key).is_some());
    }

    /// Reads, decides, and commits what was decided if nobody else wrote the instance in between; else again.
    pub(super) async fn write(
        &self,
        key: &InstanceKey,
        by: &str,
        decide: impl Fn(Option<&Arc<Instance>>) -> Result<Decision, Error>,
    ) -> Result<Accepted, Error> {
        for _ in 0..ATTEMPTS {
            let snapshot = self.catalog.latest();
            let present = snapshot.instance(key);
            let mut next = match decide(present)? {
                Decision::Keep(instance) => return Ok(Accepted { revision: instance.revision, instance }),
                Decision::Put(next) => next,
            };
            let mut ops = Vec::with_capacity(3);
            // With each new instance, also where the service is known: a removal of the empty service then loses to it.
            if present.is_none() {
                ops.push(Op::Put {
                    key: record::service_key(&key.service),
                    value: bytes::Bytes::new(),
                    when: Condition::Always,
                });
            }
            let when = present.map_or(Condition::Absent, |present| Condition::Unchanged(present.revision));
            ops.push(Op::Put { key: record::instance_key(key), value: record::encode(&next), when });
            let health = health_op(present, &next);
            let judged = health.is_some();
            ops.extend(health);
            let what = What::of(present.map(|present| &**present), &next);
            let damped = next.damped.as_ref().filter(|_| what == What::Registered);
            let why = damped.map_or("", |damped| damped.reason.as_str());
            ops.extend(self.history.note(&next, what, by, why));
            match self.commit(ops, snapshot.revision()).await {
                Ok(revision) => {
                    next.revision = revision;
                    if judged && next.check.is_some() {
                        next.health.revision = revision;
                    }
                    return Ok(Accepted { revision, instance: Arc::new(*next) });
                }
                Err(Some(error)) => return Err(error),
                Err(None) => {}
            }
        }
        Err(contended(key))
    }

    /// Commits what was decided on the snapshot at `seen`, and waits until the catalog shows it. `Err(None)` is a lost race:
    /// the catalog has caught up with the winner.
    pub(super) async fn commit(&self, ops: Vec<Op>, seen: Revision) -> Result<Revision, Option<Error>> {
        let received = Instant::now();
        match self.store.commit(ops).await {
            Ok(revision) => {
                self.metrics.writes.inc();
                self.metrics.stored.observe(received.elapsed().as_secs_f64());
                self.catalog.reached(revision).await;
                Ok(revision)
            }
            Err(StoreError::Conflict { actual, .. }) => {
                match actual {
                    Some(actual) => {
                        self.catalog.reached(actual).await;
                    }
                    // Removed by somebody since then; the mirror is about to show it.
                    None => {
                        self.catalog.newer_than(seen).await;
                    }
                }
                Err(None)
            }
            Err(error) => Err(Some(Error::Store(error))),
        }
    }
}

/// Takes an instance and the verdict on it out of the store.
pub(super) fn removal(present: &Instance) -> Vec<Op> {
    let delete = |key, when| Op::Delete { key, when };
    let health = present.check.is_some().then(|| delete(record::health_key(&present.key), Condition::Always));
    let instance = delete(record::instance_key(&present.key), Condition::Unchanged(present.revision));
    [instance].into_iter().chain(health).collect()
}

/// Every instance with a check has a record of its verdict, from its first commit to its last: whoever changes that record
/// makes sure of the instance by it.
fn health_op(present: Option<&Arc<Instance>>, next: &Instance) -> Option<Op> {
    let key = record::health_key(&next.key);
    let before = present.filter(|present| present.check.is_some());
    let same_run = before.is_some_and(|before| before.incarnation == next.incarnation);
    match (&next.check, before) {
        (Some(_), _) if same_run => None,
        (Some(_), _) => {
            let value = record::encode_health(&next.health, next.incarnation);
            Some(Op::Put { key, value, when: Condition::Always })
        }
        (None, Some(_)) => Some(Op::Delete { key, when: Condition::Always }),
        (None, None) => None,
    }
}

pub(super) fn contended(key: &InstanceKey) -> Error {
    Error::conflict("id", format!("instance {key} is being written by many at once: try again"))
}

pub(super) fn expect_incarnation(present: &Instance, given: Option<Incarnation>) -> Result<(), Error> {
    match given {
        Some(given) if given != present.incarnation => Err(Error::conflict(
            "incarnation",
            format!(
                "instance {} is registered as incarnation {}, not {given}",
                present.key, present.incarnation
            ),
        )),
        _ => Ok(()),
    }
}
