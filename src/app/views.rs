use std::{
    collections::HashMap,
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicU64, Ordering},
    },
    time::{Duration, SystemTime},
};

use prometheus_client::metrics::histogram::Histogram;
use tokio::{sync::Notify, time::Instant};

use crate::{
    catalog::{Changes, Reader, Snapshot},
    model::{Locality, Revision},
    resources::{ClientKind, Places, View, update_beside},
    rt::{self, Tasks},
    telemetry::{Metrics, Stage},
    xds::{Admit, Admitted, Code, Feed, Node, Proxies, Publisher, Refusal, ResourceSet, StreamPolicy},
};

/// Views of all services that may be in use at once. Each costs a rendering of the whole catalog, and a node may ask for one.
const MOST: usize = 256;

/// Likewise of some services, which cost what they name.
const MOST_SCOPED: usize = 4096;

/// The least time between two publications of a view, for each stream that the first concerned: about what it costs to bring
/// a change to a stream. Under a storm of changes this leaves the writers half the machine, and what is superseded meanwhile
/// is never sent.
const PACE: Duration = Duration::from_micros(20);

/// The longest such time.
const SLOWEST: Duration = Duration::from_millis(50);

/// How long a view that no stream holds any more is kept at most.
const IDLE: Duration = Duration::from_secs(10);

/// The resource sets in use: one a view, kept up as long as a stream holds it.
#[derive(Debug, Clone)]
pub(super) struct Views {
    catalog: Reader,
    proxies: Proxies,
    tasks: Tasks,
    families: Arc<Mutex<HashMap<View, Family>>>,
    /// From a durable change to its resources.
    published: Histogram,
    /// See [`View::leds_from`].
    leds_from: usize,
    /// Counts histories of resource sets, from the time at which the process started: none is ever met again.
    origins: Arc<AtomicU64>,
}

/// Views that differ only in where they are, by that. One task keeps up all of them, in step, so that those which see the same
/// have one and the same set.
#[derive(Debug, Default)]
struct Family {
    members: HashMap<Locality, Arc<Publisher>>,
    joined: Arc<Notify>,
}

impl Views {
    pub(super) fn new(
        catalog: Reader,
        proxies: Proxies,
        tasks: Tasks,
        metrics: &Metrics,
        leds_from: usize,
    ) -> Self {
        let start = rt::now().duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
        let origin = u64::try_from(start.as_nanos()).unwrap_or_default();
        Self {
            catalog,
            proxies,
            tasks,
            families: Arc::default(),
            published: metrics.propagation(Stage::Published),
            leds_from,
            origins: Arc::new(AtomicU64::new(origin)),
        }
    }

    /// The set of a view, now and as it changes; `None` when too many views are in use. Where something runs only decides what
    /// is preferred, so views that differ in nothing else give way to wider ones before any is refused.
    fn subscribe(&self, view: View) -> Option<Feed> {
        let most = if view.upstreams.is_some() { MOST_SCOPED } else { MOST };
        let here = view.locality.clone();
        let in_region = Locality { zone: "".into(), ..here.clone() };
        let family = View { locality: Locality::default(), ..view };
        let choices = [(here, most / 2), (in_region, most / 4 * 3), (Locality::default(), most)];
        choices.into_iter().find_map(|(place, most)| self.subscribe_within(&family, place, most))
    }

    /// The set of exactly this view, unless that makes more than `most` of its sort.
    fn subscribe_within(&self, family: &View, place: Locality, most: usize) -> Option<Feed> {
        let mut families = self.families();
        if let Some(publisher) = families.get(family).and_then(|family| family.members.get(&place)) {
            return Some(publisher.feed());
        }
        let of_sort = |view: &View| view.upstreams.is_some() == family.upstreams.is_some();
        let count = |families: &HashMap<View, Family>| {
            let families = families.iter().filter(|(view, _)| of_sort(view));
            families.map(|(_, family)| family.members.len()).sum::<usize>()
        };
        if count(&families) >= most {
            families.values_mut().for_each(Family::forget_unused);
            if count(&families) >= most {
                return None;
            }
        }
        let known = families.contains_key(family);
        let members = families.entry(family.clone()).or_default();
        let publisher = Publisher::new(&self.proxies);
        let feed = publisher.feed();
        members.members.insert(place, Arc::new(publisher));
        members.joined.notify_one();
        if !known {
            let joined = Arc::clone(&members.joined);
            self.tasks.spawn_until_shutdown("views", self.clone().project(family.clone(), joined));
        }
        Some(feed)
    }

