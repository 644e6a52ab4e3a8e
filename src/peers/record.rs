//! The wire form of a set and of what its replicas say, which is also what the store keeps.

use std::{
    collections::{BTreeMap, BTreeSet},
    net::SocketAddr,
    time::{Duration, SystemTime},
};

use bytes::Bytes;
use prost::Message as _;

use super::{
    Addresses, Birth, Change, Founder, Founding, Gone, Liveness, NodeId, Observation, Observe, Peer, PeerSet,
    Pending, SeenMember, Spec, Spread, Suffrage,
};
use crate::{
    model::{MemberId, Revision, Role, Roles, ServiceId},
    proto::v1,
    store::{Entry, Key},
};

pub(super) const PEERS: &str = "peers/";
pub(super) const SETS: &str = "peers/sets/";
pub(super) const OBSERVED: &str = "peers/observed/";

pub(super) fn set_key(name: &ServiceId) -> Key {
    format!("{SETS}{name}").into()
}

pub(super) fn observed_key(name: &ServiceId) -> Key {
    format!("{OBSERVED}{name}").into()
}

/// Where the catalog finds who does what.
pub(super) fn roles_key(name: &ServiceId) -> Key {
    format!("catalog/roles/{name}").into()
}

/// What the replicas of a set said last, and what follows from it.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(super) struct Observed {
    pub(super) by_node: BTreeMap<NodeId, Observation>,
    /// The process that heard each last.
    pub(super) heard_by: BTreeMap<NodeId, MemberId>,
    pub(super) roles: Roles,
    /// Who led in the term of `roles`, also when it is published no more.
    pub(super) led: Option<NodeId>,
    /// 0 before the first.
    pub(super) revision: Revision,
}

pub(super) fn encode_set(set: &PeerSet) -> Bytes {
    let kept = v1::PeerSet { revision: 0, ..set_to_proto(set) };
    let record = v1::PeerSetRecord {
        set: Some(kept),
        next_node: set.next_node,
        next_ordinal: set.next_ordinal,
        last_generation: set.last_generation,
    };
    record.encode_to_vec().into()
}

pub(super) fn decode_set(entry: &Entry) -> Result<PeerSet, String> {
    let record = v1::PeerSetRecord::decode(entry.value.clone()).map_err(|e| e.to_string())?;
    let set = record.set.ok_or("it holds no set")?;
    let founding = set.founding.map(founding_from_proto).transpose()?;
    let peers = set.peers.into_iter().map(peer_from_proto).collect::<Result<Vec<_>, _>>()?;
    let removed = set.removed.into_iter().map(|gone| {
        let key = gone.key.parse().map_err(|e| format!("removed: {e}"))?;
        let raft = Some(gone.raft).filter(|raft| !raft.is_empty()).map(|raft| address(&raft)).transpose()?;
        Ok((NodeId(gone.node_id), Gone { key, disk: gone.disk, raft }))
    });
    let pending = set.pending.map(|pending| {
        Ok::<_, String>(Pending {
            change: change_from_proto(pending.change()).ok_or("pending: is of an unknown sort")?,
            node: NodeId(pending.node_id),
            since: time(pending.since)?,
        })
    });
    Ok(PeerSet {
        spec: spec_from_proto(set.spec.ok_or("it has no spec")?)?,
        cluster: set.cluster_id.parse()?,
        generation: set.generation,
        last_generation: record.last_generation.max(set.generation),
        founding,
        peers: peers.into_iter().map(|peer| (peer.node, peer)).collect(),
        removed: removed.collect::<Result<_, String>>()?,
        next_node: record.next_node,
        next_ordinal: record.next_ordinal,
        pending: pending.transpose()?,
        revision: entry.revision,
    })
}

pub(super) fn encode_observed(observed: &Observed) -> Bytes {
    let record = v1::PeersObservedRecord {
        observed: observed.by_node.iter().map(|(node, seen)| (node.0, observation_to_proto(seen))).collect(),
        roles: Some(roles_to_proto(&observed.roles)),
        heard_by: observed.heard_by.iter().map(|(node, by)| (node.0, by.to_string())).collect(),
        led: observed.led.map_or(0, |led| led.0),
    };
    record.encode_to_vec().into()
}

