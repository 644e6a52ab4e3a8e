//! The one thread that writes. It takes all commits that wait, checks them in order, writes those that hold as one frame
//! with one sync, and only then shows and answers them.

use std::{
    fs::File,
    path::PathBuf,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    thread::{self, JoinHandle},
};

use tokio::sync::{mpsc, oneshot};

use super::{
    compact,
    format::{self, Frame},
    log::{FileError, Log},
};
use crate::{
    model::Revision,
    store::{Op, StoreError, feed::Readable, state::Ahead},
};

/// How many commits one sync makes durable at most.
const BATCH_COMMITS: usize = 1024;

/// What is asked of the writer.
#[derive(Debug)]
pub(super) enum Request {
    Commit {
        ops: Vec<Op>,
        answer: Answer,
    },
    /// The revisions up to this one are taken from now on.
    Advance {
        to: Revision,
        answer: oneshot::Sender<Result<(), StoreError>>,
    },
    Close,
}

type Answer = oneshot::Sender<Result<Revision, StoreError>>;

/// What the writer counted since the store was opened.
#[derive(Debug, Default)]
pub(super) struct Counters {
    pub(super) commits: AtomicU64,
    pub(super) batches: AtomicU64,
    pub(super) failed_batches: AtomicU64,
    pub(super) bytes: AtomicU64,
    pub(super) snapshots: AtomicU64,
}

fn add(counter: &AtomicU64, n: u64) {
    counter.fetch_add(n, Ordering::Relaxed);
}

/// What the thread owns. Readers see the store closed when it is dropped, also by a panic.
#[derive(Debug)]
pub(super) struct Writer {
    pub(super) dir: PathBuf,
    pub(super) log: Log,
    pub(super) readable: Arc<Readable>,
    pub(super) counters: Arc<Counters>,
    /// Bytes of log after which a snapshot is written, when the state is smaller.
    pub(super) compact_after: u64,
    /// Whether the last batch could not be written.
    pub(super) failing: bool,
    /// Bytes of log since the last snapshot was begun.
    pub(super) logged: u64,
    pub(super) compaction: Option<JoinHandle<()>>,
    /// Held until everything is written.
    pub(super) lock: Option<File>,
}

impl Writer {
    /// Serves until asked to close or until nobody is left to ask.
    pub(super) fn run(mut self, mut queue: mpsc::Receiver<Request>) {
        let mut frame = Frame::new(self.log.marker());
        let mut requests = Vec::with_capacity(BATCH_COMMITS);
        while queue.blocking_recv_many(&mut requests, BATCH_COMMITS) > 0 {
            let mut waiting = requests.drain(..).peekable();
            while waiting.peek().is_some() {
                let is_advance = |request: &Request| matches!(request, Request::Advance { .. });
                if let Some(Request::Advance { to, answer }) = waiting.next_if(is_advance) {
                    // Nobody listens when the caller gave up; it stands.
                    let _ = answer.send(self.advance(&mut frame, to));
                    continue;
                }
                let mut commits = std::iter::from_fn(|| waiting.next_if(|request| !is_advance(request)));
                self.write_batch(&mut frame, &mut commits, &mut queue);
            }
            drop(waiting);
            if self.compaction_due() {
                self.start_compaction();
                frame = Frame::new(self.log.marker());
            }
        }
    }

