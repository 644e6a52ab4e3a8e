//! Locks: a lease with a fencing token, for what must run exactly once.
//!
//! A lock is one record in the store: its holder, its token, and the process that counts its lease, the owner. These hold
//! whatever processes, stores and networks do:
//! - **A lock is taken only where the store has none**, by a commit whose revision is the token. So tokens grow for ever.
//! - **A renewal counts only at the owner**, which asks the store whether it still is; anywhere else the renewal makes that
//!   process the owner first, with a commit.
//! - **Only the owner ends a lease**, and it counts from its own last renewal, or whole from when it became the owner. Once it
//!   has begun to end it, a renewal has to win against that with a commit.
//!
//! Whoever becomes the owner does so after every renewal that was accepted elsewhere, and lets the lock go
//! [`Lock::expiry`] later: the holder, which counts from when it *sent* its last renewal, has stopped by then. Neither the
//! board nor the members have to be right for that; they decide how soon things happen.

mod board;
mod queue;
mod record;
#[cfg(test)]
mod tests;

use std::{future::Future, sync::Arc, time::Duration};

use prometheus_client::metrics::counter::Counter;
use tokio::{
    sync::{oneshot, watch},
    time::{Instant, timeout, timeout_at},
};

pub use board::Board;
pub use record::lock_to_proto;

use super::{
    Error,
    leases::{Holder, Leases},
};
use crate::{
    model::{Claim, Incarnation, Lock, LockName, MemberId, Members, Revision},
    rt::{self, Tasks},
    store::{Condition, Op, Store, StoreError},
    telemetry::Metrics,
};
use queue::Queues;

/// Most locks that may be held at a time.
const LOCKS: usize = 100_000;

/// A commit that lost a race is tried again on what the winner left.
const ATTEMPTS: usize = 16;

/// After a removal that failed.
const REMOVE_AGAIN: Duration = Duration::from_secs(1);

/// The lease of a lock whose owner this process is about to become: longer than any commit takes.
const PENDING: Duration = Duration::from_secs(24 * 60 * 60);

/// How long an answer waits for the board to show what it tells of. Longer only when the store's feed hangs.
const SHOWN: Duration = Duration::from_secs(1);

/// Handle to the locks. Cheap to clone.
#[derive(Debug, Clone)]
pub struct Locks {
    inner: Arc<Inner>,
}

#[derive(Debug)]
struct Inner {
    store: Arc<dyn Store>,
    members: watch::Receiver<Members>,
    /// Tells this run from others of the same name, which may still believe that they live.
    run: u64,
    /// Of each token by itself: what is late about an earlier one does not touch its successor. Those that another process owns by
    /// now end here, too, and then nothing happens.
    leases: Leases<Held>,
    board: watch::Sender<Board>,
    queues: Queues,
    taken: Counter,
    expired: Counter,
    tasks: Tasks,
}

/// What a lease is of.
type Held = (LockName, Revision);

/// What became of an attempt to take a lock.
enum Taken {
    Yes(Box<Lock>),
    /// Somebody else was faster, with this commit.
    Lost(Revision),
}

impl Locks {
    /// Starts the tasks that follow the store and end leases. `members` are the processes over the same store.
    pub fn start(
        store: Arc<dyn Store>,
        members: watch::Receiver<Members>,
        metrics: &Metrics,
        tasks: &Tasks,
    ) -> Self {
        let inner = Inner {
            store,
            members,
            run: fastrand::u64(..),
            leases: Leases::new(REMOVE_AGAIN),
            board: watch::Sender::default(),
            queues: Queues::default(),
            taken: metrics.counter("locks_taken", "Locks that were given to a holder"),
            expired: metrics.counter("locks_expired", "Locks whose holder fell silent"),
            tasks: tasks.clone(),
        };
        let locks = Self { inner: Arc::new(inner) };
        tasks.spawn_until_shutdown("locks", locks.clone().keep());
        tasks.spawn_until_shutdown("lock-expiry", locks.clone().expire());
        locks
    }

