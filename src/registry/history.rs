//! What changed, when, by whom and why. Each entry is written with the change itself, so none is lost and none is invented,
//! and every process over the store reads the same; the catalog does not hold them.

use std::{
    collections::BTreeMap,
    sync::{
        Arc,
        atomic::{AtomicU32, AtomicU64, AtomicUsize, Ordering},
    },
    time::{Duration, SystemTime, UNIX_EPOCH},
};

use bytes::Bytes;
use prost::Message as _;
use tokio::sync::Notify;

use super::{Error, Inner, Registry, record};
use crate::{
    model::{Incarnation, Instance, InstanceId, InstanceKey, Revision, ServiceId, State},
    proto::v1,
    rt,
    store::{self, Condition, Key, Op},
};

/// `history/{service}/{milliseconds}-{unique}`: by service and time. Apart from the catalog, so that nobody reads it who does not
/// ask for it.
const HISTORY: &str = "history/";

/// How often what is too old is looked for.
const LOOK: Duration = Duration::from_secs(10 * 60);

/// Entries removed in one commit.
const CHUNK: usize = 100;

/// How much of what happened is kept.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct HistoryLimits {
    /// For how long.
    pub keep: Duration,
    /// How many entries of all services, the newest; 0 writes none. For a short time there may be a quarter more.
    pub entries: usize,
    /// How many of one service.
    pub per_service: usize,
}

impl Default for HistoryLimits {
    fn default() -> Self {
        Self { keep: Duration::from_secs(7 * 24 * 60 * 60), entries: 100_000, per_service: 10_000 }
    }
}

/// What happened to an instance.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum What {
    /// A new instance, or a new run of one.
    Registered,
    /// Another address, weight, metadata, or way to keep it.
    Updated,
    /// It takes no new calls from then on.
    Drained,
    /// Its owner came to another Disco process; nothing else changed.
    Moved,
    /// Too many went with it to be believed.
    Held,
    /// It was held, and its owner vouches for it again.
    Returned,
    /// Removed, as somebody asked for.
    Deregistered,
    /// Removed: its lease was over, or its session was lost.
    Expired,
    /// Removed: the connection of its session was closed under it.
    HungUp,
    /// Removed: its owner closed its session.
    Closed,
    /// Removed by an operator while it was held.
    Released,
    /// Its checks came to another verdict.
    Judged,
    /// It was damped, and is no more.
    Undamped,
}

impl What {
    const ALL: [Self; 13] = [
        Self::Registered,
        Self::Updated,
        Self::Drained,
        Self::Moved,
        Self::Held,
        Self::Returned,
        Self::Deregistered,
        Self::Expired,
        Self::HungUp,
        Self::Closed,
        Self::Released,
        Self::Judged,
        Self::Undamped,
    ];

    /// Its word.
    pub fn name(self) -> &'static str {
        match self {
            Self::Registered => "registered",
            Self::Updated => "updated",
            Self::Drained => "drained",
            Self::Moved => "moved",
            Self::Held => "held",
            Self::Returned => "returned",
            Self::Deregistered => "deregistered",
            Self::Expired => "expired",
            Self::HungUp => "hung up",
            Self::Closed => "session closed",
            Self::Released => "released",
            Self::Judged => "judged",
            Self::Undamped => "undamped",
        }
    }

    /// Whether the instance is gone from then on.
    pub fn removes(self) -> bool {
        matches!(self, Self::Deregistered | Self::Expired | Self::HungUp | Self::Closed | Self::Released)
    }

    /// What a write makes of an instance.
    pub(super) fn of(before: Option<&Instance>, after: &Instance) -> Self {
        let Some(before) = before.filter(|before| before.incarnation == after.incarnation) else {
            return Self::Registered;
        };
        if before.state != after.state && after.state == State::Draining {
            return Self::Drained;
        }
        if before.stale.is_some() && after.stale.is_none() {
            return Self::Returned;
        }
        let as_before = Instance { owner: before.owner.clone(), revision: before.revision, ..after.clone() };
        if as_before == *before { Self::Moved } else { Self::Updated }
    }
}

