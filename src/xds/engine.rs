use std::{collections::BTreeSet, fmt, mem, sync::Arc, time::Duration};

use bytes::Bytes;
use tokio::time::Instant;

use super::{
    Config, ProtocolError, Rejection, ResourceSet, ResourceType, Response, StreamPolicy, Subscription,
    TypeStatus,
    asked::{Asked, Decode},
    by_type::ByType,
    response::Head,
    subscription::Terms,
    track::{Outstanding, Track},
};
use crate::{model::Revision, rt};

/// The two forms of the protocol.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Protocol {
    /// Incremental: changes and removals.
    Delta,
    /// State of the world: whole lists.
    Sotw,
}

impl Protocol {
    /// As shown to people and used in metrics.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Delta => "delta",
            Self::Sotw => "sotw",
        }
    }
}

impl fmt::Display for Protocol {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

/// What a request turned out to be.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Heard {
    /// A subscription, or an answer that came too late to mean anything.
    Request,
    /// An ACK, so long after the change behind the response was published.
    Acknowledged(ResourceType, Duration),
    /// A NACK and its reason.
    Rejected(ResourceType, String),
}

/// What differs between delta and SotW.
pub(super) trait Variant: fmt::Debug + Default + Clone + Send + 'static {
    const PROTOCOL: Protocol;
    type Request: Decode;

    fn ask(request: &Self::Request) -> Ask<'_>;

    /// Whether there is a type in this form of the protocol.
    fn serves(_: ResourceType) -> bool {
        true
    }

    /// Whether removals of a type are told at all.
    fn tells_removals(kind: ResourceType) -> bool;

    /// Takes the names of a request into the track, if it is more than an answer.
    fn subscribe(
        track: &mut Track,
        asked: Asked<Self::Request>,
        first: bool,
        terms: Terms<'_>,
    ) -> Result<Anew, ProtocolError>;

    /// Weighs what a client says it holds. True if it holds anything.
    fn weigh(track: &mut Track, set: &Arc<ResourceSet>, policy: StreamPolicy) -> bool;

    /// What is to be sent now; `None` if it turns out to be nothing.
    fn build(
        track: &mut Track,
        set: &Arc<ResourceSet>,
        nonce: u64,
        config: &Config,
    ) -> Result<Option<Built>, ProtocolError>;

    /// A request for a type that Disco does not have (rule K3).
    fn on_unknown(&mut self, url: &str, request: Self::Request) {
        let _ = (url, request);
    }

    /// Whether there is an answer to one.
    fn owes_unknown(&self) -> bool {
        false
    }

    /// The answer to it: the type URL, the parts and how many removals there are.
    fn next_unknown(&mut self) -> Option<(String, Vec<Bytes>, usize)> {
        None
    }
}

/// The common parts of both requests.
#[derive(Debug)]
pub(super) struct Ask<'a> {
    pub node_id: Option<&'a str>,
    pub type_url: &'a str,
    pub nonce: &'a str,
    pub error: Option<&'a str>,
}

/// Whether a request changed what is asked for.
pub(super) type Anew = bool;

/// The content of a response.
#[derive(Debug, Default)]
pub(super) struct Built {
    pub version: String,
    pub body: Vec<Bytes>,
    pub resources: usize,
    pub removed: usize,
    /// What the response is about; for a full list what changed in it.
    pub names: Vec<Arc<str>>,
}

/// One stream as a state machine: requests and resource sets go in, responses come out. No IO and no clock; whoever
/// drives it passes the time in.
///
/// Types are served in the order of [`ResourceType::ALL`] (rule O1), at most one unanswered response each.
#[derive(Debug, Clone)]
pub(super) struct Engine<V> {
    config: Arc<Config>,
    policy: StreamPolicy,
    /// The type URL of a stream that is not aggregated (rule G3).
    only: Option<&'static str>,
    node_id: String,
    tracks: Tracks,
    /// Endpoints that a changed cluster waits for and that are still to be sent, where they are collections.
    warming: BTreeSet<Arc<str>>,
    nonce: u64,
    /// The newest revision that was looked at.
    current: Revision,
    /// When it was last asked for a response.
    looked: Option<Instant>,
    /// When the oldest set was published that has not been looked at.
    published: Option<Instant>,
    /// What was asked for has changed since somebody was told.
    asked: Anew,
    /// The last look left nothing to send.
    done: bool,
    /// The client came with clusters: until then it may have listeners or routes that it has not asked for yet.
    reconnected_until: Option<Instant>,
    variant: V,
}

