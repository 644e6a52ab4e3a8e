//! An Envoy: wildcards for clusters and listeners, names for endpoints and routes, clusters that warm.

use std::{
    collections::{BTreeMap, BTreeSet, VecDeque},
    time::Duration,
};

use envoy_types::pb::google::protobuf::Any;
use proptest::prelude::*;
use prost::Message as _;

use super::{Client, View};
use crate::xds::{
    Config, Protocol, ResourceType, StreamPolicy,
    delta::Delta,
    sotw::Sotw,
    testing::{self, Bench, CDS, EDS, LDS, RDS, Sent, put, random, remove},
};

/// One step of a history.
#[derive(Debug, Clone, Copy)]
enum Step {
    /// The server's content changes.
    Change(Edit),
    /// The server sends one response, if it has one.
    Emit,
    /// The client takes one response.
    ToClient,
    /// The server takes one request.
    ToServer,
    /// The connection is lost and made again, to the same server or to one that has just started.
    Reconnect { fresh: bool, endpoints_first: bool },
    /// Envoy starts anew and holds nothing.
    Restart,
    /// Everything goes through, and time passes.
    Settle,
}

/// What a history may have in it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Reconnects {
    /// To the same server: a new one cannot tell what a SotW client holds that is gone.
    SameServer,
    AnyServer,
}

/// What must hold of routes at any time.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Check {
    /// Their clusters are there.
    References,
    /// No cluster that one goes to is removed. Where clusters are rejected there is no more to ask for.
    Removals,
    /// The protocol does not allow more than that the client gets there.
    Nothing,
}

#[derive(Debug, Clone, Copy)]
enum Edit {
    /// A cluster and its endpoints come, or change.
    Cluster {
        name: u8,
        text: u8,
    },
    Endpoints {
        name: u8,
        text: u8,
    },
    Listener {
        name: u8,
        text: u8,
    },
    /// A route goes to another cluster, if that exists.
    Route {
        name: u8,
        cluster: u8,
    },
    /// A cluster and its endpoints go; routes to it go to another one in the same moment.
    RemoveCluster {
        name: u8,
    },
    RemoveListener {
        name: u8,
    },
    /// Endpoints or a route that the client rejects.
    BadEndpoints {
        name: u8,
    },
    BadRoute {
        name: u8,
    },
    BadCluster {
        name: u8,
    },
    Nothing,
}

fn steps(bad_clusters: bool, reconnects: Reconnects) -> impl Strategy<Value = Vec<Step>> {
    let (name, text) = (0..4_u8, 0..3_u8);
    let bad = name.clone().prop_map(move |name| {
        if bad_clusters { Edit::BadCluster { name } } else { Edit::BadEndpoints { name } }
    });
    let edit = prop_oneof![
        3 => (name.clone(), text.clone()).prop_map(|(name, text)| Edit::Cluster { name, text }),
        3 => (name.clone(), text.clone()).prop_map(|(name, text)| Edit::Endpoints { name, text }),
        1 => (name.clone(), text).prop_map(|(name, text)| Edit::Listener { name, text }),
        4 => (0..2_u8, name.clone()).prop_map(|(name, cluster)| Edit::Route { name, cluster }),
        3 => name.clone().prop_map(|name| Edit::RemoveCluster { name }),
        1 => name.clone().prop_map(|name| Edit::RemoveListener { name }),
        1 => name.prop_map(|name| Edit::BadEndpoints { name }),
        1 => (0..2_u8).prop_map(|name| Edit::BadRoute { name }),
        1 => bad,
        1 => Just(Edit::Nothing),
    ];
    let reconnect = (any::<bool>(), any::<bool>()).prop_map(move |(fresh, endpoints_first)| {
        let fresh = fresh && reconnects == Reconnects::AnyServer;
        Step::Reconnect { fresh, endpoints_first }
    });
    let step = prop_oneof![
        6 => edit.prop_map(Step::Change),
        8 => Just(Step::Emit),
        8 => Just(Step::ToClient),
        8 => Just(Step::ToServer),
        2 => reconnect,
        1 => Just(Step::Restart),
        2 => Just(Step::Settle),
    ];
    prop::collection::vec(step, 0..120)
}

