//! Clients that do not know the protocol, or want to do harm: whatever comes, nothing panics, nothing grows, and the stream
//! either ends with an error or serves a client that behaves from then on. `make fuzz` goes on for longer.

mod corpus;
mod script;

use std::collections::BTreeMap;

use bytes::Bytes;
use envoy_types::pb::{
    envoy::service::discovery::v3::{DeltaDiscoveryRequest, DiscoveryRequest},
    google::rpc::Status,
};
use futures_util::{FutureExt as _, stream};
use http_body::Frame;
use http_body_util::StreamBody;
use prost::Message as _;

use super::{
    Config, Heard, ProtocolError, ResourceType, StreamPolicy,
    delta::Delta,
    sotw::Sotw,
    testing::{Bench, NO_HOST, Sent, Speak, node, put, remove, strings, version},
    wire::Requests,
};
use corpus::{Trace, fuzz};
use script::{Odd, Script, Step, kind, name, there, url};

const NEVER: &str = "never";

trait Fuzz: Speak {
    fn make(odd: &Odd, nonce: String, policy_version: Option<&String>) -> Self::Request;
    /// What a client says that wants everything of a type, one after the other, whatever was before.
    fn begin_anew(kind: ResourceType, nonce: String) -> Vec<Self::Request>;
}

fn status(error: bool) -> Option<Status> {
    error.then(|| Status { code: 13, message: "é".repeat(3000), details: Vec::new() })
}

impl Fuzz for Delta {
    fn make(odd: &Odd, nonce: String, _: Option<&String>) -> DeltaDiscoveryRequest {
        DeltaDiscoveryRequest {
            node: odd.node.map(|n| node(["n", "m"][usize::from(n)])),
            type_url: url(odd.url),
            resource_names_subscribe: odd.names.iter().map(|n| name(*n)).collect(),
            resource_names_unsubscribe: odd.gives_up.iter().map(|n| name(*n)).collect(),
            initial_resource_versions: odd
                .holds
                .iter()
                .map(|(n, text)| (name(*n), version(kind(odd.url), &name(*n), &text.to_string())))
                .collect(),
            response_nonce: nonce,
            error_detail: status(odd.error),
            ..Default::default()
        }
    }

    fn begin_anew(kind: ResourceType, response_nonce: String) -> Vec<DeltaDiscoveryRequest> {
        vec![DeltaDiscoveryRequest {
            type_url: kind.url().into(),
            resource_names_subscribe: strings(&["*"]),
            response_nonce,
            ..Default::default()
        }]
    }
}

impl Fuzz for Sotw {
    fn make(odd: &Odd, nonce: String, accepted: Option<&String>) -> DiscoveryRequest {
        DiscoveryRequest {
            node: odd.node.map(|n| node(["n", "m"][usize::from(n)])),
            type_url: url(odd.url),
            resource_names: odd.names.iter().map(|n| name(*n)).collect(),
            version_info: accepted.filter(|_| !odd.holds.is_empty()).cloned().unwrap_or_default(),
            response_nonce: nonce,
            error_detail: status(odd.error),
            ..Default::default()
        }
    }

    fn begin_anew(kind: ResourceType, response_nonce: String) -> Vec<DiscoveryRequest> {
        [NEVER, "*"]
            .map(|name| DiscoveryRequest {
                type_url: kind.url().into(),
                resource_names: strings(&[name]),
                response_nonce: response_nonce.clone(),
                ..Default::default()
            })
            .into()
    }
}

struct World<V: Fuzz> {
    server: Bench<V>,
    nonces: Vec<String>,
    trace: Trace,
}

/// The kind of an error, without what it is about.
fn variant(error: &ProtocolError) -> String {
    let text = format!("{error:?}");
    text.split([' ', '{', '(']).next().unwrap_or_default().to_owned()
}

fn few(count: usize) -> usize {
    count.min(2)
}

