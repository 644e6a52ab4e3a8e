//! Changes of membership: one at a time, each the next safe step, and over when the database itself says so.

use std::{collections::BTreeSet, time::SystemTime};

use super::{
    Refusal,
    set::{Change, Facts, Kind, Leadership, Liveness, NodeId, PeerSet, Pending, SeenMember, Suffrage},
};
use crate::model::{InstanceId, Revision, Role};

/// How far behind the leader a learner may be to be given a vote, in log entries (or bytes, where the database counts those).
const CAUGHT_UP: u64 = 1000;

/// What an operator wants to come about.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Want {
    /// This replica votes.
    Add(InstanceId),
    /// This replica is out.
    Remove(InstanceId),
    /// The second votes in the place of the first.
    Replace(InstanceId, InstanceId),
    /// This replica copies, and has no vote.
    Demote(InstanceId),
}

/// What comes next.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Step {
    /// Make this change in the database now. It is the pending one.
    Do(Pending),
    /// Nothing can be done before this has happened.
    Wait(String),
    /// It is as it was wanted.
    Done,
}

impl PeerSet {
    /// The next safe step towards what is wanted. Asking again goes on from where the database is by then.
    ///
    /// # Errors
    /// [`Refusal::Stale`] when the caller looked at another state; [`Refusal::Pending`] while another change is under way; and what
    /// makes it unsafe (rule N6). Nothing was changed.
    pub fn propose(
        &mut self,
        want: &Want,
        from: Revision,
        facts: &Facts,
        now: SystemTime,
    ) -> Result<Step, Refusal> {
        if from != self.revision {
            return Err(Refusal::Stale { from, have: self.revision });
        }
        if self.founding.is_none() {
            return Err(self.not_yet());
        }
        let next = self.next(want, facts)?;
        let (change, node) = match next {
            Next::Change(change, node) => (change, node),
            Next::Wait(reason) => return Ok(Step::Wait(reason)),
            Next::Done => return Ok(Step::Done),
        };
        if let Some(pending) = &self.pending {
            if (pending.change, pending.node) == (change, node) {
                // What was safe when it was first proposed may be no more.
                self.is_safe(change, node, facts)?;
                return Ok(Step::Do(pending.clone()));
            }
            let key = self.peers.get(&pending.node).map(|peer| peer.key.clone());
            return Err(Refusal::Pending { change: pending.change, node: pending.node, key });
        }
        self.is_safe(change, node, facts)?;
        let pending = Pending { change, node, since: now };
        if let (Change::Remove, Some(peer)) = (change, self.peers.get_mut(&node)) {
            peer.leaving = true;
        }
        self.pending = Some(pending.clone());
        Ok(Step::Do(pending))
    }

    fn next(&self, want: &Want, facts: &Facts) -> Result<Next, Refusal> {
        match want {
            Want::Add(key) => self.next_to_add(key, facts),
            Want::Remove(key) => self.next_to_remove(key, facts),
            Want::Demote(key) => {
                let peer = self.known(key)?;
                match peer.suffrage {
                    Suffrage::Voter | Suffrage::Witness => Ok(Next::Change(Change::Demote, peer.node)),
                    Suffrage::Learner => Ok(Next::Done),
                    Suffrage::Staging => Ok(Next::Wait(format!("{key} is not in the database"))),
                }
            }
            Want::Replace(old, new) if old == new => Err(Refusal::Itself(old.clone())),
            Want::Replace(old, new) => {
                let then = self.next_to_remove(old, facts)?;
                let is_dead = self.peer(old).is_some_and(|old| facts.liveness(old.node) == Liveness::Down);
                match self.next_to_add(new, facts)? {
                    // etcd takes nobody in while a member cannot be reached (--strict-reconfig-check), not even to learn.
                    _ if is_dead && self.spec.kind == Kind::Etcd => Ok(then),
                    // The new one votes before the old one goes, so that no vote is missing in between.
                    Next::Done => Ok(then),
                    next => Ok(next),
                }
            }
        }
    }

    fn next_to_add(&self, key: &InstanceId, facts: &Facts) -> Result<Next, Refusal> {
        let peer = self.known(key)?;
        Ok(match peer.suffrage {
            Suffrage::Voter | Suffrage::Witness => Next::Done,
            Suffrage::Staging if self.spec.kind.has_learners() => Next::Change(Change::AddLearner, peer.node),
            Suffrage::Staging => Next::Change(Change::AddVoter, peer.node),
            Suffrage::Learner => match self.behind(peer.node, facts) {
                Some(behind) if behind <= CAUGHT_UP => Next::Change(Change::Promote, peer.node),
                Some(behind) => {
                    Next::Wait(format!("{key} is {behind} behind the leader: it has to catch up first"))
                }
                None => Next::Wait(format!(
                    "{key} has not told how far it has come, or the leader has not: start it, and see that it is observed"
                )),
            },
        })
    }