impl<V: Variant> Engine<V> {
    /// A stream of one node; with `only`, of that type alone.
    pub(super) fn new(
        node_id: String,
        policy: StreamPolicy,
        only: Option<&'static str>,
        config: Arc<Config>,
    ) -> Self {
        Self {
            tracks: Tracks::default(),
            warming: BTreeSet::new(),
            config,
            policy,
            only,
            node_id,
            nonce: 0,
            current: Revision(0),
            looked: None,
            published: None,
            asked: false,
            done: false,
            reconnected_until: None,
            variant: V::default(),
        }
    }

    /// Takes a request in. `set` is what the stream is served, if it is known yet.
    pub(super) fn on_request(
        &mut self,
        asked: Asked<V::Request>,
        set: Option<&Arc<ResourceSet>>,
        now: Instant,
    ) -> Result<Heard, ProtocolError> {
        let ask = V::ask(&asked.message);
        if let Some(id) = ask.node_id.filter(|id| !id.is_empty() && *id != self.node_id) {
            return Err(ProtocolError::NodeChanged { was: self.node_id.clone(), now: id.to_owned() });
        }
        let (len, limit) = (ask.type_url.len(), self.config.type_url_bytes);
        if len > limit {
            return Err(ProtocolError::LongType { len, limit });
        }
        let url = match (self.only, ask.type_url) {
            (Some(only), url) if !url.is_empty() && url != only => {
                return Err(ProtocolError::OtherType { want: only, got: url.to_owned() });
            }
            (Some(only), _) => only,
            (None, "") => return Err(ProtocolError::NoType),
            (None, url) => url,
        };
        let Some(kind) = ResourceType::from_url(url).filter(|kind| V::serves(*kind)) else {
            let url = url.to_owned();
            self.variant.on_unknown(&url, asked.message);
            return Ok(Heard::Request);
        };

        let others = self.tracks.iter().flatten().filter(|track| track.kind != kind);
        let elsewhere: usize = others.map(|track| track.subscription.names().len()).sum();
        let config = self.config.as_ref();
        let terms = Terms {
            kind,
            config,
            legacy_wildcard: self.policy.legacy_wildcard,
            elsewhere,
            set: set.map(AsRef::as_ref),
        };
        let track = track_mut(&mut self.tracks, kind, &self.config);
        let first = !mem::replace(&mut track.seen, true);
        // Rule S1: a nonce of an earlier stream means nothing.
        let heard = if first { Heard::Request } else { answer(track, &ask, config, now) };
        self.asked |= V::subscribe(track, asked, first, terms)?;
        Ok(heard)
    }

    /// Whether what the stream asked for has changed since the last call.
    pub(super) fn asked_anew(&mut self) -> Anew {
        mem::take(&mut self.asked)
    }

    /// Whether the client has everything that it asked for, as of the last look.
    pub(super) fn rests(&self) -> bool {
        self.tracks.iter().flatten().all(|track| !track.seen || track.rests(self.current))
    }

    /// Whether the last response was all there was to say, so that there is no need to look again.
    pub(super) fn is_done(&self) -> bool {
        self.done
    }

    /// Notes when the first set was published that has news, for the measured latency.
    pub(super) fn on_news(&mut self, since: Instant) {
        self.published.get_or_insert(since);
    }

    /// Nothing up to `revision` concerns the stream that it has not looked at, so that it need not look.
    pub(super) fn skip(&mut self, revision: Revision) {
        for track in self.tracks.iter_mut().flatten() {
            track.skip(self.current, revision);
        }
    }

    /// What the stream asked for, by type.
    pub(super) fn subscriptions(&self) -> impl Iterator<Item = (ResourceType, &Subscription)> {
        let seen = self.tracks.iter().flatten().filter(|track| track.seen);
        seen.map(|track| (track.kind, &track.subscription))
    }

