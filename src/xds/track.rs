use std::{
    collections::{BTreeMap, BTreeSet, VecDeque},
    mem,
    ops::ControlFlow,
    sync::Arc,
};

use imbl::OrdSet;
use tokio::time::Instant;

use super::{
    ProtocolError, Rejection, Resource, ResourceSet, ResourceType, Subscription, TypeStatus,
    asked::Versions,
    ledger::Flight,
    names::{collection, is_glob},
    subscription::Delta,
};
use crate::model::Revision;

/// Where a stream stands with one resource type: what it asked for, up to where changes have been considered, and what
/// must be sent out of turn. There is no list of what the client holds: up to the cursor it holds what the set says.
#[derive(Debug, Clone)]
pub(super) struct Track {
    pub kind: ResourceType,
    /// What the client says that it holds is not believed (rule D10).
    pub resend: bool,
    /// Whether it ever asked for the type.
    pub seen: bool,
    pub subscription: Subscription,
    /// What the client said it held when it connected; weighed as soon as there is a set.
    pub claim: Option<Claim>,
    /// Changes up to here have been considered. `None` before there was a set.
    cursor: Option<Revision>,
    /// All there is must be sent: the wildcard was turned on.
    pub everything: bool,
    /// A response is due even if it is empty (rules D12, S8).
    pub owes: bool,
    /// Names that must be sent, changed or not: newly asked for, left over from a split response, waiting in the client
    /// for their cluster (rules D4, D18, O4).
    pub due: BTreeSet<Arc<str>>,
    /// Virtual hosts that the client has and that do not exist any more.
    pub vanished: BTreeSet<Arc<str>>,
    /// Removed resources that the client keeps until nothing refers to them (rule O3).
    pub held: BTreeMap<Arc<str>, Revision>,
    /// Names of rejected responses, one group each: a group goes again with the next change of any of it (rules S4, D15).
    pub rejected: Vec<OrdSet<Arc<str>>>,
    /// A response was rejected since the groups were last compared with what there is.
    recheck: bool,
    pub outstanding: Option<Outstanding>,
    /// When the change was published that is to be sent.
    pub waiting_since: Option<Instant>,
    /// What is due has clusters that are new to the client.
    pub adds: bool,
    /// SotW: hash of the last list of names, and the version the client was last told.
    pub names_hash: Option<u64>,
    pub version: Option<String>,
    pub digest: Option<(Revision, u64)>,
    pub report: Report,
}

/// What a client says it holds, in its first request of a type.
#[derive(Debug, Clone)]
pub(super) struct Claim {
    pub held: Held,
    /// Names that are due whatever it holds.
    pub forced: BTreeSet<Arc<str>>,
}

#[derive(Debug, Clone)]
pub(super) enum Held {
    /// Versions by name (rule D9).
    Each(Versions),
    /// One version for all (rule S9).
    All(String),
}

/// A response without an answer.
#[derive(Debug, Clone)]
pub(super) struct Outstanding {
    pub nonce: u64,
    /// What was in it, removals too.
    pub names: Arc<Vec<Arc<str>>>,
    /// Its ACK means that everything up to here is acknowledged; `None` when more is to follow.
    pub completes: Option<Revision>,
    pub sent: Instant,
    /// When the first response was sent since the last answer: responses that were not answered in time are superseded.
    pub unanswered_since: Instant,
    /// When the change behind it was published.
    pub since: Instant,
    /// It has clusters that are new to the client.
    pub adds: bool,
    /// It was waited for long enough.
    pub expired: bool,
}

/// What is told of a type.
#[derive(Debug, Clone, Default)]
pub(super) struct Report {
    pub sent: Revision,
    /// Up to here everything was acknowledged or did not concern the stream.
    pub acknowledged: Revision,
    /// Likewise, but for the names of rejected responses.
    pub settled: Revision,
    pub responses: u64,
    pub rejected: u64,
    pub unanswered: u64,
    pub rejections: VecDeque<Arc<Rejection>>,
}