    fn next_to_remove(&self, key: &InstanceId, facts: &Facts) -> Result<Next, Refusal> {
        match self.peer(key) {
            Some(peer) if peer.suffrage == Suffrage::Staging && !self.is_listed(peer.node, facts) => {
                Err(Refusal::NotMember(key.clone()))
            }
            Some(peer) => Ok(Next::Change(Change::Remove, peer.node)),
            None if self.removed.values().any(|gone| gone.key == *key) => Ok(Next::Done),
            None => Err(Refusal::NoPeer(key.clone())),
        }
    }

    fn known(&self, key: &InstanceId) -> Result<&super::Peer, Refusal> {
        self.peer(key).ok_or_else(|| Refusal::NoPeer(key.clone()))
    }

    /// How far a replica is behind the leader; `None` when either has not told.
    fn behind(&self, node: NodeId, facts: &Facts) -> Option<u64> {
        let tells = |seen: &&super::Observation| seen.applied > 0 && self.is_of_this(seen);
        let own = facts.observed.get(&node).filter(tells)?;
        let (leader, _) = self.leader(facts)?;
        let leader = facts.observed.get(&leader).filter(tells)?;
        Some(leader.applied.saturating_sub(own.applied))
    }

    /// Whether the database keeps a quorum of replicas that run, and loses none of those while there is a dead one (rule N6).
    fn is_safe(&self, change: Change, node: NodeId, facts: &Facts) -> Result<(), Refusal> {
        let up = |node: NodeId| facts.liveness(node) == Liveness::Up;
        let votes = |node: &NodeId| self.peers.get(node).is_some_and(|peer| peer.suffrage.votes());
        let mut voters: BTreeSet<_> = self.voters().map(|peer| peer.node).collect();
        match change {
            // A learner changes no quorum.
            Change::AddLearner => return Ok(()),
            // Where there are no learners, one that joins is started when it has been added (rule N11): it counts as one that does
            // not run.
            Change::AddVoter => {
                voters.insert(node);
            }
            Change::Promote => {
                if !up(node) {
                    return Err(Refusal::NotUp(self.key(node)));
                }
                voters.insert(node);
            }
            Change::Remove | Change::Demote => {
                // One that is suspected may well run.
                if votes(&node) && facts.liveness(node) != Liveness::Down {
                    let dead = voters.iter().find(|other| facts.liveness(**other) == Liveness::Down);
                    if let Some(dead) = dead {
                        return Err(Refusal::DeadFirst { live: self.key(node), dead: self.key(*dead) });
                    }
                }
                voters.remove(&node);
                // Witnesses have votes, and no data.
                let copies =
                    |node: &NodeId| self.peers.get(node).is_some_and(|peer| peer.suffrage == Suffrage::Voter);
                if !voters.iter().any(copies) {
                    return Err(Refusal::LastVoter(self.key(node)));
                }
            }
        }
        if self.spec.kind.leadership() == Leadership::Majority {
            // Without a quorum of those that vote now it cannot be made but by force.
            has_quorum(&self.voters().map(|peer| peer.node).collect(), facts)?;
        }
        has_quorum(&voters, facts)
    }

    fn key(&self, node: NodeId) -> String {
        self.peers.get(&node).map_or_else(|| node.to_string(), |peer| peer.key.to_string())
    }

    /// Takes in what the list of members of the replica that leads, `by`, says of the pending change, and returns whether that is
    /// over. Nothing else follows from it: other differences are shown, not repaired.
    ///
    /// That somebody is not in a list says nothing unless the list is whole: a removal is over when all others are in it and
    /// nobody that is not known. Otherwise an operator says so.
    pub fn settle(&mut self, by: NodeId, seen: &BTreeSet<SeenMember>) -> bool {
        let Some(Pending { change, node, .. }) = self.pending else { return false };
        let found: Vec<_> =
            seen.iter().filter_map(|member| Some((self.find(member)?.node, member))).collect();
        let nodes: BTreeSet<_> = found.iter().map(|(node, _)| *node).collect();
        if !nodes.contains(&by) || nodes.len() < found.len() {
            // It is of another database, or two of its members pass for one replica.
            return false;
        }
        let member = found.iter().find(|(found, _)| *found == node).map(|(_, member)| *member);
        let done = match (change, member) {
            (Change::AddLearner, Some(_)) => true,
            (Change::AddVoter | Change::Promote, Some(member)) => member.voter,
            (Change::Demote, Some(member)) => !member.voter,
            (Change::Remove, None) => {
                let mut others = self.members().filter(|peer| peer.node != node);
                found.len() == seen.len() && others.all(|peer| nodes.contains(&peer.node))
            }
            (Change::AddLearner | Change::AddVoter | Change::Promote | Change::Demote, None)
            | (Change::Remove, Some(_)) => false,
        };
        if done {
            let voter = member.is_some_and(|member| member.voter);
            self.complete(change, node, if voter { Suffrage::Voter } else { Suffrage::Learner });
        }
        done
    }