/// A server, an Envoy, and what is on its way between them.
struct World<V: Client> {
    server: Bench<V>,
    to_client: VecDeque<Sent>,
    to_server: VecDeque<V::Request>,
    view: View,
    newest: BTreeMap<ResourceType, Sent>,
    accepted: BTreeMap<ResourceType, String>,
    endpoints_asked: bool,
    /// Clusters that wait for endpoints; the answer to clusters waits for them.
    warming: BTreeSet<String>,
    unanswered_clusters: Option<Sent>,
    check: Check,
}

const BAD: &str = "bad";

impl<V: Client> World<V> {
    fn new(check: Check) -> Self {
        let start = [put(CDS, "0", "0"), put(EDS, "0", "0"), put(LDS, "0", "0")];
        let routes = [put(RDS, "0", "0"), put(RDS, "1", "0")];
        let mut world = Self {
            server: Bench::new(start.into_iter().chain(routes)),
            to_client: VecDeque::new(),
            to_server: VecDeque::new(),
            view: View::new(),
            newest: BTreeMap::new(),
            accepted: BTreeMap::new(),
            endpoints_asked: false,
            warming: BTreeSet::new(),
            unanswered_clusters: None,
            check,
        };
        world.connect(false);
        world
    }

    fn step(&mut self, step: Step) {
        match step {
            Step::Change(edit) => self.edit(edit),
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
            Step::Reconnect { fresh, endpoints_first } => {
                let mut set = self.server.set.clone().unwrap();
                if fresh {
                    set = Bench::<V>::fresh(&set);
                }
                let now = self.server.now;
                self.server = Bench::on(StreamPolicy::ENVOY, Config::default(), Some(set));
                self.server.now = now;
                self.connect(endpoints_first);
            }
            Step::Settle => {
                self.quiesce();
            }
            Step::Restart => {
                self.view.clear();
                self.accepted.clear();
                self.warming.clear();
                self.step(Step::Reconnect { fresh: false, endpoints_first: false });
            }
        }
    }

    fn connect(&mut self, endpoints_first: bool) {
        self.to_client.clear();
        self.to_server.clear();
        self.newest.clear();
        self.unanswered_clusters = None;
        self.endpoints_asked = false;
        if endpoints_first {
            self.ask_endpoints(&BTreeSet::new());
        }
        for (kind, names) in
            [(CDS, vec![]), (EDS, vec![]), (LDS, vec![]), (RDS, vec!["0".into(), "1".into()])]
        {
            if kind == EDS {
                if !self.endpoints_asked {
                    self.ask_endpoints(&BTreeSet::new());
                }
            } else {
                self.to_server.push_back(V::first(kind, &names, &self.view, self.accepted.get(&kind)));
            }
        }
    }

    fn clusters(&self) -> BTreeSet<String> {
        self.view.get(&CDS).into_iter().flatten().map(|(name, _)| name.clone()).collect()
    }

    /// Asks for the endpoints of the clusters that are there, as compared to those that were there before.
    fn ask_endpoints(&mut self, before: &BTreeSet<String>) {
        let clusters = self.clusters();
        let names: Vec<String> = clusters.iter().cloned().collect();
        let accepted = self.accepted.get(&EDS);
        if !self.endpoints_asked {
            if !names.is_empty() {
                self.endpoints_asked = true;
                self.to_server.push_back(V::first(EDS, &names, &self.view, accepted));
            }
            return;
        }
        let came: Vec<String> = clusters.difference(before).cloned().collect();
        let went: Vec<String> = before.difference(&clusters).cloned().collect();
        let newest = self.newest.get(&EDS);
        self.to_server.extend(V::resubscribe(EDS, &names, &came, &went, newest, accepted));
    }

