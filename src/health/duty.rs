use std::{collections::BTreeSet, sync::Arc};

use tokio::sync::watch;
use xxhash_rust::xxh3::xxh3_64;

use crate::model::InstanceKey;

/// The ids of the nodes that are alive and check.
pub type Nodes = Arc<BTreeSet<String>>;

/// Which instances this node checks: each is checked by exactly one of the nodes that are alive, and when the set of nodes changes
/// only those move that have to (rendezvous hashing).
#[derive(Debug, Clone)]
pub struct Duty {
    own: String,
    live: watch::Receiver<Nodes>,
}

impl Duty {
    /// The share of the node `own` among `live`. A node that is not among them has none.
    pub fn new(own: impl Into<String>, live: watch::Receiver<Nodes>) -> Self {
        Self { own: own.into(), live }
    }

    /// Everything: there is no other node.
    pub fn alone() -> Self {
        let own = String::new();
        let (_, live) = watch::channel(Arc::new(BTreeSet::from([own.clone()])));
        Self { own, live }
    }

    /// Whether the instance is this node's to check.
    pub fn mine(&self, key: &InstanceKey) -> bool {
        let live = self.live.borrow();
        if !live.contains(&self.own) {
            return false;
        }
        let text = format!("{key}\n");
        // The id breaks ties, so that all nodes agree.
        let weight = |node: &str| xxh3_64(format!("{text}{node}").as_bytes());
        let own = (weight(&self.own), self.own.as_str());
        live.iter().all(|node| (weight(node), node.as_str()) <= own)
    }

    /// Returns when the set of nodes has changed; never when it cannot change any more. Cancel-safe.
    pub(super) async fn changed(&mut self) {
        if self.live.changed().await.is_err() {
            std::future::pending().await
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn key(n: usize) -> InstanceKey {
        InstanceKey { service: "s".parse().unwrap(), id: format!("i{n}").parse().unwrap() }
    }

    fn nodes(ids: &[&str]) -> Nodes {
        Arc::new(ids.iter().map(ToString::to_string).collect())
    }

    #[tokio::test]
    async fn each_instance_is_checked_by_one_node_and_few_move() {
        let (live, seen) = watch::channel(nodes(&["a", "b", "c"]));
        let duties = ["a", "b", "c"].map(|own| Duty::new(own, seen.clone()));
        let owner = |n: usize| {
            let owners: Vec<_> = (0..3).filter(|d| duties[*d].mine(&key(n))).collect();
            assert!(owners.len() <= 1, "{owners:?} check one instance");
            owners.first().copied()
        };
        let before: Vec<_> = (0..3000).map(owner).collect();
        for node in 0..3 {
            let share = before.iter().filter(|owner| **owner == Some(node)).count();
            assert!((800..1200).contains(&share), "{share} of 3000");
        }
        live.send_replace(nodes(&["a", "b"]));
        let after: Vec<_> = (0..3000).map(owner).collect();
        for (before, after) in before.iter().zip(&after) {
            assert!(*before == Some(2) || before == after, "moved without need");
            assert!(after.is_some_and(|owner| owner < 2));
        }
        live.send_replace(nodes(&[]));
        assert!((0..100).all(|n| owner(n).is_none()));
        assert!(Duty::alone().mine(&key(1)));
    }
}
