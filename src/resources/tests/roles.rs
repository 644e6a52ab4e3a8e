use envoy_types::pb::envoy::{
    config::route::v3::RetryPolicy,
    extensions::filters::network::tcp_proxy::v3::{TcpProxy, tcp_proxy::ClusterSpecifier as TcpCluster},
};

use super::*;

/// `db` with one instance for each letter of `instances`, as [`judged`] has it, and the roles of `roles`: a letter for each (leader,
/// follower, candidate, learner as `n`, unknown as `?`, not named as `-`).
fn database(instances: &str, roles: &str, term: u64) -> Snapshot {
    let instances = instances.chars().zip(1..).map(|(letter, port)| {
        let mut instance = judged(letter, port);
        instance.key.service = "db".parse().unwrap();
        instance.locality = place(if port % 2 == 0 { "r1/even" } else { "r1/odd" });
        catalog::Change::PutInstance(instance)
    });
    let changes = instances.chain([roles_of("db", roles, term)]);
    Snapshot::default().apply(Revision(1), changes)
}

fn roles_of(service: &str, letters: &str, term: u64) -> catalog::Change {
    let mut roles = Roles { term, ..Roles::default() };
    for (letter, n) in letters.chars().zip(1..) {
        let id: crate::model::InstanceId = format!("i{n}").parse().unwrap();
        let role = match letter {
            'l' => {
                roles.leader = Some(id);
                continue;
            }
            'f' => Role::Follower,
            'c' => Role::Candidate,
            'n' => Role::Learner,
            // A second one that says so.
            'L' => Role::Leader,
            '?' => Role::Unknown,
            _ => continue,
        };
        roles.others.insert(id, role);
    }
    catalog::Change::PutRoles(service.parse().unwrap(), roles.into())
}

/// The ports of a name's endpoints, in order, with a letter for the health: degraded, unhealthy, draining.
fn ports(set: &ResourceSet, name: &str) -> String {
    let sent = load_assignment(set, name);
    assert_eq!(sent.cluster_name, name);
    let mut ports: Vec<_> = sent.endpoints.iter().flat_map(|locality| &locality.lb_endpoints).collect();
    let port = |endpoint: &LbEndpoint| socket(endpoint).1;
    ports.sort_by_key(|endpoint| port(endpoint));
    let shown = ports.iter().map(|endpoint| {
        let health = match endpoint.health_status() {
            HealthStatus::Degraded => "d",
            HealthStatus::Unhealthy => "u",
            HealthStatus::Draining => "D",
            _ => "",
        };
        format!("{}{health}", port(endpoint))
    });
    shown.collect::<Vec<_>>().join(" ")
}

#[test]
fn who_is_in_which_group() {
    // Instances, roles, then the leader, the followers and any, for Envoy and for gRPC.
    let cases: [(&str, &str, [&str; 3], [&str; 3]); 12] = [
        ("sss", "lff", ["1", "2 3", "1 2 3"], ["1", "2 3", "1 2 3"]),
        ("sss", "fff", ["", "1 2 3", "1 2 3"], ["", "1 2 3", "1 2 3"]),
        ("", "lff", ["", "", ""], ["", "", ""]),
        ("sss", "---l", ["", "1 2 3", "1 2 3"], ["", "1 2 3", "1 2 3"]),
        // Who is not named follows; nobody else counts as one, and learners have no vote.
        ("sssss", "l-cn?", ["1", "2", "1 2 3 5"], ["1", "2", "1 2 3 5"]),
        // Never two, whatever the other says.
        ("sss", "lLf", ["1", "2 3", "1 2 3"], ["1", "2 3", "1 2 3"]),
        // The leader, whatever its checks say.
        ("uss", "lff", ["1", "2 3", "1u 2 3"], ["1", "2 3", "2 3"]),
        ("Dss", "lff", ["1", "2 3", "1D 2 3"], ["1", "2 3", "2 3"]),
        ("?ss", "lff", ["1", "2 3", "2 3"], ["1", "2 3", "2 3"]),
        // Of the followers, what is true of any service: none is emptied by its checks, and those that drain are let go.
        ("suu", "lff", ["1", "2 3", "1 2u 3u"], ["1", "2 3", "1"]),
        ("sus", "lff", ["1", "2u 3", "1 2u 3"], ["1", "3", "1 3"]),
        ("sDs", "lff", ["1", "2D 3", "1 2D 3"], ["1", "3", "1 3"]),
    ];
    for (instances, roles, envoy, grpc) in cases {
        let snapshot = database(instances, roles, 1);
        for (view, want) in
            [(View::envoy(1), envoy), (near("r1/even", View::envoy(1)), envoy), (View::grpc(), grpc)]
        {
            let set = render(&snapshot, &view);
            let got = ["db.leader", "db.followers", "db.any"].map(|name| ports(&set, name));
            assert_eq!(got, want.map(str::to_owned), "{instances} {roles} {view:?}");
        }
    }
}

