//! Commits: each is one transaction of etcd.
//!
//! A transaction whose answer is lost may have been applied, and may be applied later still. So each carries a mark: it
//! writes an id of its own to a key (a slot) that no other transaction of this process uses meanwhile, and demands that the
//! slot is as the process knows it. Whoever got no answer asks for the slot: with the id there it was applied, at the
//! revision of the slot. Without it the slot is written anew in the same step, so that a transaction still under way fails,
//! and the commit can be tried again. Slots are bound to the session, so etcd removes those of processes that are gone.
//!
//! The slot also makes a commit a change for etcd where it only removes keys that are absent, so that it has a revision.

use std::{
    collections::HashMap,
    sync::{
        Mutex, PoisonError,
        atomic::{AtomicU32, Ordering},
    },
};

use bytes::Bytes;
use tokio::{
    sync::{Semaphore, SemaphorePermit},
    time::{Instant, timeout_at},
};

use super::{
    Inner,
    client::{self, Failure},
    epoch::Epoch,
    wire,
};
use crate::{
    model::Revision,
    proto::etcd::{Compare, KeyValue, RequestOp, ResponseOp, TxnRequest, TxnResponse, response_op},
    store::{Condition, Key, Op, StoreError},
};

/// How many commits are under way at once; further ones wait.
const SLOTS: usize = 512;

/// A key that marks the transactions of one commit at a time.
#[derive(Debug, Clone, Copy)]
struct Slot {
    number: u32,
    /// The lease it is bound to; under another one it has to be made anew.
    lease: i64,
    /// Where it was last written, 0 when it is not there; `None` when a transaction may be under way that writes it.
    at: Option<i64>,
}

/// The slots of this process.
#[derive(Debug)]
pub(super) struct Slots {
    permits: Semaphore,
    free: Mutex<Vec<Slot>>,
    next: AtomicU32,
}

impl Default for Slots {
    fn default() -> Self {
        Self { permits: Semaphore::new(SLOTS), free: Mutex::default(), next: AtomicU32::new(0) }
    }
}

impl Slots {
    async fn take(&self) -> Taken<'_> {
        let permit = self.permits.acquire().await.ok();
        let free = self.free.lock().unwrap_or_else(PoisonError::into_inner).pop();
        let slot = free.unwrap_or_else(|| Slot {
            number: self.next.fetch_add(1, Ordering::Relaxed),
            lease: 0,
            at: Some(0),
        });
        Taken { slot, slots: self, _permit: permit }
    }
}

/// A slot in use. It goes back also when the commit is dropped.
#[derive(Debug)]
struct Taken<'a> {
    slot: Slot,
    slots: &'a Slots,
    _permit: Option<SemaphorePermit<'a>>,
}

impl Drop for Taken<'_> {
    fn drop(&mut self) {
        self.slots.free.lock().unwrap_or_else(PoisonError::into_inner).push(self.slot);
    }
}

/// What a transaction does beside its slot.
struct Plan<'a> {
    ops: &'a [Op],
    /// Of the operations on one key only the last is done: etcd takes no key twice.
    last: HashMap<&'a str, usize>,
}

impl<'a> Plan<'a> {
    fn new(ops: &'a [Op]) -> Self {
        let last = ops.iter().enumerate().map(|(index, op)| (op.key().as_ref(), index)).collect();
        Self { ops, last }
    }

    fn conditions(&self) -> impl Iterator<Item = &'a Op> {
        self.ops.iter().filter(|op| op.when() != Condition::Always)
    }

    fn done(&self) -> impl Iterator<Item = &'a Op> {
        self.ops
            .iter()
            .enumerate()
            .filter(|(index, op)| self.last.get(op.key().as_ref()) == Some(index))
            .map(|(_, op)| op)
    }
}

/// What came of one transaction.
enum Outcome {
    Applied(Revision),
    Conflict {
        key: Key,
        actual: Option<Revision>,
    },
    /// Not applied, for a reason that is gone now.
    Again,
}

