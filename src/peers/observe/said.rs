//! What a program says, in its own terms, and what that means for a set.

use std::{collections::BTreeSet, net::SocketAddr};

use serde::{Deserialize, Deserializer, de::DeserializeOwned};

use crate::{
    model::{Role, excerpt},
    peers::{MOST_PEERS, NodeId, Observation, PeerSet, SeenMember},
};

/// Why there is no answer that could be used.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Fault {
    /// Its machine says that nothing listens there.
    Refused,
    /// Nothing came back in time.
    Silent(String),
    /// Something came back that is no answer.
    Wrong(String),
}

impl Fault {
    /// What was seen, for people.
    pub(super) fn seen(&self) -> &str {
        match self {
            Self::Refused => "connection refused",
            Self::Silent(seen) | Self::Wrong(seen) => seen,
        }
    }
}

/// A replica as a program calls it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Whom {
    /// The one that was asked.
    Own,
    /// By number.
    Node(NodeId),
    /// By where its peers or its clients find it.
    At(SocketAddr),
    /// As in the list of members.
    Member(SeenMember),
}

/// What a program says of itself and the others.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(super) struct Said {
    pub(super) role: Role,
    pub(super) term: u64,
    pub(super) leader: Option<Whom>,
    pub(super) config_index: u64,
    pub(super) applied: u64,
    pub(super) members: Option<BTreeSet<SeenMember>>,
    pub(super) digest: Option<String>,
}

impl Said {
    /// Whether it says the same, but for how far it has come.
    pub(super) fn same(&self, other: &Self) -> bool {
        let Self { role, term, leader, config_index, applied: _, members, digest } = self;
        (*role, *term, *config_index) == (other.role, other.term, other.config_index)
            && *leader == other.leader
            && *digest == other.digest
            && *members == other.members
    }

    /// What it means for the set when `node` says it.
    pub(super) fn observation(&self, node: NodeId, set: &PeerSet) -> Observation {
        let leader = self.leader.as_ref().and_then(|leader| match leader {
            Whom::Own => Some(node),
            Whom::Node(node) => Some(*node),
            Whom::At(at) => find_at(set, *at),
            Whom::Member(seen) => set.find(&known(seen, set)).map(|peer| peer.node),
        });
        let members = self.members.as_ref();
        Observation {
            role: self.role,
            term: self.term,
            leader,
            config_index: self.config_index,
            applied: self.applied,
            members: members.map(|members| members.iter().map(|seen| known(seen, set)).collect()),
            digest: self.digest.clone(),
        }
    }
}

/// The member with the address that its peers know, when the database tells the one for clients.
fn known(seen: &SeenMember, set: &PeerSet) -> SeenMember {
    let raft = seen.raft.map(|at| {
        let node = find_at(set, at);
        node.and_then(|node| set.peers.get(&node)).map_or(at, |peer| peer.at.raft)
    });
    SeenMember { raft, ..seen.clone() }
}

/// The replica that listens there, for peers or for clients.
pub(super) fn find_at(set: &PeerSet, at: SocketAddr) -> Option<NodeId> {
    let by_raft = set.peers.values().find(|peer| peer.at.raft == at);
    by_raft.or_else(|| set.peers.values().find(|peer| peer.at.client == at)).map(|peer| peer.node)
}

/// Reads a JSON answer. What it costs is bounded by the length of the text, which the caller bounds.
pub(super) fn json<T: DeserializeOwned>(body: &[u8]) -> Result<T, String> {
    serde_json::from_slice(body).map_err(|error| {
        let text = String::from_utf8_lossy(body);
        format!("not the JSON that was expected ({error}): {}", excerpt(&text))
    })
}

/// A list of members of a length that a set can have.
pub(super) fn bounded(members: BTreeSet<SeenMember>) -> Result<BTreeSet<SeenMember>, String> {
    if members.len() > MOST_PEERS {
        return Err(format!("{} members, more than the {MOST_PEERS} that a set can have", members.len()));
    }
    Ok(members)
}

/// A number that may be written as text, as protobuf's JSON does it with 64 bits.
pub(super) fn number<'de, D: Deserializer<'de>>(from: D) -> Result<u64, D::Error> {
    #[derive(Deserialize)]
    #[serde(untagged)]
    enum Number {
        Plain(u64),
        Text(String),
    }
    match Number::deserialize(from)? {
        Number::Plain(number) => Ok(number),
        Number::Text(text) => text.parse().map_err(serde::de::Error::custom),
    }
}

/// The address in a URL such as `http://10.0.0.1:2380`, when it is one of an IP address.
pub(super) fn address_in(url: &str) -> Option<SocketAddr> {
    let rest = url.split_once("://").map_or(url, |(_, rest)| rest);
    rest.split('/').next()?.parse().ok()
}