#[test]
fn a_change_of_roles_changes_the_endpoints_of_the_leader_and_the_followers_only() {
    for view in [View::envoy(1), by_host(), on_demand(), View::grpc()] {
        let before = database("sss", "lff", 1);
        let after = before.apply(Revision(2), [roles_of("db", "flf", 2)]);
        let changes = Changes::Touched([("db".parse().unwrap(), None)].into());
        let set = update(&render(&before, &view), &after, &changes, &view);
        for kind in ResourceType::ALL {
            let changed: Vec<_> = set.changed_since(kind, Revision(1)).unwrap().map(AsRef::as_ref).collect();
            let want: &[&str] =
                if kind == ResourceType::Endpoints { &["db.followers", "db.leader"] } else { &[] };
            let (mut changed, mut want): (Vec<&str>, _) = (changed, want.to_vec());
            changed.sort_unstable();
            want.sort_unstable();
            assert_eq!(changed, want, "{kind:?} {view:?}");
        }
    }
}

#[test]
fn only_asked_for_parts_are_sent() {
    let snapshot = database("sss", "lff", 1);
    let all = ["db", "db.any", "db.followers", "db.leader"];
    for (upstreams, want) in [
        (&["db"] as &[&str], &all as &[&str]),
        (&["db.leader"], &["db.leader"]),
        (&["db.followers", "db.any"], &["db.any", "db.followers"]),
        (&["other", "db.eu.leader"], &[]),
    ] {
        for view in [View::envoy(1), on_demand(), by_host(), View::grpc()] {
            let set = render(&snapshot, &only(upstreams, view));
            let names: Vec<_> = set.iter(ResourceType::Cluster).map(|(name, _)| name.as_ref()).collect();
            let mut names: Vec<&str> = names;
            names.sort_unstable();
            assert_eq!(names, want, "{upstreams:?}");
        }
    }
}

#[test]
fn a_service_that_is_registered_under_the_name_of_a_part_keeps_it() {
    let (mut writer, reader) = catalog();
    let other = |port: u16| {
        let address = format!("10.0.0.2:{port}");
        catalog::Change::PutInstance(instance("db.leader", ("x", &address, "", 1, Serving)))
    };
    let put = |n| {
        catalog::Change::PutInstance(instance(
            "db",
            (&format!("i{n}"), &format!("10.0.0.1:{n}"), "", 1, Serving),
        ))
    };
    let gone = catalog::Change::RemoveService("db.leader".parse().unwrap());
    let no_roles = catalog::Change::RemoveRoles("db".parse().unwrap());
    let views = [View::envoy(1), only(&["db"], View::envoy(1)), only(&["db.leader"], View::grpc())];
    let mut sets = views.clone().map(|view| render(&reader.latest(), &view));
    for (n, (changes, want)) in [
        (vec![put(1), put(2), roles_of("db", "lf", 1)], ["1", "1", "1"]),
        (vec![other(7)], ["7", "-", "7"]),
        (vec![other(8), roles_of("db", "fl", 2)], ["8", "-", "8"]),
        (vec![gone.clone()], ["2", "2", "2"]),
        (vec![other(9), no_roles], ["9", "-", "9"]),
        (vec![gone], ["-", "-", "-"]),
    ]
    .into_iter()
    .enumerate()
    {
        writer.apply(Revision(n as u64 + 1), changes);
        for ((set, view), want) in sets.iter_mut().zip(&views).zip(want) {
            let (snapshot, changes) = reader.since(set.revision());
            *set = update(set, &snapshot, &changes, view);
            let there = set.get(ResourceType::Endpoints, "db.leader").is_some();
            let got = if there { ports(set, "db.leader") } else { "-".to_owned() };
            assert_eq!(got, want, "{n} {view:?}");
            assert_eq!(contents(set), contents(&render(&snapshot, view)), "{n} {view:?}");
        }
    }
}