    /// The next response, if anything is due and may be sent. Call until `None`, or [`Engine::is_done`].
    pub(super) fn next_response(
        &mut self,
        set: &Arc<ResourceSet>,
        now: Instant,
    ) -> Result<Option<Response>, ProtocolError> {
        self.looked = Some(now);
        self.expire(now);
        self.current = self.current.max(set.revision());
        for track in self.tracks.iter_mut().flatten() {
            let (kind, arrives) = (track.kind, track.claim.is_some());
            if V::weigh(track, set, self.policy) && kind == ResourceType::Cluster {
                self.reconnected_until = Some(now + self.config.reconnect_grace);
            }
            if arrives
                && kind == ResourceType::LbEndpoint
                && (self.reconnected_until.is_some() || self.only.is_some())
            {
                track.forget_members(set);
            }
        }
        loop {
            for kind in ResourceType::ALL {
                if self.is_pending(kind, set, now)?
                    && self.may_send(kind, set, now)?
                    && let Some(response) = self.send(kind, set, now)?
                {
                    self.done = self.is_last(kind, set, now)?;
                    return Ok(Some(response));
                }
            }
            if !self.release(set, now)? {
                break;
            }
        }
        self.done = true;
        if let Some((type_url, body, removed)) = self.variant.next_unknown() {
            self.done = false;
            let built = Built { body, removed, version: set.revision().to_string(), ..Built::default() };
            return Ok(Some(self.respond(None, &type_url, built, set)));
        }
        self.published = None;
        Ok(None)
    }

    /// Whether nothing may follow a response of `kind`. Types before it were looked at, and wait for answers if for anything;
    /// so does what is left of its own. Those after it come to know that they have no news.
    fn is_last(
        &mut self,
        kind: ResourceType,
        set: &Arc<ResourceSet>,
        now: Instant,
    ) -> Result<bool, ProtocolError> {
        let mut last =
            !self.variant.owes_unknown() && self.tracks.iter().flatten().all(|it| it.held.is_empty());
        for kind in ResourceType::ALL.into_iter().skip_while(|before| *before < kind) {
            last &= !self.is_pending(kind, set, now)?;
        }
        if last {
            self.published = None;
        }
        Ok(last)
    }

    /// When to call [`Engine::next_response`] again even if nothing happens.
    pub(super) fn deadline(&self) -> Option<Instant> {
        let held = self.tracks.iter().flatten().any(|track| !track.held.is_empty());
        let grace = self.reconnected_until.filter(|_| held);
        let answers = self.tracks.iter().flatten().flat_map(|track| {
            let outstanding = track.outstanding.as_ref().filter(|outstanding| !outstanding.expired);
            let warming = outstanding.filter(|o| self.policy.warms_clusters && o.adds);
            let warming = warming.map(|o| o.sent + self.config.warming_timeout);
            [outstanding.map(|o| o.sent + self.config.ack_timeout), warming]
        });
        // A deadline that has passed has had its effect.
        answers.flatten().chain(grace).filter(|at| self.looked.is_none_or(|last| *at > last)).min()
    }

    /// Whether the client has answered everything that it was sent, or had its time to.
    pub(super) fn is_quiet(&self) -> bool {
        self.tracks.iter().flatten().all(|track| !track.awaits_answer())
    }

    /// How long an answer is waited for.
    pub(super) fn patience(&self) -> Duration {
        self.config.ack_timeout
    }

    /// Types that the stream asked for.
    pub(super) fn status(&self) -> Vec<TypeStatus> {
        let seen = self.tracks.iter().flatten().filter(|track| track.seen);
        seen.map(|track| track.status(self.current)).collect()
    }

    /// Brings what [`Engine::status`] gave up to date.
    pub(super) fn update_status(&self, types: &mut Vec<TypeStatus>) {
        let seen = || self.tracks.iter().flatten().filter(|track| track.seen);
        // No type is ever given up, so equally many are the same ones.
        if types.len() != seen().count() {
            *types = self.status();
            return;
        }
        seen().zip(types).for_each(|(track, status)| track.update_status(status, self.current));
    }

    /// Responses that were not answered in time.
    pub(super) fn unanswered(&self) -> u64 {
        self.tracks.iter().flatten().map(|track| track.report.unanswered).sum()
    }

    /// Whether there is something to send of this type; if so, notes since when.
    fn is_pending(
        &mut self,
        kind: ResourceType,
        set: &Arc<ResourceSet>,
        now: Instant,
    ) -> Result<bool, ProtocolError> {
        let since = self.published.unwrap_or(now);
        let Some(track) = self.known_mut(kind) else { return Ok(false) };
        let pending = track.pending(set, V::tells_removals(kind))?;
        if pending {
            track.waiting_since.get_or_insert(since);
        } else if track.seen {
            track.waiting_since = None;
            track.rest(set.revision());
        }
        Ok(pending)
    }

