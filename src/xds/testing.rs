//! Builders and a bench for tests: scripts read as data, responses are decoded from their real bytes.

use std::{
    collections::{BTreeMap, VecDeque},
    iter,
    sync::Arc,
    time::Duration,
};

use envoy_types::pb::{
    envoy::{
        config::{
            cluster::v3::Cluster,
            core::v3::Node as CoreNode,
            endpoint::v3::{ClusterLoadAssignment, LbEndpoint, lb_endpoint::HostIdentifier},
            listener::v3::Listener,
            route::v3::{RouteConfiguration, VirtualHost},
        },
        service::discovery::v3::{
            DeltaDiscoveryRequest, DeltaDiscoveryResponse, DiscoveryRequest, DiscoveryResponse,
        },
    },
    google::rpc::Status,
};
use futures_util::FutureExt as _;
use proptest::{
    strategy::Strategy,
    test_runner::{Config as ProptestConfig, RngSeed, TestError, TestRunner},
};
use prost::Message as _;
use tokio::time::Instant;

use super::{
    Change, Config, Heard, ProtocolError, Proxies, Publisher, Resource, ResourceSet, ResourceType, Response,
    StreamPolicy, TypeStatus,
    asked::{Asked, Decode},
    delta::Delta,
    engine::{Engine, Variant},
    feed::Grain,
    served::Served,
    sotw::Sotw,
};
use crate::model::Revision;

pub(super) use ResourceType::{
    Cluster as CDS, Endpoints as EDS, LbEndpoint as LEDS, Listener as LDS, Route as RDS, VirtualHost as VHDS,
};

/// A resource with some content that `text` makes. A cluster needs the endpoints of its own name.
pub(super) fn resource(kind: ResourceType, name: &str, text: &str) -> Resource {
    let (name_, text) = (name.to_owned(), text.to_owned());
    match kind {
        CDS => {
            let message = Cluster { name: name_, alt_stat_name: text, ..Cluster::default() };
            Resource::new(kind, name, &message, [name.into()])
        }
        EDS => {
            let mut message = ClusterLoadAssignment { cluster_name: name_, ..Default::default() };
            message.named_endpoints.insert(text, Default::default());
            Resource::new(kind, name, &message, [])
        }
        LEDS => {
            let host = HostIdentifier::EndpointName(text);
            let message = LbEndpoint { host_identifier: Some(host), ..Default::default() };
            Resource::new(kind, name, &message, [])
        }
        LDS => {
            let message = Listener { name: name_, stat_prefix: text, ..Listener::default() };
            Resource::new(kind, name, &message, [])
        }
        // The content of a route is the cluster that it goes to.
        RDS => {
            let message =
                RouteConfiguration { name: name_, internal_only_headers: vec![text], ..Default::default() };
            Resource::new(kind, name, &message, [])
        }
        VHDS => {
            let message = VirtualHost { name: name_, domains: vec![text], ..VirtualHost::default() };
            Resource::new(kind, name, &message, [])
        }
    }
}

/// What `resource` was made from.
pub(super) fn text_of(kind: ResourceType, body: &[u8]) -> String {
    match kind {
        CDS => Cluster::decode(body).unwrap().alt_stat_name,
        EDS => ClusterLoadAssignment::decode(body).unwrap().named_endpoints.into_keys().next().unwrap(),
        LEDS => match LbEndpoint::decode(body).unwrap().host_identifier {
            Some(HostIdentifier::EndpointName(text)) => text,
            other => panic!("{other:?}"),
        },
        LDS => Listener::decode(body).unwrap().stat_prefix,
        RDS => RouteConfiguration::decode(body).unwrap().internal_only_headers.remove(0),
        VHDS => VirtualHost::decode(body).unwrap().domains.remove(0),
    }
}

/// Stands for the content of a virtual host that does not exist (rule L3).
pub(super) const NO_HOST: &str = "?";