/// One change of one instance.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Entry {
    /// When, by the clock of the process that wrote it.
    pub at: SystemTime,
    /// The change.
    pub revision: Revision,
    /// The instance within the service.
    pub id: InstanceId,
    /// Which run of it.
    pub incarnation: Incarnation,
    /// What happened.
    pub what: What,
    /// Who asked for it.
    pub by: String,
    /// The evidence, where nobody asked for it.
    pub why: String,
    /// What it was from then on; `None` when it was removed.
    pub instance: Option<Box<Instance>>,
}

/// Writes entries.
#[derive(Debug)]
pub(super) struct History {
    limits: HistoryLimits,
    /// The newest time that was given, so that a clock that is set back does not turn the order around.
    newest: AtomicU64,
    count: AtomicU32,
    /// Apart from those of other processes at the same time.
    seed: u16,
    unpruned: AtomicUsize,
    many: Notify,
}

impl History {
    pub(super) fn new(limits: HistoryLimits) -> Self {
        Self {
            limits,
            newest: AtomicU64::new(0),
            count: AtomicU32::new(0),
            seed: fastrand::u16(..),
            unpruned: AtomicUsize::new(0),
            many: Notify::new(),
        }
    }

    /// The operation that writes down what happens; `instance` is what it is from then on, or was before it is removed.
    pub(super) fn note(&self, instance: &Instance, what: What, by: &str, why: &str) -> Option<Op> {
        if self.limits.entries == 0 {
            return None;
        }
        let now = rt::now();
        let millis = now.duration_since(UNIX_EPOCH).unwrap_or_default().as_millis();
        let millis = u64::try_from(millis).unwrap_or(u64::MAX);
        let millis = self.newest.fetch_max(millis, Ordering::Relaxed).max(millis);
        let count = self.count.fetch_add(1, Ordering::Relaxed);
        if self.unpruned.fetch_add(1, Ordering::Relaxed) >= self.limits.entries / 4 {
            self.many.notify_one();
        }
        let InstanceKey { service, id } = &instance.key;
        let entry = v1::HistoryEntry {
            at: Some((UNIX_EPOCH + Duration::from_millis(millis)).into()),
            id: id.to_string(),
            incarnation: instance.incarnation.0,
            what: what.name().to_owned(),
            by: by.to_owned(),
            why: why.to_owned(),
            instance: (!what.removes()).then(|| record::without_key(instance)),
        };
        Some(Op::Put {
            key: format!("{HISTORY}{service}/{millis:015}-{count:08x}{:04x}", self.seed).into(),
            value: Bytes::from(entry.encode_to_vec()),
            when: Condition::Always,
        })
    }
}

fn decode(service: &ServiceId, entry: &store::Entry) -> Result<Entry, String> {
    let v1::HistoryEntry { at, id, incarnation, what, by, why, instance } =
        v1::HistoryEntry::decode(entry.value.clone()).map_err(|error| error.to_string())?;
    let key = InstanceKey { service: service.clone(), id: id.parse()? };
    let revision = entry.revision;
    let instance = instance.map(|it| record::instance_from_proto(key.clone(), it, revision)).transpose()?;
    Ok(Entry {
        at: record::wire_time(at, "at")?.unwrap_or(SystemTime::UNIX_EPOCH),
        revision,
        id: key.id,
        incarnation: Incarnation(incarnation),
        what: What::ALL.into_iter().find(|it| it.name() == what).ok_or("an unknown kind of change")?,
        by,
        why,
        instance: instance.map(Box::new),
    })
}