impl Track {
    pub(super) fn new(kind: ResourceType, resend: bool) -> Self {
        Self {
            kind,
            resend,
            seen: false,
            subscription: Subscription::default(),
            claim: None,
            cursor: None,
            everything: false,
            owes: false,
            due: BTreeSet::new(),
            vanished: BTreeSet::new(),
            held: BTreeMap::new(),
            rejected: Vec::new(),
            recheck: false,
            outstanding: None,
            waiting_since: None,
            adds: false,
            names_hash: None,
            version: None,
            digest: None,
            report: Report::default(),
        }
    }

    /// Takes in what a request changed about the subscription.
    pub(super) fn subscribed(&mut self, delta: Delta) {
        self.digest = None;
        if delta.everything {
            self.everything = true;
            // What is on its way may have been given up meanwhile; under the wildcard the client keeps it.
            self.due
                .extend(self.outstanding.iter().flat_map(|outstanding| outstanding.names.iter().cloned()));
        }
        if self.subscription.is_empty() {
            // Rule S-E3: nothing more for a type that nobody watches, and no answer to wait for either.
            self.due.clear();
            self.held.clear();
            self.rejected.clear();
            self.outstanding = None;
            self.everything = false;
            self.owes = false;
            return;
        }
        for name in &delta.removed {
            if !self.subscription.is_wildcard() {
                self.held.remove(name);
                // It may have been the bad one: without it the others may be accepted (rule D15).
                self.reopen(name);
                self.due.remove(name);
            }
        }
        if delta.wildcard_off {
            self.everything = false;
        }
        if delta.wildcard_off || delta.removed.iter().any(|name| is_glob(name)) {
            self.due.retain(|name| self.subscription.covers(name));
            self.held.retain(|name, _| self.subscription.covers(name));
            for group in mem::take(&mut self.rejected) {
                if group.iter().all(|name| self.subscription.covers(name)) {
                    self.rejected.push(group);
                } else {
                    let left = group.into_iter().filter(|name| self.subscription.covers(name));
                    self.due.extend(left);
                }
            }
        }
        self.due.extend(delta.added);
    }

    /// A response was accepted.
    pub(super) fn accept(&mut self, names: &[Arc<str>]) {
        for group in &mut self.rejected {
            for name in names {
                group.remove(name);
            }
        }
        self.rejected.retain(|group| !group.is_empty());
    }

    /// A response was rejected, maybe with names of others that were: any of all those may be the bad one.
    pub(super) fn reject(&mut self, names: &[Arc<str>]) {
        let mut joined: OrdSet<Arc<str>> =
            names.iter().filter(|name| self.subscription.covers(name)).cloned().collect();
        for group in mem::take(&mut self.rejected) {
            if group.iter().any(|name| joined.contains(name)) {
                joined = joined.union(group);
            } else {
                self.rejected.push(group);
            }
        }
        self.rejected.push(joined);
        self.recheck = true;
    }

    /// Where removals are not told, what was removed while its rejection was on the way is no news any more, and no reason
    /// to keep its neighbours back either.
    fn recheck(&mut self, set: &ResourceSet) {
        if mem::take(&mut self.recheck) {
            for group in mem::take(&mut self.rejected) {
                if group.iter().all(|name| set.get(self.kind, name).is_some()) {
                    self.rejected.push(group);
                } else {
                    self.due.extend(group);
                }
            }
        }
    }

    /// Takes everything up to the set's revision as considered.
    pub(super) fn catch_up(&mut self, set: &ResourceSet) {
        self.resume(set.revision());
    }

    /// Goes on from a revision at which the client was.
    pub(super) fn resume(&mut self, at: Revision) {
        self.cursor = Some(at);
    }

    /// What changed from `looked` to `revision` does not concern the stream. Whatever has not come as far as `looked` has
    /// changes before that to consider.
    pub(super) fn skip(&mut self, looked: Revision, revision: Revision) {
        let digest = self.digest.as_mut().map(|(at, _)| at);
        for at in self.cursor.as_mut().into_iter().chain(digest).filter(|at| **at == looked) {
            *at = revision.max(*at);
        }
    }

