//! Random histories: what is updated is what is rendered anew, and nothing refers to what is not there.

use proptest::prelude::*;

use super::*;

/// Every name that a resource refers to exists, and nothing exists that none refers to.
fn check_references(set: &ResourceSet, snapshot: &Snapshot, view: &View) {
    let names = |kind| set.iter(kind).map(|(name, _)| name.to_string()).collect::<BTreeSet<_>>();
    let services = snapshot.services().filter(|service| view.includes(&service.id));
    let mut services: BTreeSet<_> = services.map(|service| service.id.to_string()).collect();
    for service in snapshot.services().filter(|service| service.roles.is_some()) {
        for group in ["leader", "followers", "any"] {
            let name = format!("{}.{group}", service.id);
            let asked = view.upstreams.as_ref().is_none_or(|names| names.contains(name.as_str()));
            let taken = snapshot.services().any(|other| other.id.as_str() == name);
            if !taken && (asked || view.includes(&service.id)) {
                services.insert(name);
            }
        }
    }

    let (tcp, listeners): (BTreeSet<_>, BTreeSet<_>) =
        names(ResourceType::Listener).into_iter().partition(|name| name.starts_with("tcp/"));
    assert_eq!(tcp, view.tcp.keys().map(|name| format!("tcp/{name}")).collect());
    let mut routes = BTreeSet::new();
    for name in listeners {
        routes.insert(route_name(&http_connection_manager(&decode(set, ResourceType::Listener, &name))));
    }
    assert_eq!(names(ResourceType::Route), routes);

    let mut clusters = BTreeSet::new();
    for name in routes {
        let routes: RouteConfiguration = decode(set, ResourceType::Route, &name);
        for (host, route) in
            routes.virtual_hosts.iter().flat_map(|host| host.routes.iter().map(move |route| (host, route)))
        {
            if let Some(Action::Route(action)) = &route.action {
                match &action.cluster_specifier {
                    Some(ClusterSpecifier::Cluster(cluster)) => clusters.extend([cluster.clone()]),
                    // Named as the domain is.
                    Some(ClusterSpecifier::ClusterHeader(_)) => clusters.extend(host.domains.iter().cloned()),
                    other => panic!("{other:?}"),
                }
            }
        }
    }
    assert_eq!(names(ResourceType::Cluster), clusters);
    assert_eq!(clusters, services);

    let mut endpoints = BTreeSet::new();
    for name in clusters {
        let cluster: Cluster = decode(set, ResourceType::Cluster, &name);
        let eds = cluster.eds_cluster_config.unwrap().service_name;
        let eds = if eds.is_empty() { cluster.name } else { eds };
        let needs = &set.get(ResourceType::Cluster, &name).unwrap().resource.needs;
        assert_eq!(needs.iter().map(AsRef::as_ref).collect::<Vec<&str>>(), [eds.as_str()]);
        endpoints.insert(eds);
    }
    assert_eq!(names(ResourceType::Endpoints), endpoints);
    for name in endpoints {
        assert_eq!(load_assignment(set, &name).cluster_name, name);
    }
}

#[derive(Debug, Clone)]
pub(super) enum Op {
    PutService(u8),
    RemoveService(u8),
    PutInstance {
        service: u8,
        id: u8,
        port: u16,
        zone: u8,
        weight: u32,
        draining: bool,
    },
    RemoveInstance(u8, u8),
    /// In that term, with that leader if there is such an instance, and a learner.
    PutRoles {
        service: u8,
        term: u64,
        leader: u8,
        learner: u8,
    },
    RemoveRoles(u8),
    /// Bring the resources up to date, from the change list or from everything.
    Update {
        resync: bool,
    },
}

pub(super) fn op() -> impl Strategy<Value = Op> {
    prop_oneof![
        1 => (0..6u8).prop_map(Op::PutService),
        2 => (0..6u8).prop_map(Op::RemoveService),
        2 => (0..6u8, 0..3u64, 0..6u8, 0..5u8).prop_map(
            |(service, term, leader, learner)| Op::PutRoles { service, term, leader, learner }
        ),
        1 => (0..6u8).prop_map(Op::RemoveRoles),
        4 => (0..6u8, 0..5u8, 1..5u16, 0..6u8, 1..4u32, any::<bool>()).prop_map(
            |(service, id, port, zone, weight, draining)| Op::PutInstance { service, id, port, zone, weight, draining }
        ),
        2 => (0..6u8, 0..5u8).prop_map(|(service, id)| Op::RemoveInstance(service, id)),
        3 => any::<bool>().prop_map(|resync| Op::Update { resync }),
    ]
}

