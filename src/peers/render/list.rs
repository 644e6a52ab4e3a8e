use super::{Format, RenderError};
use crate::{
    model::InstanceId,
    peers::set::{Addresses, Class, Facts, Founder, Founding, Liveness, NodeId, Peer, PeerSet, Suffrage},
};

/// Who is handed to a replica.
#[derive(Debug)]
pub(super) struct List<'a> {
    /// By ordinal (rule N8). Never empty.
    pub(super) lines: Vec<Line<'a>>,
}

/// One of them.
#[derive(Debug, Clone)]
pub(super) struct Line<'a> {
    pub(super) node: NodeId,
    pub(super) key: &'a InstanceId,
    pub(super) ordinal: u32,
    pub(super) at: &'a Addresses,
    pub(super) zone: &'a str,
    pub(super) suffrage: Suffrage,
}

impl<'a> List<'a> {
    pub(super) fn of(
        set: &'a PeerSet,
        founding: &'a Founding,
        peer: Option<&Peer>,
        format: Format,
    ) -> Result<Self, RenderError> {
        let class = format.class().unwrap_or(set.spec.kind.class());
        let joiner = peer.filter(|peer| peer.birth.joins());
        let lines: Vec<_> = match (class, joiner) {
            (Class::Identity, None) => founding.list.iter().map(Line::founder).collect(),
            (Class::Identity, Some(joiner)) => {
                if joiner.suffrage == Suffrage::Staging {
                    return Err(RenderError::NotAdded { key: joiner.key.clone() });
                }
                if let Some(instead) = founders_only(format) {
                    return Err(RenderError::Joiner { key: joiner.key.clone(), format, instead });
                }
                Self::members(set)
            }
            (Class::Seeds | Class::Addresses, _) => Self::members(set),
        };
        if lines.is_empty() {
            return Err(RenderError::Nobody { set: set.spec.name.clone() });
        }
        Ok(Self { lines })
    }

    /// Those of today.
    pub(super) fn members(set: &'a PeerSet) -> Vec<Line<'a>> {
        let mut lines: Vec<_> = set.members().map(Line::member).collect();
        lines.sort_by_key(|line| line.ordinal);
        lines
    }

    /// Those that live before those that may, and those before the dead. Nobody is left out (rule N5).
    pub(super) fn living_first(&self, facts: Option<&Facts>) -> Vec<Line<'a>> {
        let mut lines = self.lines.clone();
        let dead = |line: &Line<'_>| match facts.map(|facts| facts.liveness(line.node)) {
            Some(Liveness::Up) | None => 0,
            Some(Liveness::Suspect) => 1,
            Some(Liveness::Down) => 2,
        };
        lines.sort_by_key(dead);
        lines
    }
}

impl<'a> Line<'a> {
    pub(super) fn founder(founder: &'a Founder) -> Self {
        let Founder { node, key, ordinal, at, zone } = founder;
        Self { node: *node, key, ordinal: *ordinal, at, zone, suffrage: Suffrage::Voter }
    }

    pub(super) fn member(peer: &'a Peer) -> Self {
        let Peer { node, key, ordinal, at, zone, suffrage, .. } = peer;
        Self { node: *node, key, ordinal: *ordinal, at, zone, suffrage: *suffrage }
    }
}

/// Formats in which a joiner's list reads as a founding list, and what the joiner does without.
fn founders_only(format: Format) -> Option<&'static str> {
    match format {
        Format::Flamed => Some("Start it with --join and without --initial-members; flamed-env says both"),
        Format::HashicorpConfiguration => {
            Some("Start it without BootstrapCluster: the leader adds it and sends it the configuration")
        }
        Format::MongoDb => Some("The primary adds it, with rs.add"),
        Format::KafkaQuorumVoters => {
            Some("A static quorum takes nobody in; kafka-bootstrap-servers is for a dynamic one")
        }
        Format::TigerBeetle => Some("TigerBeetle has as many replicas as at its founding, for ever"),
        _ => None,
    }
}