impl Registry {
    /// What is remembered of a service, oldest first. Empty when it never was, or that is too long ago.
    ///
    /// # Errors
    /// [`Error::Store`].
    pub async fn history(&self, service: &ServiceId) -> Result<Vec<Entry>, Error> {
        let listing = self.inner.store.list(&format!("{HISTORY}{service}/")).await.map_err(Error::Store)?;
        let entries = listing.entries.iter().filter_map(|entry| {
            decode(service, entry)
                .inspect_err(|error| tracing::warn!(key = %entry.key, error, "left out of the history"))
                .ok()
        });
        Ok(entries.collect())
    }

    /// Removes what is too old, and what is too much.
    pub(super) async fn prune_history(self) {
        let inner = &self.inner;
        loop {
            tokio::select! {
                () = tokio::time::sleep(LOOK) => {}
                () = inner.history.many.notified() => {}
            }
            inner.history.unpruned.store(0, Ordering::Relaxed);
            // One process does it for all.
            if !inner.members.borrow().is_mine(HISTORY) {
                continue;
            }
            if let Err(error) = inner.prune(rt::now()).await {
                tracing::warn!(%error, "the history could not be pruned; trying again later");
            }
        }
    }
}

impl Inner {
    async fn prune(&self, now: SystemTime) -> Result<(), store::StoreError> {
        let listing = self.store.list(HISTORY).await?;
        let keys: Vec<&Key> = listing.entries.iter().map(|entry| &entry.key).collect();
        let surplus = surplus(&keys, now, &self.history.limits);
        for chunk in surplus.chunks(CHUNK) {
            let delete = |key: &&Key| Op::Delete { key: Arc::clone(key), when: Condition::Always };
            self.store.commit(chunk.iter().map(delete).collect()).await?;
        }
        Ok(())
    }
}

/// Service and time of a key.
fn place(key: &str) -> Option<(&str, u64)> {
    let (service, rest) = key.strip_prefix(HISTORY)?.split_once('/')?;
    Some((service, rest.split_once('-')?.0.parse().ok()?))
}

/// What is to go of `keys`, which are in order: the too old, then the oldest of each service and of all.
fn surplus<'a>(keys: &[&'a Key], now: SystemTime, limits: &HistoryLimits) -> Vec<&'a Key> {
    let oldest = now.checked_sub(limits.keep).and_then(|at| at.duration_since(UNIX_EPOCH).ok());
    let oldest = oldest.map_or(0, |at| u64::try_from(at.as_millis()).unwrap_or(u64::MAX));
    let mut services: BTreeMap<&str, Vec<(u64, &'a Key)>> = BTreeMap::new();
    let mut gone = Vec::new();
    for key in keys {
        match place(key) {
            Some((service, at)) if at >= oldest => services.entry(service).or_default().push((at, key)),
            _ => gone.push(*key),
        }
    }
    let mut kept = Vec::new();
    for entries in services.into_values() {
        let (more, newest) = entries.split_at(entries.len().saturating_sub(limits.per_service));
        gone.extend(more.iter().map(|(_, key)| *key));
        kept.extend_from_slice(newest);
    }
    kept.sort_unstable();
    let more = kept.len().saturating_sub(limits.entries);
    gone.extend(kept.into_iter().take(more).map(|(_, key)| key));
    gone
}

#[cfg(test)]
mod tests {
    use super::{
        super::{
            Ended,
            tests::{TTL, key, node, registration},
        },
        *,
    };
    use crate::model::Update;