impl<V: Fuzz> World<V> {
    fn new(policy: StreamPolicy, synced: bool) -> Self {
        let config = Config { response_bytes: 300, names_per_stream: 40, ..Config::default() };
        let mut server = Bench::on(policy, config, None);
        if synced {
            server.apply([]);
        }
        Self {
            server,
            nonces: vec![String::new(), "zz".into(), "ffffffffffffffffff".into()],
            trace: Trace::default(),
        }
    }

    fn step(&mut self, step: &Step) -> Result<(), ProtocolError> {
        match step {
            Step::Put(k, n, text) => {
                self.server.apply([put(kind(*k), &there(kind(*k), *n), &text.to_string())]);
            }
            Step::Remove(k, n) => self.server.apply([remove(kind(*k), &there(kind(*k), *n))]),
            Step::Emit => drop(self.emit()),
            Step::Wait(seconds) => self.server.wait(std::time::Duration::from_secs((*seconds).into())),
            Step::Request(odd) => {
                let last = self.server.last.get(&kind(odd.url));
                let (nonce, version) = match odd.nonce {
                    Some(0..6) => (last.map(|sent| sent.nonce.clone()), last.map(|sent| &sent.version)),
                    Some(n) => (Some(self.nonces[usize::from(n) % self.nonces.len()].clone()), None),
                    None => (None, last.map(|sent| &sent.version)),
                };
                let mut request = V::make(odd, nonce.unwrap_or_default(), version);
                if !odd.flips.is_empty() {
                    let mut bytes = request.encode_to_vec();
                    for (place, byte) in &odd.flips {
                        let len = bytes.len().max(1);
                        if let Some(there) = bytes.get_mut(usize::from(*place) % len) {
                            *there = *byte;
                        }
                    }
                    let Ok(other) = V::Request::decode(bytes.as_slice()) else { return Ok(()) };
                    request = other;
                }
                self.hear(request)?;
            }
        }
        // Names that this script knows, of things that it has, and the few that flips invent.
        let due: usize = ResourceType::ALL
            .iter()
            .filter_map(|kind| self.server.served.engine.track(*kind))
            .map(|track| track.due.len())
            .sum();
        assert!(due < 200, "{due} names are due");
        Ok(())
    }

    fn hear(&mut self, request: V::Request) -> Result<(), ProtocolError> {
        let heard = self.server.try_request(request);
        self.heard(heard)
    }

    fn heard(&mut self, heard: Result<Heard, ProtocolError>) -> Result<(), ProtocolError> {
        self.trace.note(&match &heard {
            Ok(Heard::Request) => "a request".to_owned(),
            Ok(Heard::Acknowledged(kind, _)) => format!("acknowledged {kind:?}"),
            Ok(Heard::Rejected(kind, _)) => format!("rejected {kind:?}"),
            Err(error) => variant(error),
        });
        heard.map(drop)
    }

    fn emit(&mut self) -> Option<Sent> {
        let Some(sent) = self.server.next() else {
            self.trace.note("nothing to send");
            return None;
        };
        let (resources, removed) = (few(sent.resources.len()), few(sent.removed.len()));
        self.trace.note(&format!("sent {:?} {resources} {removed}", sent.kind));
        self.nonces.push(sent.nonce.clone());
        Some(sent)
    }