    /// Follows the catalog until no stream holds a view of the family any more.
    async fn project(self, family: View, joined: Arc<Notify>) {
        let at = |place: &Locality| View { locality: place.clone(), ..family.clone() };
        let mut snapshot = self.catalog.latest();
        let mut places = Places::default();
        places.follow(&Snapshot::default(), &snapshot, &Changes::Resync, &family);
        let mut sets: HashMap<Locality, Arc<ResourceSet>> = HashMap::new();
        let mut calm = Instant::now();
        let origin = self.origins.fetch_add(1, Ordering::Relaxed);
        loop {
            let Some(members) = self.members(&family) else { return };
            sets.retain(|place, _| members.contains_key(place));
            for (place, publisher) in members.iter().filter(|(_, publisher)| publisher.latest().is_none()) {
                let widest = places.widest(place);
                let same = sets.iter().find(|(other, _)| places.widest(other) == widest);
                let set = same.map(|(_, set)| Arc::clone(set)).unwrap_or_else(|| {
                    let beside = sets.values().next().map(AsRef::as_ref);
                    let none = ResourceSet::starting(origin);
                    let set = update_beside(beside, &none, &snapshot, &Changes::Resync, &at(&widest));
                    Arc::new(set.with_published(Instant::now()))
                });
                sets.insert(place.clone(), Arc::clone(&set));
                publisher.publish(set);
                tokio::task::yield_now().await;
            }
            let newer = tokio::select! {
                newer = self.newer_than(snapshot.revision(), calm) => newer,
                () = joined.notified() => continue,
                () = tokio::time::sleep(IDLE) => continue,
            };
            let Some((next, changes)) = newer else { return };
            places.follow(&snapshot, &next, &changes, &family);
            snapshot = next;
            // Kept until the end, so that an address stands for one of them.
            let before: Vec<_> = sets.drain().collect();
            let mut done: HashMap<(usize, Locality), Arc<ResourceSet>> = HashMap::new();
            let mut last: Option<Arc<ResourceSet>> = None;
            let mut concerned = 0;
            for (place, set) in &before {
                let widest = places.widest(place);
                let view = at(&widest);
                // From the same set to what looks the same: the same set.
                let next = done.entry((Arc::as_ptr(set).addr(), widest)).or_insert_with(|| {
                    let next = update_beside(last.as_deref(), set, &snapshot, &changes, &view);
                    if let Some(taken) = snapshot.taken() {
                        self.published.observe(taken.elapsed().as_secs_f64());
                    }
                    Arc::new(next.with_published(Instant::now()))
                });
                last = Some(Arc::clone(next));
                if let Some(publisher) = members.get(place) {
                    concerned += publisher.publish(Arc::clone(next));
                }
                sets.insert(place.clone(), Arc::clone(next));
                tokio::task::yield_now().await;
            }
            calm = Instant::now()
                + PACE.saturating_mul(u32::try_from(concerned).unwrap_or(u32::MAX)).min(SLOWEST);
        }
    }

    /// Waits for a change, and until `calm`: one by itself goes at once. Cancel-safe.
    async fn newer_than(&self, revision: Revision, calm: Instant) -> Option<(Arc<Snapshot>, Changes)> {
        self.catalog.newer_than(revision).await?;
        tokio::time::sleep_until(calm).await;
        Some(self.catalog.since(revision))
    }

    /// Who is in the family; `None`, and the family is gone, when nobody is.
    fn members(&self, family: &View) -> Option<HashMap<Locality, Arc<Publisher>>> {
        let mut families = self.families();
        let members = families.get_mut(family)?;
        // Nobody can have subscribed since: that needs the same lock.
        members.forget_unused();
        if members.members.is_empty() {
            families.remove(family);
            return None;
        }
        Some(members.members.clone())
    }