/// The types that both forms of the protocol have.
pub(super) const IN_BOTH: [ResourceType; 4] = [CDS, EDS, LDS, RDS];

pub(super) fn put(kind: ResourceType, name: &str, text: &str) -> Change {
    Change::Put(resource(kind, name, text))
}

pub(super) fn remove(kind: ResourceType, name: &str) -> Change {
    Change::Remove(kind, name.into())
}

/// The version of what `resource` makes.
pub(super) fn version(kind: ResourceType, name: &str, text: &str) -> String {
    resource(kind, name, text).version.to_string()
}

pub(super) fn strings(list: &[&str]) -> Vec<String> {
    list.iter().map(|&text| text.into()).collect()
}

/// Checks `cases` random values, the same each time; a failure is shrunk and printed. With `DISCO_FUZZ_SECONDS` in the
/// environment it goes on with others for that long.
#[allow(clippy::disallowed_methods, reason = "a setting of the tests, not of Disco")]
pub(super) fn random<S: Strategy>(cases: u32, strategy: S, check: impl Fn(S::Value)) {
    let seconds = std::env::var("DISCO_FUZZ_SECONDS").ok().and_then(|text| text.parse().ok());
    let until = Instant::now() + Duration::from_secs(seconds.unwrap_or(0));
    for seed in 1.. {
        let mut runner = TestRunner::new(ProptestConfig {
            cases,
            rng_seed: RngSeed::Fixed(seed),
            failure_persistence: None,
            max_shrink_iters: 20_000,
            ..ProptestConfig::default()
        });
        let result = runner.run(&strategy, |value| {
            check(value);
            Ok(())
        });
        match result {
            Ok(()) => {}
            // On one line: it is a script to read.
            Err(TestError::Fail(reason, value)) => panic!("seed {seed}: {reason}\n{value:?}"),
            Err(TestError::Abort(reason)) => panic!("seed {seed}: {reason}"),
        }
        if Instant::now() >= until {
            return;
        }
    }
}

/// A decoded response.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct Sent {
    pub kind: Option<ResourceType>,
    pub type_url: String,
    pub version: String,
    pub nonce: String,
    pub identifier: String,
    /// Name, version (delta only) and content.
    pub resources: Vec<(String, String, String)>,
    pub removed: Vec<String>,
}

impl Sent {
    /// E.g. `Cluster a=1 b=2 -c`.
    pub(super) fn show(&self) -> String {
        let mut text = self.kind.map_or_else(|| self.type_url.clone(), |kind| format!("{kind:?}"));
        for (name, _, content) in &self.resources {
            text += &format!(" {name}={content}");
        }
        for name in &self.removed {
            text += &format!(" -{name}");
        }
        text
    }
}

/// What a client of a variant says and hears.
pub(super) trait Speak: Variant {
    /// An answer to a response.
    fn answer(of: &Sent, names: &[String], accepted: Option<&str>, error: Option<&str>) -> Self::Request;
    fn decode(bytes: &[u8]) -> Sent;
}

fn status(message: &str) -> Status {
    Status { code: 13, message: message.into(), details: Vec::new() }
}

pub(super) fn node(id: &str) -> CoreNode {
    CoreNode { id: id.into(), cluster: "c".into(), user_agent_name: "envoy".into(), ..Default::default() }
}

impl Speak for Delta {
    fn answer(of: &Sent, _: &[String], _: Option<&str>, error: Option<&str>) -> DeltaDiscoveryRequest {
        DeltaDiscoveryRequest {
            type_url: of.type_url.clone(),
            response_nonce: of.nonce.clone(),
            error_detail: error.map(status),
            ..Default::default()
        }
    }

