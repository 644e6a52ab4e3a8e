//! The processes and the owners, and what each step does to them.

use std::{
    collections::{BTreeMap, BTreeSet},
    net::SocketAddr,
    sync::{Arc, Mutex, MutexGuard},
    time::Duration,
};

use futures_util::future::BoxFuture;
use tokio::{
    sync::watch,
    time::{Instant, sleep, timeout},
};

use super::{
    super::{
        Config, Ended, Error, Guards, Member, Membership, Mirror, Network, Patience, Registry, Session,
        ask::{Answer, Ask},
    },
    OWNERS, Step,
    store::{Client, Disk, Link, Shared, Wire},
};
use crate::{
    catalog::{self, Reader},
    model::{Incarnation, InstanceKey, Limits, RawRegistration, Registration, Revision},
    rt::{self, Readiness, Shutdown, Tasks},
    store::Store,
    telemetry::Metrics,
};

pub(super) const TTL: Duration = Duration::from_secs(9);
const GRACE: Duration = Duration::from_secs(6);
pub(super) const WINDOW: Duration = Duration::from_secs(30);
pub(super) const SHARE: f64 = 0.5;

/// How long an owner waits for an answer.
const PATIENCE: Duration = Duration::from_secs(4);
/// How long a server takes to notice that an owner is silent.
const SILENCE: Duration = Duration::from_secs(3);

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Phase {
    Running,
    Frozen,
    Dead,
}

/// An owner and its instance.
#[derive(Debug)]
pub(super) struct Owner {
    pub(super) key: InstanceKey,
    port: u16,
    /// Held by a session, not a TTL.
    session: bool,
    pub(super) phase: Phase,
    pub(super) incarnation: u64,
    /// When the request began that was answered last, of a run that goes on.
    pub(super) vouched: Option<Instant>,
    /// Its own session, and the node that holds it.
    holds: Option<(usize, Session)>,
}

/// A removal that was answered.
#[derive(Debug)]
pub(super) struct Deregistered {
    pub(super) owner: usize,
    pub(super) incarnation: u64,
    pub(super) revision: Revision,
    pub(super) epoch: u64,
}

pub(super) struct Node {
    pub(super) registry: Registry,
    tasks: Tasks,
}

pub(super) struct World {
    pub(super) shared: Arc<Shared>,
    pub(super) nodes: Mutex<Vec<Option<Node>>>,
    wires: Vec<watch::Sender<Wire>>,
    /// Whether owners reach the node.
    reached: Mutex<Vec<bool>>,
    pub(super) owners: Mutex<Vec<Owner>>,
    /// Runs that were asked to be registered.
    pub(super) attempted: Mutex<BTreeSet<(usize, u64)>>,
    /// Requests of runs that are under way, also those that nobody waits for any more.
    pub(super) under_way: Mutex<BTreeMap<(usize, u64), usize>>,
    pub(super) deregistered: Mutex<Vec<Deregistered>>,
    backup: Mutex<Option<Disk>>,
    /// When an older state was restored last.
    pub(super) restored: Mutex<Option<Instant>>,
    tasks: Tasks,
}

/// Instances answer by what is true of them.
#[derive(Clone)]
struct Answers(Arc<World>);

impl std::fmt::Debug for Answers {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Answers")
    }
}

impl Ask for Answers {
    fn ask(&self, address: SocketAddr, within: Duration) -> BoxFuture<'_, Answer> {
        Box::pin(async move {
            let phase = self.0.owners().iter().find(|owner| owner.port == address.port()).map(|it| it.phase);
            match phase {
                Some(Phase::Running) => Answer::Accepts,
                Some(Phase::Frozen) => {
                    sleep(within).await;
                    Answer::Silent("it did not answer".into())
                }
                Some(Phase::Dead) | None => Answer::Refused,
            }
        })
    }
}