    fn families(&self) -> MutexGuard<'_, HashMap<View, Family>> {
        // Every change of the map is one call; it is whole even after a panic.
        self.families.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Family {
    fn forget_unused(&mut self) {
        self.members.retain(|_, publisher| publisher.is_followed());
    }
}

impl Admit for Views {
    fn admit(&self, node: &Node) -> Result<Admitted, Refusal> {
        let view = View::of(node)
            .map_err(|error| Refusal { code: Code::InvalidArgument, message: error.to_string() })?
            .with_leds(node, self.leds_from);
        let policy = match view.kind {
            // Only what says that it is an Envoy is trusted to behave as one.
            ClientKind::Envoy if node.user_agent_name.starts_with("envoy") => StreamPolicy::ENVOY,
            ClientKind::Envoy => StreamPolicy::OTHER,
            ClientKind::Grpc => StreamPolicy::GRPC,
        };
        let feed = self.subscribe(view).ok_or_else(|| Refusal {
            code: Code::ResourceExhausted,
            message: format!(
                "too many different views are in use ({MOST} of all services, {MOST_SCOPED} of some): let proxies share \
                 disco.outbound_port and disco.upstreams"
            ),
        })?;
        Ok(Admitted { feed, policy })
    }
}

#[cfg(test)]
mod tests {
    use std::time::SystemTime;

    use super::*;
    use crate::{
        catalog::{self, Writer, catalog},
        model::{Health, Incarnation, Instance, InstanceKey, Lease, Revision, State},
        rt::Shutdown,
        xds::ResourceType,
    };

    struct Bench {
        writer: Writer,
        views: Views,
        revision: u64,
    }

    impl Bench {
        fn new() -> Self {
            let (writer, reader) = catalog();
            Self {
                writer,
                views: Views::new(
                    reader,
                    Proxies::default(),
                    Tasks::new(Shutdown::default()),
                    &Metrics::default(),
                    0,
                ),
                revision: 0,
            }
        }

        /// An instance of `service` by the name of its zone.
        fn put(&mut self, service: &str, zone: &str) {
            self.apply(catalog::Change::PutInstance(Instance {
                key: key(service, zone),
                incarnation: Incarnation(1),
                address: [10, 0, 0, zone.as_bytes()[0]].into(),
                port: 1.try_into().unwrap(),
                locality: place(zone),
                weight: 1.try_into().unwrap(),
                metadata: [].into(),
                state: State::Serving,
                check: None,
                health: Health::unchecked(SystemTime::UNIX_EPOCH),
                lease: Lease::Session,
                revision: Revision(1),
                registered_at: SystemTime::UNIX_EPOCH,
                stale: None,
                damped: None,
                owner: None,
            }));
        }

        fn remove(&mut self, service: &str, zone: &str) {
            self.apply(catalog::Change::RemoveInstance(key(service, zone)));
        }

        fn apply(&mut self, change: catalog::Change) {
            self.revision += 1;
            self.writer.apply(Revision(self.revision), vec![change]);
        }

        fn subscribe(&self, zone: &str) -> Option<Feed> {
            self.views.subscribe(View { locality: place(zone), ..View::envoy(1) })
        }

        /// What the stream is to be served, once it is up to date.
        async fn set(&self, feed: &Feed) -> Arc<ResourceSet> {
            for _ in 0..1000 {
                match feed.latest().filter(|set| set.revision().0 == self.revision) {
                    Some(set) => return set,
                    None => tokio::time::sleep(Duration::from_millis(1)).await,
                }
            }
            panic!("revision {} does not come", self.revision);
        }

        fn members(&self) -> usize {
            self.views.families().values().map(|family| family.members.len()).sum()
        }
    }

    fn key(service: &str, id: &str) -> InstanceKey {
        InstanceKey { service: service.parse().unwrap(), id: id.parse().unwrap() }
    }

    fn place(zone: &str) -> Locality {
        Locality { zone: zone.into(), ..Locality::default() }
    }