    /// From here on the client behaves, and is to end up with everything.
    fn finish(&mut self) -> Result<(), ProtocolError> {
        self.server.apply([put(ResourceType::Cluster, "a", "9")]);
        let mut view: BTreeMap<ResourceType, BTreeMap<String, String>> = BTreeMap::new();
        let rounds = V::begin_anew(ResourceType::Cluster, String::new()).len();
        for round in 0..rounds {
            for kind in ResourceType::ALL.into_iter().filter(|kind| V::serves(*kind)) {
                let nonce = self.server.last.get(&kind).map(|sent| sent.nonce.clone()).unwrap_or_default();
                self.server.try_request(V::begin_anew(kind, nonce).remove(round))?;
            }
            view.clear();
            let names = if round + 1 == rounds { "*" } else { NEVER };
            self.server.names = ResourceType::ALL.map(|kind| (kind, strings(&[names]))).into();
            let mut responses = 0;
            let mut patience = 3;
            while patience > 0 {
                let Some(sent) = self.emit() else {
                    // Whatever it did not answer before is not waited for any more.
                    self.server.wait(std::time::Duration::from_secs(60));
                    patience -= 1;
                    continue;
                };
                responses += 1;
                assert!(responses < 500, "it does not end");
                let Some(kind) = sent.kind else { continue };
                let view = view.entry(kind).or_default();
                let whole = matches!(kind, ResourceType::Cluster | ResourceType::Listener);
                if whole && V::PROTOCOL == super::Protocol::Sotw {
                    view.clear();
                }
                for name in &sent.removed {
                    view.remove(name);
                }
                let there = sent.resources.iter().filter(|(.., text)| text != NO_HOST);
                view.extend(there.map(|(name, _, text)| (name.clone(), text.clone())));
                self.server.ack(kind);
            }
        }
        let set = self.server.set.clone().unwrap();
        for kind in ResourceType::ALL.into_iter().filter(|kind| V::serves(*kind)) {
            let want: Vec<_> = set.iter(kind).map(|(name, _)| name.to_string()).collect();
            let have: Vec<_> = view.remove(&kind).unwrap_or_default().into_keys().collect();
            assert_eq!(have, want, "{kind:?}");
            assert_eq!(self.server.acknowledged(kind), set.revision().0, "{kind:?}");
        }
        Ok(())
    }
}

fn run<V: Fuzz>(bytes: &[u8]) -> Trace {
    let script = Script::read(bytes);
    let policy = if script.envoy { StreamPolicy::ENVOY } else { StreamPolicy::GRPC };
    let mut world = World::<V>::new(policy, script.synced);
    // Nothing but an error that a client can read is allowed to end a stream.
    let ended = script.steps.iter().try_for_each(|step| world.step(step)).and_then(|()| world.finish());
    world.trace.note(&ended.map_or_else(|error| variant(&error), |()| "it has everything".to_owned()));
    world.trace
}

#[test]
fn k2_delta_any_requests_end_in_an_error_or_the_truth() {
    fuzz("delta", 300, run::<Delta>);
}

#[test]
fn k2_sotw_any_requests_end_in_an_error_or_the_truth() {
    fuzz("sotw", 300, run::<Sotw>);
}

#[test]
fn k5_any_bytes_in_any_pieces_are_requests_or_an_error() {
    fuzz("wire_delta", 500, wire::<Delta>);
    fuzz("wire_sotw", 500, wire::<Sotw>);
}

/// The first byte says in pieces of which size the rest arrives. What can be decoded is asked of a server.
fn wire<V: Fuzz>(bytes: &[u8]) -> Trace {
    let (piece, bytes) = bytes.split_first().unwrap_or((&0, &[]));
    // Each has a head of five bytes.
    let most = bytes.len() / 5;
    let pieces: Vec<_> = bytes
        .chunks(usize::from(*piece).max(1))
        .map(|part| Ok::<_, tonic::Status>(Frame::data(Bytes::copy_from_slice(part))))
        .collect();
    let mut requests = Requests::<V::Request, _>::new(StreamBody::new(stream::iter(pieces)), 20_000, 100);
    let mut world = World::<V>::new(StreamPolicy::ENVOY, true);
    world.server.apply([put(ResourceType::Cluster, "a", "1"), put(ResourceType::Endpoints, "a", "1")]);
    let mut found = 0;
    loop {
        match requests.next().now_or_never().expect("nothing to wait for") {
            Ok(Some(request)) => {
                found += 1;
                assert!(found <= most, "{found} requests in {} bytes", bytes.len());
                let heard = world.server.hear(request);
                if world.heard(heard).is_err() {
                    return world.trace;
                }
                while world.emit().is_some() {}
            }
            Ok(None) => {
                world.trace.note("the client is done");
                return world.trace;
            }
            Err(status) => {
                // What it says of the place is about this input only.
                let about: String = status.message().chars().filter(|c| !c.is_ascii_digit()).collect();
                world.trace.note(&format!("{:?} {about}", status.code()));
                return world.trace;
            }
        }
    }
}
