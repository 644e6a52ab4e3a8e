use std::{
    collections::BTreeSet,
    sync::{Arc, Mutex, PoisonError},
};

use tokio::sync::watch;

/// Whether the process may be sent work: it is once every gate is open, and not after it began to shut down.
#[derive(Debug, Clone)]
pub struct Readiness {
    waiting: Arc<watch::Sender<BTreeSet<&'static str>>>,
}

impl Default for Readiness {
    fn default() -> Self {
        Self { waiting: Arc::new(watch::channel(BTreeSet::new()).0) }
    }
}

impl Readiness {
    /// Adds a condition that must be met first. It is met by [`Gate::open`].
    pub fn gate(&self, name: &'static str) -> Gate {
        self.close(name);
        Gate { name, readiness: Mutex::new(Some(self.clone())) }
    }

    /// Makes the process not ready, until somebody opens `name`.
    pub fn close(&self, name: &'static str) {
        self.waiting.send_modify(|waiting| {
            waiting.insert(name);
        });
    }

    /// The condition is met, for now.
    pub fn open(&self, name: &'static str) {
        self.waiting.send_modify(|waiting| {
            waiting.remove(name);
        });
    }

    /// What is still waited for; empty when ready.
    pub fn waiting(&self) -> Vec<&'static str> {
        self.waiting.borrow().iter().copied().collect()
    }

    /// Whether this one condition is still waited for.
    pub fn waits_for(&self, name: &str) -> bool {
        self.waiting.borrow().contains(name)
    }

    /// Returns once nothing is waited for.
    pub async fn ready(&self) {
        self.becomes(true).await;
    }

    /// Returns once it is ready, or is not.
    pub async fn becomes(&self, ready: bool) {
        let mut waiting = self.waiting.subscribe();
        // The sender lives as long as `self`, so this ends by readiness only.
        let _ = waiting.wait_for(|waiting| waiting.is_empty() == ready).await;
    }
}

/// One condition of readiness. Dropping it unopened leaves the process not ready, which is what a failed part means.
#[derive(Debug)]
pub struct Gate {
    name: &'static str,
    readiness: Mutex<Option<Readiness>>,
}

impl Gate {
    /// The condition is met. Further calls do nothing.
    pub fn open(&self) {
        let taken = self.readiness.lock().unwrap_or_else(PoisonError::into_inner).take();
        if let Some(readiness) = taken {
            readiness.open(self.name);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn ready_when_all_gates_are_open() {
        let readiness = Readiness::default();
        let (store, xds) = (readiness.gate("store"), readiness.gate("xds"));
        store.open();
        store.open();
        assert_eq!(readiness.waiting(), ["xds"]);
        drop(xds);
        assert_eq!(readiness.waiting(), ["xds"]);
        let catalog = readiness.gate("xds");
        catalog.open();
        readiness.ready().await;
    }
}
