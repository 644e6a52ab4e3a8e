//! Instances that are held: asked again until they refuse, or until somebody vouches for them or lets them go.

use std::{
    collections::{BTreeMap, HashMap, HashSet},
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use futures_util::{StreamExt as _, stream};
use prometheus_client::{
    collector::Collector,
    encoding::{DescriptorEncoder, EncodeMetric as _},
    metrics::gauge::ConstGauge,
};
use tokio::{sync::Notify, time::Instant};

use super::{
    Error, Inner, Registry,
    ask::Answer,
    batch::{Edit, Note, Run, Written},
    history::What,
    leases::Holder,
    leave::{BY, Cause},
};
use crate::{
    catalog,
    model::{Incarnation, Instance, InstanceKey, Revision, ServiceId},
};

/// When an instance that was just held is asked again; each time after that it is twice as long.
const FIRST: Duration = Duration::from_millis(50);

/// Connections to held instances that are being opened at the same time.
const QUESTIONS: usize = 64;

/// Instances that are asked before those of them that refuse are removed.
const ROUND: usize = 4 * QUESTIONS;

/// Wait before a mark that could not be taken off is tried again.
const AGAIN: Duration = Duration::from_secs(1);

/// What an operator's release of a service did.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Released {
    /// The newest change.
    pub revision: Revision,
    /// Stale instances that were removed.
    pub removed: usize,
    /// Instances that are damped no more.
    pub published: usize,
}

/// The work that held instances make.
#[derive(Debug, Default)]
pub(super) struct Held {
    schedule: Mutex<Schedule>,
    scheduled: Notify,
    /// Those that were renewed, whose mark has to go. Each is here once: it has a lease from then on.
    revived: Mutex<Vec<Run>>,
    renewed: Notify,
}

#[derive(Debug, Default)]
struct Schedule {
    /// When each is asked, and how long it was waited for that.
    queue: BTreeMap<(Instant, InstanceKey), (Incarnation, Duration)>,
    known: HashSet<InstanceKey>,
}

impl Schedule {
    fn add(&mut self, (key, incarnation): Run, wait: Duration) {
        // Spread, so that those that were held together are not asked together for ever.
        let at = Instant::now() + wait.mul_f64(0.75 + 0.5 * fastrand::f64());
        self.known.insert(key.clone());
        self.queue.insert((at, key), (incarnation, wait));
    }
}

impl Held {
    fn schedule(&self) -> MutexGuard<'_, Schedule> {
        self.schedule.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Has held instances asked soon, unless that is planned.
    pub(super) fn soon(&self, runs: impl IntoIterator<Item = Run>) {
        let mut schedule = self.schedule();
        for run in runs {
            if !schedule.known.contains(&run.0) {
                schedule.add(run, FIRST);
            }
        }
        drop(schedule);
        self.scheduled.notify_one();
    }

    /// Has the mark taken off one that has a lease.
    pub(super) fn revived(&self, run: Run) {
        self.revived.lock().unwrap_or_else(PoisonError::into_inner).push(run);
        self.renewed.notify_one();
    }

    fn due(&self, now: Instant) -> Vec<(Run, Duration)> {
        let mut schedule = self.schedule();
        let mut due = Vec::new();
        while let Some(first) = schedule.queue.first_entry()
            && first.key().0 <= now
            && due.len() < ROUND
        {
            let ((_, key), (incarnation, wait)) = first.remove_entry();
            due.push(((key, incarnation), wait));
        }
        due
    }

    fn next(&self) -> Option<Instant> {
        self.schedule().queue.keys().next().map(|(at, _)| *at)
    }
}

impl Registry {
    /// Removes the stale instances of a service, whatever they answer, and has proxies told of those that are damped.
    ///
    /// # Errors
    /// [`Error::NoService`], [`Error::Store`].
    pub async fn release(&self, service: ServiceId) -> Result<Released, Error> {
        let (inner, by) = (Arc::clone(&self.inner), Arc::clone(&self.by));
        self.count(self.detached(async move { inner.release(&service, &by).await }).await)
    }

    /// Asks held instances again and again.
    pub(super) async fn ask_held(self) {
        let inner = &self.inner;
        let interval = inner.config.guards.ask_interval;
        let mut look = Instant::now();
        loop {
            let now = Instant::now();
            if now >= look {
                // Those that another node holds, or held before it ended.
                look = now + interval;
                inner.find_held();
            }
            inner.ask_due(now).await;
            let next = inner.held.next().map_or(look, |next| next.min(look));
            tokio::select! {
                () = tokio::time::sleep_until(next) => {}
                () = inner.held.scheduled.notified() => {}
            }
        }
    }

    /// Takes the mark off instances that were renewed.
    pub(super) async fn free_renewed(self) {
        let held = &self.inner.held;
        loop {
            held.renewed.notified().await;
            loop {
                let runs = std::mem::take(&mut *held.revived.lock().unwrap_or_else(PoisonError::into_inner));
                if runs.is_empty() {
                    break;
                }
                let Written { done, failed, error, .. } = self.inner.free(runs).await;
                tracing::info!(instances = done.len(), "no longer stale: they were renewed");
                if let Some(error) = error {
                    tracing::warn!(%error, instances = failed.len(), "were renewed, but are still marked as stale; trying again");
                    held.revived.lock().unwrap_or_else(PoisonError::into_inner).extend(failed);
                    tokio::time::sleep(AGAIN).await;
                }
            }
        }
    }
}

