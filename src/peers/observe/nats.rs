//! A NATS server's `/raftz`, about the meta group of JetStream.

use std::collections::{BTreeMap, BTreeSet};

use serde::Deserialize;

use super::said::{Said, Whom, bounded, json};
use crate::{model::Role, peers::SeenMember};

/// `GET`: the groups of the system account.
pub(super) const RAFT: &str = "/raftz?acc=$SYS&group=_meta_";

#[derive(Debug, Deserialize)]
struct Group {
    id: String,
    state: String,
    term: u64,
    #[serde(default)]
    leader: String,
    #[serde(default)]
    applied: u64,
    /// It copies and has no vote: a leaf node.
    #[serde(default)]
    observer: bool,
    #[serde(default)]
    peers: BTreeMap<String, Other>,
}

#[derive(Debug, Deserialize)]
struct Other {
    #[serde(default)]
    name: String,
    /// Nobody but the configuration has heard of it otherwise.
    #[serde(default)]
    known: bool,
}

/// Reads the answer of the server that goes by `own`: the answer names the others only.
pub(super) fn read(body: &[u8], own: &str) -> Result<Said, String> {
    let mut accounts: BTreeMap<String, BTreeMap<String, Group>> = json(body)?;
    let group = accounts.values_mut().find_map(|groups| groups.remove("_meta_"));
    let group = group.ok_or("the server has no meta group: JetStream is off, or it is not in a cluster")?;
    let role = match group.state.as_str() {
        _ if group.observer => Role::Learner,
        "LEADER" => Role::Leader,
        "FOLLOWER" => Role::Follower,
        "CANDIDATE" => Role::Candidate,
        _ => Role::Unknown,
    };
    let own = SeenMember { id: group.id, name: own.to_owned(), raft: None, voter: !group.observer };
    let mut members: BTreeSet<_> = group
        .peers
        .into_iter()
        .filter(|(_, other)| other.known)
        .map(|(id, other)| SeenMember { id, name: other.name, raft: None, voter: true })
        .collect();
    let leader = match role {
        Role::Leader => Some(Whom::Own),
        _ if group.leader.is_empty() => None,
        _ => members.iter().find(|member| member.id == group.leader).cloned().map(Whom::Member),
    };
    members.insert(own);
    let members = Some(bounded(members)?);
    Ok(Said { role, term: group.term, leader, applied: group.applied, members, ..Said::default() })
}
