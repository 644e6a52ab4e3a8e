use std::{
    collections::{BTreeMap, BTreeSet},
    net::SocketAddr,
    sync::Arc,
    time::Duration,
};

use futures_util::future::BoxFuture;
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
    model::ServiceId,
    peers::{MOST_PEERS, Observe, Peer, PeerSet, Peers, keep::Error},
    rt::Tasks,
};

/// How often what is known is told, when nothing is new: it is believed only for some time, and replicas go on.
const REPEAT: Duration = Duration::from_secs(1);

/// Notes that may wait for a set's task.
const NOTES: usize = 64;

/// Has the replicas asked of those sets that say how, are founded, and are this node's work.
#[derive(Debug)]
pub struct Observer {
    peers: Peers,
    tasks: Tasks,
    /// Dropping one ends its task.
    running: BTreeMap<ServiceId, watch::Sender<Arc<PeerSet>>>,
}

impl Observer {
    /// It does nothing before it [runs](Self::run). `tasks` owns what it starts.
    pub fn new(peers: Peers, tasks: Tasks) -> Self {
        Self { peers, tasks, running: BTreeMap::new() }
    }

    /// Runs for ever. When dropped, all that it started ends.
    pub async fn run(mut self) {
        let (mut board, mut members) = (self.peers.follow(), self.peers.members());
        loop {
            let sets = board.borrow_and_update().clone();
            let present = members.borrow_and_update().clone();
            let known = sets.names().filter_map(|name| sets.set(name));
            let mine = known.map(|known| known.set).filter(|set| {
                let name = set.spec.name.as_str();
                let is_due = set.spec.observe.is_some() && set.founding.is_some();
                is_due && present.is_member() && present.is_mine(name)
            });
            self.assign(mine.map(|set| (set.spec.name.clone(), set)).collect());
            tokio::select! {
                () = changed(&mut board) => {}
                () = changed(&mut members) => {}
            }
        }
    }

    fn assign(&mut self, mine: BTreeMap<ServiceId, Arc<PeerSet>>) {
        self.running.retain(|name, _| mine.contains_key(name));
        for (name, set) in mine {
            match self.running.get(&name) {
                Some(running) => {
                    running.send_if_modified(|before| {
                        let changed = before.revision != set.revision;
                        *before = set;
                        changed
                    });
                }
                None => {
                    let (sender, receiver) = watch::channel(set);
                    self.running.insert(name, sender);
                    let one = One::new(receiver, self.peers.clone(), self.tasks.clone());
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
    peers: Peers,
    tasks: Tasks,
    observe: Option<Observe>,
    hearing: Hearing,
    /// Who is asked where. Dropping the sender of the period ends an asker.
    askers: BTreeMap<Target, (SocketAddr, u64, watch::Sender<Duration>)>,
    serial: u64,
    period: Duration,
    notes: (mpsc::Sender<Note>, mpsc::Receiver<Note>),
    /// What was told last, and when.
    told: Option<(Sight, Instant)>,
    /// One thing is told at a time; what is new meanwhile comes after it.
    telling: Option<BoxFuture<'static, Result<(), Error>>>,
    looked: Instant,
}

impl One {
    fn new(changes: watch::Receiver<Arc<PeerSet>>, peers: Peers, tasks: Tasks) -> Self {
        let set = Arc::clone(&changes.borrow());
        Self {
            changes,
            set,
            peers,
            tasks,
            observe: None,
            hearing: Hearing::new(Duration::ZERO, false, Instant::now()),
            askers: BTreeMap::new(),
            serial: 0,
            period: Duration::ZERO,
            notes: mpsc::channel(NOTES),
            told: None,
            telling: None,
            looked: Instant::now(),
        }
    }

    async fn run(mut self) {
        self.adjust();
        loop {
            // How far replicas have come is looked at now and then, too.
            let look = self.looked + REPEAT;
            let wake = self.hearing.wake(Instant::now()).map_or(look, |wake| wake.min(look));
            let news = tokio::select! {
                Some(note) = self.notes.1.recv() => self.note(note),
                result = told(&mut self.telling) => {
                    self.telling = None;
                    if let Err(error) = result {
                        // It is told again, with what is new then.
                        tracing::warn!(set = %self.set.spec.name, %error, "what replicas say cannot be kept");
                        false
                    } else {
                        true
                    }
                }
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
        let (mut next, mut news) = (Some(first), false);
        while let Some(note) = next {
            // What an asker still had on its tongue when another took its place.
            let current = self.askers.get(&note.target).is_some_and(|(_, serial, _)| *serial == note.serial);
            news |= current && self.hearing.note(note.target, note.outcome, note.at);
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
        if self.telling.is_some() {
            return;
        }
        if let Some((before, at)) = &self.told {
            if now < *at + REPEAT && before.same(&sight) {
                return;
            }
            self.log(before, &sight);
        }
        let (peers, name, observed) =
            (self.peers.clone(), self.set.spec.name.clone(), sight.observed.clone());
        self.told = Some((sight, now));
        self.telling = Some(Box::pin(async move { peers.observed(&name, observed).await }));
    }

    fn log(&self, before: &Sight, after: &Sight) {
        let set = &self.set.spec.name;
        if after.stale && !before.stale {
            tracing::warn!(%set, "no replica answers: what was known stays, as it may be this node that is cut off");
        }
        for node in before.observed.keys().filter(|node| !after.observed.contains_key(node)) {
            let key = self.set.peers.get(node).map(|peer| peer.key.as_str());
            let why = after.unheard.get(node).map(String::as_str);
            tracing::info!(%set, %node, key, why, "does not tell what it does any more");
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

/// Returns when there is something new; never when nothing can be any more, as with the members of a process that is alone.
async fn changed<T>(receiver: &mut watch::Receiver<T>) {
    if receiver.changed().await.is_err() {
        std::future::pending().await
    }
}

async fn told(telling: &mut Option<BoxFuture<'static, Result<(), Error>>>) -> Result<(), Error> {
    match telling {
        Some(telling) => telling.await,
        None => std::future::pending().await,
    }
}
