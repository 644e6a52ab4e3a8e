//! How etcd's revisions become the store's: `revision = offset + etcd's revision`.
//!
//! The offset stands in etcd itself, at `<prefix>meta/offset`, with the id of the cluster that it was written for; so
//! every node computes the same. It is 0 until etcd goes back: restored from a backup, or replaced by another cluster.
//! Whoever sees that first moves the offset on by a compare-and-set, beyond all that it has ever seen and by [`LEAP`]
//! more, which covers what others have seen; who finds it moved far enough takes it as it is. Each transaction compares the
//! revision of the record, so no commit is answered by an offset that is no longer in force.
//!
//! A jump back shows in the header of a linearizable answer: another cluster id, or a revision or a raft term that is less
//! than one known before the question was asked. A process that starts anew while nobody else runs knows none; it can tell
//! by the cluster id only.

use std::sync::{Mutex, PoisonError};

use bytes::Bytes;
use tokio::{sync::watch, time::Instant};

use super::{Inner, client::Failure, wire};
use crate::{
    model::Revision,
    proto::etcd::{RangeRequest, ResponseHeader, TxnRequest},
};

/// What the offset is moved on by, beyond what is known: more changes than anybody makes between a backup and its use.
const LEAP: u64 = 1_000_000_000;

/// The offset in force, and what is known of the cluster that it belongs to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Epoch {
    pub(super) offset: u64,
    /// The revision at which etcd has the record.
    pub(super) written: i64,
    cluster: u64,
    /// The highest revision of etcd that was seen.
    seen: i64,
    term: u64,
}

impl Epoch {
    pub(super) fn revision(&self, etcd: i64) -> Revision {
        Revision(self.offset + u64::try_from(etcd).unwrap_or_default())
    }

    /// The revision of etcd, `None` when it is of an earlier epoch.
    pub(super) fn etcd(&self, revision: Revision) -> Option<i64> {
        i64::try_from(revision.0.checked_sub(self.offset)?).ok()
    }

    /// Whether the answer to a question that was asked when this was known comes from the same history.
    fn precedes(&self, header: &ResponseHeader) -> bool {
        header.cluster_id == self.cluster && header.revision >= self.seen && header.raft_term >= self.term
    }

    fn note(&mut self, header: &ResponseHeader) {
        self.seen = self.seen.max(header.revision);
        self.term = self.term.max(header.raft_term);
    }
}

/// What this process knows of the offset.
#[derive(Debug)]
pub(super) struct Epochs {
    known: Mutex<Option<Epoch>>,
    /// The offset, for watches: they end when it changes.
    offset: watch::Sender<u64>,
    /// One at a time looks it up.
    turn: tokio::sync::Semaphore,
}

impl Default for Epochs {
    fn default() -> Self {
        Self {
            known: Mutex::default(),
            offset: watch::Sender::default(),
            turn: tokio::sync::Semaphore::new(1),
        }
    }
}

impl Epochs {
    fn known(&self) -> Option<Epoch> {
        *self.known.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Changes when the offset does.
    pub(super) fn changes(&self) -> watch::Receiver<u64> {
        self.offset.subscribe()
    }

    fn set(&self, epoch: Epoch) {
        *self.known.lock().unwrap_or_else(PoisonError::into_inner) = Some(epoch);
        self.offset.send_if_modified(|offset| {
            let changed = *offset != epoch.offset;
            *offset = epoch.offset;
            changed
        });
    }

    /// Notes that etcd has come as far as `header` says, in the epoch.
    pub(super) fn note(&self, epoch: &Epoch, header: &ResponseHeader) {
        let mut known = self.known.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(known) = known.as_mut().filter(|known| known.written == epoch.written) {
            known.note(header);
        }
    }
}

/// The record as it stands in etcd.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Record {
    offset: u64,
    cluster: u64,
}

impl Record {
    fn encode(&self) -> Bytes {
        Bytes::from(format!("{} {:016x}", self.offset, self.cluster))
    }

    fn decode(value: &[u8]) -> Option<Self> {
        let (offset, cluster) = str::from_utf8(value).ok()?.split_once(' ')?;
        Some(Self { offset: offset.parse().ok()?, cluster: u64::from_str_radix(cluster, 16).ok()? })
    }
}

impl Inner {
    pub(super) fn offset_key(&self) -> Bytes {
        self.meta("offset")
    }

    /// The offset in force as far as it is known; looked up at first.
    pub(super) async fn epoch(&self, deadline: Instant) -> Result<Epoch, Failure> {
        match self.epochs.known() {
            Some(epoch) => Ok(epoch),
            None => self.look_up(deadline, None).await,
        }
    }

    /// What an answer to a question of the epoch `asked` means: the epoch that its revisions are of.
    pub(super) async fn settle(
        &self,
        deadline: Instant,
        asked: Epoch,
        header: Option<&ResponseHeader>,
    ) -> Result<Epoch, Failure> {
        let Some(header) = header else { return Ok(asked) };
        if asked.precedes(header) {
            self.epochs.note(&asked, header);
            return Ok(asked);
        }
        self.look_up(deadline, Some(asked)).await
    }

    /// Asks etcd whether it is still as it was: a linearizable read.
    pub(super) async fn verify(&self, deadline: Instant) -> Result<Epoch, Failure> {
        match self.epochs.known() {
            None => self.look_up(deadline, None).await,
            Some(asked) => {
                let (header, record, written) = self.read_record(deadline).await?;
                if asked.precedes(&header) && written == asked.written && record.is_some() {
                    self.epochs.note(&asked, &header);
                    return Ok(asked);
                }
                self.look_up(deadline, Some(asked)).await
            }
        }
    }

