//! What a node keeps on its disk: the log in `log.jsonl`, one record to a line, and the newest snapshot in `snapshot.json`.
//!
//! The store itself is in memory: after a start it is the snapshot, and what the log says since.

use std::{
    collections::BTreeMap,
    fmt::Debug,
    io::{self, Cursor},
    ops::RangeBounds,
    path::{Path, PathBuf},
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

use openraft::{
    Entry, EntryPayload, LogId, LogState, OptionalSend, RaftLogReader, RaftSnapshotBuilder, Snapshot,
    SnapshotMeta, StorageError, StorageIOError, StoredMembership, Vote,
    storage::{LogFlushed, RaftLogStorage, RaftStateMachine},
};
use serde::{Deserialize, Serialize};
use tokio::{
    fs::{self, File},
    io::AsyncWriteExt as _,
};

use super::{Node, NodeId, Types};

type Result<T> = std::result::Result<T, StorageError<NodeId>>;

fn lock<T>(shared: &Mutex<T>) -> MutexGuard<'_, T> {
    shared.lock().unwrap_or_else(PoisonError::into_inner)
}

/// A line of the log.
#[derive(Serialize, Deserialize)]
enum Record {
    Vote(Vote<NodeId>),
    Entry(Entry<Types>),
    /// Entries from this index on are void: another leader had others.
    Truncated(u64),
    /// Entries up to this one are in the snapshot.
    Purged(LogId<NodeId>),
}

/// The log.
pub(super) struct Log {
    path: PathBuf,
    file: File,
    vote: Option<Vote<NodeId>>,
    entries: Entries,
}

/// Its entries.
#[derive(Clone, Default)]
pub(super) struct Entries(Arc<Mutex<Held>>);

#[derive(Default)]
struct Held {
    purged: Option<LogId<NodeId>>,
    entries: BTreeMap<u64, Entry<Types>>,
}

impl Log {
    /// Reads the one in `folder`, which is made when it is not there.
    pub(super) async fn open(folder: &Path) -> anyhow::Result<Self> {
        fs::create_dir_all(folder).await?;
        let path = folder.join("log.jsonl");
        let text = read(&path).await?.unwrap_or_default();
        // A line without an end was being written when the node died: nobody was told that it is there.
        let whole = text.iter().rposition(|byte| *byte == b'\n').map_or(0, |end| end + 1);
        let (mut vote, mut held) = (None, Held::default());
        for line in text.split_inclusive(|byte| *byte == b'\n').filter(|line| line.ends_with(b"\n")) {
            match serde_json::from_slice(line)? {
                Record::Vote(given) => vote = Some(given),
                Record::Entry(entry) => drop(held.entries.insert(entry.log_id.index, entry)),
                Record::Truncated(index) => drop(held.entries.split_off(&index)),
                Record::Purged(last) => held.purged = Some(last),
            }
        }
        let file = File::options().create(true).append(true).open(&path).await?;
        file.set_len(whole as u64).await?;
        file.sync_all().await?;
        sync_folder(folder).await?;
        Ok(Self { path, file, vote, entries: Entries(Arc::new(Mutex::new(held))) })
    }

    /// Returns once they are on the disk.
    async fn write(&mut self, records: &[Record]) -> io::Result<()> {
        self.file.write_all(&lines(records)?).await?;
        self.file.flush().await?;
        self.file.sync_data().await
    }

    /// Writes the file anew, without what is in the snapshot.
    async fn rewrite(&mut self) -> io::Result<()> {
        let records: Vec<_> = {
            let held = lock(&self.entries.0);
            let vote = self.vote.iter().map(|vote| Record::Vote(*vote));
            let purged = held.purged.iter().map(|last| Record::Purged(*last));
            vote.chain(purged).chain(held.entries.values().cloned().map(Record::Entry)).collect()
        };
        write_whole(&self.path, &lines(&records)?).await?;
        self.file = File::options().append(true).open(&self.path).await?;
        Ok(())
    }
}

