//! Endpoints one by one: the same as all together, at the cost of what changes.

use envoy_types::pb::envoy::config::endpoint::v3::{
    LbEndpoint, LocalityLbEndpoints, locality_lb_endpoints::LbConfig,
};

use proptest::prelude::*;

use super::{
    histories::{Op, change, op},
    *,
};
use crate::xds::Node;

fn leds(from: usize) -> View {
    View { leds_from: from, ..View::envoy(1) }
}

/// `n` instances of `greeter` in these zones by turns.
fn many(n: usize, zones: &[&str]) -> Snapshot {
    let put = |n: usize| {
        let address = format!("10.0.{}.{}:1", n / 250, n % 250);
        let zone = zones[n % zones.len()];
        catalog::Change::PutInstance(instance("greeter", (&format!("i{n}"), &address, zone, 1, Serving)))
    };
    Snapshot::default().apply(Revision(1), (0..n).map(put))
}

fn globs(set: &ResourceSet, service: &str) -> Vec<String> {
    let entry = set.get(ResourceType::Endpoints, service).unwrap();
    entry.resource.needs.iter().map(ToString::to_string).collect()
}

/// What a client calls, by service, level and place, whichever way it was told.
fn expand(set: &ResourceSet) -> Vec<String> {
    let mut all = Vec::new();
    for (service, _) in set.iter(ResourceType::Endpoints) {
        for locality in load_assignment(set, service).endpoints {
            let place = locality.locality.clone().unwrap_or_default();
            let mut hosts: Vec<String> = endpoints_of(set, &locality).iter().map(host).collect();
            hosts.sort();
            all.push(format!("{service} {} {}/{}: {hosts:?}", locality.priority, place.region, place.zone));
        }
    }
    all.sort();
    all
}

fn endpoints_of(set: &ResourceSet, locality: &LocalityLbEndpoints) -> Vec<LbEndpoint> {
    let Some(LbConfig::LedsClusterLocalityConfig(leds)) = &locality.lb_config else {
        return locality.lb_endpoints.clone();
    };
    assert!(locality.lb_endpoints.is_empty(), "rule L4: Envoy takes one or the other");
    let source = leds.leds_config.as_ref().unwrap().config_source_specifier.as_ref();
    assert!(matches!(source, Some(ConfigSourceSpecifier::Ads(_))));
    let members = set.members(ResourceType::LbEndpoint, &leds.leds_collection_name);
    members.map(|(_, entry)| LbEndpoint::decode(entry.resource.body()).unwrap()).collect()
}

fn host(endpoint: &LbEndpoint) -> String {
    let (address, port) = socket(endpoint);
    let weight = endpoint.load_balancing_weight.unwrap().value;
    assert!(weight > 0);
    format!("{address}:{port}*{weight} {:?}", endpoint.health_status())
}