/// Where instances run, with zones of one name in several regions or none.
const PLACES: [&str; 6] = ["r0/z0", "r0/z1", "r1/z0", "r1/z2", "z1", ""];

pub(super) fn change(op: &Op) -> Option<catalog::Change> {
    let service = |service: &u8| match service {
        // What parts of others would be called.
        4 => "s0.leader".to_owned(),
        5 => "s1.any".to_owned(),
        _ => format!("s{service}"),
    };
    Some(match op {
        Op::PutService(s) => catalog::Change::PutService(service(s).parse().unwrap()),
        Op::RemoveService(s) => catalog::Change::RemoveService(service(s).parse().unwrap()),
        Op::PutInstance { service: s, id, port, zone, weight, draining } => {
            let (id, address, zone) =
                (format!("i{id}"), format!("10.0.0.1:{port}"), PLACES[usize::from(*zone)]);
            let state = if *draining { Draining } else { Serving };
            catalog::Change::PutInstance(instance(&service(s), (&id, &address, zone, *weight, state)))
        }
        Op::RemoveInstance(s, id) => catalog::Change::RemoveInstance(InstanceKey {
            service: service(s).parse().unwrap(),
            id: format!("i{id}").parse().unwrap(),
        }),
        Op::PutRoles { service: s, term, leader, learner } => {
            let id = |n: &u8| format!("i{n}").parse().unwrap();
            let others = [(id(learner), Role::Learner)].into();
            let roles = Roles { term: *term, leader: (*leader < 5).then(|| id(leader)), others };
            catalog::Change::PutRoles(service(s).parse().unwrap(), roles.into())
        }
        Op::RemoveRoles(s) => catalog::Change::RemoveRoles(service(s).parse().unwrap()),
        Op::Update { .. } => return None,
    })
}

fn view() -> impl Strategy<Value = View> {
    let kind = prop_oneof![Just(View::envoy(10_000)), Just(on_demand()), Just(by_host()), Just(View::grpc())];
    let place = prop::sample::select(vec![
        "", "z0", "z1", "r0/", "r0/z0", "r0/z1", "r1/z1", "r1/z9", "r9/z1", "r9/z9",
    ]);
    let names = vec!["s0", "s1", "s2", "s9", "s0.leader", "s1.any", "s2.followers", "s0.leader.leader"];
    let upstreams = prop::option::of(prop::sample::subsequence(names.clone(), 0..=4));
    let tcp = prop::sample::subsequence(names, 0..=3);
    (kind, place, upstreams, tcp).prop_map(|(view, place, upstreams, tcp)| {
        let mut view = near(place, view);
        if view.kind == ClientKind::Envoy {
            view.tcp = Arc::new(tcp.into_iter().map(|name| name.parse().unwrap()).zip(1..).collect());
        }
        upstreams.map_or(view.clone(), |upstreams| only(&upstreams, view))
    })
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    /// Any history: an updated set is what is rendered anew, all its references hold, a removed resource is remembered, and the
    /// widest place that is the same is.
    #[test]
    fn update_equals_render(history in proptest::collection::vec(op(), 1..60), view in view()) {
        let (mut writer, reader) = catalog();
        let mut set = render(&reader.latest(), &view);
        let (mut places, mut seen) = (Places::default(), reader.latest());
        for (n, op) in history.iter().enumerate() {
            if let Some(change) = change(op) {
                writer.apply(Revision(n as u64 + 1), vec![change]);
            }
            if let Op::Update { resync } = op {
                let (snapshot, touched) = reader.since(set.revision());
                let changes = if *resync { Changes::Resync } else { touched };
                let next = update(&set, &snapshot, &changes, &view);
                prop_assert_eq!(next.revision(), snapshot.revision());
                prop_assert_eq!(contents(&next), contents(&render(&snapshot, &view)));
                for (name, _) in set.iter(ResourceType::Cluster) {
                    let live = next.get(ResourceType::Cluster, name).is_some();
                    prop_assert!(live || next.gone(ResourceType::Endpoints, name).is_some());
                }
                check_references(&next, &snapshot, &view);
                set = next;

                places.follow(&seen, &snapshot, &changes, &view);
                let mut counted = Places::default();
                counted.follow(&Snapshot::default(), &snapshot, &Changes::Resync, &view);
                prop_assert_eq!(&places, &counted);
                let widest = View { locality: places.widest(&view.locality), ..view.clone() };
                prop_assert_eq!(contents(&render(&snapshot, &widest)), contents(&set), "{:?}", widest);
                seen = snapshot;
            }
        }
    }
}