    /// The locks that are held, as far as this process knows.
    pub fn board(&self) -> Board {
        self.inner.board.borrow().clone()
    }

    /// The board once it shows a change after `revision`. Cancel-safe.
    pub async fn newer_than(&self, revision: Revision) -> Board {
        let mut board = self.inner.board.subscribe();
        // The sender lives as long as `self`.
        match board.wait_for(|board| board.loaded() && board.revision() > revision).await {
            Ok(board) => board.clone(),
            Err(_) => self.board(),
        }
    }

    /// How many wait for the lock at this process.
    pub fn waiting(&self, name: &LockName) -> usize {
        self.inner.queues.waiting(name)
    }

    /// Takes the lock, waiting for it at most `wait` behind those that came before. Dropping the future gives the place up.
    ///
    /// # Errors
    /// [`Error::Conflict`] when another one holds it and the wait is over; [`Error::Limit`]; [`Error::Store`]: it may have
    /// been taken, and asking again with the same attempt tells.
    pub async fn acquire(&self, claim: Claim, wait: Duration) -> Result<Lock, Error> {
        if !self.inner.board.borrow().loaded() {
            return Err(Error::LocksUnread);
        }
        let until = Instant::now() + wait;
        let place = self.inner.queues.join(&claim.name)?;
        let Ok(_turn) = timeout_at(until, place.turn()).await else {
            return Err(self.held_by_another(&claim.name));
        };
        let mut board = self.inner.board.subscribe();
        loop {
            let free = board.wait_for(|board| may_take(board.lock(&claim.name), &claim));
            if timeout_at(until, free).await.is_err() {
                return Err(self.held_by_another(&claim.name));
            }
            // No longer bounded by the wait: what may have been taken is answered.
            let (inner, claim) = (Arc::clone(&self.inner), claim.clone());
            match self.detached(async move { inner.take(&claim).await }).await? {
                Taken::Yes(lock) => {
                    self.shown(lock.revision).await;
                    return Ok(*lock);
                }
                Taken::Lost(winner) => {
                    let seen = board.wait_for(|board| board.revision() >= winner);
                    let _ = timeout(SHOWN, seen).await;
                }
            }
        }
    }

    fn held_by_another(&self, name: &LockName) -> Error {
        let message = match self.board().lock(name) {
            Some(lock) => format!(
                "lock {name} is held by {} with token {} since {:.3}",
                lock.holder,
                lock.token,
                jiff::Timestamp::try_from(lock.since).unwrap_or_default()
            ),
            None => format!("lock {name} is about to be taken by another one"),
        };
        Error::conflict("name", message)
    }

    /// Extends the lease of a lock by its TTL, and returns that.
    ///
    /// # Errors
    /// [`Error::NoLock`] and [`Error::Conflict`] when the lock is lost for good; anything else: ask again, or elsewhere.
    pub async fn renew(&self, name: LockName, token: Revision) -> Result<Duration, Error> {
        let inner = Arc::clone(&self.inner);
        self.detached(async move { inner.renew(&name, token).await }).await
    }

    /// Gives the lock back. Doing so twice succeeds.
    ///
    /// # Errors
    /// [`Error::Conflict`] when it is held with another token; [`Error::Store`].
    pub async fn release(&self, name: LockName, token: Revision) -> Result<Revision, Error> {
        let inner = Arc::clone(&self.inner);
        let revision = self.detached(async move { inner.release(&name, token).await }).await?;
        self.shown(revision).await;
        Ok(revision)
    }

    /// Lets the holder, whoever that is, renew no more. It learns of that when it tries, and the lock ends when it gives it
    /// back or, at the latest, with its lease: so there are never two.
    ///
    /// # Errors
    /// [`Error::NoLock`]; [`Error::Store`].
    pub async fn revoke(&self, name: LockName) -> Result<Lock, Error> {
        let inner = Arc::clone(&self.inner);
        let lock = self.detached(async move { inner.revoke(&name).await }).await?;
        self.shown(lock.revision).await;
        Ok(lock)
    }