    #[test]
    fn what_is_too_old_and_what_is_too_much() {
        let day = 24 * 60 * 60 * 1000;
        let now = UNIX_EPOCH + Duration::from_millis(100 * day);
        let key = |service: &str, at: u64| -> Key { format!("{HISTORY}{service}/{at:015}-0").into() };
        let keys = [
            key("a", 10 * day),
            key("a", 95 * day),
            key("a", 97 * day),
            key("a", 98 * day),
            key("b", 96 * day),
            key("b", 99 * day),
        ];
        let check = |entries, per_service, want: &[usize]| {
            let limits = HistoryLimits { entries, per_service, ..HistoryLimits::default() };
            let keys: Vec<&Key> = keys.iter().collect();
            let gone = surplus(&keys, now, &limits);
            let want: Vec<&Key> = want.iter().map(|n| keys[*n]).collect();
            assert_eq!(gone, want, "{entries} {per_service}");
        };
        check(10, 10, &[0]);
        check(10, 2, &[0, 1]);
        check(10, 1, &[0, 1, 2, 4]);
        check(3, 10, &[0, 1, 4]);
        check(2, 2, &[0, 1, 4, 2]);
    }

    #[tokio::test(start_paused = true)]
    async fn every_change_is_written_down_with_its_reason() {
        let registry = node().await.registry;
        let caller = registry.called_by("10.0.0.7:4711");
        caller.register(registration("a", 1, Some(1))).await.unwrap();
        caller.register(registration("a", 1, Some(1))).await.unwrap();
        caller.renew(key("a"), None).await.unwrap();
        let update = Update { weight: 7.try_into().ok(), metadata: None };
        caller.update(key("a"), None, update).await.unwrap();
        caller.drain(key("a"), None).await.unwrap();
        let last = caller.deregister(key("a"), None).await.unwrap();
        let session = caller.session();
        for id in ["b", "c"] {
            session.register(registration(id, 1, Some(1))).await.unwrap();
        }
        session.end(Ended::HungUp).await;
        caller.register(registration("d", 1, Some(1))).await.unwrap();
        tokio::time::sleep(TTL + Duration::from_secs(1)).await;

        let entries = registry.history(&key("a").service).await.unwrap();
        let got: Vec<_> = entries
            .iter()
            .map(|it| format!("{} {} by {}: {}", it.id, it.what.name(), it.by, it.why))
            .collect();
        let refuses = "its connection was closed, as by the end of its process, and it refuses connections";
        assert_eq!(
            got,
            [
                "a registered by 10.0.0.7:4711: ",
                "a updated by 10.0.0.7:4711: ",
                "a drained by 10.0.0.7:4711: ",
                "a deregistered by 10.0.0.7:4711: ",
                "b registered by 10.0.0.7:4711: ",
                "c registered by 10.0.0.7:4711: ",
                &format!("b hung up by disco: {refuses}"),
                &format!("c hung up by disco: {refuses}"),
                "d registered by 10.0.0.7:4711: ",
                "d expired by disco: its lease of 30s ended without a renewal, and it refuses connections",
            ]
        );
        assert_eq!(entries[1].instance.as_ref().unwrap().weight.get(), 7);
        assert_eq!((&entries[3].instance, entries[3].revision), (&None, last));
        assert!(entries.is_sorted_by_key(|it| (it.at, it.revision)));
        assert_eq!(registry.history(&"else".parse().unwrap()).await.unwrap(), []);
    }

    #[tokio::test(start_paused = true)]
    async fn it_does_not_grow_beyond_its_bounds() {
        let registry = node().await.registry;
        let limits = HistoryLimits { entries: 20, per_service: 10, ..HistoryLimits::default() };
        for n in 0..30 {
            registry.register(registration(&format!("i{n}"), 1, Some(1))).await.unwrap();
        }
        let before = registry.catalog().latest().instances();
        let listing = registry.inner.store.list(HISTORY).await.unwrap();
        let keys: Vec<&Key> = listing.entries.iter().map(|entry| &entry.key).collect();
        assert_eq!(surplus(&keys, rt::now(), &limits).len(), 20);
        let later = rt::now() + Duration::from_secs(8 * 24 * 60 * 60);
        registry.inner.prune(later).await.unwrap();
        assert!(registry.history(&key("a").service).await.unwrap().is_empty());
        assert_eq!(registry.catalog().latest().instances(), before);
    }
}