    /// Whether order allows a response of this type now.
    fn may_send(
        &mut self,
        kind: ResourceType,
        set: &Arc<ResourceSet>,
        now: Instant,
    ) -> Result<bool, ProtocolError> {
        if self.track(kind).is_some_and(Track::awaits_answer) {
            return Ok(false);
        }
        // Endpoints never wait for clusters: the client's answer to clusters waits for endpoints (rule O7).
        if matches!(kind, ResourceType::Cluster | ResourceType::Endpoints) {
            return Ok(true);
        }
        let warming_timeout = self.config.warming_timeout;
        let warms = self.policy.warms_clusters;
        let Some(clusters) = self.known_mut(ResourceType::Cluster) else { return Ok(true) };
        // Rule O2: a listener or route may name a cluster that is still to be sent,
        if clusters.pending(set, V::tells_removals(ResourceType::Cluster))? {
            return Ok(false);
        }
        // or that is not warm yet.
        let warming = |outstanding: &Outstanding| {
            outstanding.adds && !outstanding.expired && now < outstanding.sent + warming_timeout
        };
        Ok(!(warms && clusters.outstanding.as_ref().is_some_and(warming)))
    }

    fn send(
        &mut self,
        kind: ResourceType,
        set: &Arc<ResourceSet>,
        now: Instant,
    ) -> Result<Option<Response>, ProtocolError> {
        let nonce = self.nonce + 1;
        let track = track_mut(&mut self.tracks, kind, &self.config);
        let since = track.waiting_since.take().unwrap_or(now);
        let Some(mut built) = V::build(track, set, nonce, &self.config)? else {
            track.rest(set.revision());
            return Ok(None);
        };
        track.owes = false;
        let more = !track.due.is_empty();
        let unanswered_since = track.outstanding.as_ref().map_or(now, |before| before.unanswered_since);
        track.outstanding = Some(Outstanding {
            nonce,
            names: Arc::new(mem::take(&mut built.names)),
            completes: (!more && track.held.is_empty()).then(|| set.revision()),
            sent: now,
            unanswered_since,
            since,
            adds: track.adds,
            expired: false,
        });
        track.adds &= more;
        track.report.responses += 1;
        track.report.sent = set.revision();
        if self.policy.repush_endpoints && self.only.is_none() {
            match kind {
                ResourceType::Cluster => self.repush_endpoints(set),
                ResourceType::Endpoints => self.repush_members(set),
                _ => {}
            }
        }
        Ok(Some(self.respond(Some(kind), kind.url(), built, set)))
    }

    /// Rules O4, O6: whoever gets a cluster waits for its endpoints, even if it has them. A stream that has not asked for
    /// endpoints yet may be about to say that it holds them.
    fn repush_endpoints(&mut self, set: &ResourceSet) {
        let clusters = self.track(ResourceType::Cluster);
        let Some(sent) = clusters.and_then(|clusters| clusters.outstanding.as_ref()) else { return };
        let names = Arc::clone(&sent.names);
        let in_collections = |name: &str| {
            let entry = set.get(ResourceType::Endpoints, name);
            entry.is_some_and(|entry| !entry.resource.needs.is_empty())
        };
        let endpoints = track_mut(&mut self.tracks, ResourceType::Endpoints, &self.config);
        for name in names.iter() {
            let Some(entry) = set.get(ResourceType::Cluster, name) else { continue };
            for need in entry.resource.needs.iter() {
                if !endpoints.seen || endpoints.subscription.covers(need) {
                    endpoints.due.insert(Arc::clone(need));
                    if in_collections(need) {
                        self.warming.insert(Arc::clone(need));
                    }
                }
            }
        }
    }

    /// Likewise the members of the collections that its endpoints are in, and after those: a cluster that does not get them
    /// anew has no endpoints at all (rule L4).
    fn repush_members(&mut self, set: &ResourceSet) {
        let ByType([_, Some(endpoints), members, ..]) = &mut self.tracks else { return };
        for name in endpoints.outstanding.iter().flat_map(|outstanding| outstanding.names.iter()) {
            if !self.warming.remove(name) {
                continue;
            }
            let Some(entry) = set.get(ResourceType::Endpoints, name) else { continue };
            let needs = entry.resource.needs.iter();
            // Where it has not asked for any yet it is about to.
            if let Some(members) = members {
                members.due.extend(needs.filter(|glob| members.subscription.covers(glob)).cloned());
            }
        }
    }

