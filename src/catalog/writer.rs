use std::sync::Arc;

use tokio::{sync::watch, time::Instant};

use super::{
    live::LiveBoard,
    reader::{Reader, Stale, State},
    snapshot::Change,
};
use crate::{
    model::{Instance, Revision, ServiceId},
    rt,
};

/// Changes that the catalog remembers. A reader further behind looks at everything.
const REMEMBERED: usize = 8192;

/// The one way into the catalog. Not cloneable: there is one writer.
#[derive(Debug)]
pub struct Writer {
    state: watch::Sender<Arc<State>>,
    live: LiveBoard,
}

/// An empty catalog: its writer and a reader.
pub fn catalog() -> (Writer, Reader) {
    let (sender, receiver) = watch::channel(Arc::new(State::default()));
    let live = LiveBoard::default();
    (Writer { state: sender, live: live.clone() }, Reader { state: receiver, live })
}

impl Writer {
    /// Publishes the state after `changes`, as of `revision`. A revision that is not newer than the present one is ignored:
    /// it has been applied before.
    pub fn apply(&mut self, revision: Revision, changes: Vec<Change>) {
        self.apply_all([(revision, changes)]);
    }

    /// As [`Writer::apply`] where the past is not what it was: readers look at everything.
    pub fn start_over(&mut self, revision: Revision, changes: Vec<Change>) {
        self.publish([(revision, changes)], true);
    }

    /// As [`Writer::apply`] for several revisions in order, published as one snapshot.
    pub fn apply_all(&mut self, batches: impl IntoIterator<Item = (Revision, Vec<Change>)>) {
        self.publish(batches, false);
    }

    fn publish(&mut self, batches: impl IntoIterator<Item = (Revision, Vec<Change>)>, start_over: bool) {
        let now = Arc::clone(&self.state.borrow());
        let (mut snapshot, mut log, mut log_from) = ((*now.snapshot).clone(), now.log.clone(), now.log_from);
        let (mut times, time) = (now.times.clone(), rt::now());
        for (revision, changes) in batches {
            if revision <= snapshot.revision() {
                continue;
            }
            let only_live = !changes.is_empty() && changes.iter().all(|change| change.touches().is_none());
            if start_over || (changes.len() > REMEMBERED && !only_live) {
                log.clear();
                log_from = revision;
            } else {
                let touched = changes.iter().filter_map(Change::touches);
                log.extend(touched.map(|(service, id)| (revision, service.clone(), id.cloned())));
            }
            let mut said = Vec::new();
            for change in &changes {
                match change {
                    // What a run said ends with it.
                    Change::PutInstance(Instance { key, incarnation, .. })
                        if self.live.get(key).is_some_and(|live| live.incarnation != *incarnation) =>
                    {
                        said.push((key.clone(), None));
                    }
                    Change::RemoveInstance(key) | Change::RemoveLive(key) => said.push((key.clone(), None)),
                    Change::PutLive(key, live) => said.push((key.clone(), Some(live.clone()))),
                    Change::PutInstance(_)
                    | Change::PutService(_)
                    | Change::RemoveService(_)
                    | Change::PutRoles(..)
                    | Change::RemoveRoles(_)
                    | Change::PutHealth(..) => {}
                }
            }
            if !only_live {
                times.push_back((revision, time));
                let gone: Vec<_> = changes.iter().filter_map(Change::removed_service).cloned().collect();
                snapshot = snapshot.apply(revision, changes);
                let is_empty = |id: &ServiceId| {
                    snapshot.service(id).is_none_or(|service| service.instances().len() == 0)
                };
                gone.iter().filter(|id| is_empty(id)).for_each(|id| self.live.forget(id));
            }
            for (key, live) in said {
                let run = snapshot.instance(&key).map(|instance| instance.incarnation);
                // It may have been said just before the instance left.
                if live.as_ref().is_none_or(|live| run == Some(live.incarnation)) {
                    self.live.put(&key, revision, live);
                }
            }
        }
        while log.len() > REMEMBERED {
            if let Some((dropped, ..)) = log.pop_front() {
                log_from = dropped;
            }
        }
        while times.len() > REMEMBERED {
            times.pop_front();
        }
        if snapshot.revision() > now.snapshot.revision() {
            snapshot.taken = Some(Instant::now());
            let (snapshot, stale) = (Arc::new(snapshot), now.stale.clone());
            self.state.send_replace(Arc::new(State { snapshot, log, log_from, times, stale }));
        }
    }

