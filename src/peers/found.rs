//! Foundings: who comes gets a number, and when enough have come the list is frozen, in the same step.

use std::{collections::BTreeMap, fmt::Write as _, net::SocketAddr, sync::Arc, time::SystemTime};

use ring::digest::{SHA256, digest};

use super::{
    Refusal,
    set::{
        Addresses, Birth, Class, ClusterId, Facts, Founder, Founding, Gone, MOST_FOUNDERS, MOST_PEERS,
        NodeId, Peer, PeerSet, Spec, Spread, Suffrage, same_place,
    },
};
use crate::model::{InstanceId, Problems, Revision, excerpt};

/// Longest text that marks a disk, a zone or a version, in bytes.
const MAX_TEXT: usize = 128;

/// Most further addresses of a replica.
const MAX_EXTRA: usize = 16;

/// A replica that wants to be in a set.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Newcomer {
    /// Its name.
    pub key: InstanceId,
    /// What its disk is marked with: made anew whenever the disk is empty.
    pub disk: String,
    /// Where it listens.
    pub at: Addresses,
    /// Where it stands; empty when unknown.
    pub zone: String,
    /// Of its software; empty when unknown.
    pub version: String,
}

/// Reads an address that is given to others: no host name (rule N9).
///
/// # Errors
/// What would be right.
pub fn parse_address(text: &str) -> Result<SocketAddr, String> {
    let wrong = |_| {
        let what = excerpt(text);
        format!("{what} is not an IP address and a port, such as 10.0.0.7:2380; host names are not given out")
    };
    text.parse().map_err(wrong)
}

impl Newcomer {
    /// Notes all that is wrong with it.
    pub fn check(&self, problems: &mut Problems) {
        if self.disk.is_empty() {
            problems.add(
                "disk",
                "is missing: want a text that marks this replica's disk, such as a UUID kept in its data directory",
            );
        }
        for (field, text) in [("disk", &self.disk), ("zone", &self.zone), ("version", &self.version)] {
            if text.len() > MAX_TEXT || text.chars().any(char::is_control) {
                problems.add(field, format!("want at most {MAX_TEXT} bytes without control characters"));
            }
        }
        let mut reachable = |field: &str, at: &SocketAddr| {
            if at.ip().is_unspecified() || at.ip().is_multicast() || at.port() == 0 {
                problems.add(
                    field,
                    format!(
                        "{at} cannot be reached by others: want an IP address of this machine and a port"
                    ),
                );
            }
        };
        reachable("raft", &self.at.raft);
        reachable("client", &self.at.client);
        for (name, at) in &self.at.extra {
            reachable(&format!("ports.{name}"), at);
        }
        let plain = |name: &String| {
            !name.is_empty()
                && name.len() <= 32
                && name.bytes().all(|b| b.is_ascii_alphanumeric() || b == b'-')
        };
        if self.at.extra.len() > MAX_EXTRA || !self.at.extra.keys().all(plain) {
            problems.add(
                "ports",
                format!("want at most {MAX_EXTRA}, each named by 1 to 32 of a-z, A-Z, 0-9 and '-'"),
            );
        }
    }
}

impl Spec {
    /// Notes all that is wrong with it.
    pub fn check(&self, problems: &mut Problems) {
        if self.expect == 0 || self.expect > MOST_FOUNDERS {
            problems.add("expect", format!("{} is out of range: want 1 to {MOST_FOUNDERS}", self.expect));
        }
        if self.name.as_str().contains('.') {
            problems.add(
                "name",
                format!(
                    "{} has a dot: want one label, since NAME.leader and others are made of it",
                    self.name
                ),
            );
        }
        match self.spread {
            Some(spread) if spread.most_per_zone == 0 => {
                problems.add("spread.most_per_zone", "0 leaves no zone for anybody: want 1 or more");
            }
            Some(_) | None => {}
        }
        if let Some(observe) = &self.observe {
            observe.check(problems);
        }
    }
}

impl PeerSet {
    /// A set that nobody has come to yet.
    pub fn new(spec: Spec, cluster: ClusterId) -> Self {
        Self {
            spec,
            cluster,
            generation: 1,
            last_generation: 1,
            founding: None,
            peers: BTreeMap::new(),
            removed: BTreeMap::new(),
            next_node: 1,
            next_ordinal: 0,
            pending: None,
            revision: Revision::default(),
        }
    }