    /// Rule O3: removes what was held, once nothing of this stream refers to it any more. True if anything was.
    fn release(&mut self, set: &Arc<ResourceSet>, now: Instant) -> Result<bool, ProtocolError> {
        let released = self.release_members(set)?;
        let is_other = |track: &Track| track.kind != ResourceType::LbEndpoint;
        if self.tracks.iter().flatten().all(|track| track.held.is_empty() || !is_other(track)) {
            return Ok(released);
        }
        let grace = self.reconnected_until.is_some_and(|until| now < until);
        for kind in [ResourceType::Listener, ResourceType::Route, ResourceType::VirtualHost] {
            let Some(track) = self.known_mut(kind).filter(|track| track.seen) else {
                // Few ask for virtual hosts at all.
                if grace && kind != ResourceType::VirtualHost {
                    return Ok(released);
                }
                continue;
            };
            if !track.subscription.is_empty()
                && (track.pending(set, V::tells_removals(kind))? || !track.is_settled())
            {
                return Ok(released);
            }
        }
        for track in self.tracks.iter_mut().flatten().filter(|track| is_other(track)) {
            track.due.extend(mem::take(&mut track.held).into_keys());
        }
        Ok(true)
    }

    /// Removes members that were held, once the client has all endpoints: those that it has refer to no collection that went.
    fn release_members(&mut self, set: &Arc<ResourceSet>) -> Result<bool, ProtocolError> {
        let ByType([_, endpoints, Some(members), ..]) = &mut self.tracks else { return Ok(false) };
        if members.held.is_empty() {
            return Ok(false);
        }
        if let Some(endpoints) = endpoints.as_mut().filter(|endpoints| !endpoints.subscription.is_empty())
            && (endpoints.pending(set, V::tells_removals(endpoints.kind))?
                || !endpoints.is_settled()
                || !endpoints.held.is_empty())
        {
            return Ok(false);
        }
        members.due.extend(mem::take(&mut members.held).into_keys());
        Ok(true)
    }

    fn expire(&mut self, now: Instant) {
        for track in self.tracks.iter_mut().flatten() {
            if let Some(outstanding) = &mut track.outstanding
                && !outstanding.expired
                && now >= outstanding.sent + self.config.ack_timeout
            {
                outstanding.expired = true;
                track.report.unanswered += 1;
            }
        }
    }

    fn respond(
        &mut self,
        kind: Option<ResourceType>,
        type_url: &str,
        built: Built,
        set: &ResourceSet,
    ) -> Response {
        self.nonce += 1;
        let head = Head {
            protocol: V::PROTOCOL,
            version: &built.version,
            type_url,
            nonce: &format!("{:x}", self.nonce),
            identifier: &self.config.identifier,
        };
        Response {
            kind,
            nonce: self.nonce,
            revision: set.revision(),
            resources: built.resources,
            removed: built.removed,
            head: head.encode(),
            body: built.body,
        }
    }

    /// Where the stream stands with a type, if it has anything to do with it.
    pub(super) fn track(&self, kind: ResourceType) -> Option<&Track> {
        self.tracks.of(kind).as_deref()
    }

    fn known_mut(&mut self, kind: ResourceType) -> Option<&mut Track> {
        self.tracks.of_mut(kind).as_deref_mut()
    }
}

/// A type that a stream never asked for costs it nothing.
type Tracks = ByType<Option<Box<Track>>>;

fn track_mut<'a>(tracks: &'a mut Tracks, kind: ResourceType, config: &Config) -> &'a mut Track {
    tracks
        .of_mut(kind)
        .get_or_insert_with(|| Box::new(Track::new(kind, config.resend_on_reconnect.contains(&kind))))
}

/// So much of a client's reason is kept, in bytes.
const REASON: usize = 2048;

/// Takes a request as the answer to the newest response of its type, if it is that. A NACK is told by its error, never by
/// its version (rule S3); any other nonce is stale (rule S5).
fn answer(track: &mut Track, ask: &Ask<'_>, config: &Config, now: Instant) -> Heard {
    let nonce = u64::from_str_radix(ask.nonce, 16).ok();
    let Some(outstanding) = track.outstanding.take_if(|outstanding| nonce == Some(outstanding.nonce)) else {
        return Heard::Request;
    };
    let reason = ask.error.map(|error| error.get(..error.floor_char_boundary(REASON)).unwrap_or(error));
    if let Some(reason) = reason {
        track.reject(&outstanding.names);
        track.report.rejected += 1;
        track.report.rejections.push_back(Arc::new(Rejection {
            at: rt::now(),
            revision: track.report.sent,
            reason: reason.to_owned(),
        }));
        while track.report.rejections.len() > config.rejections_kept {
            track.report.rejections.pop_front();
        }
    } else {
        track.accept(&outstanding.names);
    }
    if let Some(revision) = outstanding.completes {
        track.reached(revision);
    }
    match reason {
        Some(reason) => Heard::Rejected(track.kind, reason.to_owned()),
        None => Heard::Acknowledged(track.kind, now.saturating_duration_since(outstanding.since)),
    }
}