    fn edit(&mut self, edit: Edit) {
        let set = self.server.set.clone().unwrap();
        let has = |kind, name: &str| set.get(kind, name).is_some();
        let text = |n: u8| n.to_string();
        let changes = match edit {
            Edit::Cluster { name, text: t } => {
                let (name, t) = (text(name), text(t));
                let endpoints = (!has(EDS, &name)).then(|| put(EDS, &name, &t));
                endpoints.into_iter().chain([put(CDS, &name, &t)]).collect()
            }
            Edit::Endpoints { name, text: t } if has(EDS, &text(name)) => {
                vec![put(EDS, &text(name), &text(t))]
            }
            Edit::Listener { name, text: t } => vec![put(LDS, &text(name), &text(t))],
            Edit::Route { name, cluster } if has(CDS, &text(cluster)) => {
                vec![put(RDS, &text(name), &text(cluster))]
            }
            // Cluster 0 always stays, so that there is one to go to.
            Edit::RemoveCluster { name } if name != 0 => {
                let name = text(name);
                let routes = set.iter(RDS).filter(|(_, entry)| {
                    entry.resource.version == testing::resource(RDS, &entry.resource.name, &name).version
                });
                let moved = routes.map(|(route, _)| put(RDS, route, "0"));
                moved.chain([remove(CDS, &name), remove(EDS, &name)]).collect()
            }
            Edit::RemoveListener { name } => vec![remove(LDS, &text(name))],
            Edit::BadEndpoints { name } if has(EDS, &text(name)) => vec![put(EDS, &text(name), BAD)],
            Edit::BadRoute { name } => vec![put(RDS, &text(name), BAD)],
            Edit::BadCluster { name } if has(CDS, &text(name)) => vec![put(CDS, &text(name), BAD)],
            _ => vec![],
        };
        self.server.apply(changes);
    }

    fn receive(&mut self, sent: Sent) {
        let kind = sent.kind.unwrap();
        self.newest.insert(kind, sent.clone());
        if sent.resources.iter().any(|(_, _, text)| text == BAD) {
            return self.answer(&sent, Some("bad"));
        }
        let full = sent.resources.iter().all(|(_, version, _)| version.is_empty())
            && sent.removed.is_empty()
            && matches!(kind, CDS | LDS)
            && V::PROTOCOL == Protocol::Sotw;
        let before = self.clusters();
        let mut there = self.view.remove(&kind).unwrap_or_default();
        if full {
            let names: BTreeSet<&String> = sent.resources.iter().map(|(name, ..)| name).collect();
            there.retain(|name, _| names.contains(name));
        }
        for name in &sent.removed {
            there.remove(name);
        }
        for (name, version, text) in &sent.resources {
            if kind == EDS && !before.contains(name) {
                continue;
            }
            let new = (version.clone(), text.clone());
            if there.insert(name.clone(), new.clone()) != Some(new) && kind == CDS {
                self.warming.insert(name.clone());
            }
        }
        self.view.insert(kind, there);
        self.accepted.insert(kind, sent.version.clone());
        if kind == CDS {
            let after = self.clusters();
            self.warming.retain(|name| after.contains(name));
            if let Some(endpoints) = self.view.get_mut(&EDS) {
                endpoints.retain(|name, _| after.contains(name));
            }
            self.ask_endpoints(&before);
            self.unanswered_clusters = Some(sent);
        } else {
            if kind == EDS {
                for name in sent.resources.iter().map(|(name, ..)| name).chain(&sent.removed) {
                    self.warming.remove(name);
                }
            }
            self.answer(&sent, None);
        }
        self.answer_clusters();
        let clusters = self.clusters();
        for (route, (_, cluster)) in self.view.get(&RDS).into_iter().flatten() {
            let exempt = match self.check {
                Check::References => false,
                Check::Removals => !before.contains(cluster),
                Check::Nothing => true,
            };
            assert!(
                exempt || clusters.contains(cluster),
                "route {route} to {cluster}, which is not in {clusters:?}"
            );
        }
    }

    /// Envoy answers to clusters once they are warm.
    fn answer_clusters(&mut self) {
        if self.warming.is_empty()
            && let Some(sent) = self.unanswered_clusters.take()
        {
            self.answer(&sent, None);
        }
    }