impl Inner {
    pub(super) async fn commit(&self, ops: &[Op]) -> Result<Revision, StoreError> {
        let deadline = self.client.deadline();
        let plan = Plan::new(ops);
        let Ok(mut taken) = timeout_at(deadline, self.slots.take()).await else {
            let reason = format!("{SLOTS} changes are under way");
            return Err(self.unanswered(&reason, "the change was not made"));
        };
        loop {
            self.refuse_closed()?;
            match self.try_commit(deadline, &plan, &mut taken.slot).await? {
                Outcome::Applied(revision) => return Ok(revision),
                Outcome::Conflict { key, actual } => return Err(StoreError::Conflict { key, actual }),
                Outcome::Again if Instant::now() < deadline => {}
                Outcome::Again => {
                    return Err(self.unanswered("no transaction came through", "the change was not made"));
                }
            }
        }
    }

    async fn try_commit(
        &self,
        deadline: Instant,
        plan: &Plan<'_>,
        slot: &mut Slot,
    ) -> Result<Outcome, StoreError> {
        let not_made = |failure| self.failed(failure, "the change was not made");
        let epoch = self.epoch(deadline).await.map_err(not_made)?;
        let Some(lease) = self.lease(deadline).await else {
            return Err(self.unanswered("there is no session", "the change was not made"));
        };
        if slot.lease != lease {
            *slot = Slot { lease, at: Some(0), ..*slot };
        }
        let Some(at) = slot.at else {
            self.fence(deadline, slot).await.map_err(not_made)?;
            return Ok(Outcome::Again);
        };
        let id = Bytes::from(format!("{:016x}{:016x}", fastrand::u64(..), fastrand::u64(..)));
        let request = self.transaction(&epoch, plan, slot, at, &id);
        // Until the answer is there: the commit may be dropped at any await.
        slot.at = None;
        let response = match self.client.call_once(deadline, request, wire::txn).await {
            Ok(response) => response,
            Err(Failure::Unanswered(reason)) => {
                tracing::debug!(reason, "a transaction without an answer");
                return self.find_out(deadline, &epoch, slot, &id, &reason).await;
            }
            Err(Failure::Refused(status)) => {
                slot.at = Some(at);
                if client::is_lease_gone(&status) {
                    self.lost_lease(lease);
                    return Ok(Outcome::Again);
                }
                return Err(not_made(Failure::Refused(status)));
            }
        };
        self.answered();
        let header = response.header;
        if response.succeeded {
            slot.at = header.map(|header| header.revision);
            let epoch = self.settle(deadline, epoch, header.as_ref()).await.map_err(|failure| {
                self.failed(failure, "the change was made, but etcd was restored or replaced meanwhile")
            })?;
            return Ok(Outcome::Applied(epoch.revision(header.map_or(0, |header| header.revision))));
        }
        let settled = self.settle(deadline, epoch, header.as_ref()).await.map_err(not_made)?;
        slot.at = Some(found(&response, 0).map_or(0, |entry| entry.mod_revision));
        let offset_at = found(&response, 1).map_or(0, |entry| entry.mod_revision);
        if settled != epoch && settled.written != epoch.written || slot.at != Some(at) {
            return Ok(Outcome::Again);
        }
        if offset_at != epoch.written {
            self.verify(deadline).await.map_err(not_made)?;
            return Ok(Outcome::Again);
        }
        for (index, op) in plan.conditions().enumerate() {
            let actual = found(&response, index + 2).map_or(0, |entry| entry.mod_revision);
            if Some(actual) != wanted(&epoch, op.when()) {
                let actual = (actual > 0).then(|| epoch.revision(actual));
                return Ok(Outcome::Conflict { key: op.key().clone(), actual });
            }
        }
        Ok(Outcome::Again)
    }

    fn transaction(&self, epoch: &Epoch, plan: &Plan<'_>, slot: &Slot, at: i64, id: &Bytes) -> TxnRequest {
        let slot_key = self.slot_key(slot);
        let mut compare =
            vec![wire::is_at(slot_key.clone(), at), wire::is_at(self.offset_key(), epoch.written)];
        let mut failure = vec![wire::look(slot_key.clone(), false), wire::look(self.offset_key(), false)];
        for op in plan.conditions() {
            let key = self.data(op.key());
            compare.push(self.condition(epoch, key.clone(), op.when()));
            failure.push(wire::look(key, false));
        }
        let operation = |op: &Op| -> RequestOp {
            match op {
                Op::Put { key, value, .. } => wire::put(self.data(key), value.clone(), 0),
                Op::Bind { key, value, .. } => wire::put(self.data(key), value.clone(), slot.lease),
                Op::Delete { key, .. } => wire::delete(self.data(key)),
            }
        };
        let mark = wire::put(slot_key, id.clone(), slot.lease);
        let success = std::iter::once(mark).chain(plan.done().map(operation)).collect();
        TxnRequest { compare, success, failure }
    }