/// Every member is in a collection that is referred to, and none of those is empty: an empty one is waited for.
fn check_collections(set: &ResourceSet) {
    let mut members = BTreeSet::new();
    for (service, _) in set.iter(ResourceType::Endpoints) {
        for glob in globs(set, service) {
            let its: Vec<_> = set.members(ResourceType::LbEndpoint, &glob).map(|(name, _)| name).collect();
            assert!(!its.is_empty(), "{glob} is empty");
            members.extend(its.into_iter().cloned());
        }
    }
    let all: BTreeSet<_> = set.iter(ResourceType::LbEndpoint).map(|(name, _)| Arc::clone(name)).collect();
    assert_eq!(all, members, "members that nothing refers to");
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(128))]

    /// Any history, at any place, with any size to begin at: what one by one gives is what all together gives, and so is what is
    /// taken over from a view elsewhere.
    #[test]
    fn l4_one_by_one_is_what_all_together_is(
        history in proptest::collection::vec(op(), 1..80),
        place in prop::sample::select(vec!["", "z1", "r0/z0", "r1/z2", "r9/z9"]),
        from in 1..5_usize,
    ) {
        let (mut writer, reader) = catalog();
        let (here, there) = (near(place, leds(from)), near("r0/z1", leds(from)));
        let mut sets = [&here, &there].map(|view| render(&reader.latest(), view));
        for (n, op) in history.iter().enumerate() {
            if let Some(change) = change(op) {
                writer.apply(Revision(n as u64 + 1), vec![change]);
            }
            if let Op::Update { resync } = op {
                let (snapshot, touched) = reader.since(sets[0].revision());
                let changes = if *resync { Changes::Resync } else { touched };
                let one = update(&sets[0], &snapshot, &changes, &here);
                let two = update_beside(Some(&one), &sets[1], &snapshot, &changes, &there);
                for (set, view) in [(&one, &here), (&two, &there)] {
                    check_collections(set);
                    let together = View { leds_from: 0, ..view.clone() };
                    prop_assert_eq!(expand(set), expand(&render(&snapshot, &together)));
                    for (name, entry) in set.iter(ResourceType::Endpoints) {
                        let is = !entry.resource.needs.is_empty();
                        let Some(service) = name.parse().ok().and_then(|id| snapshot.service(&id)) else {
                            prop_assert!(!is, "{} is some of a service", name);
                            continue;
                        };
                        let count = service.instances().len();
                        let fits = if is { count + (from / 4).max(1) >= from } else { count < from };
                        prop_assert!(fits, "{} of {}: {}", name, count, is);
                    }
                }
                sets = [one, two];
            }
        }
    }

    /// Whatever is registered, a member has an address and a port, so that Envoy lives.
    #[test]
    fn l4_no_member_is_unusable(
        address in any::<IpAddr>(), port in 1..=u16::MAX, weight in 1..=u32::MAX, other in 1..=u32::MAX,
        id in "[a-zA-Z0-9]([a-zA-Z0-9_.:-]{0,20}[a-zA-Z0-9])?",
    ) {
        let at = |address| std::net::SocketAddr::new(address, port).to_string();
        let (first, second) = (at(address), at([1, 2, 3, 4].into()));
        let rows = [(id.as_str(), first.as_str(), "r/z", weight, Serving), ("~", second.as_str(), "", other, Draining)];
        let rows = [rows[0], ("zz-other", rows[1].1, rows[1].2, rows[1].3, rows[1].4)];
        let set = render(&greeters(&rows), &leds(1));
        prop_assert!(set.len(ResourceType::LbEndpoint) > 0);
        expand(&set);
        for (name, _) in set.iter(ResourceType::LbEndpoint) {
            prop_assert!(name.rsplit_once('/').unwrap().1.parse::<crate::model::InstanceId>().is_ok());
        }
    }
}

/// What is new in the set of a large service after these changes, by type.
fn changed(size: usize, changes: Vec<catalog::Change>) -> (Vec<String>, Vec<String>) {
    let (mut writer, reader) = catalog();
    let all = many(size, &["a", "b"]);
    let service = all.service(&"greeter".parse().unwrap()).unwrap();
    let put = |instance: &Arc<Instance>| catalog::Change::PutInstance((**instance).clone());
    writer.apply(Revision(1), service.instances().map(put).collect());
    let one = render(&reader.latest(), &leds(3));
    writer.apply(Revision(2), changes);
    let (snapshot, changes) = reader.since(Revision(1));
    let two = update(&one, &snapshot, &changes, &leds(3));
    let names = |kind| {
        let names = two.changed_since(kind, Revision(1)).unwrap();
        names
            .map(|name| name.rsplit('/').next().unwrap().to_owned())
            .collect::<BTreeSet<_>>()
            .into_iter()
            .collect()
    };
    (names(ResourceType::Endpoints), names(ResourceType::LbEndpoint))
}

#[test]
fn l4_one_change_is_one_member_and_nothing_else() {
    let put = |row| catalog::Change::PutInstance(instance("greeter", row));
    type Case<'a> = (&'a str, catalog::Change, &'a [&'a str], &'a [&'a str]);
    let cases: [Case<'_>; 6] = [
        ("weight", put(("i7", "10.0.0.7:1", "b", 9, Serving)), &[], &["i7"]),
        ("drain", put(("i7", "10.0.0.7:1", "b", 1, Draining)), &[], &["i7"]),
        ("one more", put(("new", "10.9.9.9:1", "b", 1, Serving)), &[], &["new"]),
        ("its zone", put(("i7", "10.0.0.7:1", "a", 1, Serving)), &[], &["i7"]),
        ("a zone of its own", put(("i7", "10.0.0.7:1", "c", 1, Serving)), &["greeter"], &["i7"]),
        ("an address that another has", put(("i7", "10.0.0.8:1", "b", 1, Serving)), &[], &["i7", "i8"]),
    ];
    for size in [20, 1000] {
        for (case, change, endpoints, members) in cases.clone() {
            let (have_endpoints, have_members) = changed(size, vec![change]);
            assert_eq!(
                (have_endpoints, have_members),
                (strings(endpoints), strings(members)),
                "{case} of {size}"
            );
        }
    }
    let gone = InstanceKey { service: "greeter".parse().unwrap(), id: "i3".parse().unwrap() };
    assert_eq!(changed(20, vec![catalog::Change::RemoveInstance(gone)]).1, ["i3"]);
}

