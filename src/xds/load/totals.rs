use std::{
    collections::HashMap,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use tokio::time::Instant;

use super::report::{Load, Report};

/// A report counts for so many intervals: a client may be late, and one that reconnects has nothing to say at first.
const COUNTS: u32 = 3;

/// Clients that left whose last reports are still counted, at most; in a storm of them the sums are in motion anyway.
const MOST_LEFT: usize = 20_000;

/// What all clients report, written by their streams. A clone is the same table. Sums are made when somebody asks.
#[derive(Debug, Clone)]
pub struct Loads {
    interval: Duration,
    table: Arc<Mutex<Table>>,
}

#[derive(Debug, Default)]
struct Table {
    next: u64,
    /// One for each stream: several clients may call themselves the same.
    streams: HashMap<u64, Reporter>,
    /// By node id, those who left not long ago.
    left: HashMap<Arc<str>, Reporter>,
    swept: Option<Instant>,
}

#[derive(Debug, Clone)]
struct Reporter {
    node_id: Arc<str>,
    report: Arc<Report>,
    /// When the report no longer counts; `None` if there is none.
    until: Option<Instant>,
}

impl Loads {
    /// Of clients that are asked to report every `interval`, which is not zero.
    pub fn new(interval: Duration) -> Self {
        Self { interval, table: Arc::default() }
    }

    /// How often clients are asked to report.
    pub fn interval(&self) -> Duration {
        self.interval
    }

    /// The calls of a service, summed over all whose last report is not too old at `now`.
    pub fn of(&self, service: &str, now: Instant) -> Load {
        let table = self.table();
        let mut sum = Load::default();
        let all = table.streams.values().chain(table.left.values());
        for reporter in all.filter(|reporter| reporter.counts(now)) {
            if let Some(load) = reporter.report.services.get(service) {
                sum.add(load);
            }
        }
        sum
    }

    /// A stream of this client began. Until it reports, what it said on its last stream counts.
    pub(super) fn join(&self, node_id: &str) -> u64 {
        let mut table = self.table();
        let id = table.next;
        table.next += 1;
        let reporter = table.left.remove(node_id).unwrap_or_else(|| Reporter {
            node_id: node_id.into(),
            report: Arc::default(),
            until: None,
        });
        table.streams.insert(id, reporter);
        id
    }

    /// What a stream reported last.
    pub(super) fn last(&self, id: u64) -> Arc<Report> {
        self.table().streams.get(&id).map(|reporter| Arc::clone(&reporter.report)).unwrap_or_default()
    }

    /// A report takes the place of the stream's last one: it is about everything that the client did since.
    pub(super) fn report(&self, id: u64, report: Report, now: Instant) {
        if let Some(reporter) = self.table().streams.get_mut(&id) {
            reporter.until = Some(now + self.interval.max(report.interval) * COUNTS);
            reporter.report = Arc::new(report);
        }
    }

    /// A stream ended.
    pub(super) fn leave(&self, id: u64, now: Instant) {
        let mut table = self.table();
        let Some(mut reporter) = table.streams.remove(&id) else { return };
        if table.swept.is_none_or(|swept| swept + self.interval <= now) {
            table.swept = Some(now);
            table.left.retain(|_, reporter| reporter.counts(now));
        }
        reporter.until = reporter.until.map(|until| until.min(now + self.interval * COUNTS));
        if reporter.counts(now) && table.left.len() < MOST_LEFT {
            table.left.insert(Arc::clone(&reporter.node_id), reporter);
        }
    }

    fn table(&self) -> MutexGuard<'_, Table> {
        self.table.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Reporter {
    fn counts(&self, now: Instant) -> bool {
        self.until.is_some_and(|until| now < until)
    }
}
