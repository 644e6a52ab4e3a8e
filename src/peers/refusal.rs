use std::net::SocketAddr;

use super::set::{Change, ClusterId, Kind, MOST_FOUNDERS, NodeId, PeerSet};
use crate::model::{InstanceId, Revision, ServiceId};

/// Why a peer set did not do it. Nothing was changed.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Refusal {
    /// The list is not frozen: there is nothing to hand out (rule N1). Not wrong, only too early.
    #[error("{set} is not founded yet: {} of {expect} founders have come{}; ask again, or wait for it", came.len(), names(came))]
    NotYet {
        /// The set.
        set: ServiceId,
        /// Who has come, by name: nothing that a database could be started with.
        came: Vec<InstanceId>,
        /// How many are to come.
        expect: u32,
    },
    /// The same name with another disk.
    #[error(
        "{key} is registered with another disk, as node {node}; an empty or other disk is another replica{}",
        if *frozen { ": register it under a new name, have that added, and remove this one (propose replace)" }
        else { ": if the first one is gone, withdraw it, then register again" }
    )]
    OtherDisk {
        /// Its name.
        key: InstanceId,
        /// The number of the one that is registered.
        node: NodeId,
        /// Whether the list is frozen.
        frozen: bool,
    },
    /// It was removed, and numbers are given out once.
    #[error(
        "{key} was node {node} and was removed for good; empty its disk and register it with a new disk mark to join again"
    )]
    Removed {
        /// Its name.
        key: InstanceId,
        /// Its number.
        node: NodeId,
    },
    /// The disk of another replica: a copy of it, or one that was given another name.
    #[error(
        "this disk is that of {by}, node {node}: two replicas with one disk's state break a database; start with an empty disk and a new disk mark"
    )]
    DiskTaken {
        /// Whose it is or was.
        by: InstanceId,
        /// That one's number.
        node: NodeId,
    },
    /// The address of one that was removed, where an address is identity.
    #[error(
        "{at} was the address of {by}, node {node}, which was removed: for {kind} the address is its identity, and others may still know it; listen on another port"
    )]
    AddressUsed {
        /// The address.
        at: SocketAddr,
        /// Whose it was.
        by: InstanceId,
        /// That one's number.
        node: NodeId,
        /// The database.
        kind: Kind,
    },
    /// No such number of founders.
    #[error("expect: {0} founders are out of range: want 1 to {MOST_FOUNDERS}")]
    Expect(u32),
    /// Two replicas at one address.
    #[error("{at} is the address of {by} already")]
    AddressTaken {
        /// The address.
        at: SocketAddr,
        /// Whose it is.
        by: InstanceId,
    },
    /// An address that is identity was changed.
    #[error(
        "{key} is known to its peers at {from} and cannot move to {to}: for {kind} the address is its identity; add it as a new replica and remove this one"
    )]
    Moved {
        /// Its name.
        key: InstanceId,
        /// Where it was.
        from: SocketAddr,
        /// Where it wants to be.
        to: SocketAddr,
        /// The database.
        kind: Kind,
    },
    /// Too many replicas.
    #[error("the set has {most} replicas, the most that one may have")]
    Full {
        /// The limit.
        most: usize,
    },
    /// The zone has its share (rule N13).
    #[error(
        "zone {zone:?} has its share of founders: at most {most} may be in one zone, and each has to name its own"
    )]
    Spread {
        /// The zone.
        zone: String,
        /// The limit.
        most: u32,
    },
    /// No such replica.
    #[error("{0} is not in the set: register it first")]
    NoPeer(InstanceId),
    /// It is not in the database, so it cannot be taken out of it.
    #[error("{0} is not in the database: if it is not to join, withdraw it")]
    NotMember(InstanceId),
    /// One replica in its own place.
    #[error("{0} cannot take its own place: register the one that is to, under another name")]
    Itself(InstanceId),
    /// It is in the database, so it cannot just be forgotten.
    #[error("{0} is in the database, or about to be: propose its removal instead")]
    IsMember(InstanceId),
    /// The caller named another cluster than the one that it would give up.
    #[error("the cluster is {have}, not {named}: name the one that you give up")]
    OtherCluster {
        /// What it is.
        have: ClusterId,
        /// What was named.
        named: ClusterId,
    },
    /// The caller decided on an older state.
    #[error("the set is at revision {have}, not {from}: look again before you change it")]
    Stale {
        /// What the caller saw.
        from: Revision,
        /// What it is.
        have: Revision,
    },
    /// Another change is under way.
    #[error("{} of {} is under way: finish it, or cancel it", change.as_str(), key.as_ref().map_or_else(|| node.to_string(), ToString::to_string))]
    Pending {
        /// Which.
        change: Change,
        /// Of whom.
        node: NodeId,
        /// Its name.
        key: Option<InstanceId>,
    },
    /// There is nothing to confirm or to cancel.
    #[error("no change is under way")]
    NothingPending,
    /// A replica that does not run is not given a vote.
    #[error("{0} does not run: a vote that nobody can cast only raises the quorum")]
    NotUp(String),
    /// A replica that runs is not removed while there is a dead one.
    #[error("{live} runs while {dead} is dead: remove {dead} first")]
    DeadFirst {
        /// The one that was to go.
        live: String,
        /// The one that should.
        dead: String,
    },
    /// Nobody would be left.
    #[error("{0} is the last one that votes: without it there is no database")]
    LastVoter(String),
    /// Fewer than a quorum would run.
    #[error(
        "of the {voters} that would vote then only {running} run, and {needed} are needed: bring more up first"
    )]
    NoQuorum {
        /// How many run.
        running: usize,
        /// How many have to.
        needed: usize,
        /// How many vote.
        voters: usize,
    },
}

impl PeerSet {
    /// What is answered while there is no list (rule N1).
    pub fn not_yet(&self) -> Refusal {
        Refusal::NotYet {
            set: self.spec.name.clone(),
            came: self.peers.values().map(|peer| peer.key.clone()).collect(),
            expect: self.spec.expect,
        }
    }
}

fn names(came: &[InstanceId]) -> String {
    if came.is_empty() {
        return String::new();
    }
    format!(" ({})", came.iter().map(InstanceId::as_str).collect::<Vec<_>>().join(", "))
}