    fn answer(&mut self, sent: &Sent, error: Option<&str>) {
        let kind = sent.kind.unwrap();
        let names: Vec<String> = match kind {
            EDS => self.clusters().into_iter().collect(),
            RDS => vec!["0".into(), "1".into()],
            _ => vec![],
        };
        let accepted = self.accepted.get(&kind).map(String::as_str);
        self.to_server.push_back(V::answer(sent, &names, accepted, error));
    }

    /// Until nothing happens any more, however long one waits. Returns how many responses there were, and
    /// how many had anything in them.
    fn quiesce(&mut self) -> (usize, usize) {
        let mut responses = 0;
        let mut full = 0;
        let mut idle = 0;
        while idle < 8 {
            let mut busy = self.server.exchange(&mut self.to_server, &mut self.to_client) > 0;
            while let Some(sent) = self.to_client.pop_front() {
                busy = true;
                responses += 1;
                full += usize::from(!sent.resources.is_empty() || !sent.removed.is_empty());
                assert!(responses < 1000, "it does not end");
                self.receive(sent);
            }
            if !busy {
                idle += 1;
                self.server.wait(Duration::from_secs(15));
                // Envoy warms with what it has after this time.
                self.warming.clear();
                self.answer_clusters();
            }
        }
        (responses, full)
    }

    fn finish(&mut self) {
        // What is bad is rejected once, not for ever (rule S4).
        self.quiesce();
        assert_eq!(self.quiesce().0, 0);
        // What is bad is mended.
        let set = self.server.set.clone().unwrap();
        let mut changes = Vec::new();
        for kind in [CDS, EDS, LDS, RDS] {
            for (name, entry) in set.iter(kind) {
                if entry.resource.version == testing::resource(kind, name, BAD).version {
                    changes.push(put(kind, name, "0"));
                }
            }
        }
        self.server.apply(changes);
        self.quiesce();
        let set = self.server.set.clone().unwrap();
        for kind in testing::IN_BOTH {
            let want: BTreeMap<String, String> = set
                .iter(kind)
                .map(|(name, entry)| {
                    let any = Any::decode(entry.resource.any()).unwrap();
                    (name.to_string(), testing::text_of(kind, &any.value))
                })
                .collect();
            let have: BTreeMap<String, String> = self
                .view
                .get(&kind)
                .into_iter()
                .flatten()
                .map(|(name, (_, text))| (name.clone(), text.clone()))
                .collect();
            assert_eq!(have, want, "{kind:?}");
            assert_eq!(self.server.acknowledged(kind), set.revision().0, "acknowledged {kind:?}");
        }
        // No message without a cause.
        self.server.apply([]);
        assert_eq!(self.quiesce().0, 0);
        // In SotW names that were given up are still in the version that was told last; the next response sets that right.
        self.edit(Edit::Endpoints { name: 0, text: 9 });
        self.quiesce();
        self.step(Step::Reconnect { fresh: true, endpoints_first: false });
        assert_eq!(self.quiesce().1, 0, "a reconnect that holds everything is sent nothing");
    }
}

fn run<V: Client>(steps: &[Step], check: Check) {
    let mut world = World::<V>::new(check);
    for step in steps {
        world.step(*step);
    }
    world.finish();
}

#[test]
fn o2_o3_delta_converges_and_no_route_lacks_its_cluster() {
    random(300, steps(false, Reconnects::AnyServer), |steps| run::<Delta>(&steps, Check::References));
}

#[test]
fn o2_o3_sotw_converges_and_no_route_lacks_its_cluster() {
    random(300, steps(false, Reconnects::SameServer), |steps| run::<Sotw>(&steps, Check::References));
}

#[test]
fn o3_s4_d15_delta_with_rejected_clusters_removes_none_in_use() {
    random(300, steps(true, Reconnects::AnyServer), |steps| run::<Delta>(&steps, Check::Removals));
}

#[test]
fn o3_s4_sotw_with_rejected_clusters_removes_none_in_use() {
    random(300, steps(true, Reconnects::SameServer), |steps| run::<Sotw>(&steps, Check::Removals));
}

#[test]
fn s4_s9_sotw_converges_over_restarts_of_the_server() {
    random(300, steps(true, Reconnects::AnyServer), |steps| run::<Sotw>(&steps, Check::Nothing));
}
