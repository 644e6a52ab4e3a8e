//! One store that several simulated processes share, each over a link of its own.

use std::{
    collections::{BTreeMap, VecDeque},
    sync::{Arc, Mutex, MutexGuard},
    time::Duration,
};

use bytes::Bytes;
use futures_util::future::BoxFuture;
use tokio::{
    sync::watch,
    time::{Instant, sleep, timeout},
};

use crate::{
    model::Revision,
    rt,
    store::{Condition, Entry, Event, Fault, Key, Listing, Op, Session, Status, Store, StoreError, Watch},
};

/// How long a call waits for an answer.
const PATIENCE: Duration = Duration::from_secs(3);
pub(super) const SESSION: Duration = Duration::from_secs(5);
/// What revisions are moved on by when an older state is restored.
const LEAP: u64 = 1_000_000;
/// Commits that watchers may be behind.
const REMEMBERED: usize = 200;

#[derive(Debug, Clone)]
pub(super) struct Record {
    pub(super) value: Bytes,
    pub(super) revision: u64,
    session: Option<u64>,
}

#[derive(Debug, Clone)]
pub(super) struct Disk {
    pub(super) records: BTreeMap<Key, Record>,
    pub(super) revision: u64,
    /// How often an older state was restored.
    pub(super) epoch: u64,
    /// Revisions of earlier epochs are below.
    base: u64,
    log: VecDeque<Event>,
    forgotten: u64,
    sessions: BTreeMap<u64, Instant>,
    next_session: u64,
    up: bool,
}

#[derive(Debug)]
pub(super) struct Shared {
    disk: Mutex<Disk>,
    changed: watch::Sender<()>,
    /// Every commit, for the checks.
    pub(super) commits: Mutex<Vec<(Instant, Event)>>,
}

impl Shared {
    pub(super) fn new() -> Arc<Self> {
        let disk = Disk {
            records: BTreeMap::new(),
            revision: 0,
            epoch: 0,
            base: 0,
            log: VecDeque::new(),
            forgotten: 0,
            sessions: BTreeMap::new(),
            next_session: 1,
            up: true,
        };
        let (disk, changed) = (Mutex::new(disk), watch::Sender::default());
        Arc::new(Self { disk, changed, commits: Mutex::default() })
    }

    pub(super) fn disk(&self) -> MutexGuard<'_, Disk> {
        self.disk.lock().unwrap()
    }

    pub(super) fn set_up(&self, up: bool) {
        let mut disk = self.disk();
        disk.up = up;
        // Whoever leads next gives every session its whole time.
        let until = Instant::now() + SESSION;
        disk.sessions.values_mut().for_each(|at| *at = until);
        drop(disk);
        self.changed.send_replace(());
    }

    pub(super) fn restore(&self, backup: &Disk) {
        let mut disk = self.disk();
        let leap = disk.revision + LEAP - backup.base;
        let records = backup.records.iter().map(|(key, record)| {
            (Arc::clone(key), Record { revision: record.revision + leap, ..record.clone() })
        });
        let until = Instant::now() + SESSION;
        *disk = Disk {
            records: records.collect(),
            revision: backup.revision + leap,
            epoch: disk.epoch + 1,
            base: disk.revision + LEAP,
            log: VecDeque::new(),
            forgotten: backup.revision + leap,
            sessions: backup.sessions.keys().map(|id| (*id, until)).collect(),
            next_session: disk.next_session,
            up: disk.up,
        };
        drop(disk);
        self.changed.send_replace(());
    }

    /// Watchers that are behind have to list.
    pub(super) fn compact(&self) {
        let mut disk = self.disk();
        disk.log.clear();
        disk.forgotten = disk.revision;
        drop(disk);
        self.changed.send_replace(());
    }

    fn commit(&self, ops: Vec<Op>, session: u64) -> Result<Revision, StoreError> {
        let mut disk = self.disk();
        for op in &ops {
            let actual = disk.records.get(op.key()).map(|record| record.revision);
            let holds = match op.when() {
                Condition::Always => true,
                Condition::Absent => actual.is_none(),
                Condition::Unchanged(Revision(wanted)) => actual == Some(wanted),
            };
            if !holds {
                return Err(StoreError::Conflict { key: Arc::clone(op.key()), actual: actual.map(Revision) });
            }
        }
        let revision = disk.revision + 1;
        disk.revision = revision;
        let mut changes = Vec::new();
        for op in ops {
            let bound = matches!(op, Op::Bind { .. }).then_some(session);
            match op {
                Op::Put { key, value, .. } | Op::Bind { key, value, .. } => {
                    let record = Record { value: value.clone(), revision, session: bound };
                    disk.records.insert(Arc::clone(&key), record);
                    changes.push((key, Some(value)));
                }
                Op::Delete { key, .. } => {
                    if disk.records.remove(&key).is_some() {
                        changes.push((key, None));
                    }
                }
            }
        }
        let event = Event { revision: Revision(revision), changes };
        self.commits.lock().unwrap().push((Instant::now(), event.clone()));
        disk.log.push_back(event);
        if disk.log.len() > REMEMBERED
            && let Some(oldest) = disk.log.pop_front()
        {
            disk.forgotten = oldest.revision.0;
        }
        drop(disk);
        self.changed.send_replace(());
        Ok(Revision(revision))
    }

    /// Ends the sessions of those that are silent.
    pub(super) async fn end_sessions(self: Arc<Self>) {
        loop {
            sleep(Duration::from_millis(500)).await;
            let ops: Vec<Op> = {
                let mut disk = self.disk();
                if !disk.up {
                    continue;
                }
                let now = Instant::now();
                disk.sessions.retain(|_, until| *until > now);
                let bound = disk.records.iter().filter(|(_, record)| {
                    record.session.is_some_and(|session| !disk.sessions.contains_key(&session))
                });
                let delete = |key: &Key| Op::Delete { key: Arc::clone(key), when: Condition::Always };
                bound.map(|(key, _)| delete(key)).collect()
            };
            if !ops.is_empty() {
                self.commit(ops, 0).unwrap();
            }
        }
    }
}

