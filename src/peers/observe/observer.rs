use std::{
    collections::{BTreeMap, BTreeSet},
    fmt,
    net::SocketAddr,
    sync::Arc,
    time::Duration,
};

use tokio::{
    sync::{mpsc, watch},
    time::{Instant, sleep_until},
};

use super::{
    adapter::Adapter,
    ask::{Asker, Note},
    sight::{Hearing, Sight, Target},
};
use crate::{
    model::{Members, ServiceId},
    peers::{MOST_PEERS, Observe, Peer, PeerSet},
    rt::Tasks,
};

/// Where observations go.
pub trait Sink: Send + Sync + fmt::Debug + 'static {
    /// All that is known of the replicas of a set now; replaces what was said before. Called when any of it has changed, but for
    /// how far replicas have come, which alone is told once a second. Does not wait.
    fn observed(&self, set: &ServiceId, sight: Sight);

    /// This node observes the set no more: what it said of it is void, without a successor from here.
    fn unobserved(&self, set: &ServiceId);
}

/// How often it is told how far replicas have come.
const PROGRESS: Duration = Duration::from_secs(1);

/// Notes that may wait for a set's task.
const NOTES: usize = 64;

/// The peer sets that there are, as whoever keeps them shows them.
pub type Sets = Arc<Vec<Arc<PeerSet>>>;

/// Has the replicas asked of those sets that say how, are founded, and are this node's work.
#[derive(Debug)]
pub struct Observer {
    sets: watch::Receiver<Sets>,
    members: watch::Receiver<Members>,
    sink: Arc<dyn Sink>,
    tasks: Tasks,
    /// Dropping one ends its task.
    running: BTreeMap<ServiceId, watch::Sender<Arc<PeerSet>>>,
}

impl Observer {
    /// It does nothing before it [runs](Self::run). `tasks` owns what it starts.
    pub fn new(
        sets: watch::Receiver<Sets>,
        members: watch::Receiver<Members>,
        sink: Arc<dyn Sink>,
        tasks: Tasks,
    ) -> Self {
        Self { sets, members, sink, tasks, running: BTreeMap::new() }
    }

    /// Runs until the sets or the members come to their end. When dropped, all that it started ends.
    pub async fn run(mut self) {
        loop {
            self.assign();
            let changed = tokio::select! {
                changed = self.sets.changed() => changed,
                changed = self.members.changed() => changed,
            };
            if changed.is_err() {
                return;
            }
        }
    }

    fn assign(&mut self) {
        let sets = Arc::clone(&self.sets.borrow_and_update());
        let members = self.members.borrow_and_update().clone();
        let mine = |set: &&Arc<PeerSet>| {
            set.spec.observe.is_some()
                && set.founding.is_some()
                && members.is_member()
                && members.is_mine(set.spec.name.as_str())
        };
        let mine: BTreeMap<_, _> = sets.iter().filter(mine).map(|set| (&set.spec.name, set)).collect();
        let over: Vec<_> = self.running.keys().filter(|name| !mine.contains_key(name)).cloned().collect();
        for name in over {
            self.running.remove(&name);
            self.sink.unobserved(&name);
        }
        for (name, set) in mine {
            match self.running.get(name) {
                Some(running) => {
                    running.send_if_modified(|before| {
                        let changed = before.revision != set.revision || before.cluster != set.cluster;
                        *before = Arc::clone(set);
                        changed
                    });
                }
                None => {
                    let (sender, receiver) = watch::channel(Arc::clone(set));
                    self.running.insert(name.clone(), sender);
                    let one = One::new(receiver, Arc::clone(&self.sink), self.tasks.clone());
                    self.tasks.spawn_until_shutdown("observe-set", one.run());
                }
            }
        }
    }
}

/// Observes one set.
struct One {
    changes: watch::Receiver<Arc<PeerSet>>,
    set: Arc<PeerSet>,
    sink: Arc<dyn Sink>,
    tasks: Tasks,
    observe: Option<Observe>,
    hearing: Hearing,
    /// Who is asked where. Dropping the sender of the period ends an asker.
    askers: BTreeMap<Target, (SocketAddr, u64, watch::Sender<Duration>)>,
    serial: u64,
    period: Duration,
    notes: (mpsc::Sender<Note>, mpsc::Receiver<Note>),
    told: Option<(Sight, Instant)>,
    looked: Instant,
}

impl One {
    fn new(changes: watch::Receiver<Arc<PeerSet>>, sink: Arc<dyn Sink>, tasks: Tasks) -> Self {
        let set = Arc::clone(&changes.borrow());
        Self {
            changes,
            set,
            sink,
            tasks,
            observe: None,
            hearing: Hearing::new(Duration::ZERO, false, Instant::now()),
            askers: BTreeMap::new(),
            serial: 0,
            period: Duration::ZERO,
            notes: mpsc::channel(NOTES),
            told: None,
            looked: Instant::now(),
        }
    }