pub(super) fn decode_observed(entry: &Entry) -> Result<Observed, String> {
    let record = v1::PeersObservedRecord::decode(entry.value.clone()).map_err(|e| e.to_string())?;
    let by_node =
        record.observed.into_iter().map(|(node, seen)| Ok((NodeId(node), observation_from_proto(seen)?)));
    let heard_by = record.heard_by.into_iter().map(|(node, by)| Ok((NodeId(node), by.parse()?)));
    let roles = record.roles.unwrap_or_default();
    let others = roles
        .others
        .iter()
        .map(|(id, role)| Ok((id.parse()?, role_from_proto(v1::Role::try_from(*role).unwrap_or_default()))));
    Ok(Observed {
        by_node: by_node.collect::<Result<_, String>>()?,
        heard_by: heard_by.collect::<Result<_, String>>()?,
        roles: Roles {
            term: roles.term,
            leader: Some(roles.leader)
                .filter(|leader| !leader.is_empty())
                .map(|id| id.parse())
                .transpose()?,
            others: others.collect::<Result<_, String>>()?,
        },
        led: Some(record.led).filter(|led| *led != 0).map(NodeId),
        revision: entry.revision,
    })
}

pub(super) fn roles_to_proto(roles: &Roles) -> v1::RolesRecord {
    let others = roles.others.iter().map(|(id, role)| (id.to_string(), role_to_proto(*role).into()));
    v1::RolesRecord {
        term: roles.term,
        leader: roles.leader.as_ref().map(ToString::to_string).unwrap_or_default(),
        others: others.collect(),
    }
}

fn time(given: Option<prost_types::Timestamp>) -> Result<SystemTime, String> {
    given.map_or(Ok(SystemTime::UNIX_EPOCH), |at| SystemTime::try_from(at).map_err(|e| e.to_string()))
}

/// The wire form of a set, as it is written.
pub fn set_to_proto(set: &PeerSet) -> v1::PeerSet {
    let founding = set.founding.as_ref().map(|founding| v1::Founding {
        list: founding.list.iter().map(founder_to_proto).collect(),
        digest: founding.digest.clone(),
        at: Some(founding.at.into()),
        warnings: founding.warnings.clone(),
    });
    v1::PeerSet {
        spec: Some(spec_to_proto(&set.spec)),
        cluster_id: set.cluster.to_string(),
        generation: set.generation,
        founding,
        peers: set.peers.values().map(peer_to_proto).collect(),
        removed: set
            .removed
            .iter()
            .map(|(node, Gone { key, disk, raft })| v1::RemovedPeer {
                node_id: node.0,
                key: key.to_string(),
                disk: disk.clone(),
                raft: raft.map(|raft| raft.to_string()).unwrap_or_default(),
            })
            .collect(),
        pending: set.pending.as_ref().map(pending_to_proto),
        revision: set.revision.0,
    }
}

/// The wire form of a pending change.
pub fn pending_to_proto(Pending { change, node, since }: &Pending) -> v1::PendingPeerChange {
    let change = match change {
        Change::AddLearner => v1::PeerChange::AddLearner,
        Change::AddVoter => v1::PeerChange::AddVoter,
        Change::Promote => v1::PeerChange::Promote,
        Change::Demote => v1::PeerChange::Demote,
        Change::Remove => v1::PeerChange::Remove,
    };
    v1::PendingPeerChange { change: change.into(), node_id: node.0, since: Some((*since).into()) }
}

fn change_from_proto(change: v1::PeerChange) -> Option<Change> {
    match change {
        v1::PeerChange::Unspecified => None,
        v1::PeerChange::AddLearner => Some(Change::AddLearner),
        v1::PeerChange::AddVoter => Some(Change::AddVoter),
        v1::PeerChange::Promote => Some(Change::Promote),
        v1::PeerChange::Demote => Some(Change::Demote),
        v1::PeerChange::Remove => Some(Change::Remove),
    }
}

