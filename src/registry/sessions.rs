use std::sync::{
    Arc,
    atomic::{AtomicU64, Ordering},
};

use tokio::time::Instant;

use super::{
    Accepted, Error, Inner, Registry,
    leases::{Holder, SessionId},
    leave::Cause,
};
use crate::model::Registration;

/// How a session ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Ended {
    /// The owner closed it: what it registered is gone.
    Closed,
    /// Its connection was closed under it, as a kernel does for a process that died: so is what it registered, unless too
    /// much went at once to be believed.
    HungUp,
    /// The connection fell silent, or this server ends it: the owner may well be alive, and has the grace to come back.
    Lost,
}

/// A lease that lasts as long as this value. Dropping it without [`Session::end`] counts as [`Ended::Lost`].
#[derive(Debug)]
pub struct Session {
    inner: Arc<Inner>,
    registry: Registry,
    id: SessionId,
}

impl Registry {
    /// Begins a session.
    pub fn session(&self) -> Session {
        static NEXT: AtomicU64 = AtomicU64::new(1);
        let id = SessionId(NEXT.fetch_add(1, Ordering::Relaxed));
        self.inner.leases.session_begins(id);
        Session { inner: Arc::clone(&self.inner), registry: self.clone(), id }
    }
}

impl Session {
    /// As [`Registry::register`], held by this session instead of a TTL.
    ///
    /// # Errors
    /// As [`Registry::register`].
    pub async fn register(&self, registration: Registration) -> Result<Accepted, Error> {
        self.registry.register_held(registration, Holder::Session(self.id)).await
    }

    /// Returns when the session should end, as [`Ended::Lost`], so that its owner comes again: the other processes count this
    /// one as dead, or another one counts a lease that was the session's.
    pub fn displaced(&self) -> impl Future<Output = ()> + Send + 'static {
        let (registry, id) = (self.registry.clone(), self.id);
        async move {
            tokio::select! {
                () = registry.left() => {}
                () = registry.inner.leases.displaced(id) => {}
            }
        }
    }

    /// Ends the session. What it holds is removed at once, after the grace when it was [`Ended::Lost`].
    pub async fn end(self, how: Ended) {
        let how = match how {
            Ended::Closed => Cause::Closed,
            Ended::HungUp => Cause::HungUp,
            Ended::Lost => {
                for (key, _) in self.inner.leases.session_lost(self.id, Instant::now()) {
                    let grace = self.inner.config.session_grace;
                    tracing::info!(instance = %key, ?grace, "its session was lost: it is removed after the grace unless its owner comes back");
                }
                return;
            }
        };
        let over = self.inner.leases.session_closed(self.id);
        self.registry.leave(over, how).await;
    }
}

impl Drop for Session {
    fn drop(&mut self) {
        // After `end` nothing is held any more.
        self.inner.leases.session_lost(self.id, Instant::now());
    }
}
