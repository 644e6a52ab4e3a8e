//! An Envoy whose endpoints are in collections. It keeps the members of a collection for each of its clusters, a changed cluster
//! begins without any, and it never tells which ones it holds.

use std::collections::{BTreeMap, BTreeSet, VecDeque};

use envoy_types::pb::envoy::{
    config::endpoint::v3::ClusterLoadAssignment, service::discovery::v3::DeltaDiscoveryRequest,
};
use proptest::prelude::*;

use crate::xds::{
    Change, Config, Resource, ResourceSet, ResourceType, StreamPolicy,
    delta::Delta,
    testing::{Bench, CDS, EDS, LEDS, Sent, Speak as _, delta, random, remove, resource},
};

const SERVICES: [&str; 2] = ["a", "b"];

#[derive(Debug, Clone, Copy)]
enum Step {
    /// A member of one of two collections of a service is there, with this content, or not.
    Member {
        service: u8,
        of: u8,
        id: u8,
        text: Option<u8>,
    },
    /// Whether a service's endpoints are in collections.
    Form {
        service: u8,
        collected: bool,
    },
    Cluster {
        service: u8,
        text: u8,
    },
    /// What was done since becomes one revision.
    Commit,
    Emit,
    ToClient,
    ToServer,
    Reconnect {
        fresh: bool,
    },
    Restart,
}

fn steps() -> impl Strategy<Value = Vec<Step>> {
    let service = || 0..2_u8;
    let step = prop_oneof![
        6 => (service(), 0..2_u8, 0..3_u8, prop::option::weighted(0.6, 0..3_u8))
            .prop_map(|(service, of, id, text)| Step::Member { service, of, id, text }),
        2 => (service(), any::<bool>()).prop_map(|(service, collected)| Step::Form { service, collected }),
        2 => (service(), 0..3_u8).prop_map(|(service, text)| Step::Cluster { service, text }),
        5 => Just(Step::Commit),
        8 => Just(Step::Emit),
        8 => Just(Step::ToClient),
        8 => Just(Step::ToServer),
        1 => any::<bool>().prop_map(|fresh| Step::Reconnect { fresh }),
        1 => Just(Step::Restart),
    ];
    prop::collection::vec(step, 0..150)
}

/// What the server is to serve.
#[derive(Debug, Clone, Default)]
struct Truth {
    clusters: BTreeMap<u8, u8>,
    collected: BTreeMap<u8, bool>,
    members: BTreeMap<(u8, u8, u8), u8>,
}

impl Truth {
    /// As `resources` makes it: a collection for each place that has anything, named anew in each history.
    fn resources(&self, history: usize) -> BTreeMap<(ResourceType, String), Resource> {
        let mut all = BTreeMap::new();
        for (n, service) in (0..).zip(SERVICES) {
            let mut message = ClusterLoadAssignment { cluster_name: service.into(), ..Default::default() };
            let mut globs = BTreeSet::new();
            let mut inline = String::from("all");
            for ((of, id), text) in self
                .members
                .iter()
                .filter(|((of, ..), _)| *of == n)
                .map(|((_, of, id), text)| ((of, id), text))
            {
                inline += &format!(",{of}/{id}={text}");
                if self.collected.get(&n).copied().unwrap_or(true) {
                    let path =
                        format!("xdstp:///envoy.config.endpoint.v3.LbEndpoint/{service}/{history}.{of}");
                    globs.insert(format!("{path}/*"));
                    let member = resource(LEDS, &format!("{path}/{id}"), &text.to_string());
                    all.insert((LEDS, member.name.to_string()), member);
                }
            }
            let globs: Vec<String> = globs.into_iter().collect();
            let text = if globs.is_empty() { inline } else { globs.join(" ") };
            message.named_endpoints.insert(text, Default::default());
            let needs: Vec<_> = globs.iter().map(|glob| glob.as_str().into()).collect();
            all.insert((EDS, service.into()), Resource::new(EDS, service, &message, needs));
            let text = self.clusters.get(&n).copied().unwrap_or_default().to_string();
            all.insert((CDS, service.into()), resource(CDS, service, &text));
        }
        all
    }

    fn changes(&self, set: &ResourceSet, history: usize) -> Vec<Change> {
        let resources = self.resources(history);
        let kinds = [CDS, EDS, LEDS];
        let there =
            kinds.into_iter().flat_map(|kind| set.iter(kind).map(move |(name, _)| (kind, name.to_string())));
        let gone = there.filter(|key| !resources.contains_key(key)).map(|(kind, name)| remove(kind, &name));
        gone.chain(resources.values().cloned().map(Change::Put)).collect()
    }
}

/// A cluster as Envoy has it.
#[derive(Debug, Clone, Default, PartialEq)]
struct Cluster {
    /// Its assignment, once it came.
    assignment: Option<String>,
    /// Members by collection; `None` until it was answered.
    members: BTreeMap<String, Option<BTreeMap<String, String>>>,
}

