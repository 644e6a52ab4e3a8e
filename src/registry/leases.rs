//! Who must be heard of by when. In memory only; time comes in as an argument of the pure part.

use std::{
    cmp::Reverse,
    collections::{BTreeSet, BinaryHeap, HashMap, HashSet, hash_map::Entry},
    hash::Hash,
    sync::{Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use tokio::{sync::Notify, time::Instant};

use crate::model::{Incarnation, InstanceKey, ServiceId};

/// How often deadlines are looked at while there are some, so that a time in which this process did not run is noticed.
const LOOK: Duration = Duration::from_secs(1);

/// How much later than it asked to a busy process may wake.
const LATE: Duration = Duration::from_millis(500);

/// A session that holds leases, unique within the process.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(super) struct SessionId(pub(super) u64);

/// What holds a lease.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Holder {
    /// Renewals, at least this often.
    Ttl(Duration),
    /// A live session.
    Session(SessionId),
    /// Nobody any more: a session that was lost, until its grace is over.
    Nobody,
}

/// The leases of what `K` names: instances or locks.
#[derive(Debug)]
pub(super) struct Leases<K> {
    table: Mutex<Table<K>>,
    /// A deadline came up that is earlier than those before.
    earlier: Notify,
    /// A session lost a lease to another process.
    displaced: Notify,
    grace: Duration,
}

impl<K: Clone + Ord + Hash> Leases<K> {
    pub(super) fn new(grace: Duration) -> Self {
        Self { table: Mutex::default(), earlier: Notify::new(), displaced: Notify::new(), grace }
    }

    fn table(&self) -> MutexGuard<'_, Table<K>> {
        // The table's methods leave it whole even if one should panic.
        self.table.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Makes room for so many leases in all, so that a start does not make it again and again.
    pub(super) fn reserve(&self, leases: usize) {
        let mut table = self.table();
        let more = leases.saturating_sub(table.held.len());
        table.held.reserve(more);
        table.queue.reserve(more);
    }

    /// Begins to count leases that another process counted, or this one before a restart, by what they last without a renewal:
    /// their owners have the time to come back. A lease that is counted already stays as it is.
    pub(super) fn adopt<'a>(
        &self,
        leases: impl IntoIterator<Item = (&'a K, Incarnation, Option<Duration>)>,
        now: Instant,
    ) where
        K: 'a,
    {
        let mut table = self.table();
        let mut first = false;
        for (key, incarnation, ttl) in leases {
            let (holder, within) = match ttl {
                Some(ttl) => (Holder::Ttl(ttl), ttl.max(self.grace)),
                None => (Holder::Nobody, self.grace),
            };
            if table.held.get(key).is_none_or(|held| held.incarnation != incarnation) {
                first |= table.hold(key.clone(), incarnation, holder, Some(now + within));
            }
        }
        drop(table);
        if first {
            self.earlier.notify_one();
        }
    }

    /// Stops to count a lease that another process counts from now on.
    pub(super) fn cede(&self, key: &K) {
        let mut table = self.table();
        if let Some(Holder::Session(session)) = table.held.get(key).map(|held| held.holder) {
            table.displaced.insert(session);
            self.displaced.notify_waiters();
        }
        table.forget(key);
    }

    /// Returns when another process counts a lease of the session.
    pub(super) async fn displaced(&self, session: SessionId) {
        loop {
            let mut displaced = std::pin::pin!(self.displaced.notified());
            displaced.as_mut().enable();
            if self.table().displaced.contains(&session) {
                return;
            }
            displaced.await;
        }
    }

    /// A session begins.
    pub(super) fn session_begins(&self, session: SessionId) {
        self.table().sessions.insert(session, BTreeSet::new());
    }

    /// Notes who holds the instance from now on, and returns whether that incarnation had a lease until now. A session that
    /// is over by now holds nothing.
    pub(super) fn hold(&self, key: K, incarnation: Incarnation, holder: Holder, now: Instant) -> bool {
        let mut table = self.table();
        let held = table.held.get(&key).is_some_and(|held| held.incarnation == incarnation);
        let (holder, deadline) = match holder {
            Holder::Ttl(ttl) => (holder, Some(now + ttl)),
            Holder::Session(session) if table.sessions.contains_key(&session) => (holder, None),
            Holder::Session(_) | Holder::Nobody => (Holder::Nobody, Some(now + self.grace)),
        };
        if let Holder::Session(session) = holder {
            table.displaced.remove(&session);
        }
        let first = table.hold(key, incarnation, holder, deadline);
        drop(table);
        if first {
            self.earlier.notify_one();
        }
        held
    }

    /// From now on it is held by nobody for sure, whatever was counted so far, until `within` is over.
    pub(super) fn suspend(&self, key: K, incarnation: Incarnation, within: Duration, now: Instant) {
        let first = self.table().hold(key, incarnation, Holder::Nobody, Some(now + within));
        if first {
            self.earlier.notify_one();
        }
    }

    /// Gives an instance that nobody holds, although it `is_there`, the grace.
    pub(super) fn abandon(
        &self,
        key: K,
        incarnation: Incarnation,
        now: Instant,
        is_there: impl FnOnce() -> bool,
    ) {
        let mut table = self.table();
        if !table.held.contains_key(&key) && is_there() {
            table.hold(key, incarnation, Holder::Nobody, Some(now + self.grace));
            drop(table);
            self.earlier.notify_one();
        }
    }

    /// Moves a TTL lease's deadline, and returns how long it lasts from now. `None` when that incarnation has no such lease
    /// here: it is over, and its removal under way, or another process counts it.
    pub(super) fn renew(&self, key: &K, incarnation: Incarnation, now: Instant) -> Option<Duration> {
        let mut table = self.table();
        let held = table.held.get_mut(key).filter(|held| held.incarnation == incarnation)?;
        let Holder::Ttl(ttl) = held.holder else { return None };
        // The heap keeps the old deadline; it is looked up again when that comes.
        held.deadline = Some(now + ttl);
        Some(ttl)
    }

    /// Whether that incarnation has a lease that is not over.
    pub(super) fn held(&self, key: &K, incarnation: Incarnation) -> bool {
        self.table().held.get(key).is_some_and(|held| held.incarnation == incarnation)
    }

    /// Forgets an instance that was removed, unless `is_back`: it was registered again in between, and that lease counts.
    pub(super) fn release(&self, key: &K, incarnation: Incarnation, is_back: impl FnOnce() -> bool) {
        let mut table = self.table();
        // Asked within the lock: who comes back later notes its lease later.
        if !is_back() {
            table.release(key, incarnation);
        }
    }

    /// Ends the lease of one that nobody holds, before its grace is over.
    pub(super) fn end_grace(&self, key: &K, incarnation: Incarnation) {
        let mut table = self.table();
        let nobody = |held: &&Held| held.incarnation == incarnation && held.holder == Holder::Nobody;
        if table.held.get(key).filter(nobody).is_some() {
            table.forget(key);
        }
    }

    /// Whether nobody has held the instance since its session was lost.
    pub(super) fn abandoned(&self, key: &K) -> bool {
        self.table().held.get(key).is_none_or(|held| held.holder == Holder::Nobody)
    }

    /// A session was lost: its instances are held by nobody, and returned.
    pub(super) fn session_lost(&self, session: SessionId, now: Instant) -> Vec<(K, Incarnation)> {
        let mut table = self.table();
        let keys = table.session_ends(session);
        let deadline = now + self.grace;
        let mut over = Vec::with_capacity(keys.len());
        for key in keys {
            let Some(held) = table.held.get(&key) else { continue };
            if held.holder == Holder::Session(session) {
                let incarnation = held.incarnation;
                table.hold(key.clone(), incarnation, Holder::Nobody, Some(deadline));
                over.push((key, incarnation));
            }
        }
        drop(table);
        self.earlier.notify_one();
        over
    }

    /// A session was closed: its leases are over, and returned as by [`Leases::next_due`].
    pub(super) fn session_closed(&self, session: SessionId) -> Vec<(K, Incarnation)> {
        let mut table = self.table();
        let mut over = Vec::new();
        for key in table.session_ends(session) {
            if let Some(held) = table.held.remove(&key) {
                over.push((key, held.incarnation));
            }
        }
        over
    }

    /// Waits until leases are over and returns them. They are gone from here: a registration that comes before the instance
    /// is removed has to make it anew.
    pub(super) async fn next_due(&self) -> Vec<(K, Incarnation)> {
        loop {
            let now = Instant::now();
            let (due, wake) = {
                let mut table = self.table();
                if let Some(away) = table.away(now) {
                    tracing::warn!(
                        ?away,
                        "this process did not run: no lease ended in that time, all go on for as long"
                    );
                }
                let due = table.due(now);
                let first = table.queue.peek().map(|Reverse((at, _))| (*at).min(now + LOOK));
                table.wakes = if due.is_empty() { first } else { Some(now + LOOK) };
                (due, first)
            };
            if !due.is_empty() {
                return due;
            }
            let wake = wake.unwrap_or_else(|| now + Duration::from_secs(3600));
            tokio::select! {
                () = tokio::time::sleep_until(wake) => {}
                () = self.earlier.notified() => {}
            }
        }
    }
}

impl Leases<InstanceKey> {
    /// How many leases of each service are about to end: their session was lost, or most of their TTL is over, which renewals
    /// in time do not let happen. Costs a look at every lease.
    pub(super) fn silent(&self, now: Instant) -> HashMap<ServiceId, usize> {
        let mut silent = HashMap::new();
        for (key, held) in &self.table().held {
            let is_silent = match held.holder {
                Holder::Nobody => true,
                Holder::Ttl(ttl) => held.deadline.is_some_and(|deadline| deadline < now + ttl / 2),
                Holder::Session(_) => false,
            };
            if is_silent {
                *silent.entry(key.service.clone()).or_default() += 1;
            }
        }
        silent
    }
}

#[derive(Debug)]
struct Table<K> {
    held: HashMap<K, Held>,
    sessions: HashMap<SessionId, BTreeSet<K>>,
    /// Of these, those that lost a lease to another process.
    displaced: HashSet<SessionId>,
    /// One entry per lease with a deadline; a renewal leaves it and the entry is put back when it comes up too early.
    queue: BinaryHeap<Reverse<(Instant, K)>>,
    /// When deadlines are looked at again at the latest.
    wakes: Option<Instant>,
}

#[derive(Debug)]
struct Held {
    incarnation: Incarnation,
    holder: Holder,
    deadline: Option<Instant>,
    /// The entry of the queue that stands for it.
    queued: Option<Instant>,
}

impl<K> Default for Table<K>
where
    K: Ord,
{
    fn default() -> Self {
        Self {
            held: HashMap::new(),
            sessions: HashMap::new(),
            displaced: HashSet::new(),
            queue: BinaryHeap::new(),
            wakes: None,
        }
    }
}

impl<K: Clone + Ord + Hash> Table<K> {
    fn session_ends(&mut self, session: SessionId) -> BTreeSet<K> {
        self.displaced.remove(&session);
        self.sessions.remove(&session).unwrap_or_default()
    }

    /// Returns whether its deadline is now the next of all.
    fn hold(&mut self, key: K, incarnation: Incarnation, holder: Holder, deadline: Option<Instant>) -> bool {
        let mut held = Held { incarnation, holder, deadline, queued: None };
        let entry = self.held.entry(key.clone());
        if let Entry::Occupied(before) = &entry {
            let before = before.get();
            held.queued = before.queued.filter(|at| deadline.is_none_or(|new| *at <= new));
            if let Holder::Session(old) = before.holder
                && let Some(keys) = self.sessions.get_mut(&old)
            {
                keys.remove(&key);
            }
        }
        if let Holder::Session(session) = holder
            && let Some(keys) = self.sessions.get_mut(&session)
        {
            keys.insert(key.clone());
        }
        let mut first = false;
        if let (Some(deadline), None) = (deadline, held.queued) {
            first = self.queue.peek().is_none_or(|Reverse((at, _))| deadline < *at);
            self.queue.push(Reverse((deadline, key)));
            held.queued = Some(deadline);
        }
        entry.insert_entry(held);
        first
    }

    fn release(&mut self, key: &K, incarnation: Incarnation) {
        if self.held.get(key).is_some_and(|held| held.incarnation == incarnation) {
            self.forget(key);
        }
    }

    fn forget(&mut self, key: &K) {
        if let Some(held) = self.held.remove(key)
            && let Holder::Session(session) = held.holder
            && let Some(keys) = self.sessions.get_mut(&session)
        {
            keys.remove(key);
        }
    }

    /// Where this look at the deadlines is far too late, the process was stopped, or the machine paused, and could hear of
    /// nobody: moves all deadlines by that time.
    fn away(&mut self, now: Instant) -> Option<Duration> {
        let away = now.saturating_duration_since(self.wakes?);
        if away < LATE {
            return None;
        }
        for held in self.held.values_mut() {
            held.deadline = held.deadline.map(|at| at + away);
            held.queued = held.queued.map(|at| at + away);
        }
        let queue = std::mem::take(&mut self.queue);
        self.queue = queue.into_iter().map(|Reverse((at, key))| Reverse((at + away, key))).collect();
        Some(away)
    }

    fn due(&mut self, now: Instant) -> Vec<(K, Incarnation)> {
        let mut due = Vec::new();
        while let Some(Reverse((at, _))) = self.queue.peek()
            && *at <= now
        {
            let Some(Reverse((at, key))) = self.queue.pop() else { break };
            let Some(held) = self.held.get_mut(&key).filter(|held| held.queued == Some(at)) else { continue };
            held.queued = None;
            match held.deadline {
                Some(deadline) if deadline <= now => {
                    let incarnation = held.incarnation;
                    self.held.remove(&key);
                    due.push((key, incarnation));
                }
                Some(deadline) => {
                    held.queued = Some(deadline);
                    self.queue.push(Reverse((deadline, key)));
                }
                None => {}
            }
        }
        due
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::InstanceKey;

    const TTL: Duration = Duration::from_secs(10);
    const ONE: Incarnation = Incarnation(1);

    fn key(id: &str) -> InstanceKey {
        InstanceKey { service: "s".parse().unwrap(), id: id.parse().unwrap() }
    }

    async fn due_after(leases: &Leases<InstanceKey>, start: Instant) -> (Vec<String>, u64) {
        let due = leases.next_due().await;
        (due.into_iter().map(|(key, _)| key.id.to_string()).collect(), (Instant::now() - start).as_secs())
    }

    #[tokio::test(start_paused = true)]
    async fn a_ttl_lease_ends_one_ttl_after_the_last_renewal() {
        let leases = Leases::new(TTL);
        let start = Instant::now();
        leases.hold(key("a"), ONE, Holder::Ttl(TTL), start);
        leases.hold(key("b"), ONE, Holder::Ttl(TTL), start);
        tokio::time::advance(Duration::from_secs(9)).await;
        assert_eq!(leases.renew(&key("a"), ONE, Instant::now()), Some(TTL));
        assert_eq!(leases.renew(&key("a"), Incarnation(2), Instant::now()), None);
        assert_eq!(due_after(&leases, start).await, (vec!["b".to_owned()], 10));
        assert_eq!(due_after(&leases, start).await, (vec!["a".to_owned()], 19));
    }

    #[tokio::test(start_paused = true)]
    async fn a_lost_session_has_its_grace_and_may_come_back() {
        let leases = Leases::new(TTL);
        let start = Instant::now();
        leases.session_begins(SessionId(1));
        leases.session_begins(SessionId(2));
        for id in ["a", "b"] {
            leases.hold(key(id), ONE, Holder::Session(SessionId(1)), start);
        }
        assert!(!leases.abandoned(&key("a")));
        assert_eq!(leases.session_lost(SessionId(1), start).len(), 2);
        assert!(leases.abandoned(&key("a")));
        leases.hold(key("a"), ONE, Holder::Session(SessionId(2)), start);
        assert_eq!(due_after(&leases, start).await, (vec!["b".to_owned()], 10));
        assert_eq!(leases.session_lost(SessionId(1), start), []);
        leases.hold(key("late"), ONE, Holder::Session(SessionId(1)), start);
        assert!(leases.abandoned(&key("late")), "a session that is over holds nothing");
    }

    #[tokio::test(start_paused = true)]
    async fn a_process_that_was_stopped_ends_no_lease() {
        let leases = Leases::new(TTL);
        let start = Instant::now();
        leases.hold(key("a"), ONE, Holder::Ttl(TTL), start);
        leases.hold(key("b"), ONE, Holder::Ttl(TTL * 2), start);
        let (due, ()) = tokio::join!(due_after(&leases, start), async {
            tokio::time::sleep(Duration::from_millis(2500)).await;
            // Stopped for a minute; it wakes half a second later than it would have looked.
            tokio::time::advance(TTL * 6).await;
        });
        let (ids, after) = due;
        assert_eq!(ids, ["a"]);
        assert!((69..=70).contains(&after), "{after}");
        assert_eq!(due_after(&leases, start).await.1, after + 10);
    }

    #[tokio::test(start_paused = true)]
    async fn a_lease_is_silent_when_it_should_have_been_renewed() {
        let leases = Leases::new(TTL);
        let start = Instant::now();
        leases.session_begins(SessionId(1));
        leases.session_begins(SessionId(2));
        for (id, holder) in [
            ("ttl", Holder::Ttl(TTL)),
            ("long", Holder::Ttl(TTL * 9)),
            ("session", Holder::Session(SessionId(1))),
            ("lost", Holder::Session(SessionId(2))),
        ] {
            leases.hold(key(id), ONE, holder, start);
        }
        let silent = |now| leases.silent(now).get(&key("a").service).copied().unwrap_or_default();
        assert_eq!(silent(start + TTL / 2), 0);
        assert_eq!(silent(start + TTL / 2 + LATE), 1);
        leases.session_lost(SessionId(2), start);
        assert_eq!(silent(start), 1);
        assert_eq!(silent(start + TTL), 2);
    }

    #[tokio::test(start_paused = true)]
    async fn an_earlier_deadline_wakes_the_waiter_and_a_released_lease_never_ends() {
        let leases = Leases::new(TTL);
        let start = Instant::now();
        leases.hold(key("late"), ONE, Holder::Ttl(TTL * 5), start);
        leases.hold(key("gone"), ONE, Holder::Ttl(TTL), start);
        leases.release(&key("gone"), ONE, || false);
        leases.release(&key("late"), ONE, || true);
        let (due, ()) = tokio::join!(due_after(&leases, start), async {
            tokio::task::yield_now().await;
            leases.hold(key("soon"), ONE, Holder::Ttl(TTL * 2), start);
        });
        assert_eq!(due, (vec!["soon".to_owned()], 20));
        // A shorter TTL counts from now on, also when a later deadline was queued before.
        leases.hold(key("late"), ONE, Holder::Ttl(Duration::from_secs(1)), Instant::now());
        assert_eq!(due_after(&leases, start).await, (vec!["late".to_owned()], 21));
    }
}