fn lines(records: &[Record]) -> io::Result<Vec<u8>> {
    let mut bytes = Vec::new();
    for record in records {
        serde_json::to_writer(&mut bytes, record)?;
        bytes.push(b'\n');
    }
    Ok(bytes)
}

impl RaftLogReader<Types> for Entries {
    async fn try_get_log_entries<RB: RangeBounds<u64> + Clone + Debug + OptionalSend>(
        &mut self,
        range: RB,
    ) -> Result<Vec<Entry<Types>>> {
        Ok(lock(&self.0).entries.range(range).map(|(_, entry)| entry.clone()).collect())
    }
}

impl RaftLogReader<Types> for Log {
    async fn try_get_log_entries<RB: RangeBounds<u64> + Clone + Debug + OptionalSend>(
        &mut self,
        range: RB,
    ) -> Result<Vec<Entry<Types>>> {
        self.entries.try_get_log_entries(range).await
    }
}

impl RaftLogStorage<Types> for Log {
    type LogReader = Entries;

    async fn get_log_state(&mut self) -> Result<LogState<Types>> {
        let held = lock(&self.entries.0);
        let last = held.entries.last_key_value().map(|(_, entry)| entry.log_id);
        Ok(LogState { last_purged_log_id: held.purged, last_log_id: last.or(held.purged) })
    }

    async fn get_log_reader(&mut self) -> Self::LogReader {
        self.entries.clone()
    }

    async fn save_vote(&mut self, vote: &Vote<NodeId>) -> Result<()> {
        self.write(&[Record::Vote(*vote)]).await.map_err(|error| StorageIOError::write_vote(&error))?;
        self.vote = Some(*vote);
        Ok(())
    }

    async fn read_vote(&mut self) -> Result<Option<Vote<NodeId>>> {
        Ok(self.vote)
    }

    async fn append<I>(&mut self, entries: I, callback: LogFlushed<Types>) -> Result<()>
    where
        I: IntoIterator<Item = Entry<Types>> + OptionalSend,
        I::IntoIter: OptionalSend,
    {
        let records: Vec<_> = entries.into_iter().map(Record::Entry).collect();
        let written = self.write(&records).await;
        if written.is_ok() {
            let mut held = lock(&self.entries.0);
            for record in records {
                if let Record::Entry(entry) = record {
                    held.entries.insert(entry.log_id.index, entry);
                }
            }
        }
        callback.log_io_completed(written);
        Ok(())
    }

    async fn truncate(&mut self, from: LogId<NodeId>) -> Result<()> {
        let record = Record::Truncated(from.index);
        self.write(&[record]).await.map_err(|error| StorageIOError::write_logs(&error))?;
        lock(&self.entries.0).entries.split_off(&from.index);
        Ok(())
    }

    async fn purge(&mut self, last: LogId<NodeId>) -> Result<()> {
        {
            let mut held = lock(&self.entries.0);
            held.entries = held.entries.split_off(&(last.index + 1));
            held.purged = Some(last);
        }
        self.rewrite().await.map_err(|error| StorageIOError::write_logs(&error).into())
    }
}

/// What the log amounts to.
#[derive(Clone)]
pub(super) struct Machine {
    state: Arc<Mutex<State>>,
    snapshot: PathBuf,
}

#[derive(Clone, Default, Serialize, Deserialize)]
struct State {
    applied: Option<LogId<NodeId>>,
    membership: StoredMembership<NodeId, Node>,
    values: BTreeMap<String, String>,
}

impl State {
    fn meta(&self) -> SnapshotMeta<NodeId, Node> {
        // One position in the log is one state.
        let snapshot_id = self.applied.map(|applied| applied.to_string()).unwrap_or_default();
        SnapshotMeta { last_log_id: self.applied, last_membership: self.membership.clone(), snapshot_id }
    }
}

