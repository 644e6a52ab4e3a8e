use std::{
    collections::HashMap,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use tokio::{sync::watch, time::Instant};

use crate::{
    catalog::Reader,
    resources::{self, ClientKind, View},
    rt::Tasks,
    xds::{Admit, Admitted, Code, Node, Refusal, ResourceSet, StreamPolicy},
};

/// Views that may be in use at once. Each costs a rendering of the whole catalog, and a node's metadata may ask for one.
const MOST: usize = 256;

/// The least time between two publications of a view, for each of its streams: about what it costs to bring a change to one.
/// Under a storm of changes this leaves the writers half the machine, and what is superseded meanwhile is never sent.
const PACE: Duration = Duration::from_micros(20);

/// The longest such time.
const SLOWEST: Duration = Duration::from_millis(50);

pub(super) type Set = Option<Arc<ResourceSet>>;

/// The resource sets in use: one a view, kept up by a task as long as a stream holds it.
#[derive(Debug, Clone)]
pub(super) struct Views {
    catalog: Reader,
    tasks: Tasks,
    sets: Arc<Mutex<HashMap<View, Arc<watch::Sender<Set>>>>>,
}

impl Views {
    pub(super) fn new(catalog: Reader, tasks: Tasks) -> Self {
        Self { catalog, tasks, sets: Arc::default() }
    }

    /// The set of a view, now and as it changes; `None` when too many views are in use.
    pub(super) fn subscribe(&self, view: View) -> Option<watch::Receiver<Set>> {
        let mut sets = self.sets();
        if let Some(set) = sets.get(&view) {
            return Some(set.subscribe());
        }
        if sets.len() >= MOST {
            return None;
        }
        let (sender, receiver) = watch::channel(None);
        let sender = Arc::new(sender);
        sets.insert(view.clone(), Arc::clone(&sender));
        drop(sets);
        self.tasks.spawn_until_shutdown("view", self.clone().project(view, sender));
        Some(receiver)
    }

    /// Follows the catalog until no stream holds the view any more.
    async fn project(self, view: View, sender: Arc<watch::Sender<Set>>) {
        let mut set = Arc::new(resources::render(&self.catalog.latest(), &view));
        loop {
            sender.send_replace(Some(Arc::clone(&set)));
            let streams = u32::try_from(sender.receiver_count()).unwrap_or(u32::MAX);
            let next = Instant::now() + PACE.saturating_mul(streams).min(SLOWEST);
            tokio::select! {
                newer = self.catalog.newer_than(set.revision()) => {
                    if newer.is_none() {
                        return;
                    }
                    // A change by itself goes at once.
                    tokio::time::sleep_until(next).await;
                    let (snapshot, changes) = self.catalog.since(set.revision());
                    set = Arc::new(resources::update(&set, &snapshot, &changes, &view));
                }
                () = sender.closed() => {
                    let mut sets = self.sets();
                    // Somebody may have subscribed since; subscribing holds the same lock.
                    if sender.receiver_count() == 0 {
                        sets.remove(&view);
                        return;
                    }
                }
            }
        }
    }

    fn sets(&self) -> MutexGuard<'_, HashMap<View, Arc<watch::Sender<Set>>>> {
        // Every change of the map is one call; it is whole even after a panic.
        self.sets.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Admit for Views {
    fn admit(&self, node: &Node) -> Result<Admitted, Refusal> {
        let view = View::of(node)
            .map_err(|error| Refusal { code: Code::InvalidArgument, message: error.to_string() })?;
        let policy = match view.kind {
            ClientKind::Envoy => StreamPolicy::ENVOY,
            ClientKind::Grpc => StreamPolicy::GRPC,
        };
        let set = self.subscribe(view).ok_or_else(|| Refusal {
            code: Code::ResourceExhausted,
            message: format!(
                "{MOST} different views are in use, the most that there may be: let sidecars share disco.outbound_port"
            ),
        })?;
        Ok(Admitted { set, policy })
    }
}
