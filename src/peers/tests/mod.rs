//! The never-rules N1 to N14 of peer sets, each by the tests that name it: foundings, changes of membership, leaders, all of them under
//! random scripts, and through the store.

mod backup;
mod change;
mod found;
mod keep;
mod lead;
mod script;
mod view;

use std::time::SystemTime;

use super::*;
use crate::model::{InstanceId, Role};

fn key(n: u64) -> InstanceId {
    format!("n{n}").parse().unwrap()
}

fn newcomer(n: u64) -> Newcomer {
    let at = Addresses {
        raft: format!("10.0.0.{n}:7000").parse().unwrap(),
        client: format!("10.0.0.{n}:8000").parse().unwrap(),
        extra: [].into(),
    };
    Newcomer { key: key(n), disk: format!("disk-{n}"), at, zone: String::new(), version: String::new() }
}

fn spec(kind: Kind, expect: u32) -> Spec {
    Spec { name: "db".parse().unwrap(), kind, expect, spread: None, observe: None }
}

/// A set that nobody has come to.
fn collecting(kind: Kind, expect: u32) -> PeerSet {
    PeerSet::new(spec(kind, expect), ClusterId(1))
}

/// A set founded by nodes 1 to `founders`.
fn founded(kind: Kind, founders: u32) -> PeerSet {
    let mut set = collecting(kind, founders);
    for n in 1..=u64::from(founders) {
        assert_eq!(come(&mut set, newcomer(n)), Ok(n));
    }
    assert!(set.founding.is_some());
    set
}

fn come(set: &mut PeerSet, new: Newcomer) -> Result<u64, Refusal> {
    set.register(new, SystemTime::UNIX_EPOCH).map(|node| node.0)
}

/// What each says: `1 leader 5 >1 @900; 2 follower 5 >1` is the role, the term, who leads, how far it has come.
fn says(text: &str) -> Facts {
    let mut facts = Facts::default();
    for one in text.split(';').map(str::trim).filter(|one| !one.is_empty()) {
        let mut words = one.split(' ');
        let node = NodeId(words.next().unwrap().parse().unwrap());
        let mut seen =
            Observation { role: words.next().unwrap().parse::<Role>().unwrap(), ..Observation::default() };
        for word in words {
            let (mark, rest) = word.split_at(1);
            match mark {
                ">" => seen.leader = Some(NodeId(rest.parse().unwrap())),
                "@" => seen.applied = rest.parse().unwrap(),
                "#" => seen.config_index = rest.parse().unwrap(),
                "=" => seen.digest = Some(rest.into()),
                _ => seen.term = word.parse().unwrap(),
            }
        }
        facts.observed.insert(node, seen);
    }
    facts
}

/// Who runs: `1 2 ?3` are up, up and suspect; the others are down.
fn runs(mut facts: Facts, text: &str) -> Facts {
    for word in text.split_whitespace() {
        let suspect = word.strip_prefix('?');
        let node = NodeId(suspect.unwrap_or(word).parse().unwrap());
        facts.liveness.insert(node, if suspect.is_some() { Liveness::Suspect } else { Liveness::Up });
    }
    facts
}

/// A database's list of members: `1 2 3-` are by the addresses of these nodes, the last without a vote.
fn members(text: &str) -> std::collections::BTreeSet<SeenMember> {
    let one = |word: &str| {
        let node = word.trim_end_matches('-');
        let raft = format!("10.0.0.{node}:7000").parse().ok();
        SeenMember { id: format!("f00{node}"), name: String::new(), raft, voter: !word.ends_with('-') }
    };
    text.split_whitespace().map(one).collect()
}