    async fn read_record(&self, deadline: Instant) -> Result<(ResponseHeader, Option<Record>, i64), Failure> {
        let request = RangeRequest { key: self.offset_key(), ..RangeRequest::default() };
        let response = self.client.call(deadline, request, wire::range).await?;
        let header = response.header.unwrap_or_default();
        let Some(entry) = response.kvs.first() else { return Ok((header, None, 0)) };
        match Record::decode(&entry.value) {
            Some(record) => Ok((header, Some(record), entry.mod_revision)),
            None => Err(Failure::Refused(tonic::Status::data_loss(format!(
                "{}meta/offset holds something that is not an offset: is the prefix used by something else?",
                self.prefix
            )))),
        }
    }

    /// Moves the offset on so that every later revision is greater than `to`.
    pub(super) async fn advance(&self, deadline: Instant, to: Revision) -> Result<(), Failure> {
        loop {
            let asked = self.verify(deadline).await?;
            let (header, record, written) = self.read_record(deadline).await?;
            let offset = record.map_or(0, |record| record.offset);
            let needed = to.0.saturating_sub(u64::try_from(header.revision).unwrap_or_default());
            if needed <= offset {
                return Ok(());
            }
            let record = Record { offset: needed, cluster: header.cluster_id };
            let request = TxnRequest {
                compare: vec![wire::is_at(self.offset_key(), written)],
                success: vec![wire::put(self.offset_key(), record.encode(), 0)],
                failure: vec![],
            };
            // Done twice it fails the second time, and is then found to be enough.
            if self.client.call(deadline, request, wire::txn).await?.succeeded {
                self.look_up(deadline, Some(asked)).await?;
            }
        }
    }

    /// Takes the offset that etcd has, after moving it on if revisions would go back with it.
    async fn look_up(&self, deadline: Instant, asked: Option<Epoch>) -> Result<Epoch, Failure> {
        let _turn = self.epochs.turn.acquire().await;
        // Somebody may have done it meanwhile.
        let before = self.epochs.known();
        if let Some(known) = before.filter(|known| asked.is_none_or(|asked| known.written != asked.written)) {
            return Ok(known);
        }
        loop {
            let (header, record, written) = self.read_record(deadline).await?;
            let taken = |offset, written| Epoch {
                offset,
                written,
                cluster: header.cluster_id,
                seen: header.revision.max(written),
                term: header.raft_term,
            };
            // What was given out, as far as this process knows.
            let reached = before.map_or(0, |known| known.revision(known.seen).0);
            let same_history = before.is_none_or(|known| known.precedes(&header));
            let offset = match record {
                Some(record) if record.cluster == header.cluster_id => {
                    if same_history || record.offset >= reached {
                        self.epochs.set(taken(record.offset, written));
                        return Ok(taken(record.offset, written));
                    }
                    record.offset.max(reached) + LEAP
                }
                Some(record) => {
                    let of_record = record.offset + u64::try_from(header.revision).unwrap_or_default();
                    of_record.max(reached) + LEAP
                }
                None if before.is_none() => 0,
                None => reached + LEAP,
            };
            let record = Record { offset, cluster: header.cluster_id };
            let request = TxnRequest {
                compare: vec![wire::is_at(self.offset_key(), written)],
                success: vec![wire::put(self.offset_key(), record.encode(), 0)],
                failure: vec![],
            };
            // Done twice it fails the second time, and is then found.
            let response = self.client.call(deadline, request, wire::txn).await?;
            let revision = response.header.map_or(0, |header| header.revision);
            if !response.succeeded {
                continue;
            }
            if before.is_some() || offset > 0 {
                tracing::error!(
                    seen = reached,
                    revision = offset + u64::try_from(revision).unwrap_or_default(),
                    "etcd went back: it was restored from a backup or replaced, and what was accepted since is lost; \
                     revisions go on where none was given before"
                );
            }
            self.epochs.set(taken(offset, revision));
            return Ok(taken(offset, revision));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_record_reads_back() {
        for record in [Record { offset: 0, cluster: 1 }, Record { offset: u64::MAX, cluster: u64::MAX }] {
            assert_eq!(Record::decode(&record.encode()), Some(record));
        }
        for text in ["", "1", "x 1", "1 x", "1 2 3"] {
            assert_eq!(Record::decode(text.as_bytes()), None, "{text}");
        }
    }

    #[test]
    fn an_answer_that_goes_back_is_of_another_history() {
        let epoch = Epoch { offset: 5, written: 2, cluster: 7, seen: 100, term: 3 };
        let header = |cluster_id, revision, raft_term| ResponseHeader {
            cluster_id,
            revision,
            raft_term,
            ..ResponseHeader::default()
        };
        for (header, same) in [
            (header(7, 100, 3), true),
            (header(7, 101, 4), true),
            (header(8, 101, 4), false),
            (header(7, 99, 3), false),
            (header(7, 100, 2), false),
        ] {
            assert_eq!(epoch.precedes(&header), same, "{header:?}");
        }
        assert_eq!(epoch.revision(100), Revision(105));
        assert_eq!(epoch.etcd(Revision(105)), Some(100));
        assert_eq!(epoch.etcd(Revision(4)), None);
    }
}