    fn decode(bytes: &[u8]) -> Sent {
        let message = DeltaDiscoveryResponse::decode(bytes).unwrap();
        let kind = ResourceType::from_url(&message.type_url);
        let resources = message.resources.into_iter().map(|resource| {
            let Some(any) = resource.resource else {
                assert_eq!((kind, &resource.aliases), (Some(VHDS), &vec![resource.name.clone()]), "rule D16");
                return (resource.name, String::new(), NO_HOST.to_owned());
            };
            assert_eq!(any.type_url, message.type_url, "rule G7");
            (resource.name, resource.version, text_of(kind.unwrap(), &any.value))
        });
        Sent {
            kind,
            resources: resources.collect(),
            removed: message.removed_resources,
            version: message.system_version_info,
            nonce: message.nonce,
            identifier: message.control_plane.unwrap().identifier,
            type_url: message.type_url,
        }
    }
}

impl Speak for Sotw {
    fn answer(of: &Sent, names: &[String], accepted: Option<&str>, error: Option<&str>) -> DiscoveryRequest {
        DiscoveryRequest {
            type_url: of.type_url.clone(),
            resource_names: names.to_vec(),
            version_info: accepted.unwrap_or_default().into(),
            response_nonce: of.nonce.clone(),
            error_detail: error.map(status),
            ..Default::default()
        }
    }

    fn decode(bytes: &[u8]) -> Sent {
        let message = DiscoveryResponse::decode(bytes).unwrap();
        let kind = ResourceType::from_url(&message.type_url).unwrap();
        let resources = message.resources.into_iter().map(|any| {
            assert_eq!(any.type_url, message.type_url, "rule G7");
            let name = match kind {
                CDS => Cluster::decode(any.value.as_slice()).unwrap().name,
                EDS => ClusterLoadAssignment::decode(any.value.as_slice()).unwrap().cluster_name,
                LDS => Listener::decode(any.value.as_slice()).unwrap().name,
                RDS => RouteConfiguration::decode(any.value.as_slice()).unwrap().name,
                LEDS => panic!("rule L4: SotW has no collections"),
                VHDS => panic!("rule G2: incremental only"),
            };
            (name, String::new(), text_of(kind, &any.value))
        });
        Sent {
            kind: Some(kind),
            resources: resources.collect(),
            removed: Vec::new(),
            version: message.version_info,
            nonce: message.nonce,
            identifier: message.control_plane.unwrap().identifier,
            type_url: message.type_url,
        }
    }
}

/// A delta request.
pub(super) fn delta(kind: ResourceType, subscribe: &[&str], unsubscribe: &[&str]) -> DeltaDiscoveryRequest {
    DeltaDiscoveryRequest {
        type_url: kind.url().into(),
        resource_names_subscribe: strings(subscribe),
        resource_names_unsubscribe: strings(unsubscribe),
        ..Default::default()
    }
}

/// The first delta request of a type after a reconnect.
pub(super) fn holding(
    kind: ResourceType,
    subscribe: &[&str],
    held: &[(&str, String)],
) -> DeltaDiscoveryRequest {
    DeltaDiscoveryRequest {
        initial_resource_versions: held
            .iter()
            .map(|(name, version)| ((*name).into(), version.clone()))
            .collect(),
        ..delta(kind, subscribe, &[])
    }
}

/// A stream with a script's hand on everything around it.
pub(super) struct Bench<V: Variant> {
    pub served: Served<V>,
    publisher: Publisher,
    pub set: Option<Arc<ResourceSet>>,
    pub now: Instant,
    /// The newest response of each type.
    pub last: BTreeMap<ResourceType, Sent>,
    /// SotW: the version that was accepted last, and the names that each request repeats.
    pub accepted: BTreeMap<ResourceType, String>,
    pub names: BTreeMap<ResourceType, Vec<String>>,
    nonces: std::collections::HashSet<String>,
    /// The status as it is kept up in the table.
    status: Vec<TypeStatus>,
}