    /// Notes that what is known may be older than the truth, or is not any more. What is known stays.
    pub fn set_stale(&mut self, stale: Option<Stale>) {
        let now = Arc::clone(&self.state.borrow());
        if now.stale == stale {
            return;
        }
        let State { snapshot, log, log_from, times, .. } = &*now;
        self.state.send_replace(Arc::new(State {
            snapshot: Arc::clone(snapshot),
            log: log.clone(),
            log_from: *log_from,
            times: times.clone(),
            stale,
        }));
    }
}

#[cfg(test)]
mod tests {
    use std::{
        collections::{BTreeMap, BTreeSet},
        time::SystemTime,
    };

    use proptest::prelude::*;

    use super::{super::reader::Changes, *};
    use crate::model::{
        Health, Incarnation, Instance, InstanceKey, Lease, Locality, Roles, Stale, State::Serving,
    };

    fn instance(service: u8, id: u8, port: u16, revision: Revision) -> Instance {
        Instance {
            key: key(service, id),
            incarnation: Incarnation(1),
            address: [127, 0, 0, 1].into(),
            port: port.try_into().unwrap(),
            locality: Locality::default(),
            weight: 1.try_into().unwrap(),
            metadata: BTreeMap::new(),
            state: Serving,
            check: None,
            health: Health::unchecked(SystemTime::UNIX_EPOCH),
            lease: Lease::Session,
            owner: None,
            revision,
            registered_at: SystemTime::UNIX_EPOCH,
            damped: None,
            stale: port
                .is_multiple_of(2)
                .then(|| Box::new(Stale { since: SystemTime::UNIX_EPOCH, reason: String::new() })),
        }
    }

    fn key(service: u8, id: u8) -> InstanceKey {
        InstanceKey { service: format!("s{service}").parse().unwrap(), id: format!("i{id}").parse().unwrap() }
    }

    /// A service as the naive map has it.
    #[derive(Debug, Default)]
    struct Naive {
        registered: bool,
        instances: BTreeMap<u8, u16>,
        term: Option<u64>,
    }

    proptest! {
        /// Any history: the catalog equals a naive map, and applying what `since` names to an old view gives the new one.
        #[test]
        fn equals_a_naive_map(history in proptest::collection::vec((0..6u8, 0..3u8, 0..4u8, 1..9u16), 1..80)) {
            let (mut writer, reader) = catalog();
            let mut naive: BTreeMap<u8, Naive> = BTreeMap::new();
            let mut seen = reader.latest();
            for (n, (op, service, id, port)) in history.into_iter().enumerate() {
                let revision = Revision(n as u64 + 1);
                let name = key(service, 0).service;
                let change = match op {
                    0 => {
                        naive.entry(service).or_default().registered = true;
                        Change::PutService(name)
                    }
                    1 => {
                        if let Some(known) = naive.get_mut(&service) {
                            *known = Naive { term: known.term, ..Naive::default() };
                        }
                        Change::RemoveService(name)
                    }
                    2 => {
                        if let Some(known) = naive.get_mut(&service) {
                            known.instances.remove(&id);
                        }
                        Change::RemoveInstance(key(service, id))
                    }
                    3 if port % 2 == 0 => {
                        if let Some(known) = naive.get_mut(&service) {
                            known.term = None;
                        }
                        Change::RemoveRoles(name)
                    }
                    3 => {
                        let term = u64::from(port);
                        naive.entry(service).or_default().term = Some(term);
                        Change::PutRoles(name, Arc::new(Roles { term, ..Roles::default() }))
                    }
                    _ => {
                        let known = naive.entry(service).or_default();
                        known.registered = true;
                        known.instances.insert(id, port);
                        Change::PutInstance(instance(service, id, port, revision))
                    }
                };
                naive.retain(|_, known| known.registered || known.term.is_some());
                writer.apply(revision, vec![change]);
                let now = reader.latest();
                let got = now.services().map(|s| {
                    let instances = s.instances().map(|i| (i.key.id.to_string(), i.port.get()));
                    let term = s.roles.as_ref().map(|roles| roles.term);
                    format!("{} {term:?} {} {:?}", s.id, s.is_registered(), instances.collect::<Vec<_>>())
                });
                let want = naive.iter().map(|(s, Naive { registered, instances, term })| {
                    let instances = instances.iter().map(|(i, p)| (format!("i{i}"), *p));
                    format!("s{s} {term:?} {registered} {:?}", instances.collect::<Vec<_>>())
                });
                let (got, want): (Vec<_>, Vec<_>) = (got.collect(), want.collect());
                prop_assert_eq!(got, want);
                let ports = || naive.values().flat_map(|known| known.instances.values());
                prop_assert_eq!(now.instances(), ports().count());
                let stale = ports().filter(|port| *port % 2 == 0).count();
                prop_assert_eq!(now.stale(), stale);
                prop_assert_eq!(now.services().map(|service| service.stale()).sum::<usize>(), stale);

                if n % 3 == 0 {
                    let Changes::Touched(touched) = reader.since(seen.revision()).1 else { panic!("resync") };
                    for service in now.services() {
                        let untouched = !touched.iter().any(|(id, _)| *id == service.id);
                        let same = seen.service(&service.id).is_some_and(|old| Arc::ptr_eq(old, service));
                        prop_assert!(!untouched || same, "{} changed unnoticed", service.id);
                    }
                    seen = now;
                }
            }
        }
    }

