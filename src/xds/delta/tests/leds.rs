//! Glob collections: rules L4, X3, and what real Envoy makes of them.

use envoy_types::pb::envoy::config::endpoint::v3::ClusterLoadAssignment;

use super::*;
use crate::xds::{
    Change, Resource,
    testing::{EDS, LEDS, RDS},
};

/// The member `id` of collection `of`; with `*`, the collection.
fn name(of: &str, id: &str) -> String {
    format!("xdstp:///envoy.config.endpoint.v3.LbEndpoint/{of}/{id}")
}

/// Endpoints that are in these collections.
fn collected(service: &str, globs: &[&str]) -> Change {
    let mut message = ClusterLoadAssignment { cluster_name: service.into(), ..Default::default() };
    message.named_endpoints.insert(globs.join(" "), Default::default());
    let needs = globs.iter().map(|glob| name(glob, "*").into());
    Change::Put(Resource::new(EDS, service, &message, needs))
}

fn member(of: &str, id: &str, text: &str) -> Change {
    put(LEDS, &name(of, id), text)
}

fn gone(of: &str, id: &str) -> Change {
    remove(LEDS, &name(of, id))
}

/// What is sent and acknowledged, with short names.
fn settle(s: &mut Stream) -> Vec<String> {
    let prefix = name("", "");
    let prefix = prefix.trim_end_matches('/');
    s.settle()
        .into_iter()
        .map(|sent| sent.replace(&format!("{prefix}/"), "").replace("LbEndpoint", "Lb"))
        .collect()
}

/// An Envoy that has cluster `a`, whose endpoints are in collection `x`.
fn envoy(members: &[&str]) -> Stream {
    let changes = [put(CDS, "a", "1"), collected("a", &["x"]), put(LDS, "l", ""), put(RDS, "r", "a")];
    let mut s = Stream::new(changes.into_iter().chain(members.iter().map(|id| member("x", id, "1"))));
    for (kind, names) in [(CDS, vec![]), (EDS, vec!["a"]), (LDS, vec![]), (RDS, vec!["r"])] {
        s.request(delta(kind, &names, &[]));
        s.settle();
    }
    s.request(delta(LEDS, &[&name("x", "*")], &[]));
    s
}

#[test]
fn x3_l4_a_collection_is_all_its_members_and_then_what_changes() {
    let mut s = envoy(&["1", "2"]);
    assert_eq!(settle(&mut s), ["Lb x/1=1 x/2=1"]);
    s.apply([member("x", "2", "2"), member("y", "1", "1"), member("x/deeper", "1", "1")]);
    assert_eq!(settle(&mut s), ["Lb x/2=2"]);
    s.apply([member("x", "3", "1")]);
    assert_eq!(settle(&mut s), ["Lb x/3=1"]);
    s.apply([gone("x", "1")]);
    assert_eq!(settle(&mut s), ["Lb -x/1"]);
    assert_eq!(s.acknowledged(LEDS), 4);
}

/// Envoy waits 15 s for the answer, and takes an empty one for none.
#[test]
fn x3_l4_an_empty_collection_is_answered_as_removed() {
    let mut s = envoy(&[]);
    assert_eq!(settle(&mut s), ["Lb -x/*"]);
    s.apply([member("x", "1", "1")]);
    assert_eq!(settle(&mut s), ["Lb x/1=1"]);
    s.apply([gone("x", "1")]);
    assert_eq!(settle(&mut s), ["Lb -x/1"], "its members suffice");
}

/// A cluster that does not get all of this anew goes live without any endpoint after 15 s.
#[test]
fn o4_l4_a_changed_cluster_gets_its_endpoints_and_all_members_after_them() {
    let mut s = envoy(&["1", "2"]);
    settle(&mut s);
    s.apply([put(CDS, "a", "2")]);
    assert_eq!(settle(&mut s), ["Cluster a=2", "Endpoints a=x", "Lb x/1=1 x/2=1"]);
    // Also when its endpoints are waited for.
    s.apply([collected("a", &["x", "y"]), member("y", "1", "1")]);
    let endpoints = s.next().unwrap();
    assert_eq!(endpoints.show(), "Endpoints a=x y");
    s.apply([put(CDS, "a", "3"), member("x", "1", "2")]);
    let sent: Vec<_> = std::iter::from_fn(|| s.next()).map(|sent| sent.kind.unwrap()).collect();
    assert_eq!(sent, [CDS, LEDS], "the change of the member; the endpoints wait for an answer");
    for kind in [EDS, CDS, LEDS] {
        s.ack(kind);
    }
    assert_eq!(settle(&mut s), ["Endpoints a=x y", "Lb x/1=2 x/2=1"]);
    s.request(delta(LEDS, &[&name("y", "*")], &[]));
    assert_eq!(settle(&mut s), ["Lb y/1=1"]);
}

#[test]
fn l4_endpoints_that_change_by_themselves_are_not_followed_by_their_members() {
    let mut s = envoy(&["1"]);
    settle(&mut s);
    s.apply([collected("a", &["x", "y"]), member("y", "1", "1")]);
    assert_eq!(settle(&mut s), ["Endpoints a=x y"]);
}