    /// Takes a replica in, or finds that it is in already. The last founder freezes the list (rule N1: there is no moment at which
    /// a part of it can be seen). Who comes later joins: it has to be added to the database first (rule N11).
    ///
    /// # Errors
    /// [`Refusal`] says why not; nothing was changed.
    pub fn register(&mut self, new: Newcomer, now: SystemTime) -> Result<NodeId, Refusal> {
        if let Some((node, gone)) =
            self.removed.iter().find(|(_, gone)| gone.key == new.key && gone.disk == new.disk)
        {
            let (node, key) = (*node, gone.key.clone());
            return Err(Refusal::Removed { key, node });
        }
        let present = self.peer(&new.key).cloned();
        if let Some(present) = &present
            && present.disk != new.disk
        {
            return Err(Refusal::OtherDisk {
                key: new.key,
                node: present.node,
                frozen: self.founding.is_some(),
            });
        }
        self.is_other(&new)?;
        let moves = present.as_ref().is_none_or(|peer| peer.zone != new.zone);
        if self.founding.is_none() && moves {
            self.is_spread(&new)?;
        }
        if let Some(mut peer) = present {
            let told = peer.suffrage != Suffrage::Staging
                || self.pending.as_ref().is_some_and(|pending| pending.node == peer.node);
            if self.founding.is_some()
                && self.spec.kind.class() == Class::Identity
                && told
                && peer.at.raft != new.at.raft
            {
                return Err(Refusal::Moved {
                    key: new.key,
                    from: peer.at.raft,
                    to: new.at.raft,
                    kind: self.spec.kind,
                });
            }
            let node = peer.node;
            (peer.at, peer.zone, peer.version) = (new.at, new.zone, new.version);
            self.peers.insert(node, peer);
            return Ok(node);
        }
        if self.peers.len() >= MOST_PEERS {
            return Err(Refusal::Full { most: MOST_PEERS });
        }
        let founder = self.founding.is_none();
        let node = NodeId(self.next_node);
        self.next_node += 1;
        // Founders have places without holes: one takes that of a founder who was withdrawn. Nobody's ever changes (rule N8).
        let taken = |ordinal: &u32| self.peers.values().any(|peer| peer.ordinal == *ordinal);
        let free = (0..self.next_ordinal).find(|ordinal| founder && !taken(ordinal));
        let ordinal = free.unwrap_or(self.next_ordinal);
        self.next_ordinal = self.next_ordinal.max(ordinal + 1);
        self.peers.insert(
            node,
            Peer {
                node,
                key: new.key,
                disk: new.disk,
                ordinal,
                at: new.at,
                zone: new.zone,
                version: new.version,
                suffrage: if founder { Suffrage::Voter } else { Suffrage::Staging },
                birth: if founder { Birth::Founder } else { Birth::Joiner },
                leaving: false,
            },
        );
        if founder && self.peers.len() >= self.spec.expect as usize {
            self.freeze(now);
        }
        Ok(node)
    }

    /// Whether it has nothing that is another replica's: a disk is one replica's for ever (rule N4), and so is, where it is identity,
    /// an address.
    fn is_other(&self, new: &Newcomer) -> Result<(), Refusal> {
        let other = |peer: &&Peer| peer.key != new.key;
        if let Some(peer) = self.peers.values().filter(other).find(|peer| peer.disk == new.disk) {
            return Err(Refusal::DiskTaken { by: peer.key.clone(), node: peer.node });
        }
        if let Some((node, gone)) = self.removed.iter().find(|(_, gone)| gone.disk == new.disk) {
            return Err(Refusal::DiskTaken { by: gone.key.clone(), node: *node });
        }
        let mut others = self.peers.values().filter(other);
        if let Some(peer) = others.find(|peer| same_place(peer.at.raft, new.at.raft)) {
            return Err(Refusal::AddressTaken { at: new.at.raft, by: peer.key.clone() });
        }
        let was_there = |gone: &Gone| gone.raft.is_some_and(|raft| same_place(raft, new.at.raft));
        if self.spec.kind.class() == Class::Identity
            && let Some((node, gone)) = self.removed.iter().find(|(_, gone)| was_there(gone))
        {
            let (by, kind) = (gone.key.clone(), self.spec.kind);
            return Err(Refusal::AddressUsed { at: new.at.raft, by, node: *node, kind });
        }
        Ok(())
    }

    /// Whether the founders that there are, and this one, are spread as they have to be (rule N13).
    fn is_spread(&self, new: &Newcomer) -> Result<(), Refusal> {
        let Some(Spread { most_per_zone: most, required: true }) = self.spec.spread else { return Ok(()) };
        let others = self.peers.values().filter(|peer| peer.key != new.key).map(|peer| &peer.zone);
        let mut zones: BTreeMap<&String, u32> = BTreeMap::new();
        for zone in others.chain([&new.zone]) {
            *zones.entry(zone).or_default() += 1;
        }
        // What is required may have been required after some had come.
        match zones.into_iter().find(|(zone, count)| zone.is_empty() || *count > most) {
            Some((zone, _)) => Err(Refusal::Spread { zone: zone.clone(), most }),
            None => Ok(()),
        }
    }