    /// Until the board shows the change.
    async fn shown(&self, revision: Revision) {
        let mut board = self.inner.board.subscribe();
        let _ = timeout(SHOWN, board.wait_for(|board| board.revision() >= revision)).await;
    }

    /// Runs a write to its end even if the caller goes away: a commit must never be left without its lease.
    async fn detached<T: Send + 'static>(
        &self,
        work: impl Future<Output = Result<T, Error>> + Send + 'static,
    ) -> Result<T, Error> {
        let (answer, answered) = oneshot::channel();
        self.inner.tasks.spawn("lock-write", async move {
            // Nobody may be waiting any more; the write stands all the same.
            let _ = answer.send(work.await);
        });
        answered.await.unwrap_or(Err(Error::ShuttingDown))
    }

    /// Becomes the owner of a lock in the place of a dead process, unless it was renewed elsewhere meanwhile.
    fn spawn_adoption(&self, name: LockName) {
        let locks = self.clone();
        self.inner.tasks.spawn("lock-adoption", async move {
            let still = |lock: &Lock| locks.adopts(&locks.inner.members.borrow(), lock);
            match locks.inner.adopt_from_the_dead(&name, still).await {
                Ok(true) => {
                    tracing::info!(lock = %name, "counting its lease in the place of a process that is gone")
                }
                Ok(false) => {}
                Err(error) => {
                    tracing::warn!(lock = %name, %error, "its lease is counted by nobody yet; trying again");
                }
            }
        });
    }

    /// Removes locks whose lease is over.
    async fn expire(self) {
        loop {
            for (held, _) in self.inner.leases.next_due().await {
                let inner = Arc::clone(&self.inner);
                self.inner.tasks.spawn("lock-write", async move { inner.end(held).await });
            }
        }
    }
}

/// Whether a claimant finds the lock free, or its own from an answer that was lost.
fn may_take(held: Option<&Arc<Lock>>, claim: &Claim) -> bool {
    held.is_none_or(|held| !claim.attempt.is_empty() && held.attempt == claim.attempt)
}

/// A token is held once only.
const RUN: Incarnation = Incarnation(1);

fn held(lock: &Lock) -> Held {
    (lock.name.clone(), lock.token)
}

impl Inner {
    /// This process, as long as the others count on it.
    fn member(&self) -> Result<MemberId, Error> {
        let members = self.members.borrow();
        if members.is_member() { Ok(members.own.clone()) } else { Err(Error::Isolated) }
    }

    /// Whether this process, in this run, is the owner.
    fn owns(&self, lock: &Lock) -> bool {
        lock.run == self.run && lock.owner == self.members.borrow().own
    }

    /// The lock as the store has it.
    async fn read(&self, name: &LockName) -> Result<Option<Lock>, Error> {
        let entry = self.store.get(&record::key(name)).await.map_err(Error::Store)?;
        entry.as_ref().map(record::decode).transpose()
    }

    /// The lock as the store has it, if this is its token.
    async fn read_held(&self, name: &LockName, token: Revision) -> Result<Lock, Error> {
        let lock = self.read(name).await?.ok_or_else(|| Error::NoLock(name.clone()))?;
        if lock.token != token {
            let message = format!(
                "lock {name} is held by {} with token {}, not with {token}: the one with {token} has lost it",
                lock.holder, lock.token
            );
            return Err(Error::conflict("token", message));
        }
        Ok(lock)
    }

    /// Counts the lease from now on, and each renewal. Only after a write of this process, which stops every removal of what was
    /// before.
    fn hold(&self, lock: &Lock) {
        let holder = Holder::Ttl(Lock::expiry(lock.ttl));
        self.leases.hold(held(lock), RUN, holder, Instant::now());
    }