impl World {
    pub(super) async fn start(nodes: usize, owners: usize) -> Arc<Self> {
        let owner = |n: usize| Owner {
            key: InstanceKey {
                service: if n.is_multiple_of(3) { "small" } else { "large" }.parse().unwrap(),
                id: format!("i{n}").parse().unwrap(),
            },
            port: 1000 + n as u16,
            session: n % 2 == 1,
            phase: Phase::Dead,
            incarnation: 0,
            vouched: None,
            holds: None,
        };
        let world = Arc::new(Self {
            shared: Shared::new(),
            nodes: Mutex::new((0..nodes).map(|_| None).collect()),
            wires: (0..nodes).map(|_| watch::Sender::default()).collect(),
            reached: Mutex::new(vec![true; nodes]),
            owners: Mutex::new((0..owners).map(owner).collect()),
            attempted: Mutex::default(),
            under_way: Mutex::default(),
            deregistered: Mutex::default(),
            backup: Mutex::default(),
            restored: Mutex::default(),
            tasks: Tasks::new(Shutdown::default()),
        });
        world.tasks.spawn_until_shutdown("sessions", Arc::clone(&world.shared).end_sessions());
        for node in 0..nodes {
            world.start_node(node).await;
        }
        for owner in 0..owners {
            world.tasks.spawn_until_shutdown("owner", Arc::clone(&world).live(owner));
        }
        sleep(Duration::from_secs(2)).await;
        world
    }

