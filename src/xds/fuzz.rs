//! Clients that do not know the protocol, or want to do harm: whatever comes, nothing panics, nothing grows, and the stream
//! either ends with an error or serves a client that behaves from then on. `DISCO_FUZZ_SECONDS=600 cargo test --lib fuzz`
//! goes on for longer.

use std::collections::BTreeMap;

use bytes::Bytes;
use envoy_types::pb::{
    envoy::service::discovery::v3::{DeltaDiscoveryRequest, DiscoveryRequest},
    google::rpc::Status,
};
use futures_util::{FutureExt as _, stream};
use http_body::Frame;
use http_body_util::StreamBody;
use proptest::{collection::vec, option, prelude::*};
use prost::Message as _;

use super::{
    Config, ProtocolError, ResourceType, StreamPolicy,
    delta::Delta,
    sotw::Sotw,
    testing::{Bench, NO_HOST, Sent, Speak, node, put, random, remove, strings, version},
    wire::Requests,
};

/// A request of any kind, in the words of both forms.
#[derive(Debug, Clone)]
struct Odd {
    url: u8,
    names: Vec<u8>,
    gives_up: Vec<u8>,
    /// Of the type's newest response, of any earlier one, or invented.
    nonce: Option<u8>,
    error: bool,
    holds: Vec<(u8, u8)>,
    node: Option<u8>,
    /// Bytes to change in the encoded request.
    flips: Vec<(u16, u8)>,
}

#[derive(Debug, Clone)]
enum Step {
    Request(Odd),
    Put(u8, u8, u8),
    Remove(u8, u8),
    Emit,
    Wait(u8),
}

const NAMES: [&str; 6] = ["a", "b", "c", "x", "*", ""];
const NEVER: &str = "never";

fn name(n: u8) -> String {
    if n == 63 { "x".repeat(3000) } else { NAMES[usize::from(n) % NAMES.len()].to_owned() }
}

fn kind(n: u8) -> ResourceType {
    ResourceType::ALL[usize::from(n) % ResourceType::ALL.len()]
}

fn url(n: u8) -> String {
    match n {
        60 => String::new(),
        61 => "x".repeat(600),
        50.. => format!("type.googleapis.com/unknown.{}", n % 4),
        n => kind(n).url().to_owned(),
    }
}

fn steps() -> impl Strategy<Value = Vec<Step>> {
    let flips = prop_oneof![6 => Just(vec![]), 1 => vec(any::<(u16, u8)>(), 1..4)];
    let error = prop_oneof![3 => Just(false), 1 => Just(true)];
    let node = prop_oneof![80 => Just(None), 40 => Just(Some(0)), 1 => Just(Some(1))];
    // What is an error comes seldom: it ends the script.
    let url = prop_oneof![100 => 0..50_u8, 20 => 50..60_u8, 1 => 60..62_u8];
    let asked = prop_oneof![200 => 0..6_u8, 1 => Just(63_u8)];
    let request = (
        url,
        vec(asked, 0..4),
        vec(0..8_u8, 0..3),
        option::of(0..12_u8),
        error,
        vec((0..6_u8, 0..4_u8), 0..4),
        node,
        flips,
    );
    let request = request.prop_map(|(url, names, gives_up, nonce, error, holds, node, flips)| {
        Step::Request(Odd { url, names, gives_up, nonce, error, holds, node, flips })
    });
    let step = prop_oneof![
        6 => request,
        3 => (0..4_u8, 0..4_u8, 0..3_u8).prop_map(|(kind, name, text)| Step::Put(kind, name, text)),
        2 => (0..4_u8, 0..4_u8).prop_map(|(kind, name)| Step::Remove(kind, name)),
        4 => Just(Step::Emit),
        1 => (0..100_u8).prop_map(Step::Wait),
    ];
    vec(step, 0..60)
}

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
}

