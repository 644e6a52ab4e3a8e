//! Who leads: at most one, and never of a smaller term than before (rule N7).

use std::collections::BTreeMap;

use super::set::{Facts, Leadership, NodeId, PeerSet, Suffrage};
use crate::model::{InstanceId, Role, Roles};

impl PeerSet {
    /// What is to be published after `before`, by what the replicas say now.
    ///
    /// Of those that claim to lead, the one with the greatest term and configuration counts, and only when nobody else claims the same,
    /// it is a member, and, where all replicas name their leader, a majority of the voters names it in that term.
    pub fn roles(&self, facts: &Facts, before: &Roles) -> Roles {
        let led = before.leader.as_ref().and_then(|key| self.peer(key)).map(|peer| peer.node);
        self.roles_after(facts, before, led).0
    }

    /// As [`PeerSet::roles`], knowing who led in the term of `before`, which may be published no more, and who does now. A database
    /// that has terms has one leader in each.
    pub(super) fn roles_after(
        &self,
        facts: &Facts,
        before: &Roles,
        led: Option<NodeId>,
    ) -> (Roles, Option<NodeId>) {
        let may = |node: NodeId, term: u64| {
            term > before.term || (term == before.term && (term == 0 || led.is_none_or(|led| led == node)))
        };
        let leader = self.leader(facts).filter(|(node, term)| may(*node, *term));
        let led = leader.map(|(node, _)| node).or(led);
        let term = leader.map_or(before.term, |(_, term)| term);
        let others = facts.observed.iter().filter_map(|(node, seen)| {
            let peer = self.peers.get(node)?;
            let role = match seen.role {
                // It is not the one, whatever it says.
                Role::Leader => Role::Unknown,
                // What it does it does in another database.
                _ if peer.suffrage == Suffrage::Staging || !self.is_of_this(seen) => Role::Unknown,
                _ if self.founding.is_none() => Role::Unknown,
                role => role,
            };
            Some((peer.key.clone(), role))
        });
        let mut others: BTreeMap<InstanceId, Role> = others.collect();
        // Who is silent is no follower that could be read from, and one that is not in the database is none at all.
        for peer in self.peers.values() {
            if !facts.observed.contains_key(&peer.node) {
                others.insert(peer.key.clone(), Role::Unknown);
            }
        }
        let leader = leader.and_then(|(node, _)| self.peers.get(&node)).map(|peer| peer.key.clone());
        if let Some(leader) = &leader {
            others.remove(leader);
        }
        (Roles { term, leader, others }, led)
    }

    /// Who leads in which term, by what the replicas say now.
    pub(super) fn leader(&self, facts: &Facts) -> Option<(NodeId, u64)> {
        let member = |node: &NodeId| self.members().any(|peer| peer.node == *node);
        let claims = facts.observed.iter();
        let claims =
            claims.filter(|(node, seen)| seen.role == Role::Leader && member(node) && self.is_of_this(seen));
        let rank = |node: &NodeId| facts.observed.get(node).map(|seen| (seen.term, seen.config_index));
        let best = claims.clone().filter_map(|(node, _)| rank(node)).max()?;
        let mut first = claims.filter(|(node, _)| rank(node) == Some(best));
        let (Some((node, seen)), None) = (first.next(), first.next()) else { return None };
        let agreed = match self.spec.kind.leadership() {
            Leadership::Claim => true,
            Leadership::Majority => {
                let names = |other: NodeId| {
                    let said = facts.observed.get(&other);
                    said.is_some_and(|said| {
                        self.is_of_this(said)
                            && said.term == seen.term
                            && (other == *node || said.leader == Some(*node))
                    })
                };
                let voters: Vec<_> = self.voters().map(|peer| peer.node).collect();
                voters.iter().filter(|other| names(**other)).count() > voters.len() / 2
            }
        };
        agreed.then_some((*node, seen.term))
    }
}
