use std::{
    collections::HashMap,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

use prometheus_client::metrics::histogram::Histogram;
use tokio::{sync::watch, time::Instant};

use crate::{
    catalog::Reader,
    resources::{self, ClientKind, View},
    rt::Tasks,
    telemetry::{Metrics, Stage},
    xds::{Admit, Admitted, Code, Node, Refusal, ResourceSet, StreamPolicy},
};

/// Views that may be in use at once. Each costs a rendering of the whole catalog, and a node's metadata may ask for one.
const MOST: usize = 256;

pub(super) type Set = Option<Arc<ResourceSet>>;

/// The resource sets in use: one a view, kept up by a task as long as a stream holds it.
#[derive(Debug, Clone)]
pub(super) struct Views {
    catalog: Reader,
    tasks: Tasks,
    sets: Arc<Mutex<HashMap<View, Arc<watch::Sender<Set>>>>>,
    /// From a durable change to its resources.
    published: Histogram,
}

impl Views {
    pub(super) fn new(catalog: Reader, tasks: Tasks, metrics: &Metrics) -> Self {
        Self { catalog, tasks, sets: Arc::default(), published: metrics.propagation(Stage::Published) }
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
        let published = |set: ResourceSet| Arc::new(set.with_published(Instant::now()));
        let mut set = published(resources::render(&self.catalog.latest(), &view));
        loop {
            sender.send_replace(Some(Arc::clone(&set)));
            tokio::select! {
                newer = self.catalog.newer_than(set.revision()) => {
                    let Some((snapshot, changes)) = newer else { return };
                    set = published(resources::update(&set, &snapshot, &changes, &view));
                    if let Some(taken) = snapshot.taken() {
                        self.published.observe(taken.elapsed().as_secs_f64());
                    }
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
