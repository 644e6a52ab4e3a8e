//! What becomes of instances that nobody vouches for any more: removed, or held.

use std::{
    collections::{BTreeMap, HashMap},
    net::SocketAddr,
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};

use futures_util::{StreamExt as _, future::join_all, stream};
use tokio::{sync::Semaphore, time::Instant};

use super::{
    Inner, Registry,
    ask::Answer,
    batch::{Edit, Note, Run},
    guard::{Count, Elsewhere, Guard, Guards, Verdict},
    history::What,
    losses::{LOSSES, Written},
    write::ATTEMPTS,
};
use crate::{
    model::{Instance, Lease, ServiceId, Stale, format_duration},
    rt,
    store::StoreError,
};

/// Who does what nobody asked for, in the history.
pub(super) const BY: &str = "disco";

/// How long an instance may take to answer before it is held for now. It is asked again soon, and then with more patience.
const PATIENCE: Duration = Duration::from_millis(100);

/// Connections to doubtful instances that are being opened at the same time.
const QUESTIONS: usize = 256;

/// Services that are judged and written down together; stores bound the operations of a commit (etcd: 128).
const TOGETHER: usize = 50;

/// How long leases that end are collected for.
const COLLECTED: Duration = Duration::from_millis(20);

/// How long a count of the silent leases is good for.
const COUNTED: Duration = Duration::from_millis(200);

/// Why nobody vouches for an instance.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Cause {
    /// Its lease was over.
    Expired,
    /// The connection of its session was closed under it.
    HungUp,
    /// Its owner closed its session.
    Closed,
}

impl Cause {
    fn what(self) -> What {
        match self {
            Self::Expired => What::Expired,
            Self::HungUp => What::HungUp,
            Self::Closed => What::Closed,
        }
    }

    fn text(self, instance: &Instance, grace: Duration) -> String {
        match (self, instance.lease) {
            (Self::Expired, Lease::Ttl(ttl)) => {
                format!("its lease of {} ended without a renewal", format_duration(ttl))
            }
            (Self::Expired, Lease::Session) => {
                format!(
                    "its session was lost, and its owner did not come back within {}",
                    format_duration(grace)
                )
            }
            (Self::HungUp, _) => "its connection was closed, as by the end of its process".to_owned(),
            (Self::Closed, _) => "its owner closed its session".to_owned(),
        }
    }
}

/// Judges who leaves.
#[derive(Debug)]
pub(super) struct Door {
    guard: Mutex<Guard>,
    silent: Mutex<Option<(Instant, Arc<Silent>)>>,
    questions: Semaphore,
    /// Tells what this process let go from what others did, and from what it did before it was started anew.
    boot: u64,
}

#[derive(Debug)]
struct Silent {
    of: HashMap<ServiceId, usize>,
    all: usize,
}

impl Door {
    pub(super) fn new(settings: Guards) -> Self {
        Self {
            guard: Mutex::new(Guard::new(settings)),
            silent: Mutex::default(),
            questions: Semaphore::new(QUESTIONS),
            boot: fastrand::u64(1..),
        }
    }

    fn settled(&self, service: &ServiceId, verdict: Verdict, count: usize) {
        self.guard.lock().unwrap_or_else(PoisonError::into_inner).settled(service, verdict, count);
    }
}

/// Instances of one service that leave at the same time.
struct Leaving {
    service: ServiceId,
    instances: Vec<Arc<Instance>>,
    verdict: Verdict,
}

impl Registry {
    /// Removes instances that nobody vouches for any more, as far as that is believed, and holds the others. Returns how many
    /// were removed. One whose owner comes back meanwhile stays.
    pub(super) async fn leave(&self, over: Vec<Run>, cause: Cause) -> u64 {
        let inner = Arc::clone(&self.inner);
        let removed = self.detached(async move {
            Ok(match cause {
                Cause::Closed => {
                    let removed = inner
                        .remove_unheld(over, cause.what(), &|instance| inner.text(cause, instance))
                        .await;
                    removed as u64
                }
                Cause::Expired | Cause::HungUp => inner.leave(over, cause).await as u64,
            })
        });
        removed.await.unwrap_or_default()
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
            tokio::time::sleep(COLLECTED).await;
        }
    }
}