    /// An operator says that the pending change was made, of a database that does not tell.
    ///
    /// # Errors
    /// [`Refusal::Stale`], [`Refusal::NothingPending`].
    pub fn confirm(&mut self, from: Revision) -> Result<(), Refusal> {
        let Pending { change, node, .. } = self.pending_from(from)?;
        let votes = matches!(change, Change::AddVoter | Change::Promote);
        self.complete(change, node, if votes { Suffrage::Voter } else { Suffrage::Learner });
        Ok(())
    }

    /// An operator says that the pending change was not made and will not be.
    ///
    /// # Errors
    /// [`Refusal::Stale`], [`Refusal::NothingPending`].
    pub fn cancel(&mut self, from: Revision) -> Result<(), Refusal> {
        let Pending { node, .. } = self.pending_from(from)?;
        if let Some(peer) = self.peers.get_mut(&node) {
            peer.leaving = false;
        }
        self.pending = None;
        Ok(())
    }

    fn pending_from(&self, from: Revision) -> Result<Pending, Refusal> {
        if from != self.revision {
            return Err(Refusal::Stale { from, have: self.revision });
        }
        self.pending.clone().ok_or(Refusal::NothingPending)
    }

    fn complete(&mut self, change: Change, node: NodeId, becomes: Suffrage) {
        self.pending = None;
        match change {
            Change::Remove => self.remove(node),
            Change::AddLearner | Change::AddVoter | Change::Promote | Change::Demote => {
                if let Some(peer) = self.peers.get_mut(&node) {
                    peer.suffrage = becomes;
                }
            }
        }
    }

    /// What the database's own list of members and what is written say differently, for people (they decide; Disco does not
    /// repair).
    pub fn drift(&self, facts: &Facts) -> Vec<String> {
        let mut drift = Vec::new();
        if let Some(founding) = &self.founding {
            for (node, seen) in &facts.observed {
                if seen.digest.as_ref().is_some_and(|digest| *digest != founding.digest) {
                    drift.push(format!(
                        "{} was started with another founding list: stop it, before there are two databases",
                        self.key(*node)
                    ));
                }
            }
        }
        let told =
            facts.observed.iter().filter_map(|(node, seen)| Some((node, seen, seen.members.as_ref()?)));
        let best = told.max_by_key(|(_, seen, _)| (seen.role == Role::Leader, seen.term, seen.config_index));
        let Some((_, _, members)) = best else { return drift };
        for seen in members {
            let name = if seen.name.is_empty() { &seen.id } else { &seen.name };
            match self.find(seen) {
                None => drift.push(format!("{name} is a member of the database and not of the set")),
                Some(peer) if peer.suffrage == Suffrage::Staging => {
                    drift.push(format!("{} is a member of the database, and nobody proposed it", peer.key));
                }
                Some(peer) if peer.suffrage.votes() != seen.voter => {
                    let does = if seen.voter { "votes" } else { "does not vote" };
                    drift.push(format!(
                        "{} {does} in the database; here it is a {}",
                        peer.key,
                        peer.suffrage.as_str()
                    ));
                }
                Some(_) => {}
            }
        }
        let known: BTreeSet<_> =
            members.iter().filter_map(|seen| self.find(seen)).map(|peer| peer.node).collect();
        for peer in self.members().filter(|peer| !known.contains(&peer.node)) {
            drift.push(format!("{} is a member of the set and not of the database", peer.key));
        }
        drift
    }
}

/// Whether enough of these run.
fn has_quorum(voters: &BTreeSet<NodeId>, facts: &Facts) -> Result<(), Refusal> {
    let running = voters.iter().filter(|node| facts.liveness(**node) == Liveness::Up).count();
    let needed = voters.len() / 2 + 1;
    if running < needed {
        return Err(Refusal::NoQuorum { running, needed, voters: voters.len() });
    }
    Ok(())
}

enum Next {
    Change(Change, NodeId),
    Wait(String),
    Done,
}
