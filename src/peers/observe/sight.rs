//! What is known of the replicas of a set at a moment. Pure: time comes in as an argument.

use std::{collections::BTreeMap, net::SocketAddr, time::Duration};

use tokio::time::Instant;

use super::{
    adapter::FAST,
    redis::{self, Word},
    said::{Fault, Said},
};
use crate::{
    model::Roles,
    peers::{Facts, NodeId, Observation, PeerSet},
};

/// How long what a replica said counts after it fell silent; three periods when those are longer. See the room.
pub const SILENCE: Duration = Duration::from_secs(1);

/// How many questions in a row have to fail, too, so that a pause of this process condemns nobody.
const FAILURES: u32 = 2;

/// How long there may be no leader before haste ends.
const HASTE: Duration = Duration::from_secs(30);

/// What is known of the replicas of a set.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(super) struct Sight {
    /// What each says that was heard of lately.
    pub(super) observed: BTreeMap<NodeId, Observation>,
    /// Why the last question to others was not answered.
    pub(super) unheard: BTreeMap<NodeId, String>,
    /// Nothing at all answers: this node may be cut off, and what is here was true before that.
    pub(super) stale: bool,
}

impl Sight {
    /// Whether it says the same, but for how far replicas have come.
    pub(super) fn same(&self, other: &Self) -> bool {
        let strip = |sight: &Self| {
            let mut sight = sight.clone();
            sight.observed.values_mut().for_each(|seen| seen.applied = 0);
            sight
        };
        strip(self) == strip(other)
    }
}

/// Who is asked.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Target {
    Replica(NodeId),
    /// By where it listens.
    Sentinel(SocketAddr),
}

/// What came back.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Heard {
    Said(Said),
    Word(Word),
}

impl Heard {
    fn same(&self, other: &Self) -> bool {
        match (self, other) {
            (Self::Said(one), Self::Said(other)) => one.same(other),
            _ => self == other,
        }
    }
}

#[derive(Debug)]
struct Entry {
    heard: Option<Heard>,
    /// The last good answer; before the first one when it began to be asked.
    good_at: Instant,
    last: Option<Result<(), Fault>>,
    failures: u32,
}

/// Takes in answers and lets them go.
#[derive(Debug)]
pub(super) struct Hearing {
    every: Duration,
    /// Whether sentinels have the last word.
    judged: bool,
    started: Instant,
    entries: BTreeMap<Target, Entry>,
    /// All are silent.
    dark: bool,
    /// When that was over the last time.
    light: Instant,
    /// Since when there is no leader, or one that does not answer.
    troubled: Option<Instant>,
}

impl Hearing {
    pub(super) fn new(every: Duration, judged: bool, now: Instant) -> Self {
        let every = every.max(FAST);
        Self {
            every,
            judged,
            started: now,
            entries: BTreeMap::new(),
            dark: false,
            light: now,
            troubled: None,
        }
    }

    fn silence(&self) -> Duration {
        SILENCE.max(self.every * 3)
    }

    /// Begins with one that nothing is known of.
    pub(super) fn add(&mut self, target: Target, now: Instant) {
        self.entries.insert(target, Entry { heard: None, good_at: now, last: None, failures: 0 });
        self.look(now);
    }

    pub(super) fn remove(&mut self, target: Target, now: Instant) {
        self.entries.remove(&target);
        self.look(now);
    }

    /// Takes in what came of a question; whether more is known, or less.
    pub(super) fn note(&mut self, target: Target, outcome: Result<Heard, Fault>, now: Instant) -> bool {
        let Some(entry) = self.entries.get_mut(&target) else { return false };
        let last = outcome.as_ref().map(|_| ()).map_err(Clone::clone);
        let mut news = entry.last.as_ref() != Some(&last);
        entry.last = Some(last);
        match outcome {
            Ok(heard) => {
                news |= !entry.heard.as_ref().is_some_and(|before| before.same(&heard));
                entry.heard = Some(heard);
                entry.good_at = now;
                entry.failures = 0;
            }
            Err(fault) => {
                entry.failures = entry.failures.saturating_add(1);
                if fault == Fault::Refused {
                    news |= entry.heard.take().is_some();
                }
            }
        }
        self.look(now);
        self.forget(now) || news
    }

