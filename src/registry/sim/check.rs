//! What must hold whatever happens.

use std::{collections::BTreeMap, time::Duration};

use prost::Message as _;
use tokio::time::Instant;

use super::{
    super::record,
    world::{Phase, SHARE, TTL, WINDOW, World},
};
use crate::{
    catalog::Change,
    model::{Incarnation, Instance},
    proto::v1,
    store::{Event, Key},
};

/// For how long a store that went back may miss what was accepted: until somebody who knows of it writes it again.
const RESTORED: Duration = Duration::from_secs(15);

/// What went is written down with the second in which it did.
const ROUNDED: Duration = Duration::from_secs(2);

#[derive(Debug, Default)]
pub(super) struct Checks {
    commits: usize,
    /// Instances of each service in the store.
    present: BTreeMap<String, Vec<Key>>,
    /// Removals without evidence.
    lost: Vec<(Instant, String)>,
    epoch: u64,
}

impl Checks {
    /// What holds at any time.
    pub(super) fn look(&mut self, world: &World) -> Result<(), String> {
        self.guards(world)?;
        for (node, catalog) in world.catalogs() {
            let snapshot = catalog.latest();
            for instance in snapshot.services().flat_map(|service| service.instances()) {
                let owners = world.owners();
                let n = owners.iter().position(|owner| owner.key == instance.key);
                let n = n.ok_or_else(|| format!("n{node} has {}, which nobody is", instance.key))?;
                if !world.attempted.lock().unwrap().contains(&(n, instance.incarnation.0)) {
                    return Err(format!("n{node} has {} as nobody registered it", instance.key));
                }
            }
            let epoch = world.shared.disk().epoch;
            // A process that was cut off while the store went back writes what it knew, also what was removed since then; that
            // goes when its lease is over, which the end shows.
            let removed = world.deregistered.lock().unwrap();
            for removed in removed.iter().filter(|it| it.epoch == epoch && epoch == 0) {
                let run = (removed.owner, removed.incarnation);
                let key = world.owners()[removed.owner].key.clone();
                let seen = snapshot.instance(&key);
                let late = world.under_way.lock().unwrap().get(&run).is_some_and(|n| *n > 0);
                if snapshot.revision() >= removed.revision
                    && !late
                    && seen.is_some_and(|it| it.incarnation == Incarnation(removed.incarnation))
                {
                    return Err(format!(
                        "n{node} at {} has {key}, which was removed at {}",
                        snapshot.revision(),
                        removed.revision
                    ));
                }
            }
        }
        let restored = world.restored.lock().unwrap().is_some_and(|at| at.elapsed() < RESTORED);
        let disk = world.shared.disk();
        for owner in world.owners().iter() {
            let Some(vouched) = owner.vouched else { continue };
            let key = record::instance_key(&owner.key);
            let stored = disk.records.get(&key).and_then(|it| instance(&key, it.value.clone()));
            let is_there = stored.is_some_and(|it| it.incarnation == Incarnation(owner.incarnation));
            let is_session = vouched.elapsed() >= TTL;
            if !is_there && !restored && !is_session {
                let ago = vouched.elapsed();
                return Err(format!("{} is gone, which was vouched for {ago:?} ago", owner.key));
            }
        }
        Ok(())
    }

    /// Removals without evidence leave the share.
    fn guards(&mut self, world: &World) -> Result<(), String> {
        let commits = world.shared.commits.lock().unwrap();
        let epoch = world.shared.disk().epoch;
        let news = &commits[self.commits..];
        self.commits = commits.len();
        if epoch != self.epoch {
            // What was there at each commit is unknown.
            self.epoch = epoch;
            self.present.clear();
            // With the store, what is written down of removals went back.
            self.lost.clear();
            for key in world.shared.disk().records.keys() {
                if let Some(service) = service_of(key) {
                    self.present.entry(service.to_owned()).or_default().push(key.clone());
                }
            }
            return Ok(());
        }
        for (at, Event { changes, .. }) in news {
            let mut services = Vec::new();
            for (key, value) in changes {
                if let Some(service) = service_of(key) {
                    let present = self.present.entry(service.to_owned()).or_default();
                    present.retain(|it| it != key);
                    if value.is_some() {
                        present.push(key.clone());
                    }
                }
                let noted = key.strip_prefix("history/").zip(value.clone());
                let Some((path, value)) = noted else { continue };
                let entry = v1::HistoryEntry::decode(value).unwrap();
                let ends = ["expired", "hung up"].contains(&entry.what.as_str());
                if ends && !entry.why.contains("refuses") {
                    let service = path.split('/').next().unwrap().to_owned();
                    let others = self.lost.iter().any(|(then, _)| *at - *then < WINDOW - ROUNDED);
                    if entry.why.contains("accepts") && (others || entry.why.contains("session")) {
                        return Err(format!("{} was removed while it lives: {}", entry.id, entry.why));
                    }
                    self.lost.push((*at, service.clone()));
                    services.push(service);
                }
            }
            self.lost.retain(|(then, _)| *at - *then < WINDOW);
            for service in services {
                let has = self.present.get(&service).map_or(0, Vec::len);
                let lost = self.lost.iter().filter(|(_, of)| *of == service).count();
                if (has as f64) < SHARE * (has + lost) as f64 {
                    return Err(format!("{service} lost {lost} without evidence, and {has} are left"));
                }
            }
        }
        Ok(())
    }

    /// What holds when nothing has gone wrong for a while.
    pub(super) fn end(&self, world: &World) -> Result<(), String> {
        let owners = world.owners();
        let mut want: Vec<String> = owners
            .iter()
            .filter(|owner| owner.phase == Phase::Running)
            .map(|owner| format!("{} {}", owner.key, owner.incarnation))
            .collect();
        want.sort();
        let stored: Vec<Instance> = {
            let disk = world.shared.disk();
            let all = disk.records.iter();
            all.filter_map(|(key, it)| {
                let revision = crate::model::Revision(it.revision);
                match record::decode(key, Some(&it.value), revision) {
                    Ok(Some(Change::PutInstance(instance))) => Some(instance),
                    _ => None,
                }
            })
            .collect()
        };
        for (node, catalog) in world.catalogs() {
            let snapshot = catalog.latest();
            let all = || snapshot.services().flat_map(|service| service.instances());
            let mut got: Vec<String> = all().map(|it| format!("{} {}", it.key, it.incarnation)).collect();
            got.sort();
            if got != want {
                return Err(format!("n{node} has {got:?}, and alive are {want:?}"));
            }
            if let Some(held) = all().find(|it| it.stale.is_some()) {
                return Err(format!("n{node} holds {}: {:?}", held.key, held.stale));
            }
            let mut known: Vec<Instance> = all().map(|it| (**it).clone()).collect();
            known.sort_by_key(|it| record::instance_key(&it.key));
            if known != stored {
                return Err(format!("n{node} has {known:#?}, and the store {stored:#?}"));
            }
        }
        Ok(())
    }
}

fn service_of(key: &Key) -> Option<&str> {
    key.strip_prefix(record::INSTANCES)?.split('/').next()
}

fn instance(key: &Key, value: bytes::Bytes) -> Option<Instance> {
    match record::decode(key, Some(&value), crate::model::Revision(1)) {
        Ok(Some(Change::PutInstance(instance))) => Some(instance),
        _ => None,
    }
}
