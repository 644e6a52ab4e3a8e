use tokio::sync::watch;

use crate::model::{InstanceKey, MemberId, Members};

/// Which instances this node checks: each is checked by exactly one of the nodes that are alive and check.
#[derive(Debug, Clone)]
pub struct Duty(watch::Receiver<Members>);

impl Duty {
    /// The share of a node among the others. One that is not among them has none.
    pub fn new(members: watch::Receiver<Members>) -> Self {
        Self(members)
    }

    /// Everything: there is no other node.
    pub fn alone() -> Self {
        Self(watch::channel(Members::alone(MemberId::sole())).1)
    }

    /// Whether the instance is this node's to check.
    pub fn mine(&self, key: &InstanceKey) -> bool {
        let members = self.0.borrow();
        members.is_member() && members.is_mine(&key.to_string())
    }

    /// Returns when the set of nodes has changed; never when it cannot change any more. Cancel-safe.
    pub(super) async fn changed(&mut self) {
        if self.0.changed().await.is_err() {
            std::future::pending().await
        }
    }
}
