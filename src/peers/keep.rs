//! Keeps the sets in the store: each is one record, read from the store, changed by a pure transition and written back if nobody else
//! wrote it meanwhile. So whatever processes, stores and networks do, the rules of the transitions hold.

use std::{
    collections::HashMap,
    sync::{Arc, Mutex},
    time::Duration,
};

use prometheus_client::metrics::counter::Counter;
use prost::Message as _;
use ring::rand::{SecureRandom as _, SystemRandom};
use tokio::{
    sync::watch,
    time::{Instant, timeout},
};

use super::{
    Change, ClusterId, Facts, Newcomer, NodeId, Peer, PeerSet, Refusal, Spec, Step, Suffrage, View, Want,
    board::{self, Board, Known},
    record::{self, Observed},
};
use crate::{
    catalog::Reader,
    model::{InstanceId, Members, Problems, Revision, Roles, ServiceId},
    rt::{self, Tasks},
    store::{Condition, Follower, Op, Store, StoreError},
    telemetry::Metrics,
};

/// Most sets.
const SETS: usize = 10_000;

/// A commit that lost a race is tried again on what the winner left.
pub(super) const ATTEMPTS: usize = 16;

/// How long an answer waits for the board to show what it tells of. Longer only when the store's feed hangs.
const SHOWN: Duration = Duration::from_secs(1);

/// Why a set was not read or written.
#[derive(Debug, Clone, thiserror::Error)]
pub enum Error {
    /// The input is wrong; sending it again cannot help.
    #[error("{0}")]
    Invalid(Problems),
    /// There is no such set.
    #[error("there is no peer set {0}: make it with `disco peers create {0} --expect N`")]
    NoSet(ServiceId),
    /// There is another one of that name.
    #[error("peer set {name} exists and is {what}: that cannot be changed; choose another name")]
    Exists {
        /// Its name.
        name: ServiceId,
        /// What it is.
        what: String,
    },
    /// The transition refuses.
    #[error("{0}")]
    Refused(#[from] Refusal),
    /// There are too many.
    #[error("there are {SETS} peer sets, the most that there may be")]
    Limit,
    /// Many write one set at once.
    #[error("peer set {0} is being written by many at once: try again")]
    Contended(ServiceId),
    /// The sets have not been read from the store yet.
    #[error("this node has not read the peer sets from the store yet: try another or again")]
    Unread,
    /// The store did not take it. It may or may not be durable; trying again is safe.
    #[error("the store did not take the change: {0}")]
    Store(StoreError),
    /// A record in the store is not one of ours.
    #[error("the store holds a record that cannot be read, {key}: {reason}")]
    Record {
        /// Its key.
        key: String,
        /// What is wrong with it.
        reason: String,
    },
}

/// What is to have come about, beside that the set is founded.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Until {
    /// So many run.
    pub up: usize,
    /// There is a leader.
    pub leader: bool,
    /// This replica is in the database.
    pub added: Option<InstanceId>,
    /// The view is newer than this.
    pub after: Revision,
}

impl Until {
    /// What is missing for people, or `None` when it has come about.
    pub fn missing(&self, view: &View) -> Option<String> {
        let View { set, roles, .. } = view;
        if set.founding.is_none() {
            return Some(set.not_yet().to_string());
        }
        if view.up() < self.up {
            return Some(format!("{} of {} replicas run", view.up(), self.up));
        }
        if self.leader && roles.leader.is_none() {
            return Some("there is no leader".to_owned());
        }
        if let Some(key) = &self.added
            && set.peer(key).is_none_or(|peer| peer.suffrage == Suffrage::Staging)
        {
            return Some(format!("{key} has not been added to the database"));
        }
        (view.revision <= self.after).then(|| format!("nothing is newer than revision {}", self.after))
    }
}

/// Handle to the peer sets. Cheap to clone.
#[derive(Debug, Clone)]
pub struct Peers {
    pub(super) inner: Arc<Inner>,
}

#[derive(Debug)]
pub(super) struct Inner {
    pub(super) store: Arc<dyn Store>,
    pub(super) catalog: Reader,
    pub(super) members: watch::Receiver<Members>,
    pub(super) board: watch::Sender<Board>,
    pub(super) heard: Mutex<HashMap<(ServiceId, NodeId), Instant>>,
    /// When what was observed of a set was written last.
    pub(super) written: Mutex<HashMap<ServiceId, Instant>>,
    pub(super) leaders: Counter,
}

/// What comes of a change to a set.
struct Outcome<T> {
    value: T,
    set: PeerSet,
}

