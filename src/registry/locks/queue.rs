//! Who waits for a lock at this process, in the order in which they came.

use std::{
    collections::HashMap,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

use tokio::sync::{OwnedSemaphorePermit, Semaphore};

use crate::{model::LockName, registry::Error};

/// Most that may wait for one lock here: each holds a request open.
const WAITING: usize = 10_000;

#[derive(Debug, Clone, Default)]
pub(super) struct Queues(Arc<Mutex<HashMap<LockName, Queue>>>);

#[derive(Debug)]
struct Queue {
    waiting: usize,
    /// One permit, which goes to those that ask in their order.
    turn: Arc<Semaphore>,
}

impl Queues {
    fn lock(&self) -> MutexGuard<'_, HashMap<LockName, Queue>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Goes to the end of a lock's queue.
    pub(super) fn join(&self, name: &LockName) -> Result<Place, Error> {
        let mut queues = self.lock();
        let queue = queues
            .entry(name.clone())
            .or_insert_with(|| Queue { waiting: 0, turn: Arc::new(Semaphore::new(1)) });
        if queue.waiting >= WAITING {
            let message = format!("{WAITING} wait for lock {name} at this node, the most that may");
            return Err(Error::limit("name", message));
        }
        queue.waiting += 1;
        Ok(Place { queues: self.clone(), name: name.clone(), turn: Arc::clone(&queue.turn) })
    }

    pub(super) fn waiting(&self, name: &LockName) -> usize {
        self.lock().get(name).map_or(0, |queue| queue.waiting)
    }
}

/// A place in a queue, until it is dropped.
#[derive(Debug)]
pub(super) struct Place {
    queues: Queues,
    name: LockName,
    turn: Arc<Semaphore>,
}

impl Place {
    /// Returns when those before have left; nobody else's turn comes until the permit is dropped. `None` never happens: the
    /// queue is not closed.
    pub(super) async fn turn(&self) -> Option<OwnedSemaphorePermit> {
        Arc::clone(&self.turn).acquire_owned().await.ok()
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        let mut queues = self.queues.lock();
        if let Some(queue) = queues.get_mut(&self.name) {
            queue.waiting -= 1;
            if queue.waiting == 0 {
                queues.remove(&self.name);
            }
        }
    }
}