#[test]
fn d4_l4_a_collection_that_is_asked_for_again_is_sent_again() {
    let mut s = envoy(&["1", "2"]);
    settle(&mut s);
    let glob = name("x", "*");
    s.request(delta(LEDS, &[], &[&glob]));
    assert!(settle(&mut s).is_empty());
    s.apply([member("x", "3", "1"), gone("x", "1")]);
    assert!(settle(&mut s).is_empty(), "nobody asks for it");
    s.request(delta(LEDS, &[&glob], &[]));
    assert_eq!(settle(&mut s), ["Lb x/2=1 x/3=1"]);
    s.request(delta(LEDS, &[&glob], &[&glob]));
    assert!(settle(&mut s).is_empty(), "given up in the same breath (rule D3)");
}

/// Envoy does not say which members it holds.
#[test]
fn d9_l4_a_reconnect_gets_the_whole_collection_and_what_went() {
    let mut s = envoy(&["1", "2", "3"]);
    settle(&mut s);
    s.apply([gone("x", "2")]);
    let set = s.set.clone();
    let mut s = Stream::on(StreamPolicy::ENVOY, Config::default(), set);
    s.request(holding(CDS, &[], &[("a", version(CDS, "a", "1"))]));
    s.settle();
    s.request(delta(LEDS, &[&name("x", "*")], &[]));
    assert_eq!(settle(&mut s), ["Lb x/1=1 x/3=1 -x/2"]);
    // Who holds nothing is not told.
    let mut cold = Stream::on(StreamPolicy::ENVOY, Config::default(), s.set.clone());
    cold.request(delta(CDS, &[], &[]));
    cold.settle();
    cold.request(delta(LEDS, &[&name("x", "*")], &[]));
    assert_eq!(settle(&mut cold), ["Lb x/1=1 x/3=1"]);
}

#[test]
fn d9_l4_a_client_that_says_which_members_it_holds_is_sent_the_others() {
    let mut s = Stream::new([member("x", "1", "1"), member("x", "2", "2")]);
    let [one, two, three] = ["1", "2", "3"].map(|id| name("x", id));
    let held = [(one.as_str(), version(LEDS, &one, "1")), (&two, version(LEDS, &two, "1"))];
    let held = [held[0].clone(), held[1].clone(), (&three, "0".repeat(16))];
    s.request(holding(LEDS, &[&name("x", "*")], &held));
    assert_eq!(settle(&mut s), ["Lb x/2=2 -x/3"]);
}

/// Envoy would have no endpoints in between.
#[test]
fn o3_l4_the_last_members_stay_until_the_endpoints_without_their_collection_are_acknowledged() {
    for (after, shown) in [(put(EDS, "a", "all"), "a=all"), (collected("a", &["y"]), "a=y")] {
        let mut s = envoy(&["1", "2"]);
        settle(&mut s);
        s.apply([after, gone("x", "1"), gone("x", "2"), member("y", "1", "1")]);
        assert_eq!(s.out(), [format!("Endpoints {shown}")]);
        s.ack(EDS);
        assert_eq!(settle(&mut s), ["Lb -x/1 -x/2"]);
        assert_eq!(s.acknowledged(LEDS), 2);
    }
    // An Envoy that has them gives the collection up first.
    let mut s = envoy(&["1"]);
    settle(&mut s);
    s.apply([put(EDS, "a", "all"), gone("x", "1")]);
    assert_eq!(s.out(), ["Endpoints a=all"]);
    s.request(delta(LEDS, &[], &[&name("x", "*")]));
    s.ack(EDS);
    assert!(settle(&mut s).is_empty());
}

#[test]
fn d18_l4_a_large_collection_goes_in_parts() {
    let mut s = Stream::with(
        StreamPolicy::ENVOY,
        Config { response_bytes: 500, ..Config::default() },
        ["1", "2", "3", "4"].map(|id| member("x", id, "1")),
    );
    s.request(delta(LEDS, &[&name("x", "*")], &[]));
    let parts = settle(&mut s);
    assert!(parts.len() > 1, "{parts:?}");
    let all: Vec<_> = parts.iter().flat_map(|part| part.split(' ').skip(1)).collect();
    assert_eq!(all, ["x/1=1", "x/2=1", "x/3=1", "x/4=1"]);
}

#[test]
fn l4_changes_too_many_to_remember_are_found_all_the_same() {
    let mut s = envoy(&["1", "2"]);
    settle(&mut s);
    s.apply((0..5000).map(|n| member("y", &n.to_string(), "1")).chain([member("x", "2", "2")]));
    assert_eq!(settle(&mut s), ["Lb x/2=2"]);
}

#[test]
fn d15_l4_a_rejected_member_does_not_keep_the_others_back_for_ever() {
    let mut s = envoy(&["1", "2"]);
    s.next();
    s.nack(LEDS);
    assert!(s.out().is_empty());
    s.apply([member("x", "1", "2")]);
    assert_eq!(settle(&mut s), ["Lb x/1=2 x/2=1"]);
    assert_eq!(s.acknowledged(LEDS), 2);
}