/// What is wrong with the way to the store.
#[derive(Debug, Clone, Copy, Default)]
pub(super) struct Wire {
    pub(super) cut: bool,
    pub(super) delay: Duration,
    /// Half of the answers to commits are lost.
    pub(super) lossy: bool,
}

/// One process's way to the store.
#[derive(Debug)]
pub(super) struct Link {
    shared: Arc<Shared>,
    wire: watch::Sender<Wire>,
    status: watch::Sender<Status>,
}

impl Link {
    pub(super) fn new(shared: Arc<Shared>, wire: watch::Sender<Wire>) -> Arc<Self> {
        let status = watch::Sender::new(Status { fault: None, session: None });
        Arc::new(Self { shared, wire, status })
    }

    fn reaches(&self) -> bool {
        !self.wire.borrow().cut && self.shared.disk().up
    }

    async fn call(&self) -> Result<(), StoreError> {
        let (mut wire, mut changed) = (self.wire.subscribe(), self.shared.changed.subscribe());
        let reached = async {
            while !self.reaches() {
                tokio::select! {
                    biased;
                    _ = wire.changed() => {}
                    _ = changed.changed() => {}
                }
            }
        };
        if timeout(PATIENCE, reached).await.is_err() {
            return Err(StoreError::Failed("no answer".into()));
        }
        self.delayed().await;
        Ok(())
    }

    async fn delayed(&self) {
        let delay = self.wire.borrow().delay;
        if !delay.is_zero() {
            sleep(delay).await;
        }
    }

    /// Keeps the session, as long as the store can be reached.
    pub(super) async fn keep_session(self: Arc<Self>) {
        let mut silent_since = None;
        loop {
            if self.reaches() {
                silent_since = None;
                let now = Instant::now();
                let session = self.status.borrow().session.map(|session| session.id);
                let mut disk = self.shared.disk();
                let id = session.filter(|id| disk.sessions.contains_key(id)).unwrap_or_else(|| {
                    disk.next_session += 1;
                    disk.next_session
                });
                disk.sessions.insert(id, now + SESSION);
                drop(disk);
                let next = Status { fault: None, session: Some(Session { id, until: Some(now + SESSION) }) };
                self.status.send_if_modified(|status| {
                    let same =
                        status.session.is_some_and(|s| s.id == id && s.holds()) && status.fault.is_none();
                    *status = next;
                    !same
                });
            } else if *silent_since.get_or_insert(Instant::now()) + Duration::from_secs(1) < Instant::now() {
                self.status.send_if_modified(|status| {
                    let first = status.fault.is_none();
                    status.fault.get_or_insert(Fault { since: rt::now(), reason: "silent".into() });
                    first
                });
            }
            sleep(Duration::from_secs(1)).await;
        }
    }
}

