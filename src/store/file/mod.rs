//! The embedded store: a log in a directory, and all keys in memory.
//!
//! One thread appends. It takes every commit that waits and writes them as one frame with one `fdatasync`; another one
//! answers them then, while the next frame is written. So each commit costs its share of one append, which is the least
//! that a disk can do. The log is our own
//! because a damage has to be judged by its place: a torn end is cut and reported, a damage in the middle refuses to
//! start. That needs a file in which the order of commits can be seen, which an embedded database's pages do not show.
//!
//! A directory holds `lock`, one `snapshot-<revision>` (none at first) and `log-<revision>` with the commits after that
//! revision; more of them while a snapshot is being written or after a crash there.

mod compact;
mod format;
mod log;
mod recover;
#[cfg(test)]
mod tests;
mod writer;

use std::{
    fs::{DirBuilder, File, OpenOptions, TryLockError},
    io::{ErrorKind, Read as _, Write as _},
    os::unix::fs::{DirBuilderExt as _, OpenOptionsExt as _},
    path::{Path, PathBuf},
    sync::{Arc, atomic::Ordering},
    thread,
    time::Duration,
};

use futures_util::future::BoxFuture;
use tokio::sync::{mpsc, oneshot};

use self::{
    log::at,
    recover::Recovered,
    writer::{Callers, Counters, Request, Shower, Writer},
};
use super::{Entry, Listing, Op, Store, StoreError, Watch, feed::Readable};
use crate::model::Revision;

pub use self::log::FileError;

/// How a [`FileStore`] behaves.
#[derive(Debug, Clone)]
pub struct Config {
    /// Start although accepted changes are damaged: what is before the damage is kept, the rest is put aside.
    pub accept_loss: bool,
    /// Bytes of log before a snapshot replaces it, when the state itself is smaller. Default 16 MiB.
    pub compact_after: u64,
    /// How many commits are remembered for watchers. Default 16,384.
    pub history: usize,
    /// How many commits wait for the writer; further callers wait for room. Default 4,096, at least 1.
    pub queue: usize,
    /// What goes wrong.
    #[cfg(test)]
    pub(crate) faults: Faults,
}

impl Default for Config {
    fn default() -> Self {
        Self {
            accept_loss: false,
            compact_after: 16 << 20,
            history: 16_384,
            queue: 4096,
            #[cfg(test)]
            faults: Faults::default(),
        }
    }
}

/// What a start found.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Recovery {
    /// The last revision given out.
    pub revision: Revision,
    /// How many keys there are.
    pub keys: usize,
    /// How many commits were read from logs.
    pub records: u64,
    /// How many bytes were read from logs and the snapshot.
    pub bytes: u64,
    /// The torn end of the log that was cut, if there was one.
    pub cut: Option<Cut>,
    /// What was lost under [`Config::accept_loss`], if anything.
    pub loss: Option<Loss>,
}

/// The end of a log that was not whole: a write that a crash interrupted.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Cut {
    /// The log.
    pub file: PathBuf,
    /// Where it ends now.
    pub offset: u64,
    /// How many bytes were removed.
    pub bytes: u64,
}

/// What was given up by starting with a damage.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Loss {
    /// Where.
    pub damage: Damage,
    /// Changes up to this revision were kept (of a damaged snapshot: the keys before the damage).
    pub kept: Revision,
    /// Copies of the files that were not or not wholly read.
    pub aside: Vec<PathBuf>,
}

/// A damage that took accepted changes with it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Damage {
    /// The file that is damaged or missing.
    pub file: PathBuf,
    /// The first byte that cannot be used.
    pub offset: u64,
    /// What is wrong there.
    pub what: String,
}