/// The wire form of what is wanted of a set.
pub fn spec_to_proto(spec: &Spec) -> v1::PeerSetSpec {
    v1::PeerSetSpec {
        name: spec.name.to_string(),
        kind: spec.kind.to_string(),
        expect: spec.expect,
        spread: spec
            .spread
            .map(|Spread { most_per_zone, required }| v1::PeerSpread { most_per_zone, required }),
        observe: spec.observe.as_ref().map(|Observe { adapter, port, options, every }| v1::PeerObserve {
            adapter: adapter.clone(),
            port: port.clone(),
            options: options.clone().into_iter().collect(),
            every: prost_types::Duration::try_from(*every).ok(),
        }),
    }
}

fn spec_from_proto(spec: v1::PeerSetSpec) -> Result<Spec, String> {
    Ok(Spec {
        name: spec.name.parse()?,
        kind: spec.kind.parse()?,
        expect: spec.expect,
        spread: spec
            .spread
            .map(|v1::PeerSpread { most_per_zone, required }| Spread { most_per_zone, required }),
        observe: spec.observe.map(observe_from_proto).transpose()?,
    })
}

/// How a set is observed, from the wire.
///
/// # Errors
/// A period that is negative.
pub fn observe_from_proto(observe: v1::PeerObserve) -> Result<Observe, String> {
    let every = observe.every.map_or(Ok(Observe::EVERY), Duration::try_from);
    Ok(Observe {
        adapter: observe.adapter,
        port: observe.port,
        options: observe.options.into_iter().collect(),
        every: every.map_err(|e| format!("every: {e}"))?,
    })
}

fn founding_from_proto(founding: v1::Founding) -> Result<Founding, String> {
    let list = founding.list.into_iter().map(|founder| {
        Ok(Founder {
            node: NodeId(founder.node_id),
            key: founder.key.parse()?,
            ordinal: founder.ordinal,
            at: addresses_from_proto(founder.at)?,
            zone: founder.zone,
        })
    });
    Ok(Founding {
        list: list.collect::<Result<_, String>>()?,
        digest: founding.digest,
        at: time(founding.at)?,
        warnings: founding.warnings,
    })
}

fn founder_to_proto(Founder { node, key, ordinal, at, zone }: &Founder) -> v1::Founder {
    v1::Founder {
        node_id: node.0,
        key: key.to_string(),
        ordinal: *ordinal,
        at: Some(addresses_to_proto(at)),
        zone: zone.clone(),
    }
}

fn peer_to_proto(peer: &Peer) -> v1::Peer {
    let Peer { node, key, disk, ordinal, at, zone, version, suffrage, birth, leaving } = peer;
    let suffrage = match suffrage {
        Suffrage::Staging => v1::Suffrage::Staging,
        Suffrage::Learner => v1::Suffrage::Learner,
        Suffrage::Voter => v1::Suffrage::Voter,
        Suffrage::Witness => v1::Suffrage::Witness,
    };
    v1::Peer {
        node_id: node.0,
        key: key.to_string(),
        disk: disk.clone(),
        ordinal: *ordinal,
        at: Some(addresses_to_proto(at)),
        zone: zone.clone(),
        version: version.clone(),
        suffrage: suffrage.into(),
        birth: birth_to_proto(*birth).into(),
        leaving: *leaving,
        liveness: v1::Liveness::Down.into(),
        role: v1::Role::Unknown.into(),
        observed: None,
    }
}

/// The wire form of how a replica came in.
pub fn birth_to_proto(birth: Birth) -> v1::Birth {
    match birth {
        Birth::Founder => v1::Birth::Founder,
        Birth::Joiner => v1::Birth::Joiner,
    }
}

/// The wire form of whether a replica runs.
pub fn liveness_to_proto(liveness: Liveness) -> v1::Liveness {
    match liveness {
        Liveness::Down => v1::Liveness::Down,
        Liveness::Suspect => v1::Liveness::Suspect,
        Liveness::Up => v1::Liveness::Up,
    }
}

fn peer_from_proto(peer: v1::Peer) -> Result<Peer, String> {
    Ok(Peer {
        node: NodeId(peer.node_id),
        suffrage: match peer.suffrage() {
            v1::Suffrage::Staging => Suffrage::Staging,
            v1::Suffrage::Learner => Suffrage::Learner,
            v1::Suffrage::Voter => Suffrage::Voter,
            v1::Suffrage::Witness => Suffrage::Witness,
        },
        birth: match peer.birth() {
            v1::Birth::Founder => Birth::Founder,
            v1::Birth::Joiner => Birth::Joiner,
        },
        key: peer.key.parse()?,
        disk: peer.disk,
        ordinal: peer.ordinal,
        at: addresses_from_proto(peer.at)?,
        zone: peer.zone,
        version: peer.version,
        leaving: peer.leaving,
    })
}