/// The handle that a process has.
#[derive(Debug, Clone)]
pub(super) struct Client(pub(super) Arc<Link>);

impl Store for Client {
    fn commit(&self, ops: Vec<Op>) -> BoxFuture<'_, Result<Revision, StoreError>> {
        Box::pin(async move {
            let Self(link) = self;
            link.call().await?;
            let session = link.status.borrow().session.map_or(0, |session| session.id);
            let result = link.shared.commit(ops, session);
            if link.wire.borrow().lossy && fastrand::bool() {
                return Err(StoreError::Failed("the answer was lost".into()));
            }
            link.call().await?;
            result
        })
    }

    fn get<'a>(&'a self, key: &'a str) -> BoxFuture<'a, Result<Option<Entry>, StoreError>> {
        Box::pin(async move {
            self.0.call().await?;
            let found =
                self.0.shared.disk().records.get_key_value(key).map(|(key, record)| entry(key, record));
            self.0.call().await?;
            Ok(found)
        })
    }

    fn list<'a>(&'a self, prefix: &'a str) -> BoxFuture<'a, Result<Listing, StoreError>> {
        Box::pin(async move {
            self.0.call().await?;
            let listing = {
                let disk = self.0.shared.disk();
                let entries = disk.records.iter().filter(|(key, _)| key.starts_with(prefix));
                Listing {
                    revision: Revision(disk.revision),
                    entries: entries.map(|(key, record)| entry(key, record)).collect(),
                }
            };
            self.0.call().await?;
            Ok(listing)
        })
    }

    fn watch<'a>(
        &'a self,
        prefix: &'a str,
        after: Revision,
    ) -> BoxFuture<'a, Result<Box<dyn Watch>, StoreError>> {
        Box::pin(async move {
            self.0.call().await?;
            let disk = self.0.shared.disk();
            if after.0 < disk.base {
                return Err(StoreError::Reset(Revision(disk.base)));
            }
            let (link, prefix) = (Arc::clone(&self.0), prefix.to_owned());
            Ok(Box::new(Follower { link, prefix, seen: after.0, epoch: disk.epoch }) as Box<dyn Watch>)
        })
    }

    fn status(&self) -> watch::Receiver<Status> {
        self.0.status.subscribe()
    }

    fn advance(&self, _: Revision) -> BoxFuture<'_, Result<(), StoreError>> {
        unreachable!("nobody restores a backup here")
    }

    fn close(&self) -> BoxFuture<'_, Result<(), StoreError>> {
        Box::pin(async { Ok(()) })
    }
}

fn entry(key: &Key, record: &Record) -> Entry {
    Entry { key: Arc::clone(key), value: record.value.clone(), revision: Revision(record.revision) }
}

/// Silent while the link is cut, as one that connects again by itself.
#[derive(Debug)]
struct Follower {
    link: Arc<Link>,
    prefix: String,
    seen: u64,
    epoch: u64,
}

impl Follower {
    fn look(&mut self) -> Result<Option<Event>, StoreError> {
        let disk = self.link.shared.disk();
        if disk.epoch != self.epoch {
            return Err(StoreError::Reset(Revision(disk.base)));
        }
        if self.seen < disk.forgotten {
            return Err(StoreError::Compacted(Revision(disk.forgotten)));
        }
        let newer = disk.log.iter().filter(|event| event.revision.0 > self.seen);
        for Event { revision, changes } in newer {
            let changes: Vec<_> =
                changes.iter().filter(|(key, _)| key.starts_with(&self.prefix)).cloned().collect();
            if !changes.is_empty() {
                return Ok(Some(Event { revision: *revision, changes }));
            }
        }
        self.seen = disk.revision;
        Ok(None)
    }
}

impl Watch for Follower {
    fn next(&mut self) -> BoxFuture<'_, Result<Event, StoreError>> {
        Box::pin(async move {
            let (mut wire, mut changed) = (self.link.wire.subscribe(), self.link.shared.changed.subscribe());
            loop {
                if self.link.reaches()
                    && let Some(event) = self.look()?
                {
                    self.link.delayed().await;
                    if self.link.reaches() {
                        self.seen = event.revision.0;
                        return Ok(event);
                    }
                }
                tokio::select! {
                    biased;
                    _ = wire.changed() => {}
                    _ = changed.changed() => {}
                }
            }
        })
    }
}