impl Peers {
    /// Starts the tasks that follow the store and forget what is too old. `members` are the processes over the same store that do
    /// so.
    pub fn start(
        store: Arc<dyn Store>,
        catalog: Reader,
        members: watch::Receiver<Members>,
        metrics: &Metrics,
        tasks: &Tasks,
    ) -> Self {
        let inner = Inner {
            store,
            catalog,
            members,
            board: watch::Sender::default(),
            heard: Mutex::default(),
            written: Mutex::default(),
            leaders: metrics
                .counter("peers_leaders", "Changes of the leader that was published of a peer set"),
        };
        let peers = Self { inner: Arc::new(inner) };
        tasks.spawn_until_shutdown("peers", peers.clone().keep());
        tasks.spawn_until_shutdown("peers-believed", peers.clone().forget());
        peers
    }

    async fn keep(self) {
        let mut follower = Follower::new(Arc::clone(&self.inner.store), record::PEERS);
        while let Some(news) = follower.next().await {
            self.inner.board.send_modify(|board| board.apply(news));
        }
    }

    /// One set, as far as this process knows.
    ///
    /// # Errors
    /// [`Error::NoSet`], [`Error::Unread`].
    pub fn view(&self, name: &ServiceId) -> Result<View, Error> {
        let board = self.inner.board.borrow().clone();
        let known = self.known(&board, name)?;
        Ok(View::new(&known, &self.inner.catalog.latest(), board.stale))
    }

    /// All sets by name, as far as this process knows, and the change that they are as of.
    ///
    /// # Errors
    /// [`Error::Unread`].
    pub fn views(&self) -> Result<(Revision, Vec<View>), Error> {
        let board = self.inner.board.borrow().clone();
        if !board.loaded {
            return Err(Error::Unread);
        }
        let snapshot = self.inner.catalog.latest();
        let known = board.names().filter_map(|name| board.set(name));
        Ok((board.revision, known.map(|known| View::new(&known, &snapshot, board.stale)).collect()))
    }

    /// Returns once a set has changed after `seen`, and the change. Cancel-safe.
    pub async fn changed(&self, seen: Revision) -> Revision {
        let mut board = self.inner.board.subscribe();
        // The sender lives as long as `self`.
        match board.wait_for(|board| board.loaded && board.revision > seen).await {
            Ok(board) => board.revision,
            Err(_) => seen,
        }
    }

    pub(super) fn known(&self, board: &Board, name: &ServiceId) -> Result<Known, Error> {
        match board.set(name) {
            Some(known) => Ok(known),
            None if board.loaded => Err(Error::NoSet(name.clone())),
            None => Err(Error::Unread),
        }
    }

    /// The set once what `until` names has come about. Cancel-safe; waits for ever, also for a set that nobody has made yet.
    pub async fn wait(&self, name: &ServiceId, until: &Until) -> View {
        let mut board = self.inner.board.subscribe();
        loop {
            let snapshot = self.inner.catalog.latest();
            board.mark_unchanged();
            if let Ok(view) = self.view(name)
                && until.missing(&view).is_none()
            {
                return view;
            }
            tokio::select! {
                // The sender lives as long as `self`.
                _ = board.changed() => {}
                _ = self.inner.catalog.newer_than(snapshot.revision()) => {}
            }
        }
    }

    /// Makes a set. One that is already there is left as it is, but for how it is spread and observed.
    ///
    /// # Errors
    /// [`Error::Invalid`], [`Error::Exists`], [`Error::Limit`], [`Error::Store`].
    pub async fn create(&self, spec: Spec) -> Result<(Revision, ClusterId), Error> {
        let mut problems = Problems::default();
        spec.check(&mut problems);
        if !problems.is_empty() {
            return Err(Error::Invalid(problems));
        }
        for _ in 0..ATTEMPTS {
            if let Some(present) = self.read_set(&spec.name).await? {
                let is = &present.spec;
                if (is.kind, is.expect) != (spec.kind, spec.expect) {
                    let what = format!("of {} {} founders", is.expect, is.kind);
                    return Err(Error::Exists { name: spec.name, what });
                }
                let change = |set: &mut PeerSet, _: &Facts| {
                    (set.spec.spread, set.spec.observe) = (spec.spread, spec.observe.clone());
                    Ok(())
                };
                let Outcome { set, .. } = self.update(&spec.name, change).await?;
                return Ok((set.revision, set.cluster));
            }
            if self.inner.board.borrow().names().count() >= SETS {
                return Err(Error::Limit);
            }
            let set = PeerSet::new(spec.clone(), mint());
            let name = &spec.name;
            let roles = record::roles_to_proto(&Roles::default()).encode_to_vec().into();
            let ops = vec![
                put(record::set_key(name), record::encode_set(&set), Condition::Absent),
                // From now on a call to the leader fails at once, rather than wait for a cluster that nobody knows.
                put(record::roles_key(name), roles, Condition::Always),
            ];
            match self.inner.store.commit(ops).await {
                Ok(revision) => {
                    tracing::info!(set = %name, cluster = %set.cluster, expect = spec.expect, "peer set made");
                    self.shown(revision).await;
                    return Ok((revision, set.cluster));
                }
                Err(StoreError::Conflict { .. }) => {}
                Err(error) => return Err(Error::Store(error)),
            }
        }
        Err(Error::Contended(spec.name))
    }

