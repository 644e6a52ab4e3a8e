use std::{future::Future, sync::Arc, time::Duration};

use tokio::{sync::oneshot, time::Instant};

use super::{Error, Inner, Registry, history::What, leases::Holder, leave::Cause, record};
use crate::{
    catalog::Snapshot,
    model::{
        Group, Health, Incarnation, Instance, InstanceKey, Lease, MemberId, Registration, Revision,
        ServiceId, State, Update,
    },
    rt,
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

/// How long leases that end are collected for.
const TOGETHER: Duration = Duration::from_millis(20);

/// What a request makes of the present state of one instance.
enum Decision {
    /// It is so already.
    Keep(Arc<Instance>),
    /// Write this.
    Put(Box<Instance>),
}

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

    /// Removes a service that has no instances.
    ///
    /// # Errors
    /// [`Error::NoService`]; [`Error::Conflict`] while it has instances; [`Error::Store`].
    pub async fn remove_service(&self, id: ServiceId) -> Result<Revision, Error> {
        let inner = Arc::clone(&self.inner);
        self.count(self.detached(async move { inner.remove_service(&id).await }).await)
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

    /// Looks after instances whose lease is over.
    pub(super) async fn expire(self) {
        loop {
            let due = self.inner.leases.next_due().await;
            let registry = self.clone();
            // Those that are asked may take their time, and nobody waits for them.
            self.inner.tasks.spawn("leases-over", async move {
                let removed = registry.leave(due, Cause::Expired).await;
                registry.inner.metrics.expired.inc_by(removed);
            });
            // What ends within this time goes together: one look at who else is silent, and few commits.
            tokio::time::sleep(TOGETHER).await;
        }
    }

    /// Forgets services that have had no instance for long.
    pub(super) async fn retire_empty_services(self) {
        let retention = self.inner.config.empty_service_retention;
        let mut empty_since: std::collections::BTreeMap<ServiceId, Instant> =
            std::collections::BTreeMap::new();
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

    /// This process, as long as the others count on it.
    fn member(&self) -> Result<MemberId, Error> {
        let members = self.members.borrow();
        if members.is_member() { Ok(members.own.clone()) } else { Err(Error::Isolated) }
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
        match registration.incarnation {
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

    /// Reads, decides, and commits what was decided if nobody else wrote the instance in between; else again.
    async fn write(
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
            ops.extend(self.history.note(&next, what, by, ""));
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

/// Whether callers know some of the instances of another service by this name, such as `db.leader`: who took it would be sent what is
/// meant for them.
fn is_group(snapshot: &Snapshot, id: &ServiceId) -> bool {
    let group = Group::parse(id.as_str());
    group.and_then(|(of, _)| snapshot.service(&of)?.roles.as_ref()).is_some()
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

/// What the instance is after the registration. The same run keeps its state: a renewal does not end a drain.
fn merge(registration: &Registration, present: Option<&Arc<Instance>>, holder: Holder) -> Instance {
    let Registration { key, incarnation, address, port, locality, weight, metadata, ttl, check } =
        registration.clone();
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
    }
}
