//! etcd's answers over its HTTP gateway (protobuf's JSON: zeros are left out, 64 bits are text).

use std::{collections::BTreeSet, net::SocketAddr};

use serde::Deserialize;

use super::said::{Said, Whom, address_in, bounded, json, number};
use crate::{model::Role, peers::SeenMember};

/// `POST` with `{}`.
pub(super) const STATUS: &str = "/v3/maintenance/status";

/// `POST` with `{}`: answered from the member's own memory.
pub(super) const MEMBERS: &str = "/v3/cluster/member/list";

/// What a member says of itself.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Status {
    own: u64,
    role: Role,
    term: u64,
    leader: u64,
    applied: u64,
}

#[derive(Debug, Default, Deserialize)]
#[serde(default, rename_all = "camelCase")]
struct StatusBody {
    header: Header,
    #[serde(deserialize_with = "number")]
    leader: u64,
    #[serde(deserialize_with = "number")]
    raft_term: u64,
    #[serde(deserialize_with = "number")]
    raft_index: u64,
    #[serde(deserialize_with = "number")]
    raft_applied_index: u64,
    is_learner: bool,
}

#[derive(Debug, Default, Deserialize)]
#[serde(default)]
struct Header {
    #[serde(deserialize_with = "number")]
    member_id: u64,
}

/// Reads the answer to [`STATUS`].
pub(super) fn status(body: &[u8]) -> Result<Status, String> {
    let body: StatusBody = json(body)?;
    if body.header.member_id == 0 {
        return Err("the answer names no member".to_owned());
    }
    let role = match body.leader {
        _ if body.is_learner => Role::Learner,
        0 => Role::Candidate,
        leader if leader == body.header.member_id => Role::Leader,
        _ => Role::Follower,
    };
    // Before 3.4 there is no applied index.
    let applied = if body.raft_applied_index > 0 { body.raft_applied_index } else { body.raft_index };
    Ok(Status { own: body.header.member_id, role, term: body.raft_term, leader: body.leader, applied })
}

#[derive(Debug, Default, Deserialize)]
#[serde(default)]
struct MembersBody {
    members: Vec<MemberBody>,
}

#[derive(Debug, Default, Deserialize)]
#[serde(default)]
struct MemberBody {
    #[serde(rename = "ID", deserialize_with = "number")]
    id: u64,
    name: String,
    #[serde(rename = "peerURLs")]
    peer_urls: Vec<String>,
    #[serde(rename = "isLearner")]
    is_learner: bool,
}

/// Reads the answer to [`MEMBERS`].
pub(super) fn members(body: &[u8]) -> Result<BTreeSet<SeenMember>, String> {
    let body: MembersBody = json(body)?;
    let members = body.members.into_iter().map(|member| SeenMember {
        id: format!("{:x}", member.id),
        raft: member.peer_urls.iter().find_map(|url| address_in(url)),
        name: member.name,
        voter: !member.is_learner,
    });
    let members: BTreeSet<_> = members.collect();
    if members.is_empty() {
        return Err("the list of members is empty".to_owned());
    }
    bounded(members)
}

impl Status {
    /// What a member says that answers no more than [`STATUS`]: one that copies and has no vote yet.
    pub(super) fn alone(&self) -> Option<Said> {
        let Self { role, term, applied, .. } = *self;
        (role == Role::Learner).then(|| Said { role, term, applied, ..Said::default() })
    }

    /// Whether the list names this member, and the leader, if there is one.
    pub(super) fn is_explained_by(&self, members: &BTreeSet<SeenMember>) -> bool {
        let names = |id: u64| find(members, id).is_some();
        names(self.own) && (self.leader == 0 || names(self.leader))
    }

    /// Both answers together, of the member that is to be at `raft` for the others.
    pub(super) fn said(&self, members: &BTreeSet<SeenMember>, raft: SocketAddr) -> Result<Said, String> {
        match find(members, self.own).and_then(|own| own.raft) {
            Some(at) if at != raft => {
                return Err(format!(
                    "this is another member: it is at {at} for its peers, and not at {raft}"
                ));
            }
            Some(_) | None => {}
        }
        let leader = match self.role {
            Role::Leader => Some(Whom::Own),
            _ => find(members, self.leader).cloned().map(Whom::Member),
        };
        Ok(Said {
            role: self.role,
            term: self.term,
            leader,
            applied: self.applied,
            members: Some(members.clone()),
            ..Said::default()
        })
    }
}

fn find(members: &BTreeSet<SeenMember>, id: u64) -> Option<&SeenMember> {
    let id = format!("{id:x}");
    members.iter().find(|member| member.id == id)
}