    fn digest(set: &ResourceSet) -> Vec<u64> {
        ResourceType::ALL.map(|kind| set.digest(kind)).into()
    }

    #[tokio::test]
    async fn w10_policies_by_user_agent() {
        let bench = Bench::new();
        for (name, policy) in [
            ("envoy", StreamPolicy::ENVOY),
            ("gRPC Go", StreamPolicy::GRPC),
            ("grpc-c++", StreamPolicy::GRPC),
            ("gRPC Rust tonic-xds", StreamPolicy::GRPC),
            ("", StreamPolicy::OTHER),
            ("something new", StreamPolicy::OTHER),
        ] {
            let node = Node { user_agent_name: name.into(), ..Node::default() };
            assert_eq!(bench.views.admit(&node).unwrap().policy, policy, "{name}");
        }
    }

    #[tokio::test(start_paused = true)]
    async fn places_that_see_the_same_share_a_set() {
        let mut bench = Bench::new();
        for zone in ["a", "x"] {
            bench.put("one", zone);
            bench.put("two", zone);
        }
        let [a, b, c] = ["a", "b", "c"].map(|zone| bench.subscribe(zone).unwrap());
        let (at_a, at_b, at_c) = (bench.set(&a).await, bench.set(&b).await, bench.set(&c).await);
        assert!(Arc::ptr_eq(&at_b, &at_c));
        assert_ne!(digest(&at_a), digest(&at_b));
        let bytes = |set: &ResourceSet| {
            set.get(ResourceType::Cluster, "one").unwrap().resource.delta_field().as_ptr()
        };
        assert_eq!(bytes(&at_a), bytes(&at_b), "what does not depend on the place is shared");

        // What b has so far leads on to what it has now.
        let before = bench.revision;
        bench.put("two", "b");
        let (at_b, at_c) = (bench.set(&b).await, bench.set(&c).await);
        assert_ne!(digest(&at_b), digest(&at_c));
        let changed = |set: &ResourceSet| {
            let names = set.changed_since(ResourceType::Endpoints, Revision(before)).unwrap();
            names.map(ToString::to_string).collect::<Vec<_>>()
        };
        assert_eq!((changed(&at_b), changed(&at_c)), (vec!["two".to_owned()], vec!["two".to_owned()]));

        bench.remove("two", "b");
        let (at_b, at_c) = (bench.set(&b).await, bench.set(&c).await);
        assert_eq!(digest(&at_b), digest(&at_c));
        let d = bench.subscribe("d").unwrap();
        let at_d = bench.set(&d).await;
        assert!(Arc::ptr_eq(&at_d, &at_b) || Arc::ptr_eq(&at_d, &at_c));
    }

    #[tokio::test(start_paused = true)]
    async fn many_places_are_served_as_if_anywhere() {
        let bench = Bench::new();
        let streams: Vec<_> = (0..2 * MOST).map(|n| bench.subscribe(&format!("z{n}"))).collect();
        assert!(streams.iter().all(Option::is_some), "refused for where it is");
        assert!(bench.members() <= MOST / 2 + 1);
        // Room is left for those that differ in something that they cannot do without.
        let ports: Vec<_> = (1..=MOST).map(|n| bench.views.subscribe(View::envoy(n as u16))).collect();
        let refused = ports.iter().filter(|stream| stream.is_none()).count();
        assert!(refused > 0 && bench.members() == MOST, "{refused} refused, {} in use", bench.members());
        let scoped = View { upstreams: Some(Arc::default()), ..View::envoy(1) };
        assert!(bench.views.subscribe(scoped).is_some());
    }

    #[tokio::test(start_paused = true)]
    async fn a_view_that_nobody_holds_is_forgotten() {
        let bench = Bench::new();
        let (here, there) = (bench.subscribe("a").unwrap(), bench.subscribe("b").unwrap());
        bench.set(&here).await;
        drop(there);
        tokio::time::sleep(IDLE * 2).await;
        assert_eq!(bench.members(), 1);
        drop(here);
        tokio::time::sleep(IDLE * 2).await;
        assert!(bench.views.families().is_empty());
        let again = bench.subscribe("a").unwrap();
        bench.set(&again).await;
    }
}