    pub(super) fn owners(&self) -> MutexGuard<'_, Vec<Owner>> {
        self.owners.lock().unwrap()
    }

    pub(super) fn catalogs(&self) -> Vec<(usize, Reader)> {
        let nodes = self.nodes.lock().unwrap();
        let nodes = nodes.iter().enumerate();
        nodes.filter_map(|(n, node)| Some((n, node.as_ref()?.registry.catalog().clone()))).collect()
    }

    async fn start_node(self: &Arc<Self>, n: usize) {
        if self.nodes.lock().unwrap()[n].is_some() {
            return;
        }
        let tasks = Tasks::new(Shutdown::default());
        let link = Link::new(Arc::clone(&self.shared), self.wires[n].clone());
        tasks.spawn_until_shutdown("session", Arc::clone(&link).keep_session());
        let store: Arc<dyn Store> = Arc::new(Client(link));
        let (writer, reader) = catalog::catalog();
        let gate = Readiness::default().gate("catalog");
        let mirror = Mirror::new(Arc::clone(&store), writer, reader.clone());
        mirror.start(Patience::Wait(None), &tasks, gate).await.unwrap();
        let me = Member {
            id: format!("n{n}").parse().unwrap(),
            roles: ["registry".to_owned()].into(),
            grpc: String::new(),
            http: String::new(),
            started_at: rt::now(),
        };
        let members = Membership::start(Arc::clone(&store), me, &tasks).with_role("registry", &tasks);
        let guards = Guards {
            min_share: SHARE,
            window: WINDOW,
            ask_interval: Duration::from_secs(5),
            ..Guards::default()
        };
        let config = Config { session_grace: GRACE, guards, ..Config::default() };
        let answers = Arc::new(Answers(Arc::clone(self)));
        let registry = Registry::start_over(
            Network { ask: answers, forward: None },
            config,
            store,
            reader,
            members,
            &Metrics::default(),
            &tasks,
        );
        self.nodes.lock().unwrap()[n] = Some(Node { registry, tasks });
    }

    /// The node's registry, if an owner reaches it.
    fn reach(&self, n: usize) -> Option<Registry> {
        if !self.reached.lock().unwrap()[n] {
            return None;
        }
        self.nodes.lock().unwrap()[n].as_ref().map(|node| node.registry.clone())
    }

    pub(super) async fn step(self: &Arc<Self>, step: Step) {
        match step {
            Step::Start(n) => {
                let mut owners = self.owners();
                if owners[n].phase == Phase::Dead {
                    let owner = &mut owners[n];
                    (owner.phase, owner.incarnation, owner.vouched) =
                        (Phase::Running, owner.incarnation + 1, None);
                }
            }
            Step::Crash(n) => self.crash(n),
            Step::Freeze(n) => self.freeze(n),
            Step::Thaw(n) => self.thaw(n),
            Step::FreezeAll => (0..OWNERS).for_each(|n| self.freeze(n)),
            Step::ThawAll => (0..OWNERS).for_each(|n| self.thaw(n)),
            Step::Deregister(n) => self.deregister(n),
            Step::CutStore(n) => self.wires[n].send_modify(|wire| wire.cut = true),
            Step::SlowStore(n) => {
                self.wires[n].send_modify(|wire| wire.delay = Duration::from_millis(fastrand::u64(1..400)));
            }
            Step::LossyStore(n) => self.wires[n].send_modify(|wire| wire.lossy = true),
            Step::MendStore(n) => drop(self.wires[n].send_replace(Wire::default())),
            Step::CutOwners(n) => self.reached.lock().unwrap()[n] = false,
            Step::MendOwners(n) => self.reached.lock().unwrap()[n] = true,
            Step::CrashNode(n) => {
                let node = self.nodes.lock().unwrap()[n].take();
                if let Some(node) = node {
                    node.tasks.shutdown().start();
                    self.end_sessions_of(n);
                }
            }
            Step::StartNode(n) => self.start_node(n).await,
            Step::StoreDown => self.shared.set_up(false),
            Step::StoreUp => self.shared.set_up(true),
            Step::Compact => self.shared.compact(),
            Step::Backup => *self.backup.lock().unwrap() = Some(self.shared.disk().clone()),
            Step::Restore => {
                if let Some(backup) = &*self.backup.lock().unwrap() {
                    self.shared.restore(backup);
                    *self.restored.lock().unwrap() = Some(Instant::now());
                }
            }
            Step::Wait(_) => {}
        }
    }

    /// Those that the node held are without it.
    fn end_sessions_of(&self, n: usize) {
        for owner in self.owners().iter_mut() {
            if owner.holds.as_ref().is_some_and(|(at, _)| *at == n) {
                owner.holds = None;
                owner.vouched = None;
            }
        }
    }

    fn crash(self: &Arc<Self>, n: usize) {
        let mut owners = self.owners();
        let owner = &mut owners[n];
        if owner.phase == Phase::Dead {
            return;
        }
        (owner.phase, owner.vouched) = (Phase::Dead, None);
        if let Some((node, session)) = owner.holds.take() {
            // The kernel closes its connection, if that word comes through.
            let how = if self.reach(node).is_some() { Ended::HungUp } else { Ended::Lost };
            self.tasks.spawn("hang-up", session.end(how));
        }
    }

    fn freeze(&self, n: usize) {
        let mut owners = self.owners();
        if owners[n].phase == Phase::Running {
            (owners[n].phase, owners[n].vouched) = (Phase::Frozen, None);
        }
    }

    fn thaw(&self, n: usize) {
        let mut owners = self.owners();
        if owners[n].phase == Phase::Frozen {
            owners[n].phase = Phase::Running;
        }
    }

    fn deregister(self: &Arc<Self>, n: usize) {
        let (key, incarnation, held) = {
            let mut owners = self.owners();
            let owner = &mut owners[n];
            if owner.phase != Phase::Running {
                return;
            }
            (owner.phase, owner.vouched) = (Phase::Dead, None);
            (owner.key.clone(), owner.incarnation, owner.holds.take())
        };
        let world = Arc::clone(self);
        self.tasks.spawn("deregister", async move {
            let first = held.as_ref().map_or(0, |(node, _)| *node);
            for turn in 0..NODES_TRIED {
                let Some(registry) = world.reach((first + turn) % world.wires.len()) else { continue };
                let epoch = world.shared.disk().epoch;
                let removed = registry.deregister(key.clone(), Some(Incarnation(incarnation)));
                if let Ok(Ok(revision)) = timeout(PATIENCE, removed).await {
                    let answered = Deregistered { owner: n, incarnation, revision, epoch };
                    world.deregistered.lock().unwrap().push(answered);
                    break;
                }
            }
            if let Some((_, session)) = held {
                session.end(Ended::Closed).await;
            }
        });
    }

    /// What an owner does, run after run.
    async fn live(self: Arc<Self>, n: usize) {
        let mut node = n % self.wires.len();
        let mut registered = 0;
        let mut silent_since: Option<Instant> = None;
        loop {
            let (phase, incarnation, is_session, holds) = {
                let owners = self.owners();
                let owner = &owners[n];
                (owner.phase, owner.incarnation, owner.session, owner.holds.as_ref().map(|(at, _)| *at))
            };
            // The server does not hear of it for long.
            let silent = phase == Phase::Frozen || holds.is_some_and(|at| self.reach(at).is_none());
            silent_since = silent.then(|| silent_since.unwrap_or_else(Instant::now));
            if silent_since.is_some_and(|since| since.elapsed() > SILENCE) {
                let mut owners = self.owners();
                (owners[n].holds, owners[n].vouched) = (None, None);
            }
            if phase != Phase::Running {
                sleep(Duration::from_millis(200)).await;
                continue;
            }
            if holds.is_some() {
                let displaced = self.owners()[n].holds.as_ref().map(|(_, session)| session.displaced());
                let Some(displaced) = displaced else { continue };
                if timeout(Duration::from_millis(200), displaced).await.is_ok() {
                    let mut owners = self.owners();
                    (owners[n].holds, owners[n].vouched) = (None, None);
                }
                continue;
            }
            let Some(registry) = self.reach(node) else {
                node = (node + 1) % self.wires.len();
                sleep(Duration::from_millis(100)).await;
                continue;
            };
            let began = Instant::now();
            let result = if is_session {
                let session = registry.session();
                let request = async |session: Session, registration| {
                    let result = session.register(registration).await;
                    result.map(|_| Some(session))
                };
                let request = request(session, self.registration(n, incarnation));
                self.request(n, incarnation, true, request).await
            } else if registered == incarnation {
                let (key, incarnation) = (self.owners()[n].key.clone(), Incarnation(incarnation));
                let request = async move { registry.renew(key, Some(incarnation)).await.map(|_| None) };
                self.request(n, incarnation.0, false, request).await
            } else {
                let registration = self.registration(n, incarnation);
                let request = async move { registry.register(registration).await.map(|_| None) };
                self.request(n, incarnation, true, request).await
            };
            let wait = match result {
                Some(Ok(session)) => {
                    let mut owners = self.owners();
                    let owner = &mut owners[n];
                    registered = incarnation;
                    // It may have ended meanwhile.
                    if owner.incarnation == incarnation && owner.phase == Phase::Running {
                        owner.vouched = Some(began);
                        owner.holds = session.map(|session| (node, session));
                    }
                    TTL / 3
                }
                Some(Err(Error::NotFound(_))) => {
                    registered = 0;
                    Duration::from_millis(50)
                }
                Some(Err(_)) | None => {
                    node = (node + 1) % self.wires.len();
                    Duration::from_millis(200)
                }
            };
            if self.owners()[n].holds.is_some() {
                continue;
            }
            // Looks up now and then: a crash and a new run do not wait.
            let until = Instant::now() + wait;
            while Instant::now() < until && self.owners()[n].incarnation == incarnation {
                sleep(Duration::from_millis(100).min(until - Instant::now())).await;
            }
        }
    }

    /// Runs a request to its end, as a server does, and waits for its answer for a while.
    async fn request<T: Send + 'static>(
        self: &Arc<Self>,
        n: usize,
        incarnation: u64,
        registers: bool,
        request: impl Future<Output = Result<T, Error>> + Send + 'static,
    ) -> Option<Result<T, Error>> {
        let run = (n, incarnation);
        if registers {
            self.attempted.lock().unwrap().insert(run);
        }
        *self.under_way.lock().unwrap().entry(run).or_default() += 1;
        let (sender, answer) = tokio::sync::oneshot::channel();
        let world = Arc::clone(self);
        self.tasks.spawn("request", async move {
            let result = request.await;
            *world.under_way.lock().unwrap().entry(run).or_default() -= 1;
            let _ = sender.send(result);
        });
        timeout(PATIENCE, answer).await.ok()?.ok()
    }

    fn registration(&self, n: usize, incarnation: u64) -> Registration {
        let owners = self.owners();
        let owner = &owners[n];
        let raw = RawRegistration {
            service: owner.key.service.to_string(),
            id: owner.key.id.to_string(),
            incarnation: Some(incarnation),
            address: Some("127.0.0.1".into()),
            port: Some(owner.port.into()),
            ttl: Some(TTL),
            ..RawRegistration::default()
        };
        Registration::check(raw, &Limits::default()).unwrap()
    }

    pub(super) async fn heal(self: &Arc<Self>) {
        self.shared.set_up(true);
        for wire in &self.wires {
            wire.send_replace(Wire::default());
        }
        self.reached.lock().unwrap().fill(true);
        for n in 0..self.wires.len() {
            self.start_node(n).await;
        }
        for n in 0..OWNERS {
            self.thaw(n);
        }
    }

    pub(super) async fn stop(&self) {
        self.tasks.shutdown().start();
        let nodes = std::mem::take(&mut *self.nodes.lock().unwrap());
        for node in nodes.into_iter().flatten() {
            node.tasks.shutdown().start();
        }
        self.owners().clear();
    }
}

/// Nodes that a removal is tried at.
const NODES_TRIED: usize = 6;