fn addresses_to_proto(Addresses { raft, client, extra }: &Addresses) -> v1::PeerAddresses {
    v1::PeerAddresses {
        raft: raft.to_string(),
        client: client.to_string(),
        extra: extra.iter().map(|(name, at)| (name.clone(), at.to_string())).collect(),
    }
}

fn addresses_from_proto(at: Option<v1::PeerAddresses>) -> Result<Addresses, String> {
    let at = at.ok_or("at: is missing")?;
    let extra = at.extra.iter().map(|(name, at)| Ok((name.clone(), address(at)?)));
    Ok(Addresses {
        raft: address(&at.raft)?,
        client: address(&at.client)?,
        extra: extra.collect::<Result<_, String>>()?,
    })
}

fn address(text: &str) -> Result<SocketAddr, String> {
    text.parse().map_err(|_| format!("{text} is not an address"))
}

/// The wire form of what a replica says.
pub fn observation_to_proto(seen: &Observation) -> v1::PeerObservation {
    let Observation { role, term, leader, config_index, applied, members, digest } = seen;
    let seen = members.iter().flatten().map(|SeenMember { id, name, raft, voter }| v1::SeenPeer {
        id: id.clone(),
        name: name.clone(),
        raft: raft.map(|at| at.to_string()).unwrap_or_default(),
        voter: *voter,
    });
    v1::PeerObservation {
        role: role_to_proto(*role).into(),
        term: *term,
        leader: leader.map_or(0, |leader| leader.0),
        config_index: *config_index,
        applied: *applied,
        members: seen.collect(),
        tells_members: members.is_some(),
        digest: digest.clone().unwrap_or_default(),
    }
}

/// What a replica says, from the wire.
///
/// # Errors
/// An address that is none.
pub fn observation_from_proto(seen: v1::PeerObservation) -> Result<Observation, String> {
    let members = seen.members.iter().map(|member| {
        let raft = Some(&member.raft).filter(|text| !text.is_empty());
        let raft = raft.map(|text| {
            let want = "want an IP address and a port";
            text.parse::<SocketAddr>().map_err(|_| format!("members: {text} is not an address: {want}"))
        });
        Ok(SeenMember {
            id: member.id.clone(),
            name: member.name.clone(),
            raft: raft.transpose()?,
            voter: member.voter,
        })
    });
    let members = members.collect::<Result<BTreeSet<_>, String>>()?;
    Ok(Observation {
        role: role_from_proto(seen.role()),
        term: seen.term,
        leader: Some(seen.leader).filter(|leader| *leader != 0).map(NodeId),
        config_index: seen.config_index,
        applied: seen.applied,
        members: (seen.tells_members || !members.is_empty()).then_some(members),
        digest: Some(seen.digest).filter(|digest| !digest.is_empty()),
    })
}

/// The wire form of a role.
pub fn role_to_proto(role: Role) -> v1::Role {
    match role {
        Role::Unknown => v1::Role::Unknown,
        Role::Leader => v1::Role::Leader,
        Role::Follower => v1::Role::Follower,
        Role::Candidate => v1::Role::Candidate,
        Role::Learner => v1::Role::Learner,
    }
}

fn role_from_proto(role: v1::Role) -> Role {
    match role {
        v1::Role::Unknown => Role::Unknown,
        v1::Role::Leader => Role::Leader,
        v1::Role::Follower => Role::Follower,
        v1::Role::Candidate => Role::Candidate,
        v1::Role::Learner => Role::Learner,
    }
}

/// The name that a key of the store stands for.
pub(super) fn name_of(key: &str) -> Option<(bool, ServiceId)> {
    let set = key.strip_prefix(SETS).map(|name| (true, name));
    let (is_set, name) = set.or_else(|| key.strip_prefix(OBSERVED).map(|name| (false, name)))?;
    Some((is_set, name.parse().ok()?))
}
