use std::{
    fmt,
    net::SocketAddr,
    sync::{
        Arc, Mutex, OnceLock, PoisonError,
        atomic::{AtomicU64, AtomicUsize, Ordering},
    },
    time::{Duration, SystemTime},
};

use dashmap::DashMap;
use imbl::OrdSet;
use tokio::{sync::Notify, time::Instant};

use super::{
    Node, Protocol, ResourceSet, ResourceType, Subscription,
    feed::Standing,
    ledger::{Concern, Flight, Lack, Relevant},
};
use crate::{model::Revision, rt};

/// Everybody who is connected, one entry per stream. Written by the streams; a clone is the same table.
#[derive(Debug, Clone, Default)]
pub struct Proxies {
    table: Arc<Table>,
}

#[derive(Debug, Default)]
struct Table {
    streams: DashMap<u64, Arc<Stream>>,
    next: AtomicU64,
    /// Told whenever a stream acknowledged, asked or left.
    changed: Notify,
    /// Those who wait to be told. To tell takes a lock that all streams share, so it is done only for somebody.
    waiters: AtomicUsize,
}

impl Table {
    /// Call after the change: who has not seen it counts as waiting since before.
    fn tell(&self) {
        if self.waiters.load(Ordering::SeqCst) > 0 {
            self.changed.notify_waiters();
        }
    }
}

/// Counts among those who wait.
struct Waiter<'a>(&'a Table);

impl<'a> Waiter<'a> {
    fn new(table: &'a Table) -> Self {
        table.waiters.fetch_add(1, Ordering::SeqCst);
        Self(table)
    }
}

impl Drop for Waiter<'_> {
    fn drop(&mut self) {
        self.0.waiters.fetch_sub(1, Ordering::SeqCst);
    }
}

#[derive(Debug)]
struct Stream {
    id: u64,
    node: Node,
    protocol: Protocol,
    connected_at: SystemTime,
    types: Mutex<Vec<TypeStatus>>,
    /// What it is served, and what of it the status does not know.
    standing: OnceLock<Standing>,
}

/// A connected xDS client, as of when it was asked for.
#[derive(Debug, Clone)]
pub struct ProxyStatus {
    /// Who it says it is.
    pub node: Node,
    /// Which form of the protocol it speaks.
    pub protocol: Protocol,
    /// Since when.
    pub connected_at: SystemTime,
    /// The types that it asked for, in push order.
    pub types: Vec<TypeStatus>,
    /// What it is to hold, as far as it asked for it; `None` until that is known.
    pub set: Option<Arc<ResourceSet>>,
}

impl ProxyStatus {
    /// Whether it has acknowledged everything that it is to hold. One that has asked for nothing yet is not.
    pub fn synced(&self) -> bool {
        !self.types.is_empty() && self.types.iter().all(|kind| kind.synced)
    }

    /// The other end of the connection.
    pub fn peer(&self) -> Option<SocketAddr> {
        self.node.peer
    }

    /// Why it rejected something that it still lacks; empty if there is no such thing.
    pub fn last_error(&self) -> &str {
        self.types.iter().map(TypeStatus::last_error).find(|error| !error.is_empty()).unwrap_or("")
    }
}

/// Where a stream stands with a type.
#[derive(Debug, Clone)]
pub struct TypeStatus {
    /// The type.
    pub kind: ResourceType,
    /// What it asked for.
    pub subscription: Subscription,
    /// The state that the last response was made from.
    pub sent: Revision,
    /// Everything up to here was acknowledged or did not concern the stream. Does not go on while something that was
    /// rejected is still wanting.
    pub acknowledged: Revision,
    /// Likewise, but for the names in `unaccepted`.
    pub settled: Revision,
    /// Nothing is wanting at the newest state that the stream has seen.
    pub synced: bool,
    /// Responses sent.
    pub responses: u64,
    /// Responses rejected.
    pub rejected: u64,
    /// Responses that were not answered in time.
    pub unanswered: u64,
    /// Names in rejected responses that were not accepted since.
    pub unaccepted: Vec<OrdSet<Arc<str>>>,
    /// The last rejections, oldest first.
    pub rejections: Vec<Arc<Rejection>>,
    /// Nothing is wanting or on its way: what comes that does not concern the stream, it has.
    pub(super) rests: bool,
    pub(super) flight: Flight,
}

