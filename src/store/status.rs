use std::time::SystemTime;

use tokio::time::Instant;

/// How a store is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Status {
    /// Why it does not answer, if it does not. What was read from it before may be stale then.
    pub fault: Option<Fault>,
    /// The session that [`super::Op::Bind`] binds to, if there is one at the moment.
    pub session: Option<Session>,
}

/// That a store does not answer.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Fault {
    /// Since when.
    pub since: SystemTime,
    /// What is wrong, and what to do.
    pub reason: String,
}

/// The time for which keys stay that are bound to this process.
///
/// Whoever binds a key reads the session before the commit. When it is another one after the commit or any time later,
/// the key is gone or about to go, and has to be written again.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Session {
    /// Differs from that of every other session of the same store.
    pub id: u64,
    /// Until when the keys stay for certain; moved on while the store answers. That wakes nobody who waits
    /// for a change of the status, unless it was over before. A process that was frozen finds it in the past. `None`: as long as the store is open.
    pub until: Option<Instant>,
}

impl Session {
    /// Whether what was bound in it is certain to be there.
    pub fn holds(&self) -> bool {
        self.until.is_none_or(|until| Instant::now() < until)
    }
}

impl Status {
    /// Of a store in this process.
    pub(super) fn local() -> Self {
        Self { fault: None, session: Some(Session { id: 1, until: None }) }
    }
}
