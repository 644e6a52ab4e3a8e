//! Instances that come and go: counted by each process from what the catalog shows, and damped. The mark is in the instance's
//! record, so that all processes agree on it and a restart keeps it; who counts the instance's lease takes it off.

use std::{
    collections::{BTreeMap, HashMap, VecDeque},
    sync::{Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use tokio::time::Instant;

use super::{
    Inner, Registry,
    batch::{Edit, Note, Run},
    guard::Guards,
    history::What,
    leave::BY,
};
use crate::{
    catalog::{Service, Snapshot},
    model::{Damped, Instance, InstanceKey, State, format_duration},
    rt,
};

/// The least time between two looks at those that are damped.
const LOOK: Duration = Duration::from_millis(250);

/// When runs of instances ended of late.
#[derive(Debug)]
pub(super) struct Flaps {
    /// How many ends count, and for how long.
    most: usize,
    window: Duration,
    seen: Mutex<Seen>,
}

#[derive(Debug, Default)]
struct Seen {
    /// At most `most` of each instance, oldest first.
    ends: HashMap<InstanceKey, VecDeque<Instant>>,
    swept: Option<Instant>,
}

impl Flaps {
    pub(super) fn new(settings: &Guards) -> Self {
        let most = usize::try_from(settings.flaps).unwrap_or(usize::MAX);
        Self { most, window: settings.flap_window, seen: Mutex::default() }
    }

    fn seen(&self) -> MutexGuard<'_, Seen> {
        self.seen.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Notes what became of an instance. One that was drained, or held, did not flap.
    pub(super) fn note(&self, before: &Instance, after: Option<&Instance>, now: Instant) {
        let goes_on = after.is_some_and(|after| after.incarnation == before.incarnation);
        if goes_on || self.most == 0 || before.state == State::Draining || before.stale.is_some() {
            return;
        }
        let mut seen = self.seen();
        if seen.swept.is_none_or(|at| now.saturating_duration_since(at) >= self.window) {
            seen.swept = Some(now);
            seen.ends.retain(|_, ends| {
                ends.back().is_some_and(|at| now.saturating_duration_since(*at) < self.window)
            });
        }
        let ends = seen.ends.entry(before.key.clone()).or_default();
        ends.push_back(now);
        if ends.len() > self.most {
            ends.pop_front();
        }
    }

    /// Whether it went too often.
    fn too_often(&self, key: &InstanceKey, now: Instant) -> bool {
        let seen = self.seen();
        let ends = seen.ends.get(key).filter(|ends| self.most > 0 && ends.len() >= self.most);
        let first = ends.and_then(|ends| ends.front());
        first.is_some_and(|first| now.saturating_duration_since(*first) < self.window)
    }

    fn forget(&self, key: &InstanceKey) {
        self.seen().ends.remove(key);
    }
}

/// Whether a service has the share of its instances without those that are damped; `more` come to these.
fn has_share(service: &Service, more: usize, share: f64) -> bool {
    let serves = |it: &&std::sync::Arc<Instance>| {
        it.damped.is_none() && it.state == State::Serving && it.is_published()
    };
    let (serving, all) = (service.instances().filter(serves).count(), service.instances().len() + more);
    serving > 0 && serving as f64 >= share * all as f64
}

impl Inner {
    /// Whether proxies are not to be told of a new run yet. Never where too few would be left.
    pub(super) fn damping(&self, snapshot: &Snapshot, key: &InstanceKey) -> Option<Box<Damped>> {
        let Guards { min_share, flaps, flap_window, flap_penalty, .. } = self.config.guards;
        if !self.flaps.too_often(key, Instant::now()) {
            return None;
        }
        let service = snapshot.service(&key.service)?;
        let is_more = service.instance(&key.id).is_none();
        if !has_share(service, usize::from(is_more), min_share) {
            return None;
        }
        self.metrics.dampings.inc();
        let reason = format!(
            "it went {flaps} times within {}: proxies are told of it when it has lasted {}",
            format_duration(flap_window),
            format_duration(flap_penalty)
        );
        tracing::warn!(instance = %key, "damped: {reason}");
        Some(Box::new(Damped { until: rt::now() + flap_penalty, reason }))
    }

    /// Takes the mark off instances. `why` tells the history, and is `None` for those that keep it.
    pub(super) async fn undamp(
        &self,
        runs: Vec<Run>,
        by: &std::sync::Arc<str>,
        why: &str,
    ) -> super::batch::Written {
        self.write_each(runs, |present| {
            present.damped.as_ref()?;
            let mut next = (**present).clone();
            next.damped = None;
            let note = Note { what: What::Undamped, by: std::sync::Arc::clone(by), why: why.to_owned() };
            Some((Edit::Put(Box::new(next)), note))
        })
        .await
    }

    /// Forgets how often an instance went.
    pub(super) fn forgive(&self, key: &InstanceKey) {
        self.flaps.forget(key);
    }
}

impl Registry {
    /// Has proxies told of damped instances that have lasted, or that are needed.
    pub(super) async fn undamp_in_time(self) {
        let inner = &self.inner;
        let Guards { min_share, flap_penalty, .. } = inner.config.guards;
        let by: std::sync::Arc<str> = BY.into();
        // By the clock that has no jumps: that of the record is for people, and for a process that takes over.
        let mut until: BTreeMap<Run, Instant> = BTreeMap::new();
        loop {
            let snapshot = inner.catalog.latest();
            if snapshot.damped() == 0 {
                until.clear();
                if inner.catalog.newer_than(snapshot.revision()).await.is_none() {
                    return;
                }
                continue;
            }
            let now = Instant::now();
            let mut known = BTreeMap::new();
            let (mut lasted, mut needed) = (Vec::new(), Vec::new());
            for service in snapshot.services().filter(|service| service.damped() > 0) {
                let enough = has_share(service, 0, min_share);
                for instance in service.instances() {
                    let Some(damped) = instance.damped.as_ref().filter(|_| inner.keeps(instance)) else {
                        continue;
                    };
                    let run = (instance.key.clone(), instance.incarnation);
                    let left =
                        || damped.until.duration_since(rt::now()).unwrap_or_default().min(flap_penalty);
                    let at = until.get(&run).copied().unwrap_or_else(|| now + left());
                    if at <= now {
                        lasted.push(run.clone());
                    } else if !enough {
                        needed.push(run.clone());
                    }
                    known.insert(run, at);
                }
            }
            until = known;
            for (runs, why) in [(lasted, "it has lasted"), (needed, "too few others serve")] {
                if let Some(error) = inner.undamp(runs, &by, why).await.error {
                    tracing::warn!(%error, "proxies cannot be told of instances that were damped; trying again");
                }
            }
            tokio::time::sleep(LOOK).await;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::registry::tests::{key, node, registration};

    const PORT: u16 = 1;

    /// Ids of those that are damped.
    fn damped(registry: &Registry) -> Vec<String> {
        let snapshot = registry.catalog().latest();
        let all = snapshot.services().flat_map(|service| service.instances());
        all.filter(|it| it.damped.is_some()).map(|it| it.key.id.to_string()).collect()
    }

    /// A run that ends after `lasts`; what it was when it began.
    async fn run(registry: &Registry, id: &str, incarnation: u64, lasts: Duration, drains: bool) -> bool {
        let accepted = registry.register(registration(id, PORT, Some(incarnation))).await.unwrap();
        tokio::time::sleep(lasts).await;
        if drains {
            registry.drain(key(id), None).await.unwrap();
        }
        registry.deregister(key(id), None).await.unwrap();
        // The task that counts has its turn.
        tokio::time::sleep(Duration::from_millis(1)).await;
        accepted.instance.damped.is_some()
    }

    #[tokio::test(start_paused = true)]
    async fn who_comes_and_goes_is_kept_from_proxies_until_it_lasts() {
        let registry = node().await.registry;
        for id in ["x", "y", "z"] {
            registry.register(registration(id, 2, Some(1))).await.unwrap();
        }
        let second = Duration::from_secs(1);
        let mut seen = Vec::new();
        for incarnation in 1..=8 {
            seen.push(run(&registry, "a", incarnation, second, false).await);
        }
        assert_eq!(seen, [false, false, false, false, false, true, true, true]);

        registry.register(registration("a", PORT, Some(9))).await.unwrap();
        let since = Instant::now();
        registry.renew(key("a"), None).await.unwrap();
        registry.register(registration("a", PORT, Some(9))).await.unwrap();
        assert_eq!(damped(&registry), ["a"], "a renewal changes nothing");
        while !damped(&registry).is_empty() {
            for id in ["a", "x", "y", "z"] {
                registry.renew(key(id), None).await.unwrap();
            }
            tokio::time::sleep(second / 10).await;
        }
        let lasted = since.elapsed().as_secs_f64();
        assert!((60.0..60.5).contains(&lasted), "{lasted}");
        let entries = registry.history(&key("a").service).await.unwrap();
        let told: Vec<_> = entries.iter().rev().take(2).map(|it| (it.what.name(), it.why.as_str())).collect();
        let why = "it went 5 times within 2m: proxies are told of it when it has lasted 1m";
        assert_eq!(told, [("undamped", "it has lasted"), ("registered", why)]);

        // What was long ago does not count.
        registry.deregister(key("a"), None).await.unwrap();
        tokio::time::sleep(second * 130).await;
        for id in ["x", "y", "z"] {
            registry.register(registration(id, 2, Some(1))).await.unwrap();
        }
        assert!(!run(&registry, "a", 10, second, false).await);
    }

    #[tokio::test(start_paused = true)]
    async fn deploys_and_drains_are_never_damped() {
        let registry = node().await.registry;
        for turn in 0..4 {
            for id in ["a", "b", "c"] {
                registry.register(registration(id, PORT, Some(turn + 1))).await.unwrap();
                tokio::time::sleep(Duration::from_secs(1)).await;
            }
        }
        assert_eq!(damped(&registry), [""; 0], "three restarts of each within seconds");
        for incarnation in 5..30 {
            assert!(!run(&registry, "d", incarnation, Duration::from_millis(100), true).await);
        }
    }

    #[tokio::test(start_paused = true)]
    async fn a_service_keeps_its_share() {
        let registry = node().await.registry;
        let second = Duration::from_secs(1);
        for incarnation in 1..=8 {
            assert!(!run(&registry, "a", incarnation, second, false).await, "it is the only one");
        }
        for id in ["x", "y"] {
            registry.register(registration(id, 2, Some(1))).await.unwrap();
        }
        registry.register(registration("a", PORT, Some(9))).await.unwrap();
        assert_eq!(damped(&registry), ["a"]);
        let serving = |registry: &Registry| {
            let snapshot = registry.catalog().latest();
            let service = snapshot.service(&key("a").service).unwrap().clone();
            let has = service.instances().filter(|it| service.endpoints().has(it));
            has.map(|it| it.key.id.to_string()).collect::<Vec<_>>()
        };
        assert_eq!(serving(&registry), ["x"], "x and y are at one address");
        registry.deregister(key("x"), None).await.unwrap();
        tokio::time::sleep(second).await;
        assert_eq!(damped(&registry), ["a"], "y is half of the service");
        // At once, and for good a moment later.
        registry.deregister(key("y"), None).await.unwrap();
        assert_eq!(serving(&registry), ["a"]);
        tokio::time::sleep(second).await;
        assert_eq!(damped(&registry), [""; 0]);
        let entries = registry.history(&key("a").service).await.unwrap();
        let last = entries.last().unwrap();
        assert_eq!((last.what.name(), last.why.as_str()), ("undamped", "too few others serve"));
    }

    #[tokio::test(start_paused = true)]
    async fn a_restart_keeps_it_and_an_operator_ends_it() {
        use crate::{registry::tests::Node, store::MemoryStore};
        let store: std::sync::Arc<dyn crate::store::Store> = std::sync::Arc::new(MemoryStore::default());
        let first = Node::start(std::sync::Arc::clone(&store)).await;
        first.registry.register(registration("x", 2, Some(1))).await.unwrap();
        for incarnation in 1..=5 {
            run(&first.registry, "a", incarnation, Duration::from_secs(1), false).await;
        }
        first.registry.register(registration("a", PORT, Some(6))).await.unwrap();
        first.stop().await;
        let second = Node::start(store).await;
        tokio::time::sleep(Duration::from_secs(5)).await;
        assert_eq!(damped(&second.registry), ["a"]);
        let released = second.registry.release(key("a").service).await.unwrap();
        assert_eq!((released.removed, released.published), (0, 1));
        assert_eq!(damped(&second.registry), [""; 0]);
    }
}
