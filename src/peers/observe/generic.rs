//! Programs that answer over HTTP in a form of their own: the generic probe, and openraft's metrics.

use std::collections::{BTreeMap, BTreeSet};

use serde::Deserialize;

use super::said::{Said, Whom, bounded, json};
use crate::{
    model::Role,
    peers::{NodeId, SeenMember},
};

#[derive(Debug, Deserialize)]
struct Body {
    role: String,
    #[serde(default)]
    term: u64,
    #[serde(default)]
    leader: Option<u64>,
    #[serde(default)]
    applied: u64,
    #[serde(default)]
    config_index: u64,
    #[serde(default)]
    digest: Option<String>,
}

/// Reads the answer to the generic probe. A JSON object with a role counts whatever the status is; without one the status
/// does: 200 leads, anything else does not.
pub(super) fn probe(status: u16, body: &[u8]) -> Result<Said, String> {
    let is_object = body.iter().find(|byte| !byte.is_ascii_whitespace()) == Some(&b'{');
    if is_object
        && let Ok(fields) = json::<BTreeMap<String, serde_json::Value>>(body)
        && fields.contains_key("role")
    {
        return told(body);
    }
    let role = if status == 200 { Role::Leader } else { Role::Follower };
    let leader = (status == 200).then_some(Whom::Own);
    Ok(Said { role, leader, ..Said::default() })
}

fn told(body: &[u8]) -> Result<Said, String> {
    let body: Body = json(body)?;
    let role: Role = body.role.parse()?;
    if body.digest.as_ref().is_some_and(|digest| digest.len() > 128) {
        return Err("the digest is longer than 128 characters".to_owned());
    }
    let leader = match (role, body.leader) {
        (Role::Leader, _) => Some(Whom::Own),
        (_, node) => node.map(NodeId).map(Whom::Node),
    };
    Ok(Said {
        role,
        term: body.term,
        leader,
        config_index: body.config_index,
        applied: body.applied,
        digest: body.digest,
        members: None,
    })
}

#[derive(Debug, Deserialize)]
struct Metrics {
    id: u64,
    state: String,
    current_term: u64,
    #[serde(default)]
    current_leader: Option<u64>,
    #[serde(default)]
    last_applied: Option<LogId>,
    membership_config: Membership,
}

#[derive(Debug, Deserialize)]
struct LogId {
    index: u64,
}

#[derive(Debug, Deserialize)]
struct Membership {
    #[serde(default)]
    log_id: Option<LogId>,
    membership: Configs,
}

#[derive(Debug, Deserialize)]
struct Configs {
    /// Two while one is on its way to the other.
    configs: Vec<BTreeSet<u64>>,
    #[serde(default)]
    nodes: BTreeMap<String, serde_json::Value>,
}

/// Reads openraft's `RaftMetrics` of node `own` as serde writes it, or in an `Ok`. Node ids are those of the set.
pub(super) fn openraft(body: &[u8], own: NodeId) -> Result<Said, String> {
    #[derive(Deserialize)]
    #[serde(untagged)]
    enum Answer {
        Plain(Box<Metrics>),
        Wrapped {
            #[serde(rename = "Ok")]
            metrics: Box<Metrics>,
        },
    }
    let (Answer::Plain(metrics) | Answer::Wrapped { metrics }) = json(body)?;
    if metrics.id != own.0 {
        return Err(format!("this is node {}, not node {own}", metrics.id));
    }
    let role = match metrics.state.as_str() {
        "Leader" => Role::Leader,
        "Follower" => Role::Follower,
        "Candidate" => Role::Candidate,
        "Learner" => Role::Learner,
        _ => Role::Unknown,
    };
    let Membership { log_id, membership: Configs { configs, nodes } } = metrics.membership_config;
    let voters: BTreeSet<u64> = configs.into_iter().flatten().collect();
    let nodes: BTreeSet<u64> = nodes.keys().filter_map(|id| id.parse().ok()).collect();
    let members: BTreeSet<_> = nodes
        .union(&voters)
        .map(|id| SeenMember {
            id: id.to_string(),
            name: String::new(),
            raft: None,
            voter: voters.contains(id),
        })
        .collect();
    let leader = match role {
        Role::Leader => Some(Whom::Own),
        _ => metrics.current_leader.filter(|leader| *leader != metrics.id).map(NodeId).map(Whom::Node),
    };
    let index = |log: Option<LogId>| log.map_or(0, |log| log.index);
    Ok(Said {
        role,
        term: metrics.current_term,
        leader,
        config_index: index(log_id),
        applied: index(metrics.last_applied),
        // Before the first configuration it knows of nobody.
        members: if members.is_empty() { None } else { Some(bounded(members)?) },
        digest: None,
    })
}
