use std::{future::Future, time::Duration};

use tokio_util::{
    sync::{CancellationToken, WaitForCancellationFuture},
    task::TaskTracker,
};
use tracing::Instrument as _;

use super::Seldom;

/// Tells tasks to end. Cheap to clone.
#[derive(Debug, Clone, Default)]
pub struct Shutdown(CancellationToken);

impl Shutdown {
    /// Asks everybody who listens to end.
    pub fn start(&self) {
        self.0.cancel();
    }

    /// True once asked to end.
    pub fn started(&self) -> bool {
        self.0.is_cancelled()
    }

    /// Returns once asked to end. It is one signal for thousands of tasks: to ask it takes locks that all of them share, so it is
    /// asked only when it has something to say.
    pub fn wait(&self) -> Seldom<WaitForCancellationFuture<'_>> {
        Seldom::new(self.0.cancelled())
    }

    /// One that starts when this starts, and that can be started by itself.
    pub fn child(&self) -> Self {
        Self(self.0.child_token())
    }
}

/// Goes with every request that came over a connection: starts when the streams of that connection are to move to another one,
/// and when the process is to end.
#[derive(Debug, Clone)]
pub struct Leave(pub Shutdown);

/// Owns tasks, each with a name that its log lines carry. Nothing in Disco runs without such an owner.
#[derive(Debug, Clone, Default)]
pub struct Tasks {
    tracker: TaskTracker,
    shutdown: Shutdown,
}

impl Tasks {
    /// Tasks that end when `shutdown` starts.
    pub fn new(shutdown: Shutdown) -> Self {
        Self { tracker: TaskTracker::new(), shutdown }
    }

    /// The signal that ends them.
    pub fn shutdown(&self) -> &Shutdown {
        &self.shutdown
    }

    /// Runs `task`, which listens to [`Tasks::shutdown`] itself.
    pub fn spawn<F>(&self, name: &'static str, task: F)
    where
        F: Future<Output = ()> + Send + 'static,
    {
        self.tracker.spawn(task.instrument(tracing::info_span!(parent: None, "task", name)));
    }

    /// Runs `task`, which listens to [`Tasks::shutdown`] itself, without a name: for tasks that wake so often that entering and
    /// leaving the name's span would show.
    pub fn spawn_often_polled<F>(&self, task: F)
    where
        F: Future<Output = ()> + Send + 'static,
    {
        self.tracker.spawn(task);
    }

    /// Runs `task` until it ends or shutdown starts; then it is dropped at its next await.
    pub fn spawn_until_shutdown<F>(&self, name: &'static str, task: F)
    where
        F: Future<Output = ()> + Send + 'static,
    {
        let shutdown = self.shutdown.clone();
        self.spawn(name, async move {
            tokio::select! {
                () = task => {}
                () = shutdown.wait() => {}
            }
        });
    }

    /// Waits until all have ended, at most `limit`. Returns how many have not.
    pub async fn join(&self, limit: Duration) -> usize {
        self.tracker.close();
        let _ = tokio::time::timeout(limit, self.tracker.wait()).await;
        self.tracker.len()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test(start_paused = true)]
    async fn join_counts_those_that_do_not_end() {
        let tasks = Tasks::default();
        tasks.spawn("stubborn", std::future::pending());
        tasks.spawn_until_shutdown("obedient", std::future::pending());
        tasks.shutdown().start();
        assert_eq!(tasks.join(Duration::from_secs(1)).await, 1);
    }
}