    /// Whether there is something to send, or it takes a closer look to know.
    pub(super) fn pending(&mut self, set: &ResourceSet, removals: bool) -> Result<bool, ProtocolError> {
        if !self.seen {
            return Ok(false);
        }
        if !removals {
            self.recheck(set);
        }
        if !self.due.is_empty() || self.owes || self.everything || self.claim.is_some() {
            return Ok(true);
        }
        let at = set.revision();
        if self.cursor.is_some_and(|cursor| cursor < at)
            && self.news(set, removals, |_| ControlFlow::Break(()))?.is_break()
        {
            return Ok(true);
        }
        self.cursor = Some(at);
        Ok(false)
    }

    /// Looks at the names that changed after the cursor and concern the stream, newest first and some perhaps more than once,
    /// until `found` says that it is enough; with removals of what it holds, if it is told of them.
    fn news(
        &self,
        set: &ResourceSet,
        removals: bool,
        mut found: impl FnMut(&Arc<str>) -> ControlFlow<()>,
    ) -> Result<ControlFlow<()>, ProtocolError> {
        let Some(cursor) = self.cursor else { return Ok(ControlFlow::Continue(())) };
        if removals && !set.knows_removals_since(self.kind, cursor) {
            return Err(ProtocolError::Behind { at: cursor });
        }
        let mut look = |name: &Arc<str>| {
            let matters = self.subscription.covers(name)
                && match set.get(self.kind, name) {
                    Some(entry) => entry.changed > cursor,
                    None => set.gone(self.kind, name).is_some_and(|gone| {
                        let told = removals && gone.first <= cursor;
                        let suspect = || self.rejected.iter().any(|group| group.contains(name));
                        gone.removed > cursor && (told || suspect())
                    }),
                };
            if matters { found(name) } else { ControlFlow::Continue(()) }
        };
        Ok(if let Some(mut names) = set.changed_since(self.kind, cursor) {
            names.try_for_each(look)
        } else if self.subscription.is_wildcard() || self.kind == ResourceType::LbEndpoint {
            // The name of a collection does not say what is in it.
            let live = set.iter(self.kind).map(|(name, _)| name);
            let gone = set.iter_gone(self.kind).map(|(name, _)| name);
            live.chain(gone).try_for_each(look)
        } else {
            self.subscription.names().iter().try_for_each(&mut look)
        })
    }

    /// Takes all names that are to be sent now, and brings the cursor to the set. Removals that must wait are held.
    pub(super) fn take(
        &mut self,
        set: &ResourceSet,
        removals: bool,
        holds: bool,
    ) -> Result<Vec<Arc<str>>, ProtocolError> {
        let before = self.cursor;
        let mut news: Vec<Arc<str>> = Vec::new();
        let _ = self.news(set, removals, |name| {
            news.push(Arc::clone(name));
            ControlFlow::Continue(())
        })?;
        news.sort_unstable();
        news.dedup();
        let alone = self.due.is_empty() && !self.everything && self.rejected.is_empty();
        news.retain(|name| self.is_sent(set, name, removals && holds));
        if alone {
            self.cursor = Some(set.revision());
            self.adds |= self.are_new(set, before, &news);
            return Ok(news);
        }
        for name in news {
            self.reopen(&name);
            self.due.insert(name);
        }
        if !self.rejected.is_empty() {
            // Asked for again, and gone meanwhile: its neighbours need not wait for a change of it (rule D15).
            let gone: Vec<_> =
                self.due.iter().filter(|name| set.get(self.kind, name).is_none()).cloned().collect();
            for name in gone {
                self.reopen(&name);
            }
        }
        if self.everything {
            self.due.extend(mem::take(&mut self.rejected).into_iter().flatten());
        }
        self.cursor = Some(set.revision());
        self.expand(set);
        let due = mem::take(&mut self.due);
        if !mem::take(&mut self.everything) {
            self.adds |= self.are_new(set, before, &due);
            return Ok(due.into_iter().filter(|name| self.subscription.covers(name)).collect());
        }
        self.adds |= set.len(self.kind) > 0;
        let live = set.iter(self.kind).map(|(name, _)| Arc::clone(name));
        let gone = due.into_iter().filter(|name| set.get(self.kind, name).is_none());
        Ok(live.chain(gone).collect())
    }

