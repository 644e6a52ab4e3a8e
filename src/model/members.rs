use std::collections::BTreeSet;

use xxhash_rust::xxh3::xxh3_64_with_seed;

use super::id::name;

name! {
    /// A Disco process among those that share a store. Stable across its restarts, unique among the others.
    MemberId, "the name of a node"
}

impl MemberId {
    /// What a process is called that has its store to itself.
    pub fn sole() -> Self {
        Self("disco".into())
    }
}

/// The Disco processes of one kind that are alive, as one of them sees it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Members {
    /// The process that sees it.
    pub own: MemberId,
    /// Those that are alive. Without `own` when that lost its place: the others count it as dead.
    pub live: BTreeSet<MemberId>,
}

impl Members {
    /// One process with nobody beside it.
    pub fn alone(own: MemberId) -> Self {
        Self { live: [own.clone()].into(), own }
    }

    /// Whether the others count this process as alive. While they do not, they do its work.
    pub fn is_member(&self) -> bool {
        self.live.contains(&self.own)
    }

    /// Who does the work called `name`: the same for all that see the same members, and, when one comes or goes, another one only
    /// for that one's share of the names. `None` when nobody is alive.
    pub fn assigned(&self, name: &str) -> Option<&MemberId> {
        // Rendezvous hashing.
        self.live.iter().max_by_key(|member| {
            let seed = xxh3_64_with_seed(member.as_str().as_bytes(), 0);
            (xxh3_64_with_seed(name.as_bytes(), seed), *member)
        })
    }

    /// Whether the work called `name` is this process's.
    pub fn is_mine(&self, name: &str) -> bool {
        self.assigned(name) == Some(&self.own)
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use super::*;

    fn members(live: &[&str]) -> Members {
        let live = live.iter().map(|id| id.parse().unwrap()).collect();
        Members { own: "n1".parse().unwrap(), live }
    }

    #[test]
    fn work_moves_only_from_or_to_who_comes_or_goes() {
        let (all, fewer) = (members(&["n1", "n2", "n3"]), members(&["n1", "n3"]));
        let mut share: BTreeMap<String, usize> = BTreeMap::new();
        for n in 0..3000 {
            let name = format!("greeter/{n}");
            let (before, after) = (all.assigned(&name).unwrap(), fewer.assigned(&name).unwrap());
            assert!(before == after || before.as_str() == "n2", "{name} moved from {before} to {after}");
            *share.entry(before.to_string()).or_default() += 1;
        }
        assert_eq!(share.len(), 3);
        assert!(share.values().all(|of| (800..1200).contains(of)), "{share:?}");
    }

    #[test]
    fn who_lost_its_place_has_no_work() {
        let alone = Members::alone("n1".parse().unwrap());
        assert!(alone.is_member() && alone.is_mine("a"));
        let others = members(&["n2"]);
        assert!(!others.is_member() && !others.is_mine("a"));
        assert_eq!(members(&[]).assigned("a"), None);
    }
}