impl Inner {
    /// The owner of a held instance vouches for it again.
    pub(super) fn revive(&self, key: InstanceKey, incarnation: Incarnation, ttl: Duration) {
        // The lease first: a removal under way sees it.
        self.leases.hold(key.clone(), incarnation, Holder::Ttl(ttl), Instant::now());
        self.held.revived((key, incarnation));
    }

    async fn free(&self, runs: Vec<Run>) -> Written {
        self.write_each(runs, |present| {
            present.stale.as_ref()?;
            let mut next = (**present).clone();
            next.stale = None;
            let why = "it was renewed".to_owned();
            Some((Edit::Put(Box::new(next)), Note { what: What::Returned, by: BY.into(), why }))
        })
        .await
    }

    async fn release(&self, service: &ServiceId, by: &Arc<str>) -> Result<Released, Error> {
        let snapshot = self.catalog.latest();
        let found = snapshot.service(service).ok_or_else(|| Error::NoService(service.clone()))?;
        let runs = |is: fn(&Instance) -> bool| -> Vec<Run> {
            let of = found.instances().filter(|it| is(it));
            of.map(|it| (it.key.clone(), it.incarnation)).collect()
        };
        let removed = self
            .write_each(runs(|it| it.stale.is_some()), |present| {
                let why = present.stale.as_ref()?.reason.clone();
                Some((Edit::Remove, Note { what: What::Released, by: Arc::clone(by), why }))
            })
            .await;
        for instance in &removed.done {
            self.released(&instance.key, instance.incarnation);
        }
        let published = self.undamp(runs(|it| it.damped.is_some()), by, "an operator released it").await;
        published.done.iter().for_each(|instance| self.forgive(&instance.key));
        let released = Released {
            revision: removed.revision.max(published.revision).max(snapshot.revision()),
            removed: removed.done.len(),
            published: published.done.len(),
        };
        tracing::info!(%service, removed = released.removed, published = released.published, "released");
        removed.error.or(published.error).map_or(Ok(released), Err)
    }

    fn find_held(&self) {
        let snapshot = self.catalog.latest();
        if snapshot.stale() == 0 {
            return;
        }
        let services = snapshot.services().filter(|service| service.stale() > 0);
        let instances = services.flat_map(|service| service.instances());
        let stale = instances.filter(|it| it.stale.is_some() && self.keeps(it));
        self.held.soon(stale.map(|it| (it.key.clone(), it.incarnation)));
    }

    async fn ask_due(&self, now: Instant) {
        let settings = &self.config.guards;
        let snapshot = self.catalog.latest();
        let questions = self.held.due(now).into_iter().map(async |(run, wait)| {
            let present = snapshot.instance(&run.0).filter(|it| it.incarnation == run.1);
            let stale = present.and_then(|it| Some((it, it.stale.as_ref()?)));
            let answer = match stale.filter(|(it, _)| self.is_over(it)) {
                Some((it, stale)) => {
                    let heard = self.last_heard(it, stale.since, Cause::Expired);
                    Some(self.ask(&snapshot, it, heard, settings.ask_timeout).await)
                }
                None => None,
            };
            (run, wait, answer)
        });
        let mut answers = stream::iter(questions).buffer_unordered(QUESTIONS);
        let mut gone = HashMap::new();
        while let Some((run, wait, answer)) = answers.next().await {
            let mut schedule = self.held.schedule();
            match answer {
                None => {
                    schedule.known.remove(&run.0);
                }
                Some(Answer::Accepts | Answer::Silent(_)) => {
                    schedule.add(run, (wait * 2).min(settings.ask_interval))
                }
                Some(answer @ (Answer::Refused | Answer::Taken)) => {
                    schedule.known.remove(&run.0);
                    gone.insert(run, answer);
                }
            }
        }
        if !gone.is_empty() {
            self.remove_unheld(gone.keys().cloned().collect(), What::Expired, &|instance| {
                let reason = instance.stale.as_ref().map(|stale| stale.reason.as_str()).unwrap_or_default();
                let answer =
                    gone.get(&(instance.key.clone(), instance.incarnation)).unwrap_or(&Answer::Refused);
                format!("{reason}; by now {answer}")
            })
            .await;
        }
    }
}

/// How many instances are held and damped, as metrics.
#[derive(Debug)]
pub(super) struct KeptMetrics(pub(super) catalog::Reader);

impl Collector for KeptMetrics {
    fn encode(&self, mut encoder: DescriptorEncoder<'_>) -> Result<(), std::fmt::Error> {
        let snapshot = self.0.latest();
        for (name, help, count) in [
            ("registry_held", "Instances that are kept although their lease is over", snapshot.stale()),
            (
                "registry_damped",
                "Instances that proxies are not told of because they come and go",
                snapshot.damped(),
            ),
        ] {
            let gauge = ConstGauge::new(i64::try_from(count).unwrap_or(i64::MAX));
            gauge.encode(encoder.encode_descriptor(name, help, None, gauge.metric_type())?)?;
        }
        Ok(())
    }
}