/// Why a [`FileStore`] did not open.
#[derive(Debug, thiserror::Error)]
pub enum OpenError {
    /// The system refused an operation on a file.
    #[error("cannot open the store: {0}")]
    File(#[from] FileError),
    /// Another process has the directory.
    #[error("the store in {} is in use by another process: stop that one, or give this one another directory", .0.display())]
    Locked(PathBuf),
    /// Accepted changes are damaged, so starting would lose them.
    #[error(
        "the store is damaged: {} at byte {}: {}. Accepted changes would be lost, so nothing was changed. Restore the \
         directory from a backup, or start once with `disco serve --accept-loss` (in the file: `store.file.accept_loss: true`): \
         it keeps all changes before the damage and puts the damaged files aside under another name",
        .0.file.display(), .0.offset, .0.what
    )]
    Damaged(Damage),
}

/// What the writer did since the store was opened.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Stats {
    /// Commits made durable.
    pub commits: u64,
    /// Writes with one sync each that made them so.
    pub batches: u64,
    /// Batches that could not be written.
    pub failed_batches: u64,
    /// Bytes appended to logs.
    pub bytes: u64,
    /// Snapshots written.
    pub snapshots: u64,
}

/// The embedded store. Close it to be sure that its directory is free; dropping it ends its thread a little later.
#[derive(Debug)]
pub struct FileStore {
    readable: Arc<Readable>,
    queue: mpsc::Sender<Request>,
    counters: Arc<Counters>,
}

impl FileStore {
    /// Opens the store in `dir`, which is created when absent. Blocks while it reads: about a second for two million
    /// keys. A runtime that it is opened in runs for as long as commits are waited for.
    ///
    /// # Errors
    /// [`OpenError`]; the directory is then as it was.
    pub fn open(dir: &Path, config: Config) -> Result<(Self, Recovery), OpenError> {
        create_dir(dir)?;
        let (mut lock, used) = lock(dir)?;
        let Recovered { state, log, logged, recovery } = recover::recover(dir, used, config.accept_loss)?;
        #[cfg(test)]
        let log = log.with_faults(config.faults);
        if !used {
            mark_used(dir, &mut lock)?;
        }
        tracing::info!(
            dir = %dir.display(),
            revision = recovery.revision.0,
            keys = recovery.keys,
            commits = recovery.records,
            "opened the store"
        );
        let readable = Readable::new(state, config.history);
        let counters = Arc::new(Counters::default());
        let callers = Callers::new();
        let writer = Writer {
            dir: dir.to_owned(),
            log,
            readable: Arc::clone(&readable),
            counters: Arc::clone(&counters),
            compact_after: config.compact_after,
            failing: false,
            logged,
            compaction: None,
            shower: Shower::start(Arc::clone(&readable), callers.clone()).map_err(at(dir))?,
            callers,
            lock: Some(lock),
        };
        let (queue, requests) = mpsc::channel(config.queue.max(1));
        thread::Builder::new()
            .name("store-writer".into())
            .spawn(move || writer.run(requests))
            .map_err(at(dir))?;
        Ok((Self { readable, queue, counters }, recovery))
    }

    /// What the writer did so far.
    pub fn stats(&self) -> Stats {
        let read = |counter: &std::sync::atomic::AtomicU64| counter.load(Ordering::Relaxed);
        Stats {
            commits: read(&self.counters.commits),
            batches: read(&self.counters.batches),
            failed_batches: read(&self.counters.failed_batches),
            bytes: read(&self.counters.bytes),
            snapshots: read(&self.counters.snapshots),
        }
    }
}