impl Inner {
    async fn leave(&self, over: Vec<Run>, cause: Cause) -> usize {
        let over = match cause {
            Cause::HungUp => self.really_gone(over).await,
            Cause::Expired | Cause::Closed => over,
        };
        let mut services: BTreeMap<ServiceId, Vec<Run>> = BTreeMap::new();
        let mut left = over.len();
        for run in over {
            services.entry(run.0.service.clone()).or_default().push(run);
        }
        let services: Vec<Vec<Run>> = services.into_values().collect();
        let mut groups = Vec::new();
        for some in services.chunks(TOGETHER) {
            let runs = some.concat();
            left -= runs.len();
            groups.extend(self.judge_in_turn(&runs, left).await);
        }
        join_all(groups.into_iter().map(|group| self.let_go(group, cause))).await.into_iter().sum()
    }

    /// A connection is also closed by a network that mends: the owner had given it up, and its last words arrive now. So it
    /// is the end of those instances only that refuse connections; the owner of another one has the time to come back.
    async fn really_gone(&self, over: Vec<Run>) -> Vec<Run> {
        let snapshot = self.catalog.latest();
        let present = over.iter().filter_map(|(key, incarnation)| {
            let present = snapshot.instance(key).filter(|present| present.incarnation == *incarnation)?;
            (self.is_over(present) && present.stale.is_none()).then(|| Arc::clone(present))
        });
        let (_, unsure) = self.ask_all(present.collect()).await;
        let mut gone = over;
        for (instance, answer) in unsure {
            let (key, incarnation) = (&instance.key, instance.incarnation);
            gone.retain(|(of, run)| of != key || *run != incarnation);
            tracing::info!(
                instance = %key, answer, grace = ?self.config.session_grace,
                "its connection was closed, but it is there: it is removed after the grace unless its owner comes back"
            );
            let is_there =
                || self.catalog.latest().instance(key).is_some_and(|now| now.incarnation == incarnation);
            self.leases.abandon(key.clone(), incarnation, Instant::now(), is_there);
        }
        gone
    }

    fn text(&self, cause: Cause, instance: &Instance) -> String {
        cause.text(instance, self.config.session_grace)
    }

    /// Whether this process counts its lease, and it is over.
    pub(super) fn is_over(&self, present: &Instance) -> bool {
        self.keeps(present) && !self.leases.held(&present.key, present.incarnation)
    }

    /// As [`Inner::judge`], and has it written down where other processes judge as well.
    async fn judge_in_turn(&self, over: &[Run], more: usize) -> Vec<Leaving> {
        for _ in 0..ATTEMPTS {
            let own_store = self.store.status().borrow().session.is_some_and(|it| it.until.is_none());
            if own_store && self.members.borrow().live.len() <= 1 {
                return self.judge(over, more, Some(&Written::default()));
            }
            let listing = match self.store.list(LOSSES).await {
                Ok(listing) => listing,
                Err(error) => {
                    tracing::warn!(%error, "what other nodes let go is unknown: everybody is asked");
                    break;
                }
            };
            let window = self.config.guards.window;
            let written = Written::read(self.door.boot, listing.entries, window);
            let groups = self.judge(over, more, Some(&written));
            let going = groups.iter().filter(|group| group.verdict == Verdict::Go);
            let going: Vec<_> = going.map(|group| (&group.service, group.instances.len())).collect();
            if going.is_empty() {
                return groups;
            }
            match self.store.commit(written.ops(&going)).await {
                Ok(_) => return groups,
                Err(error) => {
                    let mut guard = self.door.guard.lock().unwrap_or_else(PoisonError::into_inner);
                    for Leaving { service, instances, verdict } in &groups {
                        guard.take_back(service, *verdict, instances.len());
                    }
                    if !matches!(error, StoreError::Conflict { .. }) {
                        tracing::warn!(%error, "what goes could not be written down: everybody is asked");
                        break;
                    }
                }
            }
        }
        self.judge(over, more, None)
    }

