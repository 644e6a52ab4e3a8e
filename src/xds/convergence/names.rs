//! A client that comes and goes by name, like proxyless gRPC or an Envoy with on-demand clusters.

use std::collections::{BTreeMap, BTreeSet, VecDeque};

use proptest::prelude::*;

use super::{Client, View};
use crate::xds::{
    Config, Protocol, ResourceType, StreamPolicy,
    delta::Delta,
    sotw::Sotw,
    testing::{self, Bench, LDS, RDS, Sent, put, random, remove},
};

#[derive(Debug, Clone)]
enum Step {
    Put(ResourceType, u8, u8),
    PutBad(ResourceType, u8),
    Remove(ResourceType, u8),
    /// Asks for a name, `*` with 0; names are 1 to 4.
    Subscribe(ResourceType, u8),
    Unsubscribe(ResourceType, u8),
    Emit,
    ToClient,
    ToServer,
    /// The connection is lost and made again, to the same server or to one that has just started, by the same client or
    /// by one that holds nothing.
    Reconnect {
        fresh: bool,
        forgetful: bool,
    },
}

fn steps() -> impl Strategy<Value = Vec<Step>> {
    let kind = || prop_oneof![Just(LDS), Just(RDS)];
    let step = prop_oneof![
        3 => (kind(), 1..5_u8, 0..3_u8).prop_map(|(kind, name, text)| Step::Put(kind, name, text)),
        1 => (kind(), 1..5_u8).prop_map(|(kind, name)| Step::PutBad(kind, name)),
        2 => (kind(), 1..5_u8).prop_map(|(kind, name)| Step::Remove(kind, name)),
        4 => (kind(), 0..5_u8).prop_map(|(kind, name)| Step::Subscribe(kind, name)),
        3 => (kind(), 0..5_u8).prop_map(|(kind, name)| Step::Unsubscribe(kind, name)),
        6 => Just(Step::Emit),
        6 => Just(Step::ToClient),
        6 => Just(Step::ToServer),
        1 => (any::<bool>(), any::<bool>())
            .prop_map(|(fresh, forgetful)| Step::Reconnect { fresh, forgetful }),
    ];
    prop::collection::vec(step, 0..100)
}

const BAD: &str = "bad";
/// Asked for all the time, so that no list is empty by chance of being the first; never exists.
const ALWAYS: &str = "none";

fn config(small: bool) -> Config {
    Config { response_bytes: if small { 200 } else { 1 << 20 }, ..Config::default() }
}

struct World<V: Client> {
    server: Bench<V>,
    to_client: VecDeque<Sent>,
    to_server: VecDeque<V::Request>,
    names: BTreeMap<ResourceType, BTreeSet<String>>,
    view: View,
    newest: BTreeMap<ResourceType, Sent>,
    accepted: BTreeMap<ResourceType, String>,
    small: bool,
}

impl<V: Client> World<V> {
    fn new(small: bool) -> Self {
        let mut world = Self {
            server: Bench::with(StreamPolicy::GRPC, config(small), []),
            to_client: VecDeque::new(),
            to_server: VecDeque::new(),
            names: BTreeMap::new(),
            view: View::new(),
            newest: BTreeMap::new(),
            accepted: BTreeMap::new(),
            small,
        };
        for kind in [LDS, RDS] {
            world.names.entry(kind).or_default().insert(ALWAYS.into());
        }
        world.connect();
        world
    }

    fn connect(&mut self) {
        self.to_client.clear();
        self.to_server.clear();
        self.newest.clear();
        for kind in [LDS, RDS] {
            self.to_server.push_back(V::first(kind, &self.all(kind), &self.view, self.accepted.get(&kind)));
        }
    }

    fn step(&mut self, step: Step) {
        let name = |n: u8| if n == 0 { "*".to_owned() } else { n.to_string() };
        match step {
            Step::Put(kind, n, text) => self.server.apply([put(kind, &name(n), &text.to_string())]),
            Step::PutBad(kind, n) => self.server.apply([put(kind, &name(n), BAD)]),
            Step::Remove(kind, n) => self.server.apply([remove(kind, &name(n))]),
            Step::Subscribe(kind, n) => self.subscribe(kind, name(n), true),
            Step::Unsubscribe(kind, n) => self.subscribe(kind, name(n), false),
            Step::Emit => self.to_client.extend(self.server.next()),
            Step::ToClient => {
                if let Some(sent) = self.to_client.pop_front() {
                    self.receive(sent);
                }
            }
            Step::ToServer => {
                if let Some(request) = self.to_server.pop_front() {
                    self.server.request(request);
                }
            }
            Step::Reconnect { fresh, forgetful } => {
                let mut set = self.server.set.clone().unwrap();
                if fresh {
                    set = Bench::<V>::fresh(&set);
                }
                self.server = Bench::on(StreamPolicy::GRPC, config(self.small), Some(set));
                if forgetful {
                    self.view.clear();
                    self.accepted.clear();
                }
                self.connect();
            }
        }
    }

