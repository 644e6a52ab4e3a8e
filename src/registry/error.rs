use crate::{
    model::{InstanceKey, LockName, MemberId, Problem, Problems},
    store::StoreError,
};

/// Why the registry refused or failed.
#[derive(Debug, Clone, thiserror::Error)]
pub enum Error {
    /// The input is wrong; sending it again cannot help.
    #[error("{0}")]
    Invalid(Problems),
    /// There is no such instance. An owner registers again.
    #[error(
        "instance {0} is not registered: register it (again); `disco instance list` shows those that are"
    )]
    NotFound(InstanceKey),
    /// There is no such service.
    #[error("service {0} is not known; `disco service list` (GET /v1/services) shows those that are")]
    NoService(crate::model::ServiceId),
    /// Nobody holds the lock.
    #[error("lock {0} is held by nobody")]
    NoLock(LockName),
    /// Many write one lock at once.
    #[error("lock {0} is being written by many at once: try again")]
    Contended(LockName),
    /// The locks have not been read from the store yet.
    #[error("this node has not read the locks from the store yet: try another or again")]
    LocksUnread,
    /// Somebody else holds it, or it is not in the state that the request needs.
    #[error("{0}")]
    Conflict(Problem),
    /// A limit of the server was reached.
    #[error("{0}")]
    Limit(Problem),
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
    /// Another process counts the instance's lease, and it alone knows whether the instance may be replaced.
    #[error("instance {key} is alive as far as this node knows; node {owner} can tell: try there")]
    Elsewhere {
        /// The instance.
        key: InstanceKey,
        /// The process.
        owner: MemberId,
    },
    /// The other processes count this one as dead.
    #[error(
        "this node has lost touch with the store, so another one keeps the leases for now: try another or again"
    )]
    Isolated,
    /// There is something already where a backup was to be restored.
    #[error(
        "the store is not empty: it holds {0} entries. Restore into an empty one, or say --replace (over HTTP ?replace=true): \
         what is not in the snapshot is then removed"
    )]
    NotEmpty(usize),
    /// The server is shutting down.
    #[error("this server is shutting down; try another or again")]
    ShuttingDown,
}

impl Error {
    pub(super) fn conflict(field: &str, message: String) -> Self {
        Self::Conflict(Problem::new(field, message, None))
    }

    pub(super) fn limit(field: &str, message: String) -> Self {
        Self::Limit(Problem::new(field, message, None))
    }
}