    /// Counts the lease, whole from now on, but no renewals: the next one has to be written. So a removal that is under
    /// way cannot pass by it.
    fn suspend(&self, lock: &Lock, within: Duration) {
        self.leases.suspend(held(lock), RUN, within, Instant::now());
    }

    /// Begins to count the lease of a lock that this process owns, unless it does already.
    fn adopt(&self, lock: &Lock) {
        if !self.leases.held(&held(lock), RUN) {
            self.suspend(lock, Lock::expiry(lock.ttl));
        }
    }

    /// Writes a lock in the place of what was read. `None` when somebody else wrote it in between.
    async fn replace(&self, lock: &Lock) -> Result<Option<Revision>, Error> {
        let when = Condition::Unchanged(lock.revision);
        let op = Op::Put { key: record::key(&lock.name), value: record::encode(lock), when };
        committed(self.store.commit(vec![op]).await)
    }

    async fn take(&self, claim: &Claim) -> Result<Taken, Error> {
        let owner = self.member()?;
        let board = self.board.borrow().clone();
        if let Some(held) = board.lock(&claim.name).filter(|held| may_take(Some(held), claim)) {
            // The lock may have ended since.
            return Ok(match self.renew(&claim.name, held.token).await {
                Ok(_) => Taken::Yes(Box::new((**held).clone())),
                Err(Error::NoLock(_) | Error::Conflict(_)) => Taken::Lost(Revision(held.revision.0 + 1)),
                Err(error) => return Err(error),
            });
        }
        if board.locks().len() >= LOCKS {
            let message = format!("{LOCKS} locks are held, the most that may be at a time");
            return Err(Error::limit("name", message));
        }
        let Claim { name, holder, attempt, ttl } = claim.clone();
        let mut lock = Lock {
            name,
            token: Revision::default(),
            holder,
            attempt,
            ttl,
            since: rt::now(),
            owner,
            run: self.run,
            revoked: false,
            revision: Revision::default(),
        };
        let key = record::key(&lock.name);
        let op = Op::Put { key, value: record::encode(&lock), when: Condition::Absent };
        let begun = Instant::now();
        match self.store.commit(vec![op]).await {
            Ok(revision) => {
                (lock.token, lock.revision) = (revision, revision);
                // From now on the record says its token itself: revisions of records change when a store is restored. Where this
                // fails it stays as it is, and the next write of it does the same.
                if let Ok(Some(revision)) = self.replace(&lock).await {
                    lock.revision = revision;
                }
                // The board may have told of it before; what was counted since then is not over yet.
                if begun.elapsed() < lock.ttl {
                    self.hold(&lock);
                } else {
                    self.adopt(&lock);
                }
                self.taken.inc();
                tracing::info!(lock = %lock.name, token = %lock.token, holder = lock.holder, "taken");
                Ok(Taken::Yes(Box::new(lock)))
            }
            Err(StoreError::Conflict { actual, .. }) => Ok(Taken::Lost(actual.unwrap_or_default())),
            Err(error) => Err(Error::Store(error)),
        }
    }

    async fn renew(&self, name: &LockName, token: Revision) -> Result<Duration, Error> {
        for _ in 0..ATTEMPTS {
            let owner = self.member()?;
            let lock = self.read_held(name, token).await?;
            if lock.revoked {
                let message = format!("lock {name} was asked back: end the work and release it");
                return Err(Error::conflict("token", message));
            }
            let counted = || self.leases.renew(&held(&lock), RUN, Instant::now()).is_some();
            if self.owns(&lock) && counted() {
                return Ok(lock.ttl);
            }
            // Its owner is another one, or its lease is over here and its removal under way, which then loses to this write.
            if self.own(Lock { owner, run: self.run, ..lock.clone() }).await? {
                return Ok(lock.ttl);
            }
        }
        Err(contended(name))
    }

