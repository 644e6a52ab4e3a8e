//! Patroni's `GET /cluster`: what its store holds, which is where the lock of the leader is.

use std::{collections::BTreeSet, net::IpAddr};

use serde::Deserialize;

use super::said::{Said, Whom, bounded, json};
use crate::{
    model::Role,
    peers::{Peer, SeenMember},
};

/// `GET`.
pub(super) const CLUSTER: &str = "/cluster";

#[derive(Debug, Deserialize)]
struct Cluster {
    members: Vec<Member>,
}

#[derive(Debug, Deserialize)]
struct Member {
    name: String,
    role: String,
    #[serde(default)]
    state: String,
    #[serde(default)]
    host: String,
    #[serde(default)]
    port: u16,
    /// Absent, or text, of one that does not run.
    #[serde(default)]
    timeline: serde_json::Value,
}

impl Member {
    fn leads(&self) -> bool {
        // The leader of a standby cluster takes no writes.
        matches!(self.role.as_str(), "leader" | "master" | "primary")
    }

    fn seen(&self) -> SeenMember {
        let host = self.host.parse::<IpAddr>().ok();
        let raft = host.filter(|_| self.port > 0).map(|host| (host, self.port).into());
        SeenMember { id: self.name.clone(), name: self.name.clone(), raft, voter: true }
    }
}

/// Reads the answer of one replica. It is found in the list by its name, or by where its clients find it.
pub(super) fn read(body: &[u8], own: &Peer) -> Result<Said, String> {
    let cluster: Cluster = json(body)?;
    let is_own = |member: &&Member| {
        let at = member.seen().raft;
        member.name == own.key.as_str() || at == Some(own.at.client) || at == Some(own.at.raft)
    };
    let me = cluster.members.iter().find(is_own);
    let me = me.ok_or_else(|| format!("the cluster has no member {} at {}", own.key, own.at.client))?;
    let works = matches!(me.state.as_str(), "running" | "streaming" | "in archive recovery");
    let role = match () {
        () if !works => Role::Unknown,
        () if me.leads() => Role::Leader,
        () => Role::Follower,
    };
    let timeline = |member: &Member| member.timeline.as_u64().unwrap_or(0);
    // The term is the one of the reign that it takes part in.
    let leader = cluster.members.iter().find(|member| member.leads());
    let term = leader.map_or_else(|| timeline(me), timeline);
    let whom =
        leader.map(|leader| if std::ptr::eq(leader, me) { Whom::Own } else { Whom::Member(leader.seen()) });
    let members: BTreeSet<_> = cluster.members.iter().map(Member::seen).collect();
    Ok(Said { role, term, leader: whom, members: Some(bounded(members)?), ..Said::default() })
}