    /// Those that are still there, by service, and whether they may go; `more` are not judged yet. Without `written`, what
    /// other processes let go is unknown.
    fn judge(&self, over: &[Run], more: usize, written: Option<&Written>) -> Vec<Leaving> {
        let now = Instant::now();
        let snapshot = self.catalog.latest();
        let mut services: BTreeMap<ServiceId, Vec<Arc<Instance>>> = BTreeMap::new();
        for (key, incarnation) in over {
            let present = snapshot.instance(key).filter(|present| present.incarnation == *incarnation);
            let Some(present) = present.filter(|present| self.is_over(present)) else { continue };
            if present.stale.is_some() {
                self.held.soon([(key.clone(), *incarnation)]);
            } else {
                services.entry(key.service.clone()).or_default().push(Arc::clone(present));
            }
        }
        let silent = self.silent(now);
        let mut all = Count {
            present: snapshot.instances() - snapshot.stale(),
            leaving: services.values().map(Vec::len).sum::<usize>() + more,
            silent: silent.all,
        };
        let mut guard = self.door.guard.lock().unwrap_or_else(PoisonError::into_inner);
        let judged = services.into_iter().map(|(service, instances)| {
            let present = snapshot.service(&service).map_or(0, |it| it.instances().len() - it.stale());
            let of = Count {
                present,
                leaving: instances.len(),
                silent: silent.of.get(&service).copied().unwrap_or_default(),
            };
            let elsewhere = |service| match written {
                Some(written) => written.elsewhere(service),
                None => Elsewhere { lost: usize::MAX / 4, going: 0 },
            };
            let verdict = guard.judge(now, &service, (of, elsewhere(Some(&service))), (all, elsewhere(None)));
            all.leaving -= of.leaving;
            if verdict == (Verdict::Ask { trips: true }) {
                self.metrics.trips.inc();
                tracing::warn!(
                    %service, leaving = of.leaving, silent = of.silent, present,
                    "too many instances leave to be believed: each is asked, and stays unless it refuses connections; \
                     `disco service release {service}` removes those that are held"
                );
            }
            Leaving { service, instances, verdict }
        });
        judged.collect()
    }

    /// Who else is about to leave. A look at all leases is not repeated for each that ends.
    fn silent(&self, now: Instant) -> Arc<Silent> {
        let mut counted = self.door.silent.lock().unwrap_or_else(PoisonError::into_inner);
        match &*counted {
            Some((at, silent)) if now.saturating_duration_since(*at) < COUNTED => Arc::clone(silent),
            _ => {
                let of = self.leases.silent(now);
                let silent = Arc::new(Silent { all: of.values().sum(), of });
                *counted = Some((now, Arc::clone(&silent)));
                silent
            }
        }
    }

    /// Removes or holds; returns how many were removed.
    async fn let_go(&self, group: Leaving, cause: Cause) -> usize {
        let Leaving { service, instances, verdict } = group;
        let count = instances.len();
        let runs = |instances: &[Arc<Instance>]| {
            instances.iter().map(|it| (it.key.clone(), it.incarnation)).collect::<Vec<_>>()
        };
        let removed = match verdict {
            Verdict::Go => {
                self.remove_unheld(runs(&instances), cause.what(), &|instance| self.text(cause, instance))
                    .await
            }
            Verdict::Ask { .. } => {
                let (refused, unsure) = self.ask_all(instances).await;
                let held = self.hold(unsure, cause);
                let why = |instance: &Instance| {
                    format!("{}, and it refuses connections", self.text(cause, instance))
                };
                let (removed, held) =
                    tokio::join!(self.remove_unheld(runs(&refused), cause.what(), &why), held);
                tracing::info!(%service, removed, held, "asked instances that nobody vouches for");
                removed
            }
        };
        self.door.settled(&service, verdict, count);
        removed
    }