    async fn run(mut self) {
        self.adjust();
        loop {
            let now = Instant::now();
            // How far replicas have come is looked at now and then, too.
            let wake = self
                .hearing
                .wake(now)
                .map_or(self.looked + PROGRESS, |wake| wake.min(self.looked + PROGRESS));
            let news = tokio::select! {
                Some(note) = self.notes.1.recv() => self.note(note),
                changed = self.changes.changed() => {
                    if changed.is_err() {
                        return;
                    }
                    self.set = Arc::clone(&self.changes.borrow_and_update());
                    self.adjust();
                    true
                }
                () = sleep_until(wake) => {
                    self.hearing.forget(Instant::now());
                    true
                }
            };
            if news {
                self.tell();
            }
        }
    }

    fn note(&mut self, first: Note) -> bool {
        let now = Instant::now();
        let (mut next, mut news) = (Some(first), false);
        while let Some(note) = next {
            // What an asker still had on its tongue when another took its place.
            let current = self.askers.get(&note.target).is_some_and(|(_, serial, _)| *serial == note.serial);
            news |= current && self.hearing.note(note.target, note.outcome, now);
            next = self.notes.1.try_recv().ok();
        }
        news
    }

    fn tell(&mut self) {
        let now = Instant::now();
        self.looked = now;
        let Some(sight) = self.hearing.sight(&self.set, now) else { return };
        let period = self.hearing.period(&self.set, &sight, now);
        if period != self.period {
            self.period = period;
            for (_, _, every) in self.askers.values() {
                every.send_replace(period);
            }
        }
        let same = match &mut self.told {
            Some((told, at)) if *told == sight => {
                *at = now;
                return;
            }
            Some((told, at)) => now < *at + PROGRESS && told.same(&sight),
            None => false,
        };
        if !same {
            self.told = Some((sight.clone(), now));
            self.sink.observed(&self.set.spec.name, sight);
        }
    }

    /// Asks those that are to be asked, and nobody else.
    fn adjust(&mut self) {
        let now = Instant::now();
        let Some(observe) = self.set.spec.observe.clone() else { return };
        if self.observe.as_ref() != Some(&observe) {
            self.askers.clear();
            self.period = observe.every;
            self.hearing = Hearing::new(observe.every, observe.adapter == "redis", now);
            self.observe = Some(observe.clone());
        }
        let adapter = match Adapter::of(&observe) {
            Ok(adapter) => adapter,
            Err(problems) => {
                // It was checked when it was written, so another version of Disco wrote it.
                tracing::warn!(set = %self.set.spec.name, %problems, "cannot observe this set");
                return;
            }
        };
        let wanted = targets(&self.set, &observe, &adapter);
        let over: Vec<_> = self
            .askers
            .iter()
            .filter(|(target, (address, _, _))| wanted.get(target).map(|(at, _)| at) != Some(address))
            .map(|(target, _)| *target)
            .collect();
        for target in over {
            self.askers.remove(&target);
            self.hearing.remove(target, now);
        }
        for (target, (address, peer)) in wanted {
            if self.askers.contains_key(&target) {
                continue;
            }
            let limit = observe.limit();
            let asker = match (peer, &adapter) {
                (Some(peer), adapter) => Asker::replica(adapter, peer, address, limit, &self.tasks),
                (None, Adapter::Redis { master, .. }) => Asker::sentinel(master, address, limit),
                (None, _) => continue,
            };
            self.serial += 1;
            let (every, receiver) = watch::channel(self.period);
            self.askers.insert(target, (address, self.serial, every));
            self.hearing.add(target, now);
            let run = asker.run(target, self.serial, receiver, self.notes.0.clone());
            self.tasks.spawn_until_shutdown("observe", run);
        }
    }
}

/// Whom to ask, and where. One that has not the address that is to be asked is not asked.
fn targets(
    set: &PeerSet,
    observe: &Observe,
    adapter: &Adapter,
) -> BTreeMap<Target, (SocketAddr, Option<Arc<Peer>>)> {
    let mut targets = BTreeMap::new();
    for peer in set.peers.values() {
        let at = match observe.port.as_str() {
            "" => Some(peer.at.client),
            name => peer.at.extra.get(name).copied(),
        };
        if let Some(at) = at {
            targets.insert(Target::Replica(peer.node), (at, Some(Arc::new(peer.clone()))));
        }
    }
    if let Adapter::Redis { sentinels, .. } = adapter {
        let beside = set.members().filter_map(|peer| peer.at.extra.get("sentinel").copied());
        let all: BTreeSet<_> =
            if sentinels.is_empty() { beside.collect() } else { sentinels.iter().copied().collect() };
        targets.extend(all.into_iter().take(MOST_PEERS).map(|at| (Target::Sentinel(at), (at, None))));
    }
    targets
}