impl Machine {
    /// As of the snapshot in `folder`, if there is one.
    pub(super) async fn open(folder: &Path) -> anyhow::Result<Self> {
        let snapshot = folder.join("snapshot.json");
        let state = match read(&snapshot).await? {
            Some(bytes) => serde_json::from_slice(&bytes)?,
            None => State::default(),
        };
        Ok(Self { state: Arc::new(Mutex::new(state)), snapshot })
    }

    pub(super) fn get(&self, key: &str) -> Option<String> {
        lock(&self.state).values.get(key).cloned()
    }
}

impl RaftStateMachine<Types> for Machine {
    type SnapshotBuilder = Self;

    async fn applied_state(&mut self) -> Result<(Option<LogId<NodeId>>, StoredMembership<NodeId, Node>)> {
        let state = lock(&self.state);
        Ok((state.applied, state.membership.clone()))
    }

    async fn apply<I>(&mut self, entries: I) -> Result<Vec<()>>
    where
        I: IntoIterator<Item = Entry<Types>> + OptionalSend,
        I::IntoIter: OptionalSend,
    {
        let mut state = lock(&self.state);
        let apply = |Entry { log_id, payload }: Entry<Types>| {
            state.applied = Some(log_id);
            match payload {
                EntryPayload::Blank => {}
                EntryPayload::Normal(write) => drop(state.values.insert(write.key, write.value)),
                EntryPayload::Membership(given) => {
                    state.membership = StoredMembership::new(Some(log_id), given);
                }
            }
        };
        Ok(entries.into_iter().map(apply).collect())
    }

    async fn get_snapshot_builder(&mut self) -> Self {
        self.clone()
    }

    async fn begin_receiving_snapshot(&mut self) -> Result<Box<Cursor<Vec<u8>>>> {
        Ok(Box::default())
    }

    async fn install_snapshot(
        &mut self,
        meta: &SnapshotMeta<NodeId, Node>,
        snapshot: Box<Cursor<Vec<u8>>>,
    ) -> Result<()> {
        let bytes = snapshot.into_inner();
        let failed = |error: io::Error| StorageIOError::write_snapshot(Some(meta.signature()), &error);
        let state = serde_json::from_slice(&bytes).map_err(|error| failed(error.into()))?;
        write_whole(&self.snapshot, &bytes).await.map_err(failed)?;
        *lock(&self.state) = state;
        Ok(())
    }

    async fn get_current_snapshot(&mut self) -> Result<Option<Snapshot<Types>>> {
        let failed = |error: io::Error| StorageIOError::read_snapshot(None, &error);
        let Some(bytes) = read(&self.snapshot).await.map_err(failed)? else { return Ok(None) };
        let state: State = serde_json::from_slice(&bytes).map_err(|error| failed(error.into()))?;
        Ok(Some(Snapshot { meta: state.meta(), snapshot: Box::new(Cursor::new(bytes)) }))
    }
}

impl RaftSnapshotBuilder<Types> for Machine {
    async fn build_snapshot(&mut self) -> Result<Snapshot<Types>> {
        let state = lock(&self.state).clone();
        let meta = state.meta();
        let failed = |error: io::Error| StorageIOError::write_snapshot(Some(meta.signature()), &error);
        let bytes = serde_json::to_vec(&state).map_err(|error| failed(error.into()))?;
        write_whole(&self.snapshot, &bytes).await.map_err(failed)?;
        Ok(Snapshot { meta, snapshot: Box::new(Cursor::new(bytes)) })
    }
}

/// `None` when there is no such file.
async fn read(path: &Path) -> io::Result<Option<Vec<u8>>> {
    match fs::read(path).await {
        Ok(bytes) => Ok(Some(bytes)),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(error) => Err(error),
    }
}