    /// Takes a replica in: see [`PeerSet::register`].
    ///
    /// # Errors
    /// [`Error`]; asking again is always safe.
    pub async fn register(&self, name: &ServiceId, new: Newcomer) -> Result<(PeerSet, Peer), Error> {
        let mut problems = Problems::default();
        new.check(&mut problems);
        if !problems.is_empty() {
            return Err(Error::Invalid(problems));
        }
        let now = rt::now();
        let Outcome { value: node, set } = self.update(name, |set, _| set.register(new.clone(), now)).await?;
        let peer = set.peers.get(&node).cloned().ok_or(Refusal::NoPeer(new.key))?;
        Ok((set, peer))
    }

    /// Forgets a replica that was handed nothing: see [`PeerSet::withdraw`].
    ///
    /// # Errors
    /// [`Error`].
    pub async fn withdraw(&self, name: &ServiceId, key: &InstanceId) -> Result<Revision, Error> {
        Ok(self.update(name, |set, facts| set.withdraw(key, facts)).await?.set.revision)
    }

    /// The next step of a change: see [`PeerSet::propose`].
    ///
    /// # Errors
    /// [`Error`].
    pub async fn propose(
        &self,
        name: &ServiceId,
        want: &Want,
        from: Revision,
    ) -> Result<(Step, PeerSet), Error> {
        let now = rt::now();
        let Outcome { value, set } =
            self.update(name, |set, facts| set.propose(want, from, facts, now)).await?;
        Ok((value, set))
    }

    /// The pending change was made, or, with `cancel`, will not be.
    ///
    /// # Errors
    /// [`Error`].
    pub async fn finish(&self, name: &ServiceId, from: Revision, cancel: bool) -> Result<Revision, Error> {
        let finish = |set: &mut PeerSet, _: &Facts| if cancel { set.cancel(from) } else { set.confirm(from) };
        Ok(self.update(name, finish).await?.set.revision)
    }

    /// Gives a founding up: see [`PeerSet::refound`].
    ///
    /// # Errors
    /// [`Error`].
    pub async fn refound(
        &self,
        name: &ServiceId,
        given_up: ClusterId,
        expect: u32,
    ) -> Result<(Revision, ClusterId), Error> {
        let cluster = mint();
        let Outcome { set, .. } = self.update(name, |set, _| set.refound(given_up, expect, cluster)).await?;
        tracing::warn!(set = %name, %given_up, %cluster, "peer set is founded anew");
        Ok((set.revision, set.cluster))
    }

    /// All sets, for who observes them.
    pub(super) fn follow(&self) -> watch::Receiver<Board> {
        self.inner.board.subscribe()
    }

    /// The processes that observe.
    pub(super) fn members(&self) -> watch::Receiver<Members> {
        self.inner.members.clone()
    }

    /// Writes what differs from what was read, together. The answer is the revision of the set.
    pub(super) async fn commit(
        &self,
        name: &ServiceId,
        base: &Known,
        set: Option<&PeerSet>,
        observed: &Observed,
    ) -> Result<Option<Revision>, Error> {
        let unless_written = |revision: Revision| match revision {
            Revision(0) => Condition::Absent,
            revision => Condition::Unchanged(revision),
        };
        let mut ops = Vec::new();
        if let Some(set) = set {
            let when = Condition::Unchanged(base.set.revision);
            ops.push(put(record::set_key(name), record::encode_set(set), when));
        }
        // What is observed is judged by the set, so whoever judges by another one has to lose: it is written with each.
        if set.is_some() || *observed != *base.observed {
            let when = unless_written(base.observed.revision);
            ops.push(put(record::observed_key(name), record::encode_observed(observed), when));
        }
        let (before, after) = (&base.observed.roles, &observed.roles);
        if before != after {
            let roles = record::roles_to_proto(after).encode_to_vec().into();
            ops.push(put(record::roles_key(name), roles, Condition::Always));
        }
        if ops.is_empty() {
            return Ok(None);
        }
        let revision = self.inner.store.commit(ops).await.map_err(Error::Store)?;
        if before.leader != after.leader {
            self.inner.leaders.inc();
            let leader = after.leader.as_ref().map_or("nobody", InstanceId::as_str);
            tracing::info!(set = %name, leader, term = after.term, "leader");
        }
        Ok(Some(revision))
    }