    /// Writes itself as the owner, and returns whether nobody else wrote in between.
    async fn own(&self, lock: Lock) -> Result<bool, Error> {
        // The lease comes before the write: a removal that has read what is written sees the lease. It counts from after the
        // write, however long that takes: renewals were accepted elsewhere until then.
        self.suspend(&lock, PENDING);
        let replaced = self.replace(&lock).await;
        match replaced {
            Ok(Some(_)) => self.hold(&lock),
            Ok(None) | Err(_) => self.suspend(&lock, Lock::expiry(lock.ttl)),
        }
        Ok(replaced?.is_some())
    }

    async fn adopt_from_the_dead(
        &self,
        name: &LockName,
        still: impl Fn(&Lock) -> bool,
    ) -> Result<bool, Error> {
        let owner = self.member()?;
        match self.read(name).await? {
            Some(lock) if still(&lock) => self.own(Lock { owner, run: self.run, ..lock }).await,
            _ => Ok(false),
        }
    }

    async fn release(&self, name: &LockName, token: Revision) -> Result<Revision, Error> {
        for _ in 0..ATTEMPTS {
            let lock = match self.read_held(name, token).await {
                Ok(lock) => lock,
                Err(Error::NoLock(_)) => return Ok(self.board.borrow().revision()),
                Err(error) => return Err(error),
            };
            if let Some(revision) = self.remove(&lock).await? {
                tracing::info!(lock = %name, %token, holder = lock.holder, "released");
                return Ok(revision);
            }
        }
        Err(contended(name))
    }

    async fn revoke(&self, name: &LockName) -> Result<Lock, Error> {
        for _ in 0..ATTEMPTS {
            let lock = self.read(name).await?.ok_or_else(|| Error::NoLock(name.clone()))?;
            if lock.revoked {
                return Ok(lock);
            }
            let mut revoked = Lock { revoked: true, ..lock };
            if let Some(revision) = self.replace(&revoked).await? {
                tracing::info!(lock = %name, token = %revoked.token, holder = revoked.holder, "asked back");
                revoked.revision = revision;
                return Ok(revoked);
            }
        }
        Err(contended(name))
    }

    /// Removes what was read. `None` when somebody else wrote it in between.
    async fn remove(&self, lock: &Lock) -> Result<Option<Revision>, Error> {
        let op = Op::Delete { key: record::key(&lock.name), when: Condition::Unchanged(lock.revision) };
        let removed = committed(self.store.commit(vec![op]).await)?;
        if removed.is_some() {
            self.leases.release(&held(lock), RUN, || false);
        }
        Ok(removed)
    }

    /// The lease is over here. The lock goes unless another process owns it by now, or its holder came back.
    async fn end(&self, ended: Held) {
        let (name, token) = &ended;
        let removal = async {
            let Some(lock) = self.read(name).await? else { return Ok(None) };
            // Asked after the read: who becomes the owner holds the lease before it writes.
            let over = lock.token == *token && self.owns(&lock) && !self.leases.held(&ended, RUN);
            if over { self.remove(&lock).await.map(|removed| removed.map(|_| lock)) } else { Ok(None) }
        };
        match removal.await {
            Ok(Some(Lock { token, holder, .. })) => {
                self.expired.inc();
                tracing::warn!(lock = %name, %token, holder, "its holder fell silent: the lock is free");
            }
            Ok(None) => {}
            Err(error) => {
                tracing::warn!(lock = %name, %error, "its lease is over but it could not be removed; trying again");
                self.leases.abandon(ended.clone(), RUN, Instant::now(), || true);
            }
        }
    }
}

fn contended(name: &LockName) -> Error {
    Error::Contended(name.clone())
}

fn committed(result: Result<Revision, StoreError>) -> Result<Option<Revision>, Error> {
    match result {
        Ok(revision) => Ok(Some(revision)),
        Err(StoreError::Conflict { .. }) => Ok(None),
        Err(error) => Err(Error::Store(error)),
    }
}