impl<V: Speak> Bench<V> {
    /// As a server that has just started has it: the same content without a history.
    pub(super) fn fresh(set: &ResourceSet) -> Arc<ResourceSet> {
        let all = ResourceType::ALL.into_iter().flat_map(|kind| set.iter(kind));
        let all = all.map(|(_, entry)| Change::Put((*entry.resource).clone()));
        Arc::new(ResourceSet::default().apply(set.revision(), all))
    }

    /// A stream of an Envoy that is served `changes` as revision 1.
    pub(super) fn new(changes: impl IntoIterator<Item = Change>) -> Self {
        Self::with(StreamPolicy::ENVOY, Config::default(), changes)
    }

    pub(super) fn with(
        policy: StreamPolicy,
        config: Config,
        changes: impl IntoIterator<Item = Change>,
    ) -> Self {
        Self::on(policy, config, Some(Arc::new(ResourceSet::default().apply(Revision(1), changes))))
    }

    pub(super) fn on(policy: StreamPolicy, config: Config, set: Option<Arc<ResourceSet>>) -> Self {
        Self::serving(Engine::new("n".into(), policy, None, Arc::new(config)), set)
    }

    fn serving(engine: Engine<V>, set: Option<Arc<ResourceSet>>) -> Self {
        let publisher = Publisher::new(&Proxies::default());
        set.iter().for_each(|set| _ = publisher.publish(Arc::clone(set)));
        // By name however little there is, so that nothing is woken that need not be.
        let follower = publisher.feed().follow_with(Grain { names: usize::MAX, share: 0 });
        Self {
            served: Served::new(engine, follower),
            publisher,
            set,
            now: Instant::now(),
            last: BTreeMap::new(),
            accepted: BTreeMap::new(),
            names: BTreeMap::new(),
            nonces: Default::default(),
            status: Vec::new(),
        }
    }

    /// Likewise, on a service of one type.
    pub(super) fn only(kind: ResourceType, changes: impl IntoIterator<Item = Change>) -> Self {
        let engine =
            Engine::new("n".into(), StreamPolicy::ENVOY, Some(kind.url()), Arc::new(Config::default()));
        Self::serving(engine, Some(Arc::new(ResourceSet::default().apply(Revision(1), changes))))
    }

    pub(super) fn request(&mut self, request: V::Request) -> Heard {
        self.try_request(request).unwrap()
    }

    pub(super) fn try_request(&mut self, request: V::Request) -> Result<Heard, ProtocolError> {
        let asked: Asked<V::Request> = Decode::decode(request.encode_to_vec().into(), usize::MAX).unwrap();
        self.hear(asked)
    }

    pub(super) fn hear(&mut self, asked: Asked<V::Request>) -> Result<Heard, ProtocolError> {
        let heard = self.served.hear(asked, self.now)?;
        if !self.served.is_due() {
            self.report();
        }
        Ok(heard)
    }

    /// The next revision.
    pub(super) fn apply(&mut self, changes: impl IntoIterator<Item = Change>) {
        let set = self.set.as_deref().cloned().unwrap_or_default();
        let set = Arc::new(set.apply(Revision(set.revision().0 + 1), changes));
        self.publisher.publish(Arc::new(set.as_ref().clone().with_published(self.now)));
        self.set = Some(set);
    }

    pub(super) fn wait(&mut self, time: Duration) {
        self.now += time;
    }

    /// Takes in all that is on the way to it, and sends all that it then may. Returns how much that is.
    pub(super) fn exchange(
        &mut self,
        requests: &mut VecDeque<V::Request>,
        responses: &mut VecDeque<Sent>,
    ) -> usize {
        for request in requests.drain(..) {
            self.request(request);
        }
        let before = responses.len();
        responses.extend(iter::from_fn(|| self.next()));
        responses.len() - before
    }