    fn covers(&self, kind: ResourceType, name: &str) -> bool {
        self.names[&kind].contains("*") || self.names[&kind].contains(name)
    }

    fn all(&self, kind: ResourceType) -> Vec<String> {
        self.names[&kind].iter().cloned().collect()
    }

    fn subscribe(&mut self, kind: ResourceType, name: String, on: bool) {
        let names = self.names.get_mut(&kind).unwrap();
        if on {
            names.insert(name.clone());
        } else {
            names.remove(&name);
        }
        let all = self.all(kind);
        let (came, went) = if on { (vec![name], vec![]) } else { (vec![], vec![name]) };
        let (newest, accepted) = (self.newest.get(&kind), self.accepted.get(&kind));
        self.to_server.extend(V::resubscribe(kind, &all, &came, &went, newest, accepted));
        // What is not subscribed to is dropped; under the wildcard the server says what becomes of it.
        let names = &self.names[&kind];
        if !names.contains("*") {
            self.view.entry(kind).or_default().retain(|name, _| names.contains(name));
        }
    }

    fn receive(&mut self, sent: Sent) {
        let kind = sent.kind.unwrap();
        self.newest.insert(kind, sent.clone());
        let bad = sent.resources.iter().any(|(name, _, text)| text == BAD && self.covers(kind, name));
        let error = bad.then_some("bad");
        if !bad {
            let mut there = self.view.remove(&kind).unwrap_or_default();
            if kind == LDS && V::PROTOCOL == Protocol::Sotw {
                there.clear();
            }
            for name in &sent.removed {
                there.remove(name);
            }
            for (name, version, text) in &sent.resources {
                if self.covers(kind, name) {
                    there.insert(name.clone(), (version.clone(), text.clone()));
                }
            }
            self.view.insert(kind, there);
            self.accepted.insert(kind, sent.version.clone());
        }
        let accepted = self.accepted.get(&kind).map(String::as_str);
        self.to_server.push_back(V::answer(&sent, &self.all(kind), accepted, error));
    }

    fn quiesce(&mut self) -> usize {
        let mut responses = 0;
        loop {
            responses += self.server.exchange(&mut self.to_server, &mut self.to_client);
            assert!(responses < 1000, "it does not end");
            let Some(sent) = self.to_client.pop_front() else { return responses };
            self.receive(sent);
        }
    }

    fn finish(&mut self) {
        // What is bad is rejected once, not for ever (rule S4).
        self.quiesce();
        assert_eq!(self.quiesce(), 0, "a message without a cause");
        let set = self.server.set.clone().unwrap();
        for kind in [LDS, RDS] {
            for (name, _) in set.iter(kind) {
                let good = self.server.set.as_ref().unwrap().get(kind, name).unwrap();
                if good.resource.version == testing::resource(kind, name, BAD).version {
                    self.server.apply([put(kind, name, "0")]);
                }
            }
        }
        self.quiesce();
        let set = self.server.set.clone().unwrap();
        for kind in [LDS, RDS] {
            let want: BTreeMap<&str, String> = set
                .iter(kind)
                .filter(|(name, _)| self.covers(kind, name))
                .map(|(name, entry)| (name.as_ref(), entry.resource.version.to_string()))
                .collect();
            let view = self.view.get(&kind).cloned().unwrap_or_default();
            let have: BTreeMap<&str, String> = view
                .iter()
                // In SotW the removal of a route is not told.
                .filter(|(name, _)| {
                    kind == LDS || V::PROTOCOL == Protocol::Delta || want.contains_key(name.as_str())
                })
                .map(|(name, (_, text))| {
                    let resource = testing::resource(kind, name, text);
                    (name.as_str(), resource.version.to_string())
                })
                .collect();
            assert_eq!(have, want, "{kind:?}, small responses: {}", self.small);
            if !(self.names[&kind].is_empty()) {
                assert_eq!(self.server.acknowledged(kind), set.revision().0, "acknowledged {kind:?}");
            }
        }
        self.server.apply([]);
        assert_eq!(self.quiesce(), 0, "a message without a cause");
    }
}

fn run<V: Client>(steps: Vec<Step>, small: bool) {
    let mut world = World::<V>::new(small);
    for step in steps {
        world.step(step);
    }
    world.finish();
}

#[test]
fn d3_d4_d7_w7_delta_converges_by_name() {
    random(300, (steps(), any::<bool>()), |(steps, small)| run::<Delta>(steps, small));
}

#[test]
fn w5_w6_w7_s6_sotw_converges_by_name() {
    random(300, (steps(), any::<bool>()), |(steps, small)| run::<Sotw>(steps, small));
}
