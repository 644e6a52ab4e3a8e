//! What replicas say: taken in, judged and written where it is news, and forgotten when nothing more is heard.

use std::{collections::BTreeMap, sync::PoisonError, time::Duration};

use tokio::time::Instant;

use super::{
    Error, NodeId, Observation, PeerSet, Peers, Refusal, board::Known, keep::ATTEMPTS, record::Observed,
};
use crate::{
    model::{InstanceId, Members, ServiceId},
    store::StoreError,
};

/// How long what a replica said is believed.
const BELIEVED: Duration = Duration::from_secs(9);

/// How often it is looked whether something is to be believed no more.
const LOOK: Duration = Duration::from_secs(1);

/// How often at most it is written how far replicas have come, when nothing else is new.
const PROGRESS: Duration = Duration::from_secs(5);

impl Peers {
    /// Takes in what one replica says. It is believed for [`Peers::believed`].
    ///
    /// # Errors
    /// [`Error`].
    pub async fn report(&self, name: &ServiceId, key: &InstanceId, seen: Observation) -> Result<(), Error> {
        let known = {
            let board = self.inner.board.borrow();
            self.known(&board, name)?
        };
        let node = match known.set.peer(key) {
            Some(peer) => peer.node,
            // The board may lag behind the registration.
            None => {
                let set = self.read_set(name).await?.ok_or_else(|| Error::NoSet(name.clone()))?;
                set.peer(key).ok_or_else(|| Refusal::NoPeer(key.clone()))?.node
            }
        };
        self.hear(name, &[(node, Some(seen))].into()).await
    }

    /// Takes in what all replicas of a set say, by who observes them. Those that are not named are silent.
    ///
    /// # Errors
    /// [`Error`].
    pub async fn observed(&self, name: &ServiceId, seen: BTreeMap<NodeId, Observation>) -> Result<(), Error> {
        let known = {
            let board = self.inner.board.borrow();
            self.known(&board, name)?
        };
        let silent = known.observed.by_node.keys().map(|node| (*node, None));
        let mut news: BTreeMap<_, _> = silent.collect();
        news.extend(seen.into_iter().map(|(node, seen)| (node, Some(seen))));
        self.hear(name, &news).await
    }

    /// How long what a replica says is believed.
    pub fn believed(&self) -> Duration {
        BELIEVED
    }

    async fn hear(
        &self,
        name: &ServiceId,
        news: &BTreeMap<NodeId, Option<Observation>>,
    ) -> Result<(), Error> {
        let now = Instant::now();
        {
            let mut heard = self.inner.heard.lock().unwrap_or_else(PoisonError::into_inner);
            for (node, seen) in news {
                match seen {
                    Some(_) => heard.insert((name.clone(), *node), now),
                    None => heard.remove(&(name.clone(), *node)),
                };
            }
        }
        let board = self.inner.board.borrow().clone();
        let known = self.known(&board, name)?;
        if !self.is_news(&known, news) {
            return Ok(());
        }
        let mut base = known;
        for _ in 0..ATTEMPTS {
            match self.write_observed(name, &base, news).await {
                Err(Error::Store(StoreError::Conflict { .. })) => {}
                result => return result,
            }
            base = self.read(name).await?;
        }
        Err(Error::Contended(name.clone()))
    }

    /// Whether what was said is worth a write.
    fn is_news(&self, known: &Known, news: &BTreeMap<NodeId, Option<Observation>>) -> bool {
        let Members { own, live } = &*self.inner.members.borrow();
        let Observed { by_node, heard_by, .. } = &*known.observed;
        let mut progress = false;
        let new = news.iter().any(|(node, seen)| match (by_node.get(node), seen) {
            (None, None) => false,
            (Some(before), Some(seen)) => {
                let by = heard_by.get(node);
                // One that tells now this process and now that one moves from one to the other no more often than it has to be
                // written how far it has come.
                progress |= before.applied != seen.applied || by != Some(own);
                Observation { applied: 0, ..before.clone() } != Observation { applied: 0, ..seen.clone() }
                    || by.is_none_or(|by| !live.contains(by))
            }
            (Some(_), None) | (None, Some(_)) => true,
        });
        let written = self.inner.written.lock().unwrap_or_else(PoisonError::into_inner);
        let due = || written.get(&known.set.spec.name).is_none_or(|at| at.elapsed() >= PROGRESS);
        // What is observed may have been written before this process saw which change is pending.
        new || (progress && due()) || settled(&mut (*known.set).clone(), &known.observed)
    }