impl<V: Fuzz> World<V> {
    fn new(policy: StreamPolicy, synced: bool) -> Self {
        let config = Config { response_bytes: 300, names_per_stream: 40, ..Config::default() };
        let mut server = Bench::on(policy, config, None);
        if synced {
            server.apply([]);
        }
        Self { server, nonces: vec![String::new(), "zz".into(), "ffffffffffffffffff".into()] }
    }

    fn step(&mut self, step: &Step) -> Result<(), ProtocolError> {
        match step {
            Step::Put(k, n, text) => self.server.apply([put(kind(*k), &name(*n), &text.to_string())]),
            Step::Remove(k, n) => self.server.apply([remove(kind(*k), &name(*n))]),
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
                self.server.try_request(request)?;
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

    fn emit(&mut self) -> Option<Sent> {
        let sent = self.server.next()?;
        self.nonces.push(sent.nonce.clone());
        Some(sent)
    }

    /// From here on the client behaves, and is to end up with everything.
    fn finish(mut self) -> Result<(), ProtocolError> {
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

fn run<V: Fuzz>((steps, gentle, synced): (Vec<Step>, bool, bool)) {
    let policy = if gentle { StreamPolicy::ENVOY } else { StreamPolicy::GRPC };
    let mut world = World::<V>::new(policy, synced);
    for step in &steps {
        if world.step(step).is_err() {
            return;
        }
    }
    // Nothing but an error that a client can read is allowed to end a stream.
    let _ = world.finish();
}

#[test]
fn k2_delta_any_requests_end_in_an_error_or_the_truth() {
    random(300, (steps(), any::<bool>(), any::<bool>()), run::<Delta>);
}

#[test]
fn k2_sotw_any_requests_end_in_an_error_or_the_truth() {
    random(300, (steps(), any::<bool>(), any::<bool>()), run::<Sotw>);
}

#[test]
fn k5_any_bytes_in_any_pieces_are_requests_or_an_error() {
    let frame = (any::<bool>(), option::of(0..40_u32), vec(any::<u8>(), 0..60));
    let valid = (0..62_u8, vec(0..64_u8, 0..4), vec(any::<(u16, u8)>(), 0..2));
    random(500, (vec(frame, 0..4), vec(valid, 0..4), 1..64_usize), |(frames, valid, piece)| {
        let mut bytes = Vec::new();
        for (compressed, len, body) in frames {
            bytes.push(u8::from(compressed));
            bytes.extend(len.unwrap_or(u32::try_from(body.len()).unwrap()).to_be_bytes());
            bytes.extend(body);
        }
        for (type_url, names, flips) in valid {
            let request = DeltaDiscoveryRequest {
                type_url: url(type_url),
                resource_names_subscribe: names.into_iter().map(name).collect(),
                ..Default::default()
            };
            let mut body = request.encode_to_vec();
            let len = body.len().max(1);
            for (place, byte) in flips {
                if let Some(there) = body.get_mut(usize::from(place) % len) {
                    *there = byte;
                }
            }
            let mut framed = vec![0];
            framed.extend(u32::try_from(body.len()).unwrap().to_be_bytes());
            framed.extend(body);
            // Before and after what is broken.
            bytes = if piece % 2 == 0 { [bytes, framed].concat() } else { [framed, bytes].concat() };
        }
        let most = bytes.len() / 5;
        let pieces: Vec<_> = bytes
            .chunks(piece)
            .map(|part| Ok::<_, tonic::Status>(Frame::data(Bytes::copy_from_slice(part))))
            .collect();
        let body = StreamBody::new(stream::iter(pieces));
        let mut requests = Requests::<DeltaDiscoveryRequest, _>::new(body, 20_000, 100);
        let mut found = 0;
        while let Ok(Some(_)) = requests.next().now_or_never().expect("nothing to wait for") {
            found += 1;
            assert!(found <= most, "{found} requests in {} bytes", bytes.len());
        }
    });
}
