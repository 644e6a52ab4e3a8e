use std::{
    collections::HashMap,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

use tokio::sync::watch;

use crate::{
    catalog::Reader,
    model::Locality,
    resources::{self, ClientKind, View},
    rt::Tasks,
    xds::{Admit, Admitted, Code, Node, Refusal, ResourceSet, StreamPolicy},
};

/// Views of all services that may be in use at once. Each costs a rendering of the whole catalog, and a node may ask for one.
const MOST: usize = 256;

/// Likewise of some services, which cost what they name.
const MOST_SCOPED: usize = 4096;

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

    /// The set of a view, now and as it changes; `None` when too many views are in use. Where something runs only decides what
    /// is preferred, so views that differ in nothing else give way to wider ones before any is refused.
    fn subscribe(&self, view: View) -> Option<watch::Receiver<Set>> {
        let most = if view.upstreams.is_some() { MOST_SCOPED } else { MOST };
        let region = Locality { zone: "".into(), ..view.locality.clone() };
        let in_region = View { locality: region, ..view.clone() };
        let anywhere = View { locality: Locality::default(), ..view.clone() };
        let choices = [(view, most / 2), (in_region, most / 4 * 3), (anywhere, most)];
        choices.into_iter().find_map(|(view, most)| self.subscribe_within(view, most))
    }

    /// The set of exactly this view, unless that makes more than `most` of its sort.
    fn subscribe_within(&self, view: View, most: usize) -> Option<watch::Receiver<Set>> {
        let mut sets = self.sets();
        if let Some(set) = sets.get(&view) {
            return Some(set.subscribe());
        }
        let scoped = view.upstreams.is_some();
        if sets.keys().filter(|other| other.upstreams.is_some() == scoped).count() >= most {
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
            tokio::select! {
                newer = self.catalog.newer_than(set.revision()) => {
                    let Some((snapshot, changes)) = newer else { return };
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
                "{} different views are in use, the most that there may be: let proxies share disco.upstreams and \
                 disco.outbound_port",
                self.sets().len()
            ),
        })?;
        Ok(Admitted { set, policy })
    }
}