    /// Those that refuse connections, and what the others say.
    async fn ask_all(
        &self,
        instances: Vec<Arc<Instance>>,
    ) -> (Vec<Arc<Instance>>, Vec<(Arc<Instance>, String)>) {
        let questions = instances.into_iter().map(async |instance| {
            let _place = self.door.questions.acquire().await;
            // The next start gives everybody a lease.
            if self.tasks.shutdown().started() {
                return None;
            }
            let address = SocketAddr::new(instance.address, instance.port.get());
            let answer = self.network.ask.ask(address, PATIENCE).await;
            Some((instance, answer))
        });
        let (mut refused, mut unsure) = (Vec::new(), Vec::new());
        let mut answers = stream::iter(questions).buffer_unordered(QUESTIONS);
        while let Some(answer) = answers.next().await {
            let Some((instance, answer)) = answer else { continue };
            match answer {
                Answer::Refused => refused.push(instance),
                Answer::Unsure(said) => unsure.push((instance, said)),
            }
        }
        (refused, unsure)
    }

    /// Marks instances as stale; returns how many.
    async fn hold(&self, unsure: Vec<(Arc<Instance>, String)>, cause: Cause) -> usize {
        let since = rt::now();
        let said: HashMap<_, _> =
            unsure.into_iter().map(|(it, said)| ((it.key.clone(), it.incarnation), said)).collect();
        let runs: Vec<Run> = said.keys().cloned().collect();
        let written = self
            .write_each(runs, |present| {
                let run = (present.key.clone(), present.incarnation);
                let said = said.get(&run).filter(|_| self.is_over(present))?;
                let reason = format!("{}, too many others went, and {said}", self.text(cause, present));
                let mut next = (**present).clone();
                next.stale = Some(Box::new(Stale { since, reason: reason.clone() }));
                Some((Edit::Put(Box::new(next)), Note { what: What::Held, by: BY.into(), why: reason }))
            })
            .await;
        self.held.soon(written.done.iter().map(|it| (it.key.clone(), it.incarnation)));
        if let Some(error) = written.error {
            tracing::warn!(%error, instances = written.failed.len(), "could not be marked as stale; they stay, and are looked at again");
        }
        self.give_grace(written.failed);
        written.done.len()
    }

    /// Removes those that have no lease, and returns how many. `why` is what the log and the history say.
    pub(super) async fn remove_unheld(
        &self,
        runs: Vec<Run>,
        what: What,
        why: &(dyn Fn(&Instance) -> String + Send + Sync),
    ) -> usize {
        let written = self
            .write_each(runs, |present| {
                let note = || Note { what, by: BY.into(), why: why(present) };
                self.is_over(present).then(|| (Edit::Remove, note()))
            })
            .await;
        for instance in &written.done {
            self.released(&instance.key, instance.incarnation);
            tracing::info!(instance = %instance.key, "removed: {}", why(instance));
        }
        if let Some(error) = written.error {
            tracing::warn!(%error, instances = written.failed.len(), "nobody vouches for them, but they could not be removed; trying again");
        }
        self.give_grace(written.failed);
        written.done.len()
    }

    /// Those that could not be written come up again after the grace.
    fn give_grace(&self, failed: Vec<Run>) {
        for (key, incarnation) in failed {
            let is_there = || {
                let snapshot = self.catalog.latest();
                let present = snapshot.instance(&key);
                present.is_some_and(|present| present.incarnation == incarnation && self.keeps(present))
            };
            self.leases.abandon(key.clone(), incarnation, Instant::now(), is_there);
        }
    }
}