    async fn write_observed(
        &self,
        name: &ServiceId,
        base: &Known,
        news: &BTreeMap<NodeId, Option<Observation>>,
    ) -> Result<(), Error> {
        let mut next = (*base.observed).clone();
        let own = self.inner.members.borrow().own.clone();
        for (node, seen) in news {
            match seen {
                Some(seen) if base.set.peers.contains_key(node) => {
                    next.by_node.insert(*node, seen.clone());
                    next.heard_by.insert(*node, own.clone());
                }
                Some(_) | None => {
                    next.by_node.remove(node);
                    next.heard_by.remove(node);
                }
            }
        }
        let mut set = (*base.set).clone();
        self.judge(&set, &mut next);
        let settled = settled(&mut set, &next);
        if settled {
            // As it was before, with the set as it is now: a removed leader leads no more.
            (next.roles, next.led) = (base.observed.roles.clone(), base.observed.led);
            self.judge(&set, &mut next);
        }
        self.commit(name, base, settled.then_some(&set), &next).await?;
        let mut written = self.inner.written.lock().unwrap_or_else(PoisonError::into_inner);
        written.insert(name.clone(), Instant::now());
        Ok(())
    }

    /// Forgets what was said too long ago, by whoever has heard it last, and by one of the others when that one is gone.
    pub(super) async fn forget(self) {
        let mut look = tokio::time::interval(LOOK);
        loop {
            look.tick().await;
            let (board, members) = (self.inner.board.borrow().clone(), self.inner.members.borrow().clone());
            for known in board.names().filter_map(|name| board.set(name)) {
                let name = &known.set.spec.name;
                let silent: BTreeMap<_, _> = self
                    .silent(name, &known.observed, &members)
                    .into_iter()
                    .map(|node| (node, None))
                    .collect();
                if silent.is_empty() {
                    continue;
                }
                // Not again after a conflict: it may have told another process just now.
                match self.write_observed(name, &known, &silent).await {
                    Ok(()) | Err(Error::Store(StoreError::Conflict { .. })) => {}
                    Err(error) => {
                        tracing::warn!(set = %name, %error, "what was said too long ago is kept for now");
                    }
                }
            }
        }
    }

    fn silent(&self, name: &ServiceId, observed: &Observed, members: &Members) -> Vec<NodeId> {
        let now = Instant::now();
        let mut heard = self.inner.heard.lock().unwrap_or_else(PoisonError::into_inner);
        let mine = |node: &NodeId| match observed.heard_by.get(node) {
            Some(by) if *by == members.own => members.is_member(),
            Some(by) if members.live.contains(by) => false,
            Some(_) | None => members.is_member() && members.is_mine(name.as_str()),
        };
        let mut nodes: Vec<_> = observed.by_node.keys().collect();
        nodes.retain(|node| {
            let mine = mine(node);
            if !mine {
                // It tells another process: what it told this one says nothing of when that one heard it last.
                heard.remove(&(name.clone(), **node));
            }
            mine
        });
        let nodes = nodes.into_iter();
        // What this process did not hear itself is believed from when it sees it.
        let last = nodes.map(|node| (*node, *heard.entry((name.clone(), *node)).or_insert(now)));
        let silent = last.filter(|(_, at)| now.saturating_duration_since(*at) >= BELIEVED);
        silent.map(|(node, _)| node).collect()
    }
}

/// Whether the pending change is over, by the list of members of the replica that leads.
fn settled(set: &mut PeerSet, observed: &Observed) -> bool {
    let leader = observed.roles.leader.as_ref().and_then(|key| set.peer(key)).map(|peer| peer.node);
    let told = leader.and_then(|leader| Some((leader, observed.by_node.get(&leader)?.members.as_ref()?)));
    told.is_some_and(|(leader, members)| set.settle(leader, members))
}