    /// Whether something that changed is to be sent now: removals may have to wait (rule O3).
    fn is_sent(&mut self, set: &ResourceSet, name: &Arc<str>, holds: bool) -> bool {
        self.held.remove(name);
        if set.get(self.kind, name).is_some() {
            return true;
        }
        if holds && self.is_referred_to(set, name) {
            let removed = set.gone(self.kind, name).map_or(set.revision(), |gone| gone.removed);
            self.reopen(name);
            self.due.remove(name);
            self.held.insert(Arc::clone(name), removed);
            return false;
        }
        if self.kind == ResourceType::VirtualHost {
            self.vanished.insert(Arc::clone(name));
        }
        true
    }

    /// Whether any came into being after the client was told last.
    fn are_new<'a>(
        &self,
        set: &ResourceSet,
        before: Option<Revision>,
        names: impl IntoIterator<Item = &'a Arc<str>>,
    ) -> bool {
        names.into_iter().any(|name| {
            let since = set.get(self.kind, name).map(|entry| entry.since);
            since.is_some_and(|since| before.is_none_or(|before| since > before))
        })
    }

    /// Whether something that the client holds may still refer to a removed resource. Nothing refers to a member of a
    /// collection, but to the collection, which goes with its last one.
    fn is_referred_to(&self, set: &ResourceSet, name: &str) -> bool {
        collection(name).is_none_or(|glob| set.members(self.kind, &glob).next().is_none())
    }

    /// Makes the members of collections due that are due as such; one without members itself, to be told of as removed
    /// (rule X3).
    pub(super) fn expand(&mut self, set: &ResourceSet) {
        if self.kind != ResourceType::LbEndpoint {
            return;
        }
        let globs: Vec<_> = self.due.iter().filter(|name| is_glob(name)).cloned().collect();
        for glob in globs {
            let mut members = set.members(self.kind, &glob).map(|(name, _)| Arc::clone(name)).peekable();
            if members.peek().is_some() {
                self.due.remove(&glob);
                self.due.extend(members);
            }
        }
    }

    /// Makes removals due of members that the client may hold from an earlier connection, which it does not tell. Where a
    /// whole collection went, what refers to it has changed, too.
    pub(super) fn forget_members(&mut self, set: &ResourceSet) {
        let gone = set.iter_gone(self.kind).map(|(name, _)| name);
        let gone = gone.filter(|name| self.subscription.covers(name) && !self.is_referred_to(set, name));
        let gone: Vec<_> = gone.cloned().collect();
        self.due.extend(gone);
    }

    /// Makes all groups due that `name` is in.
    fn reopen(&mut self, name: &Arc<str>) {
        if self.rejected.iter().any(|group| group.contains(name)) {
            for group in mem::take(&mut self.rejected) {
                if group.contains(name) {
                    self.due.extend(group);
                } else {
                    self.rejected.push(group);
                }
            }
        }
    }

    /// The resource as the stream is to see it: a held one is still there.
    pub(super) fn find<'a>(&self, set: &'a ResourceSet, name: &Arc<str>) -> Option<&'a Arc<Resource>> {
        if let Some(entry) = set.get(self.kind, name) {
            return Some(&entry.resource);
        }
        self.held.contains_key(name).then(|| set.gone(self.kind, name)).flatten().map(|gone| &gone.last)
    }

    /// Whether a name that does not exist is that of a virtual host that the client asked for and does not have. Envoy has calls
    /// wait for it until it is told so in a form of its own (rules D16, L3). Asked once for each answer.
    pub(super) fn is_unknown_host(&mut self, name: &Arc<str>) -> bool {
        self.kind == ResourceType::VirtualHost
            && !self.vanished.remove(name)
            && self.subscription.names().contains(name)
    }

    /// Whether nothing unacknowledged is on its way, for at most the time that is allowed.
    pub(super) fn awaits_answer(&self) -> bool {
        self.outstanding.as_ref().is_some_and(|outstanding| !outstanding.expired)
    }

    /// Everything was sent and accepted; the cursor is at the set (call [`Track::pending`] before).
    pub(super) fn is_settled(&self) -> bool {
        self.outstanding.is_none() && self.rejected.is_empty()
    }

    /// There is nothing to send at `revision`.
    pub(super) fn rest(&mut self, revision: Revision) {
        if self.outstanding.is_none() && self.held.is_empty() {
            self.reached(revision);
        }
    }

    /// The client has everything up to `revision`, but for what it rejected.
    pub(super) fn reached(&mut self, revision: Revision) {
        self.report.settled = self.report.settled.max(revision);
        if self.rejected.is_empty() {
            self.report.acknowledged = self.report.acknowledged.max(revision);
        }
    }

    /// What is not acknowledged though the revisions do not tell it: what is on its way, and what is still to go.
    fn flight(&self) -> Flight {
        Flight {
            unanswered: self.outstanding.as_ref().map(|it| (it.unanswered_since, Arc::clone(&it.names))),
            due: self.due.iter().cloned().collect(),
            held: self.held.keys().cloned().collect(),
            considered: self.cursor.filter(|_| !self.everything && self.claim.is_none()),
        }
    }

    /// Whether it has everything up to `current`, and whatever comes that does not concern it.
    pub(super) fn rests(&self, current: Revision) -> bool {
        let owed = self.owes || self.everything || self.claim.is_some() || !self.due.is_empty();
        !owed && self.outstanding.is_none() && self.held.is_empty() && self.report.settled >= current
    }

    pub(super) fn status(&self, current: Revision) -> TypeStatus {
        let report = &self.report;
        TypeStatus {
            kind: self.kind,
            subscription: self.subscription.clone(),
            sent: report.sent,
            acknowledged: report.acknowledged,
            settled: report.settled,
            synced: report.acknowledged >= current && self.rejected.is_empty(),
            responses: report.responses,
            rejected: report.rejected,
            unanswered: report.unanswered,
            unaccepted: self.rejected.clone(),
            rejections: report.rejections.iter().cloned().collect(),
            rests: self.rests(current),
            flight: self.flight(),
        }
    }

    /// As [`Track::status`], over an earlier one. What seldom changes is shared with other streams: to count references to it
    /// anew each time would cost more than all the rest.
    pub(super) fn update_status(&self, status: &mut TypeStatus, current: Revision) {
        let report = &self.report;
        let rests = self.rests(current);
        if rests
            && status.rests
            && status.synced
            && status.responses == report.responses
            && status.subscription.shares(&self.subscription)
            && self.rejected.is_empty()
            && status.unaccepted.is_empty()
            && status.flight.considered.is_some()
        {
            // Nothing was asked, sent or answered, and to what came meanwhile it rests.
            return;
        }
        if !status.subscription.shares(&self.subscription) {
            status.subscription.clone_from(&self.subscription);
        }
        if !(status.unaccepted.is_empty() && self.rejected.is_empty()) {
            status.unaccepted.clone_from(&self.rejected);
        }
        if status.rejected != report.rejected {
            status.rejections = report.rejections.iter().cloned().collect();
        }
        status.sent = report.sent;
        status.acknowledged = report.acknowledged;
        status.settled = report.settled;
        status.synced = report.acknowledged >= current && self.rejected.is_empty();
        status.responses = report.responses;
        status.rejected = report.rejected;
        status.unanswered = report.unanswered;
        status.rests = rests;
        status.flight = self.flight();
    }
}