    fn write_batch(
        &mut self,
        frame: &mut Frame,
        waiting: &mut impl Iterator<Item = Request>,
        queue: &mut mpsc::Receiver<Request>,
    ) {
        let mut ahead = Ahead::default();
        let mut accepted: Vec<(Revision, Vec<Op>)> = Vec::new();
        let mut answers: Vec<(Answer, Result<Revision, StoreError>)> = Vec::new();
        {
            let state = self.readable.state();
            let mut revision = state.revision();
            frame.begin_commits(Revision(revision.0 + 1));
            while frame.len() < format::FULL {
                let (ops, answer) = match waiting.next() {
                    Some(Request::Commit { ops, answer }) => (ops, answer),
                    Some(Request::Close) => {
                        // What is queued is still taken; nothing new comes in.
                        queue.close();
                        continue;
                    }
                    Some(Request::Advance { .. }) | None => break,
                };
                let outcome = state.check(&ops, &ahead).map(|()| {
                    revision.0 += 1;
                    ahead.note(revision, &ops);
                    frame.push_commit(&ops);
                    accepted.push((revision, ops));
                    revision
                });
                answers.push((answer, outcome));
            }
        }
        if let Err(error) = self.append(frame) {
            // Conflicts too: they may be with commits of this batch.
            let failed = StoreError::Failed(format!("cannot write the change: {error}"));
            if !std::mem::replace(&mut self.failing, true) {
                tracing::error!(%error, "cannot write to the store; changes are refused until it works again");
            }
            add(&self.counters.failed_batches, 1);
            for (answer, _) in answers {
                let _ = answer.send(Err(failed.clone()));
            }
            return;
        }
        self.readable.publish(accepted);
        for (answer, outcome) in answers {
            // Nobody listens when the caller gave up; the commit stands.
            let _ = answer.send(outcome);
        }
    }

    fn advance(&mut self, frame: &mut Frame, to: Revision) -> Result<(), StoreError> {
        if to <= self.readable.state().revision() {
            return Ok(());
        }
        let bytes = frame.skip(to);
        self.log
            .append(bytes)
            .map_err(|error| StoreError::Failed(format!("cannot write the change: {error}")))?;
        self.logged += bytes.len() as u64;
        self.readable.advance(to)
    }

    fn append(&mut self, frame: &mut Frame) -> Result<(), FileError> {
        let commits = u64::from(frame.count());
        if commits == 0 {
            return Ok(());
        }
        let bytes = frame.finish_commits();
        self.log.append(bytes)?;
        self.logged += bytes.len() as u64;
        if std::mem::take(&mut self.failing) {
            tracing::info!("the store can be written to again");
        }
        add(&self.counters.commits, commits);
        add(&self.counters.batches, 1);
        add(&self.counters.bytes, bytes.len() as u64);
        Ok(())
    }

    /// Half of all that is read at a start is then log at most, and each byte is written about twice. A log whose end is
    /// not known stays the newest: there, and only there, a start cuts it.
    fn compaction_due(&self) -> bool {
        !self.failing
            && self.logged > self.compact_after.max(self.readable.state().bytes())
            && self.compaction.as_ref().is_none_or(JoinHandle::is_finished)
    }

    /// Begins a new log and writes the snapshot that it follows in another thread, while commits go on. When that fails
    /// the older files stay, and it is tried again after as many bytes more.
    fn start_compaction(&mut self) {
        self.logged = 0;
        let state = self.readable.state().clone();
        match Log::create(&self.dir, state.revision()) {
            Ok(log) => {
                #[cfg(test)]
                let log = log.with_faults(self.log.faults());
                self.log = log;
            }
            Err(error) => {
                tracing::warn!(%error, "cannot begin a new log; the old one goes on growing");
                return;
            }
        }
        let (dir, counters) = (self.dir.clone(), Arc::clone(&self.counters));
        let spawned =
            thread::Builder::new().name("store-compact".into()).spawn(move || {
                match compact::compact(&dir, &state) {
                    Ok(()) => add(&counters.snapshots, 1),
                    Err(error) => tracing::warn!(%error, "cannot write a snapshot; the older files stay"),
                }
            });
        match spawned {
            Ok(thread) => self.compaction = Some(thread),
            Err(error) => {
                tracing::warn!(%error, "cannot start a thread for a snapshot; the older files stay")
            }
        }
    }
}

impl Drop for Writer {
    fn drop(&mut self) {
        if let Some(compaction) = self.compaction.take() {
            // A panic there was logged by its thread; the older files stay.
            let _ = compaction.join();
        }
        self.lock = None;
        self.readable.close();
    }
}