#[test]
fn nothing_hides_that_there_is_no_leader() {
    let snapshot = database("sss", "lff", 1);
    let set = render(&snapshot, &View::envoy(1));
    let cluster = |name: &str| decode::<Cluster>(&set, ResourceType::Cluster, name);
    assert_eq!(cluster("db.leader").outlier_detection, None);
    assert_eq!(cluster("db.leader").common_lb_config.unwrap().healthy_panic_threshold, wire::percent(0.0));
    for name in ["db.followers", "db.any"] {
        assert_eq!(Cluster { name: "db".into(), ..cluster(name) }, cluster("db"), "{name}");
    }
    let conditions = |host: &VirtualHost| {
        let Some(Action::Route(action)) = &host.routes[0].action else { panic!("no route") };
        action.retry_policy.as_ref().map(|RetryPolicy { retry_on, .. }| retry_on.clone())
    };
    let of_leader = Some("connect-failure,refused-stream".to_owned());
    for view in [View::envoy(1), on_demand()] {
        let routes: RouteConfiguration = decode(&render(&snapshot, &view), ResourceType::Route, OUTBOUND);
        for host in routes.virtual_hosts.iter().filter(|host| host.name != "*") {
            let leader = host.domains.iter().any(|domain| domain == "db.leader");
            assert_eq!(conditions(host) == of_leader, leader, "{host:?}");
        }
    }
    let set = render(&snapshot, &View::grpc());
    for (name, retried) in [("db", true), ("db.any", true), ("db.leader", false)] {
        let routes: RouteConfiguration = decode(&set, ResourceType::Route, name);
        assert_eq!(conditions(&routes.virtual_hosts[0]).is_some(), retried, "{name}");
    }
}

fn tcp(ports: &[(&str, u16)], view: View) -> View {
    View { tcp: Arc::new(ports.iter().map(|(name, port)| (name.parse().unwrap(), *port)).collect()), ..view }
}

fn tcp_listener(set: &ResourceSet, name: &str) -> (String, TcpProxy) {
    let listener: Listener = decode(set, ResourceType::Listener, &format!("tcp/{name}"));
    let [chain] = listener.filter_chains.as_slice() else { panic!("{listener:?}") };
    let Some(filter::ConfigType::TypedConfig(any)) = &chain.filters[0].config_type else {
        panic!("{chain:?}")
    };
    (chain.name.clone(), TcpProxy::decode(any.value.as_slice()).unwrap())
}

#[test]
fn a_tcp_listener_takes_connections_to_the_cluster_of_its_name() {
    let view = tcp(&[("db.leader", 5), ("db", 6), ("later", 7)], View::envoy(1));
    let set = render(&database("sss", "lff", 1), &view);
    for (name, port) in view.tcp.iter() {
        let listener: Listener = decode(&set, ResourceType::Listener, &format!("tcp/{name}"));
        assert_eq!(listener.address, Some(endpoints::socket([127, 0, 0, 1].into(), *port)));
        let (_, proxy) = tcp_listener(&set, name.as_str());
        assert_eq!(proxy.cluster_specifier, Some(TcpCluster::Cluster(name.to_string())));
        assert_eq!(proxy.idle_timeout, wire::seconds(0), "pools keep quiet connections");
        assert_eq!(proxy.on_demand, None);
    }
    let on_demand = render(&database("sss", "lff", 1), &tcp(&[("db", 6)], on_demand()));
    assert!(tcp_listener(&on_demand, "db").1.on_demand.is_some(), "it does not know the cluster otherwise");
}

#[test]
fn connections_are_cut_when_the_term_or_the_leader_is_another_and_at_no_other_change() {
    let view = tcp(&[("db.leader", 5), ("db.followers", 6), ("db", 7)], View::envoy(1));
    let (mut writer, reader) = catalog();
    let mut set = render(&reader.latest(), &view);
    let put = |n, state| {
        catalog::Change::PutInstance(instance(
            "db",
            (&format!("i{n}"), &format!("10.0.0.1:{n}"), "", 1, state),
        ))
    };
    for (n, (change, chain)) in [
        (put(1, Serving), "db.leader"),
        (roles_of("db", "lff", 3), "db.leader/3/i1"),
        (put(2, Serving), "db.leader/3/i1"),
        (put(1, Draining), "db.leader/3/i1"),
        (roles_of("db", "lfn", 3), "db.leader/3/i1"),
        (roles_of("db", "fff", 3), "db.leader/3/"),
        (roles_of("db", "flf", 4), "db.leader/4/i2"),
        (roles_of("db", "flf", 5), "db.leader/5/i2"),
        (roles_of("other", "fl", 9), "db.leader/5/i2"),
        (catalog::Change::RemoveRoles("db".parse().unwrap()), "db.leader"),
    ]
    .into_iter()
    .enumerate()
    {
        writer.apply(Revision(n as u64 + 1), vec![change]);
        let before = tcp_listener(&set, "db.leader").0;
        let (snapshot, changes) = reader.since(set.revision());
        set = update(&set, &snapshot, &changes, &view);
        assert_eq!(tcp_listener(&set, "db.leader").0, chain, "{n}");
        let changed = set.changed_since(ResourceType::Listener, Revision(n as u64)).unwrap();
        let changed: Vec<&str> = changed.map(AsRef::as_ref).collect();
        let want: &[&str] = if before == chain { &[] } else { &["tcp/db.leader"] };
        assert_eq!(changed, want, "{n}: no other listener may drain");
    }
}