/// Whoever reads it finds what was there, or all of this, also after a loss of power.
async fn write_whole(path: &Path, bytes: &[u8]) -> io::Result<()> {
    let new = path.with_extension("new");
    let mut file = File::create(&new).await?;
    file.write_all(bytes).await?;
    file.sync_all().await?;
    fs::rename(&new, path).await?;
    match path.parent() {
        Some(folder) => sync_folder(folder).await,
        None => Ok(()),
    }
}

async fn sync_folder(folder: &Path) -> io::Result<()> {
    File::open(folder).await?.sync_all().await
}

#[cfg(test)]
mod tests {
    use openraft::{
        CommittedLeaderId,
        storage::RaftLogStorageExt as _,
        testing::{StoreBuilder, Suite},
    };
    use tempfile::TempDir;

    use super::*;
    use crate::Write;

    struct Builder;

    impl StoreBuilder<Types, Log, Machine, TempDir> for Builder {
        async fn build(&self) -> Result<(TempDir, Log, Machine)> {
            let folder = tempfile::tempdir().unwrap();
            let (log, machine) = open(folder.path()).await;
            Ok((folder, log, machine))
        }
    }

    async fn open(folder: &Path) -> (Log, Machine) {
        (Log::open(folder).await.unwrap(), Machine::open(folder).await.unwrap())
    }

    /// openraft's own tests of what it asks of a store.
    #[test]
    fn it_is_as_openraft_wants_it() {
        Suite::test_all(Builder).unwrap();
    }

    fn id(index: u64) -> LogId<NodeId> {
        LogId::new(CommittedLeaderId::new(1, 1), index)
    }

    fn entry(index: u64) -> Entry<Types> {
        let write = Write { key: format!("k{index}"), value: index.to_string() };
        Entry { log_id: id(index), payload: EntryPayload::Normal(write) }
    }

    async fn indexes(log: &mut Log) -> Vec<u64> {
        let entries = log.try_get_log_entries(..).await.unwrap();
        entries.into_iter().map(|entry| entry.log_id.index).collect()
    }

    #[tokio::test]
    async fn it_comes_back_after_a_start() {
        let folder = tempfile::tempdir().unwrap();
        let (mut log, mut machine) = open(folder.path()).await;
        let vote = Vote::new_committed(3, 1);
        log.save_vote(&vote).await.unwrap();
        log.blocking_append((1..=9).map(entry)).await.unwrap();
        log.truncate(id(8)).await.unwrap();
        machine.apply((1..=5).map(entry)).await.unwrap();
        machine.build_snapshot().await.unwrap();
        machine.apply([entry(6)]).await.unwrap();
        log.purge(id(4)).await.unwrap();
        log.blocking_append([entry(8)]).await.unwrap();

        // The node died when it wrote the ninth.
        let file = folder.path().join("log.jsonl");
        let mut text = std::fs::read(&file).unwrap();
        let whole = text.len();
        text.extend_from_slice(br#"{"Entry":{"log_id""#);
        std::fs::write(&file, text).unwrap();

        for _ in 0..2 {
            let (mut log, mut machine) = open(folder.path()).await;
            assert_eq!(log.read_vote().await.unwrap(), Some(vote));
            assert_eq!(indexes(&mut log).await, [5, 6, 7, 8]);
            let state = log.get_log_state().await.unwrap();
            assert_eq!((state.last_purged_log_id, state.last_log_id), (Some(id(4)), Some(id(8))));
            assert_eq!(machine.applied_state().await.unwrap().0, Some(id(5)));
            assert_eq!((machine.get("k5"), machine.get("k6")), (Some("5".to_owned()), None));
            assert_eq!(std::fs::metadata(&file).unwrap().len(), whole as u64);
        }
    }

    #[tokio::test]
    async fn a_damaged_log_is_not_read() {
        let folder = tempfile::tempdir().unwrap();
        std::fs::write(folder.path().join("log.jsonl"), "{\"Entry\n{\"Truncated\":4}\n").unwrap();
        assert!(Log::open(folder.path()).await.is_err());
    }
}
