//! The one thread that writes. It takes all commits that wait, checks them in order and writes those that hold as one frame
//! with one sync. Only then they are shown and answered: by a second thread, while this one writes the next batch. So the
//! disk does not wait for the processor, nor the other way around.

use std::{
    collections::VecDeque,
    fs::File,
    io, mem,
    path::PathBuf,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
        mpsc as blocking,
    },
    thread::{self, JoinHandle},
};

use tokio::{
    runtime::Handle,
    sync::{mpsc, oneshot},
};

use super::{
    compact,
    format::{self, Frame},
    log::{FileError, Log},
};
use crate::{
    model::Revision,
    rt::Tasks,
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

/// Commits that are written together.
#[derive(Debug)]
struct Batch {
    /// The last one accepted, of this batch or before.
    revision: Revision,
    /// What those accepted will have written.
    ahead: Ahead,
    accepted: Vec<(Revision, Vec<Op>)>,
    answers: Answers,
}

impl Batch {
    /// Shows and answers what is durable.
    fn show(self, readable: &Readable, callers: &Callers) {
        readable.publish(self.accepted);
        callers.tell(self.answers);
    }
}

/// Answers that are due. Each is given at last when they are dropped.
#[derive(Debug, Default)]
struct Answers(Vec<(Answer, Result<Revision, StoreError>)>);

impl Drop for Answers {
    fn drop(&mut self) {
        for (answer, outcome) in self.0.drain(..) {
            // Nobody listens when the caller gave up; the commit stands.
            let _ = answer.send(outcome);
        }
    }
}

/// The way to those who wait for answers.
#[derive(Debug, Clone)]
pub(super) struct Callers {
    /// That of who opened the store, if there is one.
    runtime: Option<Handle>,
    tasks: Tasks,
}

impl Callers {
    pub(super) fn new() -> Self {
        Self { runtime: Handle::try_current().ok(), tasks: Tasks::default() }
    }

    /// Gives many answers from within the runtime: from a thread outside each would wake a worker by a call of the system. A
    /// runtime that ends before drops them, which gives them, too.
    fn tell(&self, answers: Answers) {
        if let Some(runtime) = self.runtime.as_ref().filter(|_| answers.0.len() > 1) {
            let _within = runtime.enter();
            self.tasks.spawn("store-answers", async move { drop(answers) });
        }
    }
}

/// The thread that shows one batch while the writer writes the next.
#[derive(Debug)]
pub(super) struct Shower {
    /// `None` at the end.
    batches: Option<blocking::SyncSender<Batch>>,
    shown: blocking::Receiver<()>,
    thread: Option<JoinHandle<()>>,
}

impl Shower {
    pub(super) fn start(readable: Arc<Readable>, callers: Callers) -> io::Result<Self> {
        let (batches, next) = blocking::sync_channel::<Batch>(1);
        let (done, shown) = blocking::sync_channel(1);
        let thread = thread::Builder::new().name("store-shower".into()).spawn(move || {
            for batch in next {
                batch.show(&readable, &callers);
                if done.send(()).is_err() {
                    return;
                }
            }
        })?;
        Ok(Self { batches: Some(batches), shown, thread: Some(thread) })
    }

    /// Begins to show a batch. `false` when the thread is gone, which only a panic does.
    fn begin(&self, batch: Batch) -> bool {
        self.batches.as_ref().is_some_and(|batches| batches.send(batch).is_ok())
    }

    /// Waits until that batch is shown.
    fn done(&self) -> bool {
        self.shown.recv().is_ok()
    }

    fn end(&mut self) {
        self.batches = None;
        if let Some(thread) = self.thread.take() {
            // A panic there was logged by its thread.
            let _ = thread.join();
        }
    }
}

/// Takes what waits in the queue; where nothing does it waits, if it `may_wait`. `false` when there is nothing.
fn receive(queue: &mut mpsc::Receiver<Request>, into: &mut VecDeque<Request>, may_wait: bool) -> bool {
    if may_wait || !queue.is_empty() {
        // All at once: that makes room in the queue once, not each by each.
        let mut requests = Vec::from(mem::take(into));
        queue.blocking_recv_many(&mut requests, BATCH_COMMITS);
        *into = requests.into();
    }
    !into.is_empty()
}

/// What the thread owns. Readers see the store closed when it is dropped, also by a panic.
#[derive(Debug)]
pub(super) struct Writer {
    pub(super) dir: PathBuf,
    pub(super) log: Log,
    pub(super) readable: Arc<Readable>,
    pub(super) callers: Callers,
    pub(super) counters: Arc<Counters>,
    /// Bytes of log after which a snapshot is written, when the state is smaller.
    pub(super) compact_after: u64,
    /// Whether the last batch could not be written.
    pub(super) failing: bool,
    /// Bytes of log since the last snapshot was begun.
    pub(super) logged: u64,
    pub(super) compaction: Option<JoinHandle<()>>,
    pub(super) shower: Shower,
    /// Held until everything is written.
    pub(super) lock: Option<File>,
}

impl Writer {
    /// Serves until asked to close or until nobody is left to ask.
    pub(super) fn run(mut self, mut queue: mpsc::Receiver<Request>) {
        let mut frame = Frame::new(self.log.marker());
        let mut waiting = VecDeque::with_capacity(BATCH_COMMITS);
        let mut durable: Option<Batch> = None;
        loop {
            if waiting.is_empty() && !receive(&mut queue, &mut waiting, durable.is_none()) {
                match durable.take() {
                    // Nobody waits to be written, so there is nothing to do beside it.
                    Some(batch) => batch.show(&self.readable, &self.callers),
                    None => return,
                }
                continue;
            }
            if let Some(Request::Advance { to, answer }) =
                waiting.pop_front_if(|next| matches!(next, Request::Advance { .. }))
            {
                if let Some(batch) = durable.take() {
                    batch.show(&self.readable, &self.callers);
                }
                // Nobody listens when the caller gave up; it stands.
                let _ = answer.send(self.advance(&mut frame, to));
                continue;
            }
            let batch = self.gather(&mut frame, &mut waiting, &mut queue, durable.as_mut());
            let begun = durable.take().map(|before| self.shower.begin(before));
            let appended = self.append(&mut frame);
            if begun.is_some_and(|begun| !(begun && self.shower.done())) {
                return;
            }
            match appended {
                Ok(()) => durable = Some(batch),
                Err(error) => self.fail(&error, batch),
            }
            if self.compaction_due() {
                // The new log begins after all that is in the old one.
                if let Some(batch) = durable.take() {
                    batch.show(&self.readable, &self.callers);
                }
                self.start_compaction();
                frame = Frame::new(self.log.marker());
            }
        }
    }

    /// The next batch, checked against the state as it will be after the one `before` it, and encoded. Nothing is applied
    /// meanwhile.
    fn gather(
        &self,
        frame: &mut Frame,
        waiting: &mut VecDeque<Request>,
        queue: &mut mpsc::Receiver<Request>,
        before: Option<&mut Batch>,
    ) -> Batch {
        let state = self.readable.state();
        let mut batch = match before {
            Some(before) => Batch {
                revision: before.revision,
                ahead: mem::take(&mut before.ahead).next(),
                accepted: Vec::new(),
                answers: Answers::default(),
            },
            None => Batch {
                revision: state.revision(),
                ahead: Ahead::default(),
                accepted: Vec::new(),
                answers: Answers::default(),
            },
        };
        frame.begin_commits(Revision(batch.revision.0 + 1));
        while frame.len() < format::FULL {
            let is_advance = |next: &mut Request| matches!(next, Request::Advance { .. });
            let (ops, answer) = match waiting.pop_front_if(|next| !is_advance(next)) {
                Some(Request::Commit { ops, answer }) => (ops, answer),
                Some(Request::Close) => {
                    // What is queued is still taken; nothing new comes in.
                    queue.close();
                    continue;
                }
                Some(Request::Advance { .. }) | None => break,
            };
            let outcome = state.check(&ops, &batch.ahead).map(|()| {
                batch.revision.0 += 1;
                batch.ahead.note(batch.revision, &ops);
                frame.push_commit(&ops);
                batch.accepted.push((batch.revision, ops));
                batch.revision
            });
            batch.answers.0.push((answer, outcome));
        }
        batch
    }

    fn fail(&mut self, error: &FileError, mut batch: Batch) {
        // Conflicts too: they may be with commits of this batch.
        let failed = StoreError::Failed(format!("cannot write the change: {error}"));
        if !mem::replace(&mut self.failing, true) {
            tracing::error!(%error, "cannot write to the store; changes are refused until it works again");
        }
        add(&self.counters.failed_batches, 1);
        for (_, outcome) in &mut batch.answers.0 {
            *outcome = Err(failed.clone());
        }
        self.callers.tell(batch.answers);
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
        if mem::take(&mut self.failing) {
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
            && self.logged > self.compact_after
            && self.logged > self.readable.state().bytes()
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
        self.shower.end();
        self.lock = None;
        self.readable.close();
    }
}