    fn look(&mut self, now: Instant) {
        let silent = |entry: &Entry| matches!(entry.last, Some(Err(Fault::Silent(_))));
        let dark = !self.entries.is_empty() && self.entries.values().all(silent);
        if self.dark && !dark {
            self.light = now;
        }
        self.dark = dark;
    }

    fn deadline(&self, entry: &Entry) -> Option<Instant> {
        let failing = entry.heard.is_some() && entry.failures >= FAILURES && !self.dark;
        failing.then(|| entry.good_at.max(self.light) + self.silence())
    }

    /// Lets go what counts no more; whether there was any.
    pub(super) fn forget(&mut self, now: Instant) -> bool {
        let due = |entry: &Entry| self.deadline(entry).is_some_and(|deadline| now >= deadline);
        let over: Vec<_> =
            self.entries.iter().filter(|(_, entry)| due(entry)).map(|(target, _)| *target).collect();
        for target in &over {
            if let Some(entry) = self.entries.get_mut(target) {
                entry.heard = None;
            }
        }
        !over.is_empty()
    }

    /// When something may change though nobody answers.
    pub(super) fn wake(&self, now: Instant) -> Option<Instant> {
        let first = (!self.all_tried()).then(|| self.started + self.silence());
        let haste = self.troubled.map(|since| since + HASTE);
        let deadlines = self.entries.values().filter_map(|entry| self.deadline(entry));
        deadlines.chain(first).chain(haste).filter(|at| *at > now).min()
    }

    fn all_tried(&self) -> bool {
        self.entries.values().all(|entry| entry.last.is_some())
    }

    /// What is known, once everybody was asked: before that, one who takes over would take a leader away whom the others know.
    pub(super) fn sight(&self, set: &PeerSet, now: Instant) -> Option<Sight> {
        let waited = self.all_tried() || now >= self.started + self.silence();
        let nothing = self.dark && self.entries.values().all(|entry| entry.heard.is_none());
        if !waited || nothing {
            return None;
        }
        let word = self.word();
        let mut sight = Sight { stale: self.dark, ..Sight::default() };
        for (target, entry) in &self.entries {
            let Target::Replica(node) = target else { continue };
            if let Some(Err(fault)) = &entry.last {
                sight.unheard.insert(*node, fault.seen().to_owned());
            }
            let (Some(Heard::Said(said)), Some(peer)) = (&entry.heard, set.peers.get(node)) else { continue };
            let observation = if self.judged {
                redis::judge(said, &[peer.at.client, peer.at.raft], word).observation(*node, set)
            } else {
                said.observation(*node, set)
            };
            sight.observed.insert(*node, observation);
        }
        Some(sight)
    }

    /// What most of the sentinels say.
    fn word(&self) -> Option<Word> {
        let sentinels = self.entries.iter().filter(|(target, _)| matches!(target, Target::Sentinel(_)));
        let words: Vec<_> = sentinels
            .map(|(_, entry)| match entry.heard {
                Some(Heard::Word(word)) => Some(word),
                _ => None,
            })
            .collect();
        redis::majority(&words)
    }

    /// How often to ask now: faster while there is no leader, or one that does not answer, for at most half a minute.
    pub(super) fn period(&mut self, set: &PeerSet, sight: &Sight, now: Instant) -> Duration {
        let facts = Facts { observed: sight.observed.clone(), ..Facts::default() };
        let leader = set.roles(&facts, &Roles::default()).leader;
        let leader = leader.and_then(|key| set.peer(&key)).map(|peer| Target::Replica(peer.node));
        let answers = leader.and_then(|leader| self.entries.get(&leader));
        if answers.is_some_and(|entry| entry.last == Some(Ok(()))) {
            self.troubled = None;
            return self.every;
        }
        let since = *self.troubled.get_or_insert(now);
        if now < since + HASTE { FAST } else { self.every }
    }
}