    fn condition(&self, epoch: &Epoch, key: Bytes, when: Condition) -> Compare {
        // What was written in an earlier epoch is at no revision that etcd has.
        wire::is_at(key, wanted(epoch, when).unwrap_or(i64::MAX))
    }

    /// Whether the transaction with this id was applied. If not, it never will be.
    async fn find_out(
        &self,
        deadline: Instant,
        epoch: &Epoch,
        slot: &mut Slot,
        id: &Bytes,
        reason: &str,
    ) -> Result<Outcome, StoreError> {
        const UNKNOWN: &str = "the change may or may not have been made";
        let key = self.slot_key(slot);
        let request = TxnRequest {
            compare: vec![wire::has(key.clone(), id.clone())],
            success: vec![wire::look(key.clone(), false)],
            failure: vec![wire::put(key, Bytes::new(), slot.lease)],
        };
        let response = match self.client.call(deadline, request, wire::txn).await {
            Ok(response) => response,
            Err(Failure::Unanswered(_)) => return Err(self.unanswered(reason, UNKNOWN)),
            Err(Failure::Refused(status)) => {
                if client::is_lease_gone(&status) {
                    self.lost_lease(slot.lease);
                }
                return Err(self.unanswered(reason, UNKNOWN));
            }
        };
        self.answered();
        let settled = self.settle(deadline, *epoch, response.header.as_ref()).await;
        let settled = settled.map_err(|failure| self.failed(failure, UNKNOWN))?;
        if response.succeeded {
            let applied = found(&response, 0).map_or(0, |entry| entry.mod_revision);
            slot.at = Some(applied);
            return Ok(Outcome::Applied(settled.revision(applied)));
        }
        slot.at = response.header.map(|header| header.revision);
        Ok(Outcome::Again)
    }

    /// Writes the slot anew, so that a transaction under way that demands it as it was fails.
    async fn fence(&self, deadline: Instant, slot: &mut Slot) -> Result<(), Failure> {
        let request = TxnRequest {
            success: vec![wire::put(self.slot_key(slot), Bytes::new(), slot.lease)],
            ..TxnRequest::default()
        };
        match self.client.call(deadline, request, wire::txn).await {
            Ok(response) => slot.at = response.header.map(|header| header.revision),
            Err(Failure::Refused(status)) if client::is_lease_gone(&status) => self.lost_lease(slot.lease),
            Err(failure) => return Err(failure),
        }
        Ok(())
    }

    fn slot_key(&self, slot: &Slot) -> Bytes {
        self.meta(&format!("commits/{:016x}/{}", slot.lease, slot.number))
    }
}

/// Where the key has to be in etcd; 0: absent. `None`: at a revision of an earlier epoch, where it cannot be.
fn wanted(epoch: &Epoch, when: Condition) -> Option<i64> {
    match when {
        // 0 is no revision of a key.
        Condition::Unchanged(revision) => epoch.etcd(revision).filter(|revision| *revision > 0),
        Condition::Absent | Condition::Always => Some(0),
    }
}

/// What a transaction read by its operation at the index.
fn found(response: &TxnResponse, index: usize) -> Option<&KeyValue> {
    match response.responses.get(index) {
        Some(ResponseOp { response: Some(response_op::Response::ResponseRange(range)) }) => range.kvs.first(),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::store::conformance::{delete, put, put_when};

    #[test]
    fn the_last_operation_on_a_key_is_done_and_all_conditions_are_kept() {
        let ops = [put_when("a", "1", Condition::Absent), delete("b"), put("a", "2"), put("b", "1")];
        let plan = Plan::new(&ops);
        assert_eq!(plan.done().collect::<Vec<_>>(), [&ops[2], &ops[3]]);
        assert_eq!(plan.conditions().collect::<Vec<_>>(), [&ops[0]]);
    }
}