impl TypeStatus {
    /// Nothing concerns the stream up to `quiet` that is not in the status.
    pub(super) fn skip(&mut self, quiet: Revision) {
        (self.acknowledged, self.settled) = (self.acknowledged_at(quiet), self.settled_at(quiet));
        if let Some(considered) = self.flight.considered.as_mut().filter(|_| self.rests) {
            *considered = quiet.max(*considered);
        }
    }

    fn settled_at(&self, quiet: Revision) -> Revision {
        if self.rests { self.settled.max(quiet) } else { self.settled }
    }

    fn acknowledged_at(&self, quiet: Revision) -> Revision {
        if self.rests && self.unaccepted.is_empty() {
            self.acknowledged.max(quiet)
        } else {
            self.acknowledged
        }
    }

    /// Why the client rejected what it still lacks; empty if there is no such thing.
    pub fn last_error(&self) -> &str {
        match self.rejections.last() {
            Some(last) if !self.unaccepted.is_empty() => &last.reason,
            _ => "",
        }
    }

    /// Since when a response has been waiting for an answer.
    pub fn unanswered_since(&self) -> Option<SystemTime> {
        self.flight.unanswered.as_ref().map(|(since, _)| rt::at(*since))
    }

    /// Whether it has a revision, or a name as of it, when nothing concerned the stream up to `quiet` since.
    pub(super) fn has(&self, revision: Revision, name: Option<&str>, quiet: Revision) -> bool {
        match name {
            None => self.acknowledged_at(quiet) >= revision && self.unaccepted.is_empty(),
            Some(name) => self.settled_at(quiet) >= revision && !self.is_rejected(name),
        }
    }
}

/// A NACK.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Rejection {
    /// When it came.
    pub at: SystemTime,
    /// The state that the response was made from.
    pub revision: Revision,
    /// What the client said.
    pub reason: String,
}

/// How far a revision has got.
#[derive(Debug, Clone)]
pub struct Progress {
    /// Everybody has it.
    pub complete: bool,
    /// Streams that have acknowledged it.
    pub acknowledged: usize,
    /// Node ids of those that have not, in order.
    pub pending: Vec<String>,
    /// What each of those lacks, in the same order.
    pub lacking: Vec<Lack>,
}

/// The least time between two looks at many streams by one waiter.
const PACE: Duration = Duration::from_millis(2);

/// So many streams may be looked at whenever one of them changes.
const FEW: usize = 64;

impl Proxies {
    /// Everybody who is connected, by node id.
    pub fn list(&self) -> Vec<ProxyStatus> {
        let mut streams = self.streams();
        streams.sort_by(|a, b| (&a.node.id, a.id).cmp(&(&b.node.id, b.id)));
        streams
            .into_iter()
            .map(|stream| {
                let quiet = stream.quiet();
                let mut types = stream.types().clone();
                types.iter_mut().for_each(|of| of.skip(quiet));
                ProxyStatus {
                    node: stream.node.clone(),
                    protocol: stream.protocol,
                    connected_at: stream.connected_at,
                    types,
                    set: stream.set(),
                }
            })
            .collect()
    }

    /// How many streams there are.
    pub fn len(&self) -> usize {
        self.table.streams.len()
    }

    /// Whether nobody is connected.
    pub fn is_empty(&self) -> bool {
        self.table.streams.is_empty()
    }