    #[tokio::test]
    async fn far_behind_is_told_to_look_at_everything() {
        let (mut writer, reader) = catalog();
        for n in 1..=REMEMBERED as u64 + 2 {
            writer.apply(Revision(n), vec![Change::PutInstance(instance(0, 0, 1, Revision(n)))]);
        }
        assert_eq!(reader.since(Revision(1)).1, Changes::Resync);
        assert!(matches!(reader.since(Revision(2)).1, Changes::Touched(t) if t.len() == 1));
        assert_eq!(reader.since(reader.latest().revision()).1, Changes::Touched(BTreeSet::new()));
        assert_eq!(reader.changes_of(Revision(2)), None);
        assert_eq!(reader.changes_of(Revision(3)).map(|touched| touched.len()), Some(1));
        assert_eq!(reader.changes_of(Revision(REMEMBERED as u64 * 2)), Some(BTreeSet::new()));
        assert!(reader.came(Revision(3)) <= reader.came(Revision(REMEMBERED as u64)));
        assert_eq!(reader.came(Revision(REMEMBERED as u64 * 2)), None);
        assert!(reader.reached(Revision(5)).await);
        writer.apply(Revision(3), vec![Change::RemoveService(key(0, 0).service)]);
        assert_eq!(reader.latest().instances(), 1);
    }

    #[test]
    fn more_than_is_remembered_at_once_is_looked_at_whole() {
        let (mut writer, reader) = catalog();
        let many = (0..=REMEMBERED).map(|n| Change::PutService(format!("s{n}").parse().unwrap()));
        writer.apply(Revision(5), many.collect());
        assert_eq!(reader.since(Revision(4)).1, Changes::Resync);
        assert_eq!(reader.changes_of(Revision(5)), None);
        writer.apply(Revision(6), vec![Change::PutInstance(instance(0, 0, 1, Revision(6)))]);
        assert!(matches!(reader.since(Revision(5)).1, Changes::Touched(touched) if touched.len() == 1));
    }

    #[test]
    fn instances_share_the_name_of_their_service() {
        let (mut writer, reader) = catalog();
        let both = [0, 1].map(|id| Change::PutInstance(instance(0, id, 1, Revision(1))));
        writer.apply(Revision(1), both.into());
        let snapshot = reader.latest();
        let service = snapshot.service(&key(0, 0).service).unwrap();
        let name = service.id.shared();
        assert!(service.instances().all(|instance| Arc::ptr_eq(&instance.key.service.shared(), &name)));
    }
}