    /// Changes a set by a transition, which may run several times.
    async fn update<T>(
        &self,
        name: &ServiceId,
        decide: impl Fn(&mut PeerSet, &Facts) -> Result<T, Refusal>,
    ) -> Result<Outcome<T>, Error> {
        for _ in 0..ATTEMPTS {
            let base = self.read(name).await?;
            let mut set = (*base.set).clone();
            let facts = self.facts(&set, &base.observed);
            let value = decide(&mut set, &facts)?;
            if set == *base.set {
                return Ok(Outcome { value, set });
            }
            let mut observed = (*base.observed).clone();
            if set.generation != base.set.generation {
                // Another database: its terms begin anew.
                observed = Observed { revision: observed.revision, ..Observed::default() };
            }
            self.judge(&set, &mut observed);
            match self.commit(name, &base, Some(&set), &observed).await {
                Ok(revision) => {
                    set.revision = revision.unwrap_or(set.revision);
                    self.told(&base.set, &set);
                    self.shown(set.revision).await;
                    return Ok(Outcome { value, set });
                }
                Err(Error::Store(StoreError::Conflict { .. })) => {}
                Err(error) => return Err(error),
            }
        }
        Err(Error::Contended(name.clone()))
    }

    /// Who leads by what is observed, after who did.
    pub(super) fn judge(&self, set: &PeerSet, observed: &mut Observed) {
        observed.by_node.retain(|node, _| set.peers.contains_key(node));
        observed.heard_by.retain(|node, _| set.peers.contains_key(node));
        let facts = self.facts(set, observed);
        (observed.roles, observed.led) = set.roles_after(&facts, &observed.roles, observed.led);
    }

    fn told(&self, before: &PeerSet, after: &PeerSet) {
        let set = &after.spec.name;
        if let (None, Some(founding)) = (&before.founding, &after.founding) {
            let digest = &founding.digest;
            tracing::info!(%set, founders = founding.list.len(), %digest, "peer set is founded");
            for warning in &founding.warnings {
                tracing::warn!(%set, warning, "the founding list");
            }
        }
        if let (None, Some(pending)) = (&before.pending, &after.pending) {
            let (change, node) = (Change::as_str(pending.change), pending.node);
            tracing::info!(%set, change, %node, "a change of membership is under way");
        }
    }

    pub(super) fn facts(&self, set: &PeerSet, observed: &Observed) -> Facts {
        let liveness = board::liveness(set, &self.inner.catalog.latest());
        Facts { liveness, observed: observed.by_node.clone() }
    }

    pub(super) async fn read_set(&self, name: &ServiceId) -> Result<Option<PeerSet>, Error> {
        let key = record::set_key(name);
        let entry = self.inner.store.get(&key).await.map_err(Error::Store)?;
        let set = entry.map(|entry| record::decode_set(&entry)).transpose();
        set.map_err(|reason| Error::Record { key: key.to_string(), reason })
    }

    /// The set as the store has it.
    pub(super) async fn read(&self, name: &ServiceId) -> Result<Known, Error> {
        // First: when the set is changed in between, it is not the newest of what is observed, and cannot be written.
        let key = record::observed_key(name);
        let entry = self.inner.store.get(&key).await.map_err(Error::Store)?;
        let observed = entry.map(|entry| record::decode_observed(&entry)).transpose();
        let observed = observed.map_err(|reason| Error::Record { key: key.to_string(), reason })?;
        let set = self.read_set(name).await?.ok_or_else(|| Error::NoSet(name.clone()))?;
        Ok(Known { set: Arc::new(set), observed: Arc::new(observed.unwrap_or_default()) })
    }

    async fn shown(&self, revision: Revision) {
        let mut board = self.inner.board.subscribe();
        let _ = timeout(SHOWN, board.wait_for(|board| board.revision >= revision)).await;
    }
}

fn put(key: crate::store::Key, value: bytes::Bytes, when: Condition) -> Op {
    Op::Put { key, value, when }
}

/// A cluster id that was never given out.
fn mint() -> ClusterId {
    let mut bytes = [0; 16];
    if SystemRandom::new().fill(&mut bytes).is_err() {
        // The operating system has always some; without, what the process was seeded with has to do.
        return ClusterId(fastrand::u128(1..));
    }
    ClusterId(u128::from_be_bytes(bytes))
}
