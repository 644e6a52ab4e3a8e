//! Random histories: what is updated is what is rendered anew, and nothing refers to what is not there.

use proptest::prelude::*;

use super::*;

/// Every name that a resource refers to exists, and nothing exists that none refers to.
fn check_references(set: &ResourceSet, snapshot: &Snapshot, view: &View) {
    let names = |kind| set.iter(kind).map(|(name, _)| name.to_string()).collect::<BTreeSet<_>>();
    let services = snapshot.services().filter(|service| view.includes(&service.id));
    let services: BTreeSet<_> = services.map(|service| service.id.to_string()).collect();

    let mut routes = BTreeSet::new();
    for name in names(ResourceType::Listener) {
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
    /// Bring the resources up to date, from the change list or from everything.
    Update {
        resync: bool,
    },
}

pub(super) fn op() -> impl Strategy<Value = Op> {
    prop_oneof![
        1 => (0..4u8).prop_map(Op::PutService),
        1 => (0..4u8).prop_map(Op::RemoveService),
        4 => (0..4u8, 0..5u8, 1..5u16, 0..6u8, 1..4u32, any::<bool>()).prop_map(
            |(service, id, port, zone, weight, draining)| Op::PutInstance { service, id, port, zone, weight, draining }
        ),
        2 => (0..4u8, 0..5u8).prop_map(|(service, id)| Op::RemoveInstance(service, id)),
        3 => any::<bool>().prop_map(|resync| Op::Update { resync }),
    ]
}

/// Where instances run, with zones of one name in several regions or none.
const PLACES: [&str; 6] = ["r0/z0", "r0/z1", "r1/z0", "r1/z2", "z1", ""];

pub(super) fn change(op: &Op) -> Option<catalog::Change> {
    let service = |service: &u8| format!("s{service}");
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
        Op::Update { .. } => return None,
    })
}

fn view() -> impl Strategy<Value = View> {
    let kind = prop_oneof![Just(View::envoy(10_000)), Just(on_demand()), Just(by_host()), Just(View::grpc())];
    let place = prop::sample::select(vec![
        "", "z0", "z1", "r0/", "r0/z0", "r0/z1", "r1/z1", "r1/z9", "r9/z1", "r9/z9",
    ]);
    let upstreams = prop::option::of(prop::sample::subsequence(vec!["s0", "s1", "s2", "s9"], 0..=4));
    (kind, place, upstreams).prop_map(|(view, place, upstreams)| {
        let view = near(place, view);
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