impl Cluster {
    fn globs(&self) -> BTreeSet<String> {
        let globs = self.assignment.iter().flat_map(|text| text.split(' '));
        globs.filter(|glob| glob.ends_with('*')).map(str::to_owned).collect()
    }

    fn assign(&mut self, text: &str) {
        self.assignment = Some(text.to_owned());
        let globs = self.globs();
        self.members.retain(|glob, _| globs.contains(glob));
        for glob in globs {
            self.members.entry(glob).or_default();
        }
    }

    fn is_warm(&self) -> bool {
        self.assignment.is_some() && self.members.values().all(Option::is_some)
    }

    /// What it would call.
    fn hosts(&self) -> BTreeSet<String> {
        let members = self.members.values().flatten().flatten();
        let one_by_one = members.map(|(name, text)| {
            let (path, id) = name.rsplit_once('/').unwrap();
            format!("{}/{id}={text}", &path[path.len() - 1..])
        });
        let inline = self.assignment.iter().filter_map(|text| text.strip_prefix("all,"));
        one_by_one.chain(inline.flat_map(|text| text.split(',').map(str::to_owned))).collect()
    }
}

struct World {
    server: Bench<Delta>,
    truth: Truth,
    history: usize,
    to_client: VecDeque<Sent>,
    to_server: VecDeque<DeltaDiscoveryRequest>,
    /// Content of clusters, and versions of what it says that it holds.
    clusters: BTreeMap<String, String>,
    versions: BTreeMap<ResourceType, BTreeMap<String, String>>,
    active: BTreeMap<String, Cluster>,
    warming: BTreeMap<String, Cluster>,
    asked: BTreeSet<ResourceType>,
    globs: BTreeSet<String>,
}

impl World {
    fn new() -> Self {
        let mut world = Self {
            server: Bench::on(StreamPolicy::ENVOY, config(), None),
            truth: Truth::default(),
            history: 0,
            to_client: VecDeque::new(),
            to_server: VecDeque::new(),
            clusters: BTreeMap::new(),
            versions: BTreeMap::new(),
            active: BTreeMap::new(),
            warming: BTreeMap::new(),
            asked: BTreeSet::new(),
            globs: BTreeSet::new(),
        };
        world.commit();
        world.connect();
        world
    }

    fn commit(&mut self) {
        let set = self.server.set.as_deref().cloned().unwrap_or_default();
        self.server.apply(self.truth.changes(&set, self.history));
    }

    fn connect(&mut self) {
        self.to_client.clear();
        self.to_server.clear();
        self.asked.clear();
        self.ask(CDS, &[], &[]);
        if !self.clusters.is_empty() {
            let names: Vec<_> = self.clusters.keys().cloned().collect();
            self.ask(EDS, &names, &[]);
        }
        let globs: Vec<_> = std::mem::take(&mut self.globs).into_iter().collect();
        if !globs.is_empty() {
            self.globs = globs.iter().cloned().collect();
            self.ask(LEDS, &globs, &[]);
        }
    }

    fn ask(&mut self, kind: ResourceType, come: &[String], go: &[String]) {
        let versions = self.versions.get(&kind).filter(|_| self.asked.insert(kind));
        self.to_server.push_back(DeltaDiscoveryRequest {
            initial_resource_versions: versions.cloned().unwrap_or_default().into_iter().collect(),
            resource_names_subscribe: come.to_vec(),
            resource_names_unsubscribe: go.to_vec(),
            ..delta(kind, &[], &[])
        });
    }

    /// Asks for the collections that any cluster now needs, and gives the others up.
    fn ask_globs(&mut self) {
        let all = self.active.values().chain(self.warming.values());
        let want: BTreeSet<String> = all.flat_map(Cluster::globs).collect();
        let come: Vec<_> = want.difference(&self.globs).cloned().collect();
        let go: Vec<_> = self.globs.difference(&want).cloned().collect();
        self.globs = want;
        if !come.is_empty() || !go.is_empty() {
            self.ask(LEDS, &come, &go);
        }
    }

    fn step(&mut self, step: Step) {
        match step {
            Step::Member { service, of, id, text } => {
                match text {
                    Some(text) => self.truth.members.insert((service, of, id), text),
                    None => self.truth.members.remove(&(service, of, id)),
                };
            }
            Step::Form { service, collected } => {
                self.truth.collected.insert(service, collected);
            }
            Step::Cluster { service, text } => {
                self.truth.clusters.insert(service, text);
            }
            Step::Commit => self.commit(),
            Step::Emit => self.to_client.extend(self.server.next()),
            Step::ToClient => {
                if let Some(sent) = self.to_client.pop_front() {
                    self.receive(&sent);
                }
            }
            Step::ToServer => {
                if let Some(request) = self.to_server.pop_front() {
                    self.server.request(request);
                }
            }
            Step::Reconnect { fresh } => {
                let (now, mut set) = (self.server.now, self.server.set.clone());
                if fresh {
                    // One that has just started does not know what went before.
                    self.history += 1;
                    let next = ResourceSet::default();
                    let changes = self.truth.changes(&next, self.history);
                    let revision = set.as_ref().unwrap().revision();
                    set = Some(std::sync::Arc::new(next.apply(revision, changes)));
                }
                self.server = Bench::on(StreamPolicy::ENVOY, config(), set);
                self.server.now = now;
                self.connect();
            }
            Step::Restart => {
                self.clusters.clear();
                self.versions.clear();
                self.active.clear();
                self.warming.clear();
                self.globs.clear();
                self.step(Step::Reconnect { fresh: false });
            }
        }
    }