impl Store for FileStore {
    fn commit(&self, ops: Vec<Op>) -> BoxFuture<'_, Result<Revision, StoreError>> {
        Box::pin(async move {
            let bytes = format::encoded_len(&ops);
            if bytes > format::MAX_COMMIT {
                return Err(StoreError::Failed(format!(
                    "a change of {bytes} bytes is too large: at most {} are written at once",
                    format::MAX_COMMIT
                )));
            }
            let (answer, answered) = oneshot::channel();
            self.queue.send(Request::Commit { ops, answer }).await.map_err(|_| StoreError::Closed)?;
            answered.await.unwrap_or(Err(StoreError::Closed))
        })
    }

    fn get<'a>(&'a self, key: &'a str) -> BoxFuture<'a, Result<Option<Entry>, StoreError>> {
        Box::pin(async move { self.readable.get(key) })
    }

    fn list<'a>(&'a self, prefix: &'a str) -> BoxFuture<'a, Result<Listing, StoreError>> {
        Box::pin(async move { self.readable.list(prefix) })
    }

    fn watch<'a>(
        &'a self,
        prefix: &'a str,
        after: Revision,
    ) -> BoxFuture<'a, Result<Box<dyn Watch>, StoreError>> {
        Box::pin(async move { self.readable.watch(prefix, after) })
    }

    fn advance(&self, to: Revision) -> BoxFuture<'_, Result<(), StoreError>> {
        Box::pin(async move {
            let (answer, answered) = oneshot::channel();
            self.queue.send(Request::Advance { to, answer }).await.map_err(|_| StoreError::Closed)?;
            answered.await.unwrap_or(Err(StoreError::Closed))
        })
    }

    fn close(&self) -> BoxFuture<'_, Result<(), StoreError>> {
        Box::pin(async move {
            // Refused when it is closing already; either way it is closed in the end.
            let _ = self.queue.send(Request::Close).await;
            self.readable.closed().await;
            Ok(())
        })
    }
}

fn create_dir(dir: &Path) -> Result<(), FileError> {
    if dir.is_dir() {
        return Ok(());
    }
    if dir.exists() {
        return Err(at(dir)(ErrorKind::NotADirectory.into()));
    }
    DirBuilder::new().recursive(true).mode(0o700).create(dir).map_err(at(dir))?;
    match dir.parent() {
        Some(parent) if !parent.as_os_str().is_empty() => log::sync_dir(parent),
        _ => Ok(()),
    }
}

/// How long another process may still hold the directory: one that is ending, such as this one's forerunner.
const ENDING: Duration = Duration::from_millis(500);

/// Takes the directory for this process, and tells whether it has held a store.
fn lock(dir: &Path) -> Result<(File, bool), OpenError> {
    let path = dir.join("lock");
    let mut file = OpenOptions::new()
        .read(true)
        .write(true)
        .create(true)
        .truncate(false)
        .mode(0o600)
        .open(&path)
        .map_err(at(&path))?;
    let tries = 20;
    for left in (0..tries).rev() {
        match file.try_lock() {
            Ok(()) => break,
            Err(TryLockError::WouldBlock) if left > 0 => thread::sleep(ENDING / tries),
            Err(TryLockError::WouldBlock) => return Err(OpenError::Locked(dir.to_owned())),
            Err(TryLockError::Error(cause)) => return Err(FileError { path, cause }.into()),
        }
    }
    let mut text = String::new();
    file.read_to_string(&mut text).map_err(at(&path))?;
    Ok((file, !text.is_empty()))
}

/// From now on a directory without segments has lost them, and is not a new one.
fn mark_used(dir: &Path, lock: &mut File) -> Result<(), FileError> {
    let marked = lock.write_all(b"a Disco store\n").and_then(|()| lock.sync_all());
    marked.map_err(at(&dir.join("lock")))?;
    log::sync_dir(dir)
}

/// Makes the log fail, in tests.
#[cfg(test)]
#[derive(Debug, Clone, Default)]
pub(crate) struct Faults(Arc<std::sync::atomic::AtomicU8>);

#[cfg(test)]
impl Faults {
    /// Half of a frame is written, then the disk is full.
    pub(crate) const WRITE: u8 = 1;
    /// The sync fails.
    pub(crate) const SYNC: u8 = 2;
    /// What a failed write left cannot be cut.
    pub(crate) const REPAIR: u8 = 4;

    pub(crate) fn set(&self, faults: u8) {
        self.0.store(faults, Ordering::SeqCst);
    }

    fn has(&self, fault: u8) -> bool {
        self.0.load(Ordering::SeqCst) & fault != 0
    }
}