    /// Waits until everybody whom it concerns has acknowledged `revision`, at most `timeout` (zero: look once).
    pub async fn wait_acknowledged(
        &self,
        revision: Revision,
        concern: &Concern,
        timeout: Duration,
    ) -> Progress {
        let end = Instant::now() + timeout;
        let _waiter = Waiter::new(&self.table);
        loop {
            let changed = self.table.changed.notified();
            tokio::pin!(changed);
            // Counts from here, so that nothing that happens during the look is missed.
            changed.as_mut().enable();
            let looked = Instant::now();
            let progress = self.progress(revision, concern);
            if progress.complete || Instant::now() >= end {
                return progress;
            }
            let told = tokio::time::timeout_at(end, changed).await.is_ok();
            if told && self.len() > FEW {
                tokio::time::sleep_until(end.min(looked + PACE)).await;
            }
        }
    }

    /// How far `revision` has got now; see [`Proxies::wait_acknowledged`].
    pub fn progress(&self, revision: Revision, concern: &Concern) -> Progress {
        let mut relevant = Relevant::new(revision, concern);
        let mut acknowledged = 0;
        let mut behind = Vec::new();
        for stream in self.streams() {
            let collects = || stream.types().iter().any(|of| of.kind == ResourceType::LbEndpoint);
            let set = match concern {
                Concern::Change { .. } => stream.set(),
                // To know which collections the endpoints are in.
                Concern::Endpoints(_) if collects() => stream.set(),
                Concern::All | Concern::Endpoints(_) => None,
            };
            let quiet = stream.quiet();
            let lacks = relevant.lacks(&stream.types(), set.as_ref(), quiet);
            match lacks {
                None => {}
                Some(lacks) if lacks.is_empty() => acknowledged += 1,
                Some(lacks) => behind.push((stream, lacks)),
            }
        }
        behind.sort_by(|(a, _), (b, _)| (&a.node.id, a.id).cmp(&(&b.node.id, b.id)));
        Progress {
            complete: behind.is_empty(),
            acknowledged,
            pending: behind.iter().map(|(stream, _)| stream.node.id.clone()).collect(),
            lacking: behind
                .into_iter()
                .flat_map(|(stream, lacks)| {
                    lacks.into_iter().map(move |(kind, why)| Lack {
                        node_id: stream.node.id.clone(),
                        peer: stream.node.peer,
                        protocol: stream.protocol,
                        connected_at: stream.connected_at,
                        kind,
                        why,
                    })
                })
                .collect(),
        }
    }

    /// Has those who wait look again.
    pub(super) fn tell(&self) {
        self.table.tell();
    }

    /// Adds a stream; it leaves when the seat is dropped.
    pub(super) fn join(&self, node: Node, protocol: Protocol) -> Seat {
        let id = self.table.next.fetch_add(1, Ordering::Relaxed);
        let stream = Arc::new(Stream {
            id,
            node,
            protocol,
            connected_at: rt::now(),
            types: Mutex::default(),
            standing: OnceLock::new(),
        });
        self.table.streams.insert(id, Arc::clone(&stream));
        Seat { table: Arc::clone(&self.table), stream }
    }

    /// A copy, so that no shard of the table stays locked.
    fn streams(&self) -> Vec<Arc<Stream>> {
        self.table.streams.iter().map(|entry| Arc::clone(entry.value())).collect()
    }
}

impl Stream {
    fn types(&self) -> std::sync::MutexGuard<'_, Vec<TypeStatus>> {
        self.types.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn set(&self) -> Option<Arc<ResourceSet>> {
        self.standing.get().and_then(Standing::set)
    }

    /// To be read before the types.
    fn quiet(&self) -> Revision {
        self.standing.get().map_or(Revision(0), Standing::quiet)
    }
}

/// A stream's place in the table.
pub(super) struct Seat {
    table: Arc<Table>,
    stream: Arc<Stream>,
}

impl Seat {
    pub(super) fn node_id(&self) -> &str {
        &self.stream.node.id
    }

