//! What becomes of instances that nobody vouches for any more: removed, or held.

use std::{
    collections::{BTreeMap, HashMap},
    net::SocketAddr,
    sync::{Arc, Mutex, PoisonError},
    time::{Duration, SystemTime},
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
    catalog::Snapshot,
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

/// How much later another instance has to be registered at the same address to be the successor: a process may register
/// itself under several ids.
const SUCCEEDS: Duration = Duration::from_secs(1);

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

/// Instances of one service that leave at the same time and do not refuse connections, and what each answered.
struct Leaving {
    service: ServiceId,
    instances: Vec<Asked>,
    verdict: Verdict,
}

type Asked = (Arc<Instance>, Answer);

/// What is to be done with some that leave.
enum Going {
    /// They are gone.
    Gone(Vec<Asked>),
    /// By the verdict.
    Judged(Leaving),
}

impl Registry {
    /// Removes instances that nobody vouches for any more, as far as that is believed, and holds the others. Returns how many
    /// were removed. One whose owner comes back meanwhile stays.
    pub(super) async fn leave(&self, over: Vec<Run>, cause: Cause) -> u64 {
        let inner = Arc::clone(&self.inner);
        if cause != Cause::Expired && !over.is_empty() {
            let (inner, over) = (Arc::clone(&inner), over.clone());
            self.inner
                .tasks
                .spawn_until_shutdown("hung-up", async move { inner.ask_in_grace(over, cause).await });
        }
        let removed = self.detached(async move { Ok(inner.leave(over, cause).await as u64) });
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
    /// Asks all of them, in rounds of whole services. Those that refuse are gone, whatever else there is.
    async fn leave(&self, over: Vec<Run>, cause: Cause) -> usize {
        let mut services: BTreeMap<ServiceId, Vec<Run>> = BTreeMap::new();
        let mut left = over.len();
        for run in over {
            services.entry(run.0.service.clone()).or_default().push(run);
        }
        let services: Vec<Vec<Run>> = services.into_values().collect();
        let mut going = Vec::new();
        for some in services.chunks(TOGETHER) {
            let runs = some.concat();
            left -= runs.len();
            let (refused, others) = self.ask_all(self.still_there(&runs), cause).await;
            going.push(Going::Gone(refused));
            match cause {
                Cause::Expired if !others.is_empty() => {
                    going.extend(self.judge_in_turn(&others, left).await.into_iter().map(Going::Judged));
                }
                Cause::Expired => {}
                Cause::HungUp | Cause::Closed => self.give_grace_to(others),
            }
        }
        join_all(going.into_iter().map(|some| self.let_go(some, cause))).await.into_iter().sum()
    }

    /// A process that dies together with its owner may accept connections for a moment longer: asks again while the grace lasts,
    /// ever less often.
    async fn ask_in_grace(&self, over: Vec<Run>, cause: Cause) {
        let (mut runs, mut wait) = (over, PATIENCE);
        let end = Instant::now() + self.config.session_grace;
        while Instant::now() + wait < end {
            tokio::time::sleep(wait).await;
            wait *= 2;
            let snapshot = self.catalog.latest();
            runs.retain(|(key, incarnation)| {
                let present = snapshot.instance(key).filter(|it| it.incarnation == *incarnation);
                present.is_some_and(|it| self.keeps(it) && self.leases.abandoned(key))
            });
            if runs.is_empty() {
                return;
            }
            let there = runs.iter().filter_map(|(key, _)| snapshot.instance(key).cloned()).collect();
            let (gone, _) = self.ask_all(there, cause).await;
            gone.iter().for_each(|(it, _)| self.leases.end_grace(&it.key, it.incarnation));
            self.remove_asked(&gone, cause).await;
        }
    }

    /// Those whose lease is over. Those that are held already are asked soon.
    fn still_there(&self, over: &[Run]) -> Vec<Arc<Instance>> {
        let snapshot = self.catalog.latest();
        let mut present = Vec::with_capacity(over.len());
        for (key, incarnation) in over {
            let run = snapshot.instance(key).filter(|present| present.incarnation == *incarnation);
            let Some(instance) = run.filter(|present| self.is_over(present)) else { continue };
            if instance.stale.is_some() {
                self.held.soon([(key.clone(), *incarnation)]);
            } else {
                present.push(Arc::clone(instance));
            }
        }
        present
    }

    /// A stream is also closed by a network that mends: the owner had given it up, and its last words arrive now, all of them or
    /// the first. So that is the end of those instances only that refuse connections; the owner of another one has the time to
    /// come back.
    fn give_grace_to(&self, living: Vec<Asked>) {
        for (instance, answer) in living {
            tracing::info!(
                instance = %instance.key, %answer, grace = ?self.config.session_grace,
                "its session ended, but it is there: it is looked at again after the grace, unless its owner comes back"
            );
            self.give_grace(vec![(instance.key.clone(), instance.incarnation)]);
        }
    }

    fn text(&self, cause: Cause, instance: &Instance) -> String {
        cause.text(instance, self.config.session_grace)
    }

    /// Whether this process counts its lease, and it is over.
    pub(super) fn is_over(&self, present: &Instance) -> bool {
        self.keeps(present) && !self.leases.held(&present.key, present.incarnation)
    }

    /// As [`Inner::judge`], and has it written down where other processes judge as well.
    async fn judge_in_turn(&self, over: &[Asked], more: usize) -> Vec<Leaving> {
        for _ in 0..ATTEMPTS {
            let own_store = self.store.status().borrow().session.is_some_and(|it| it.until.is_none());
            if own_store && self.members.borrow().live.len() <= 1 {
                return self.judge(over, more, Some(&Written::default()));
            }
            let listing = match self.store.list(LOSSES).await {
                Ok(listing) => listing,
                Err(error) => {
                    tracing::warn!(%error, "what other nodes let go is unknown: all are held");
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
                        tracing::warn!(%error, "what goes could not be written down: all are held");
                        break;
                    }
                }
            }
        }
        self.judge(over, more, None)
    }

    /// Those whose lease is still over, by service, and whether they may go; `more` are not judged yet. Without `written`, what
    /// other processes let go is unknown.
    fn judge(&self, over: &[Asked], more: usize, written: Option<&Written>) -> Vec<Leaving> {
        let now = Instant::now();
        let snapshot = self.catalog.latest();
        let mut services: BTreeMap<ServiceId, [Vec<Asked>; 2]> = BTreeMap::new();
        let over = over.iter().filter(|(instance, _)| {
            let present = snapshot.instance(&instance.key);
            present.is_some_and(|it| it.incarnation == instance.incarnation && self.is_over(it))
        });
        let mut leaving = more;
        for (instance, answer) in over {
            let [silent, living] = services.entry(instance.key.service.clone()).or_default();
            let some = if *answer == Answer::Accepts { living } else { silent };
            some.push((Arc::clone(instance), answer.clone()));
            leaving += 1;
        }
        let silent = self.silent(now);
        let mut all = Count { present: snapshot.instances() - snapshot.stale(), leaving, silent: silent.all };
        let mut guard = self.door.guard.lock().unwrap_or_else(PoisonError::into_inner);
        let mut judged = Vec::with_capacity(services.len());
        for (service, [dumb, living]) in services {
            let present = snapshot.service(&service).map_or(0, |it| it.instances().len() - it.stale());
            let elsewhere = |service| match written {
                Some(written) => written.elsewhere(service),
                None => Elsewhere { lost: usize::MAX / 4, going: 0 },
            };
            let lost = (elsewhere(Some(&service)), elsewhere(None));
            let about_to = silent.of.get(&service).copied().unwrap_or_default();
            let others = [about_to + living.len(), about_to];
            for (instances, others) in [dumb, living].into_iter().zip(others) {
                let Some((first, answer)) = instances.first() else { continue };
                let of = Count { present, leaving: instances.len(), silent: others };
                let of_session = first.lease == Lease::Session;
                let verdict = match answer {
                    Answer::Accepts if of_session => guard.hold(now, &service, of.leaving),
                    Answer::Accepts => guard.judge_living(now, &service, (of, lost.0), (all, lost.1)),
                    Answer::Refused | Answer::Taken | Answer::Silent(_) => {
                        guard.judge(now, &service, (of, lost.0), (all, lost.1))
                    }
                };
                all.leaving -= of.leaving;
                if verdict == (Verdict::Hold { trips: true }) {
                    self.metrics.trips.inc();
                    tracing::warn!(
                        %service, leaving = of.leaving, silent = of.silent, present,
                        "leases are over of instances that may be alive, or too many at once: those that do not refuse \
                         connections stay; `disco service release {service}` removes those that are held"
                    );
                }
                judged.push(Leaving { service: service.clone(), instances, verdict });
            }
        }
        judged
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
    async fn let_go(&self, going: Going, cause: Cause) -> usize {
        match going {
            Going::Gone(instances) => self.remove_asked(&instances, cause).await,
            Going::Judged(Leaving { service, instances, verdict }) => {
                let count = instances.len();
                let removed = match verdict {
                    Verdict::Go => self.remove_asked(&instances, cause).await,
                    Verdict::Hold { .. } => {
                        let held = self.hold(&instances, cause).await;
                        tracing::info!(%service, held, "instances that nobody vouches for stay");
                        0
                    }
                };
                self.door.settled(&service, verdict, count);
                removed
            }
        }
    }

    async fn remove_asked(&self, instances: &[Asked], cause: Cause) -> usize {
        let said = by_run(instances);
        let why = |instance: &Instance| {
            let answer = said.get(&(instance.key.clone(), instance.incarnation));
            let text = self.text(cause, instance);
            answer.map_or_else(|| text.clone(), |answer| format!("{text}, and {answer}"))
        };
        self.remove_unheld(runs(instances), cause.what(), &why).await
    }

    /// Those that are gone for certain, and what the others say.
    async fn ask_all(&self, instances: Vec<Arc<Instance>>, cause: Cause) -> (Vec<Asked>, Vec<Asked>) {
        let snapshot = self.catalog.latest();
        let questions = instances.into_iter().map(async |instance| {
            let _place = self.door.questions.acquire().await;
            // The next start gives everybody a lease.
            if self.tasks.shutdown().started() {
                return None;
            }
            let heard = self.last_heard(&instance, rt::now(), cause);
            let answer = self.ask(&snapshot, &instance, heard, PATIENCE).await;
            Some((instance, answer))
        });
        let answers: Vec<Asked> =
            stream::iter(questions).buffered(QUESTIONS).filter_map(async |it| it).collect().await;
        answers.into_iter().partition(|(_, answer)| answer.is_end())
    }

    /// When at the latest the owner of an instance was heard of, whose lease was over at `over`.
    pub(super) fn last_heard(&self, instance: &Instance, over: SystemTime, cause: Cause) -> SystemTime {
        let before = match (cause, instance.lease) {
            (Cause::HungUp | Cause::Closed, _) => Duration::ZERO,
            (Cause::Expired, Lease::Ttl(ttl)) => ttl,
            (Cause::Expired, Lease::Session) => self.config.session_grace,
        };
        over.checked_sub(before).unwrap_or(over)
    }

    /// What an instance answers whose owner was `heard` of last then.
    pub(super) async fn ask(
        &self,
        snapshot: &Snapshot,
        instance: &Instance,
        heard: SystemTime,
        within: Duration,
    ) -> Answer {
        let answer =
            self.network.ask.ask(SocketAddr::new(instance.address, instance.port.get()), within).await;
        let successor = || {
            let service = snapshot.service(&instance.key.service)?;
            let endpoints = service.endpoints();
            let mut claims = endpoints.claims(instance.address, instance.port);
            let other = |it: &&Arc<Instance>| it.key != instance.key && it.stale.is_none();
            claims.any(|it| other(&it) && it.registered_at > heard + SUCCEEDS).then_some(())
        };
        match answer {
            Answer::Accepts if successor().is_some() => Answer::Taken,
            answer => answer,
        }
    }

    /// Marks instances as stale; returns how many.
    async fn hold(&self, instances: &[Asked], cause: Cause) -> usize {
        let since = rt::now();
        let said = by_run(instances);
        let written = self
            .write_each(runs(instances), |present| {
                let run = (present.key.clone(), present.incarnation);
                let answer = said.get(&run).filter(|_| self.is_over(present))?;
                let doubt = if **answer == Answer::Accepts { "but" } else { "too many others went, and" };
                let reason = format!("{}, {doubt} {answer}", self.text(cause, present));
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

fn by_run(instances: &[Asked]) -> HashMap<Run, &Answer> {
    instances.iter().map(|(it, answer)| ((it.key.clone(), it.incarnation), answer)).collect()
}

fn runs(instances: &[Asked]) -> Vec<Run> {
    instances.iter().map(|(it, _)| (it.key.clone(), it.incarnation)).collect()
}