    fn receive(&mut self, sent: &Sent) {
        let kind = sent.kind.unwrap();
        if kind != LEDS {
            let versions = self.versions.entry(kind).or_default();
            versions.extend(sent.resources.iter().map(|(name, version, _)| (name.clone(), version.clone())));
            versions.retain(|name, _| !sent.removed.contains(name));
        }
        self.to_server.push_back(Delta::answer(sent, &[], None, None));
        match kind {
            CDS => {
                let mut new = Vec::new();
                for (name, _, text) in &sent.resources {
                    match self.clusters.insert(name.clone(), text.clone()) {
                        Some(before) if before == *text => continue,
                        None => new.push(name.clone()),
                        Some(_) => {}
                    }
                    self.warming.insert(name.clone(), Cluster::default());
                }
                if !new.is_empty() {
                    self.ask(EDS, &new, &[]);
                }
            }
            EDS => {
                for (name, _, text) in &sent.resources {
                    for clusters in [&mut self.active, &mut self.warming] {
                        clusters.get_mut(name).into_iter().for_each(|cluster| cluster.assign(text));
                    }
                }
            }
            LEDS => self.receive_members(sent),
            other => panic!("{other:?}"),
        }
        let warm: Vec<_> =
            self.warming.iter().filter(|(_, cluster)| cluster.is_warm()).map(|(n, _)| n.clone()).collect();
        for name in warm {
            let cluster = self.warming.remove(&name).unwrap();
            self.active.insert(name, cluster);
        }
        self.ask_globs();
    }

    fn receive_members(&mut self, sent: &Sent) {
        let glob_of = |name: &str| format!("{}/*", name.rsplit_once('/').unwrap().0);
        let names = sent.resources.iter().map(|(name, ..)| name).chain(&sent.removed);
        let globs: BTreeSet<String> = names.map(|name| glob_of(name)).collect();
        for cluster in self.active.values_mut().chain(self.warming.values_mut()) {
            for (glob, members) in cluster.members.iter_mut().filter(|(glob, _)| globs.contains(*glob)) {
                let members = members.get_or_insert_default();
                for name in &sent.removed {
                    members.remove(name);
                }
                let its = sent.resources.iter().filter(|(name, ..)| glob_of(name) == *glob);
                members.extend(its.map(|(name, _, text)| (name.clone(), text.clone())));
            }
        }
    }

    fn quiesce(&mut self) -> usize {
        let mut responses = 0;
        loop {
            responses += self.server.exchange(&mut self.to_server, &mut self.to_client);
            assert!(responses < 1000, "it does not end");
            let Some(sent) = self.to_client.pop_front() else { return responses };
            self.receive(&sent);
        }
    }

    fn finish(&mut self) {
        self.commit();
        self.quiesce();
        assert_eq!(self.warming, BTreeMap::new(), "nothing waits for what does not come");
        for (n, service) in (0..).zip(SERVICES) {
            let members = self.truth.members.iter().filter(|((of, ..), _)| *of == n);
            let want: BTreeSet<String> =
                members.map(|((_, of, id), text)| format!("{of}/{id}={text}")).collect();
            assert_eq!(self.active[service].hosts(), want, "{service}");
        }
        let revision = self.server.set.as_ref().unwrap().revision().0;
        let asked = self.asked.clone();
        for kind in asked {
            if kind != LEDS || !self.globs.is_empty() {
                assert_eq!(self.server.acknowledged(kind), revision, "acknowledged {kind:?}");
            }
        }
        self.server.apply([]);
        assert_eq!(self.quiesce(), 0, "a message without a cause");
        // One change, one response.
        self.truth.members.insert((0, 0, 0), 9);
        self.truth.collected.insert(0, true);
        self.commit();
        self.quiesce();
        self.truth.members.insert((0, 0, 0), 8);
        self.commit();
        assert_eq!(self.quiesce(), 1);
    }
}

fn config() -> Config {
    Config { response_bytes: 400, ..Config::default() }
}

#[test]
fn x3_l4_o4_d9_collections_converge() {
    random(300, steps(), |steps| {
        let mut world = World::new();
        for step in steps {
            world.step(step);
        }
        world.finish();
    });
}