    /// Says what the stream is served, once.
    pub(super) fn serve(&self, standing: Standing) {
        // A second one would be a second admission, which there is not.
        let _ = self.stream.standing.set(standing);
    }

    pub(super) fn update(&self, update: impl FnOnce(&mut Vec<TypeStatus>)) {
        update(&mut self.stream.types());
        self.table.tell();
    }
}

impl fmt::Debug for Seat {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Seat({})", self.stream.id)
    }
}

impl Drop for Seat {
    fn drop(&mut self) {
        self.table.streams.remove(&self.stream.id);
        self.table.tell();
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::xds::{
        delta::Delta,
        testing::{Bench, CDS, EDS, delta, put},
    };

    fn join(proxies: &Proxies, id: &str, bench: &Bench<Delta>) -> Seat {
        let seat = proxies.join(Node { id: id.into(), ..Node::default() }, Protocol::Delta);
        seat.update(|types| bench.served.engine.update_status(types));
        seat
    }

    #[test]
    fn progress_counts_whom_it_concerns() {
        let proxies = Proxies::default();
        let mut good = Bench::<Delta>::new([put(EDS, "a", "1"), put(EDS, "b", "1")]);
        good.request(delta(EDS, &["a"], &[]));
        good.settle();
        let mut bad = Bench::<Delta>::new([put(EDS, "a", "bad"), put(EDS, "b", "1"), put(CDS, "c", "1")]);
        bad.request(delta(EDS, &["a"], &[]));
        bad.out();
        bad.nack(EDS);
        bad.request(delta(EDS, &["b"], &[]));
        bad.request(delta(CDS, &[], &[]));
        bad.settle();
        let _seats = [join(&proxies, "good", &good), join(&proxies, "bad", &bad)];
        let check = |revision, name, acknowledged, pending: &[&str]| {
            let progress = proxies.progress(Revision(revision), &Concern::of(name));
            assert_eq!(progress.acknowledged, acknowledged, "{progress:?}");
            assert_eq!(progress.pending, pending, "{progress:?}");
            assert_eq!(progress.complete, pending.is_empty());
        };
        check(1, None, 1, &["bad"]);
        check(1, Some("a"), 1, &["bad"]);
        // What it rejected does not hold up what it accepted.
        check(1, Some("b"), 1, &[]);
        check(1, Some("nobody's"), 0, &[]);
        check(2, Some("a"), 0, &["bad", "good"]);
        let list = proxies.list();
        assert_eq!(list.iter().map(|proxy| proxy.last_error()).collect::<Vec<_>>(), ["bad", ""]);
        assert_eq!(list.iter().map(ProxyStatus::synced).collect::<Vec<_>>(), [false, true]);
    }

    #[tokio::test(start_paused = true)]
    async fn waiting_ends_with_the_last_acknowledgement_or_departure_or_in_time() {
        let proxies = Proxies::default();
        let mut bench = Bench::<Delta>::new([put(EDS, "a", "1")]);
        bench.request(delta(EDS, &["a"], &[]));
        bench.settle();
        let (first, second) = (join(&proxies, "first", &bench), join(&proxies, "second", &bench));
        let concern = Concern::of(Some("a"));
        let wait = |seconds| proxies.wait_acknowledged(Revision(2), &concern, Duration::from_secs(seconds));
        assert_eq!(wait(1).await.pending, ["first", "second"]);
        bench.apply([put(EDS, "a", "2")]);
        bench.settle();
        let started = Instant::now();
        let (progress, ()) = tokio::join!(wait(60), async {
            tokio::time::sleep(Duration::from_secs(3)).await;
            first.update(|types| bench.served.engine.update_status(types));
            tokio::time::sleep(Duration::from_secs(3)).await;
            drop(second);
        });
        assert_eq!((progress.complete, progress.acknowledged), (true, 1));
        assert_eq!(started.elapsed(), Duration::from_secs(6));
    }
}