    /// Takes back a replica that was never handed a list: one that came too early, or whose disk is new again before the list is
    /// frozen, or one that never joined. Its number is not given again.
    ///
    /// # Errors
    /// [`Refusal::NoPeer`]; [`Refusal::IsMember`] for one that is in the database, also if only the database itself says so.
    pub fn withdraw(&mut self, key: &InstanceId, facts: &Facts) -> Result<NodeId, Refusal> {
        let peer = self.peer(key).ok_or_else(|| Refusal::NoPeer(key.clone()))?;
        let node = peer.node;
        let pending = self.pending.as_ref().is_some_and(|pending| pending.node == node);
        let is_member = self.founding.is_some() && peer.suffrage != Suffrage::Staging;
        if pending || is_member || self.is_listed(node, facts) {
            return Err(Refusal::IsMember(key.clone()));
        }
        self.remove(node);
        Ok(node)
    }

    /// Begins another founding: a new database. All replicas have to come again, with empty disks; their old numbers stay used.
    ///
    /// # Errors
    /// [`Refusal::OtherCluster`] unless the caller names the cluster that it gives up; [`Refusal::Expect`].
    pub fn refound(&mut self, given_up: ClusterId, expect: u32, cluster: ClusterId) -> Result<(), Refusal> {
        if given_up != self.cluster || cluster == self.cluster {
            return Err(Refusal::OtherCluster { have: self.cluster, named: given_up });
        }
        if expect == 0 || expect > MOST_FOUNDERS {
            return Err(Refusal::Expect(expect));
        }
        let all: Vec<_> = self.peers.keys().copied().collect();
        for node in all {
            self.remove(node);
        }
        // Machines keep their addresses, and in another cluster these are other identities.
        for gone in self.removed.values_mut() {
            gone.raft = None;
        }
        self.cluster = cluster;
        self.generation = self.generation.max(self.last_generation) + 1;
        self.last_generation = self.generation;
        self.spec.expect = expect;
        self.founding = None;
        self.pending = None;
        self.next_ordinal = 0;
        Ok(())
    }

    pub(super) fn remove(&mut self, node: NodeId) {
        if let Some(peer) = self.peers.remove(&node) {
            let is_member = self.founding.is_some() && peer.suffrage != Suffrage::Staging;
            let raft = is_member.then_some(peer.at.raft);
            self.removed.insert(node, Gone { key: peer.key, disk: peer.disk, raft });
        }
    }

    fn freeze(&mut self, now: SystemTime) {
        let mut list: Vec<_> = self.peers.values().map(Founder::of).collect();
        list.sort_by_key(|founder| founder.ordinal);
        let digest = self.digest(&list);
        let warnings = self.warnings(&list);
        self.founding = Some(Founding { list: Arc::from(list), digest, at: now, warnings });
    }

    /// Of everything that makes a founding list this one. The text that is digested is part of the format: it never changes.
    fn digest(&self, list: &[Founder]) -> String {
        let Self { spec, cluster, generation, .. } = self;
        let mut text = format!("disco-founding-1\n{}\n{cluster}\n{generation}\n", spec.name);
        for Founder { node, key, ordinal, at, zone: _ } in list {
            // Writing to a string does not fail.
            let _ = write!(text, "{ordinal} {node} {key} {} {}", at.raft, at.client);
            for (name, at) in &at.extra {
                let _ = write!(text, " {name}={at}");
            }
            text.push('\n');
        }
        let mut hex = String::with_capacity(64);
        for byte in digest(&SHA256, text.as_bytes()).as_ref() {
            let _ = write!(hex, "{byte:02x}");
        }
        hex
    }

    /// What an operator should know before anything depends on the list (rules N13 and N14).
    fn warnings(&self, list: &[Founder]) -> Vec<String> {
        let mut warnings = Vec::new();
        if list.len().is_multiple_of(2) {
            warnings.push(format!(
                "{} voters bear no more losses than {}: an odd number is better",
                list.len(),
                list.len() - 1
            ));
        }
        let mut zones: BTreeMap<&str, usize> = BTreeMap::new();
        for founder in list {
            *zones.entry(&founder.zone).or_default() += 1;
        }
        if list.len() > 1 && zones.len() == 1 {
            match list.first().map(|first| first.zone.as_str()) {
                Some("") | None => {}
                Some(zone) => {
                    warnings.push(format!("all voters are in zone {zone}: when it is lost, so is the quorum"))
                }
            }
        }
        if let Some(spread) = self.spec.spread {
            for (zone, count) in zones.into_iter().filter(|(_, count)| *count > spread.most_per_zone as usize)
            {
                let most = spread.most_per_zone;
                warnings.push(format!(
                    "{count} voters are in zone {zone}, more than the {most} that were asked for"
                ));
            }
        }
        warnings
    }
}

impl Founder {
    fn of(peer: &Peer) -> Self {
        let Peer { node, key, ordinal, at, zone, .. } = peer.clone();
        Self { node, key, ordinal, at, zone }
    }
}