    pub(super) fn next(&mut self) -> Option<Sent> {
        let set = self.set.clone()?;
        if self.served.news().now_or_never() == Some(true) {
            self.served.wake();
        }
        if self.served.is_late(self.now) {
            self.served.time_out();
        }
        if !self.served.is_due() {
            let looked = self.served.engine.clone().next_response(&set, self.now).unwrap();
            assert!(looked.is_none(), "it is not woken for {looked:?}");
            return None;
        }
        let response = self.served.next(self.now).unwrap();
        self.served.timer(None);
        if !self.served.is_due() {
            self.report();
        }
        let response: Response = response?;
        let mut bytes = Vec::new();
        response.encode(&mut bytes);
        assert_eq!(bytes.len(), response.len());
        let sent = V::decode(&bytes);
        assert_eq!(
            (sent.resources.len(), sent.removed.len()),
            (response.resources, response.removed),
            "{sent:?}"
        );
        assert!(self.nonces.insert(sent.nonce.clone()), "rule S1: nonce twice: {sent:?}");
        let mut names: Vec<_> = sent.resources.iter().map(|(name, ..)| name).chain(&sent.removed).collect();
        names.sort();
        assert!(names.windows(2).all(|pair| pair[0] != pair[1]), "rules D14, S-E4: a name twice: {sent:?}");
        if let Some(kind) = sent.kind {
            self.last.insert(kind, sent.clone());
        }
        Some(sent)
    }

    /// As the server reports, whenever there is nothing more to do.
    fn report(&mut self) {
        self.served.engine.update_status(&mut self.status);
        // What rests is not kept up; the revision stands for it.
        let at = self.set.as_ref().map_or(Revision(0), |set| set.revision());
        let [kept, now] = [self.status.clone(), self.served.engine.status()].map(|mut types| {
            types.iter_mut().for_each(|of| of.skip(at));
            format!("{types:?}")
        });
        assert_eq!(kept, now);
        self.served.follower().reported();
    }

    /// Everything that is sent now.
    pub(super) fn out(&mut self) -> Vec<String> {
        iter::from_fn(|| self.next()).map(|sent| sent.show()).collect()
    }

    pub(super) fn answer(&mut self, kind: ResourceType, error: Option<&str>) -> Heard {
        let sent = self.last[&kind].clone();
        if error.is_none() {
            self.accepted.insert(kind, sent.version.clone());
        }
        let names = self.names.get(&kind).cloned().unwrap_or_default();
        let accepted = self.accepted.get(&kind).cloned();
        self.request(V::answer(&sent, &names, accepted.as_deref(), error))
    }

    pub(super) fn ack(&mut self, kind: ResourceType) -> Heard {
        self.answer(kind, None)
    }

    pub(super) fn nack(&mut self, kind: ResourceType) -> Heard {
        self.answer(kind, Some("bad"))
    }

    /// Everything that is sent now, each acknowledged, and what follows.
    pub(super) fn settle(&mut self) -> Vec<String> {
        let mut all = Vec::new();
        while let Some(sent) = self.next() {
            all.push(sent.show());
            if let Some(kind) = sent.kind {
                self.ack(kind);
            }
        }
        all
    }

    /// The acknowledged revision of a type.
    pub(super) fn acknowledged(&self, kind: ResourceType) -> u64 {
        let status = self.served.engine.status().into_iter().find(|of| of.kind == kind);
        status.map_or(0, |mut status| {
            status.skip(self.served.follower().standing().quiet());
            status.acknowledged.0
        })
    }
}

impl Bench<Sotw> {
    /// A SotW request with these names, and the nonce and version of the newest accepted response.
    pub(super) fn ask(&mut self, kind: ResourceType, names: &[&str]) -> Heard {
        self.names.insert(kind, strings(names));
        self.request(DiscoveryRequest {
            type_url: kind.url().into(),
            resource_names: strings(names),
            version_info: self.accepted.get(&kind).cloned().unwrap_or_default(),
            response_nonce: self.last.get(&kind).map(|sent| sent.nonce.clone()).unwrap_or_default(),
            ..Default::default()
        })
    }
}