fn strings(list: &[&str]) -> Vec<String> {
    list.iter().map(|&text| text.to_owned()).collect()
}

/// Between the size to begin at and three quarters of it, it stays as it is.
#[test]
fn l4_a_service_about_the_threshold_does_not_go_back_and_forth() {
    let view = leds(8);
    let mut set = ResourceSet::starting(7);
    for (size, is) in [
        (7, false),
        (8, true),
        (7, true),
        (8, true),
        (6, true),
        (5, false),
        (7, false),
        (9, true),
        (0, false),
    ] {
        let service = catalog::Change::PutService("greeter".parse().unwrap());
        let snapshot = many(size, &["a"]).apply(Revision(set.revision().0 + 1), [service]);
        set = update(&set, &snapshot, &Changes::Resync, &view);
        assert_eq!(!globs(&set, "greeter").is_empty(), is, "{size}");
        check_collections(&set);
    }
}

#[test]
fn l4_collections_of_another_history_have_other_names_and_all_names_are_short() {
    let snapshot = many(9, &["eu-west/eu-west-1a", "eu-west/eu-west-1b", ""]);
    let of = |origin| update(&ResourceSet::starting(origin), &snapshot, &Changes::Resync, &leds(1));
    let (one, two) = (globs(&of(1), "greeter"), globs(&of(2), "greeter"));
    assert_eq!(one.len(), 3);
    assert!(one.iter().all(|glob| !two.contains(glob)));
    assert_eq!(one, globs(&of(1), "greeter"));
    let longest = one.iter().map(|glob| glob.len() - "greeter".len()).max();
    assert_eq!(longest, Some("xdstp:///envoy.config.endpoint.v3.LbEndpoint//0123456789/*".len()));
}

#[test]
fn l4_places_share_the_members_and_differ_in_levels() {
    let snapshot = many(9, &["r/a", "r/b", "s/c"]);
    let one = render(&snapshot, &near("r/a", leds(1)));
    let two = update_beside(
        Some(&one),
        &ResourceSet::default(),
        &snapshot,
        &Changes::Resync,
        &near("s/c", leds(1)),
    );
    let levels = |set: &ResourceSet| {
        load_assignment(set, "greeter").endpoints.iter().map(|locality| locality.priority).collect::<Vec<_>>()
    };
    assert_eq!((levels(&one), levels(&two)), (vec![0, 1, 2], vec![0, 1, 1]));
    for (name, entry) in one.iter(ResourceType::LbEndpoint) {
        assert!(Arc::ptr_eq(&entry.resource, &two.get(ResourceType::LbEndpoint, name).unwrap().resource));
    }
}

/// A SotW Envoy crashes on it; a gRPC client sees no endpoints.
#[test]
fn l4_only_an_envoy_whose_stream_can_carry_it_gets_it() {
    for (agent, collections, client, want) in [
        ("envoy", true, None, 5),
        ("envoy", false, None, 0),
        ("gRPC Go", true, None, 0),
        ("gRPC Go", true, Some("envoy"), 0),
        ("something", true, None, 0),
        ("", true, None, 0),
    ] {
        let mut node = Node { user_agent_name: agent.into(), collections, ..Node::default() };
        node.metadata.extend(client.map(|client| ("disco.client".to_owned(), client.into())));
        let view = View::of(&node).unwrap().with_leds(&node, 5);
        assert_eq!(view.leds_from, want, "{agent} {collections} {client:?}");
        let set = render(&many(9, &["a"]), &view);
        assert_eq!(set.len(ResourceType::LbEndpoint) > 0, want > 0);
    }
}
