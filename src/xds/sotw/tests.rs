use std::time::Duration;

use envoy_types::pb::envoy::service::discovery::v3::DiscoveryRequest;

use super::*;
use crate::xds::{
    Heard,
    testing::{Bench, CDS, EDS, IN_BOTH, LDS, RDS, node, put, remove, strings},
};

type Stream = Bench<Sotw>;

const NOTHING: [&str; 0] = [];

/// A stream that asked for everything, like Envoy, and has it: clusters and endpoints `a` and `b`, listener `l`, route
/// `r` to `a`.
fn settled() -> Stream {
    let two = [put(CDS, "a", "1"), put(CDS, "b", "1"), put(EDS, "a", "1"), put(EDS, "b", "1")];
    let mut s = Stream::new(two.into_iter().chain([put(LDS, "l", "1"), put(RDS, "r", "a")]));
    s.ask(CDS, &[]);
    s.ask(EDS, &["a", "b"]);
    s.ask(LDS, &[]);
    s.ask(RDS, &["r"]);
    let all = ["Cluster a=1 b=1", "Endpoints a=1 b=1", "Listener l=1", "Route r=a"];
    assert_eq!(s.settle(), all);
    s
}

/// The versions that a settled stream was told.
fn versions(s: &Stream) -> [String; 4] {
    IN_BOTH.map(|kind| s.accepted[&kind].clone())
}

/// A new stream to a server that has what `old` was served, whose client states versions for its names.
fn reconnect(old: &Stream, policy: StreamPolicy, versions: &[String; 4]) -> Stream {
    reconnect_to(Stream::on(policy, Config::default(), old.set.clone()), old, versions)
}

fn reconnect_to(mut s: Stream, old: &Stream, versions: &[String; 4]) -> Stream {
    for (kind, version) in IN_BOTH.into_iter().zip(versions) {
        s.request(DiscoveryRequest {
            type_url: kind.url().into(),
            version_info: version.clone(),
            // Rule S1: some Envoys repeat the nonce of the old stream.
            response_nonce: "1".into(),
            resource_names: old.names[&kind].clone(),
            ..Default::default()
        });
        s.names.insert(kind, old.names[&kind].clone());
    }
    s
}

#[test]
fn g3_g6_bad_requests_are_errors() {
    let mut s = Stream::new([]);
    assert_eq!(s.try_request(DiscoveryRequest::default()), Err(ProtocolError::NoType));
    let request =
        DiscoveryRequest { node: Some(node("m")), type_url: CDS.url().into(), ..Default::default() };
    assert!(matches!(s.try_request(request), Err(ProtocolError::NodeChanged { .. })));
}

#[test]
fn k3_unknown_types_are_held_silently() {
    let mut s = Stream::new([put(CDS, "a", "1")]);
    s.request(DiscoveryRequest {
        type_url: "t/x".into(),
        resource_names: strings(&["n"]),
        ..Default::default()
    });
    assert_eq!(s.out(), NOTHING);
    s.ask(CDS, &[]);
    assert_eq!(s.out(), ["Cluster a=1"]);
}

#[test]
fn k4_s8_nothing_is_answered_before_there_is_a_set_then_everything() {
    let mut s = Stream::on(StreamPolicy::ENVOY, Config::default(), None);
    s.ask(CDS, &[]);
    assert_eq!(s.out(), NOTHING);
    s.apply([put(CDS, "a", "1")]);
    assert_eq!(s.out(), ["Cluster a=1"]);
}

#[test]
fn s8_d12_an_empty_list_is_answered_once() {
    let mut s = Stream::new([]);
    s.ask(CDS, &[]);
    assert_eq!(s.settle(), ["Cluster"]);
    s.ask(LDS, &["l"]);
    assert_eq!(s.settle(), ["Listener"]);
    s.ask(EDS, &["a"]);
    assert_eq!(s.settle(), NOTHING);
}

#[test]
fn s_e1_lists_of_clusters_and_listeners_are_whole() {
    let mut s = settled();
    s.apply([put(CDS, "b", "2"), put(LDS, "m", "1")]);
    assert_eq!(s.settle(), ["Cluster a=1 b=2", "Endpoints b=1", "Listener l=1 m=1"]);
    s.apply([remove(LDS, "l")]);
    assert_eq!(s.settle(), ["Listener m=1"]);
    s.apply([remove(LDS, "m")]);
    assert_eq!(s.settle(), ["Listener"]);
}

#[test]
fn s_e2_endpoints_and_routes_are_sent_as_they_change() {
    let mut s = settled();
    s.apply([put(EDS, "b", "2")]);
    assert_eq!(s.settle(), ["Endpoints b=2"]);
    s.apply([remove(EDS, "b")]);
    assert_eq!(s.settle(), NOTHING);
    assert_eq!(s.acknowledged(EDS), 3);
}

#[test]
fn s_e3_nothing_is_sent_for_a_type_that_nobody_watches() {
    let mut s = settled();
    s.apply([put(EDS, "a", "2")]);
    assert_eq!(s.out(), ["Endpoints a=2"]);
    s.apply([put(EDS, "b", "2")]);
    s.ask(EDS, &[]);
    assert_eq!(s.out(), NOTHING);
    assert!(s.served.engine.status().iter().all(|kind| kind.synced));
}

#[test]
fn s_e5_what_is_missing_is_left_out_and_holds_nothing_back() {
    let mut s = Stream::new([put(CDS, "a", "1"), put(EDS, "a", "1")]);
    s.ask(CDS, &["a", "x"]);
    s.ask(EDS, &["a", "x"]);
    assert_eq!(s.settle(), ["Cluster a=1", "Endpoints a=1"]);
}

#[test]
fn w7_what_is_missing_is_sent_when_it_appears() {
    let mut s = Stream::new([]);
    s.ask(CDS, &["a"]);
    s.ask(EDS, &["a"]);
    s.settle();
    s.apply([put(CDS, "a", "1"), put(CDS, "b", "1"), put(EDS, "a", "1"), put(EDS, "b", "1")]);
    assert_eq!(s.settle(), ["Cluster a=1", "Endpoints a=1"]);
}

#[test]
fn s_e7_w5_what_is_given_up_and_asked_for_again_is_sent_again() {
    let mut s = Stream::new([put(CDS, "a", "1"), put(CDS, "b", "1"), put(EDS, "a", "1"), put(EDS, "b", "1")]);
    s.ask(CDS, &["a", "b"]);
    s.ask(EDS, &["a", "b"]);
    assert_eq!(s.settle(), ["Cluster a=1 b=1", "Endpoints a=1 b=1"]);
    s.ask(CDS, &["b"]);
    s.ask(EDS, &["b"]);
    assert_eq!(s.settle(), NOTHING);
    s.ask(EDS, &["a", "b"]);
    s.ask(CDS, &["a", "b"]);
    assert_eq!(s.settle(), ["Cluster a=1 b=1", "Endpoints a=1"]);
}

#[test]
fn w6_names_that_were_volunteered_before_are_sent_when_asked_for() {
    let mut s = settled();
    s.ask(CDS, &["*", "a"]);
    assert_eq!(s.settle(), ["Cluster a=1 b=1", "Endpoints a=1"]);
}

#[test]
fn w4_walk_sotw() {
    let mut s = Stream::new([put(LDS, "A", "1"), put(LDS, "B", "1")]);
    s.ask(LDS, &[]);
    assert_eq!(s.settle(), ["Listener A=1 B=1"]);
    s.ask(LDS, &["*", "A"]);
    assert_eq!(s.settle(), ["Listener A=1 B=1"]);
    s.ask(LDS, &["A"]);
    s.apply([put(LDS, "B", "2")]);
    assert_eq!(s.settle(), NOTHING);
    s.apply([put(LDS, "A", "2")]);
    assert_eq!(s.settle(), ["Listener A=2"]);
    s.ask(LDS, &[]);
    s.apply([put(LDS, "A", "3")]);
    assert_eq!(s.settle(), NOTHING);
}

#[test]
fn w10_an_empty_list_of_a_grpc_client_is_nothing() {
    let mut s = Stream::with(StreamPolicy::GRPC, Config::default(), [put(LDS, "a", "1")]);
    s.ask(LDS, &[]);
    assert_eq!(s.settle(), NOTHING);
}

#[test]
fn s2_the_version_changes_with_the_content_of_the_subscription_only() {
    let mut s = settled();
    let before = versions(&s);
    s.apply([put(EDS, "other", "1"), put(EDS, "a", "2")]);
    s.settle();
    let after = versions(&s);
    assert_eq!(before[0], after[0]);
    assert_ne!(before[1], after[1]);
    s.apply([put(EDS, "a", "1"), remove(EDS, "other")]);
    s.settle();
    assert_eq!(versions(&s), before);
}

#[test]
fn s3_a_nack_is_told_by_its_error_whatever_its_version() {
    let mut s = settled();
    s.apply([put(EDS, "a", "bad")]);
    assert_eq!(s.out(), ["Endpoints a=bad"]);
    let sent = s.last[&EDS].clone();
    s.accepted.insert(EDS, sent.version);
    assert_eq!(s.nack(EDS), Heard::Rejected(EDS, "bad".into()));
    assert_eq!(s.acknowledged(EDS), 1);
}

#[test]
fn s4_nack_is_not_sent_again() {
    let mut s = settled();
    s.apply([put(CDS, "a", "bad"), put(EDS, "a", "bad"), put(EDS, "b", "2"), put(LDS, "m", "1")]);
    assert_eq!(s.out(), ["Cluster a=bad b=1", "Endpoints a=bad b=2", "Listener l=1 m=1"]);
    s.nack(CDS);
    s.nack(EDS);
    s.ack(LDS);
    for _ in 0..3 {
        s.wait(Duration::from_secs(100));
        s.apply([put(LDS, "l", "1")]);
        assert_eq!(s.out(), NOTHING);
    }
    // Rule D15 holds here, too: the neighbours go again.
    s.apply([put(EDS, "a", "good")]);
    assert_eq!(s.settle(), ["Endpoints a=good b=2"]);
    // A whole list goes with any change; what was rejected with it counts as changed.
    s.apply([put(CDS, "b", "2")]);
    assert_eq!(s.settle(), ["Cluster a=bad b=2", "Endpoints a=good b=2"]);
    assert!(s.served.engine.status().iter().all(|kind| kind.synced));
}

#[test]
fn s5_s6_a_stale_nonce_subscribes_but_is_answered_after_the_newest_is() {
    let mut s = settled();
    let old = s.last[&EDS].clone();
    s.apply([put(EDS, "a", "2"), put(EDS, "c", "1")]);
    assert_eq!(s.out(), ["Endpoints a=2"]);
    let request = DiscoveryRequest {
        type_url: EDS.url().into(),
        resource_names: strings(&["a", "b", "c"]),
        version_info: old.version,
        response_nonce: old.nonce,
        ..Default::default()
    };
    assert_eq!(s.request(request), Heard::Request);
    assert_eq!(s.out(), NOTHING);
    assert_eq!(s.acknowledged(EDS), 1);
    s.names.insert(EDS, strings(&["a", "b", "c"]));
    s.ack(EDS);
    assert_eq!(s.settle(), ["Endpoints c=1"]);
}

#[test]
fn s7_a_repeated_request_is_not_answered() {
    let mut s = settled();
    s.ask(EDS, &["a", "b"]);
    s.ask(CDS, &[]);
    assert_eq!(s.out(), NOTHING);
}

#[test]
fn s9_a_reconnect_of_envoy_that_holds_everything_is_sent_nothing() {
    let old = settled();
    let mut s = reconnect(&old, StreamPolicy::ENVOY, &versions(&old));
    assert_eq!(s.settle(), NOTHING);
    assert_eq!(IN_BOTH.map(|kind| s.acknowledged(kind)), [1; 4]);
    s.apply([put(EDS, "b", "2")]);
    assert_eq!(s.settle(), ["Endpoints b=2"]);
}

#[test]
fn s9_a_reconnect_of_a_client_that_may_have_dropped_names_is_sent_the_named() {
    let old = settled();
    let mut s = reconnect(&old, StreamPolicy::OTHER, &versions(&old));
    assert_eq!(s.settle(), ["Endpoints a=1 b=1", "Route r=a"]);
}

#[test]
fn s9_a_reconnect_with_another_version_is_sent_what_there_is() {
    let mut old = settled();
    let before = versions(&old);
    old.apply([put(CDS, "b", "2"), put(EDS, "b", "2")]);
    let mut s = reconnect(&old, StreamPolicy::ENVOY, &before);
    assert_eq!(s.settle(), ["Cluster a=1 b=2", "Endpoints a=1 b=2"]);
}

#[test]
fn s9_o4_a_reconnect_whose_clusters_changed_gets_their_endpoints() {
    let mut old = settled();
    let before = versions(&old);
    old.apply([put(CDS, "b", "2")]);
    let mut s = reconnect(&old, StreamPolicy::ENVOY, &before);
    assert_eq!(s.settle(), ["Cluster a=1 b=2", "Endpoints b=1"]);
}

#[test]
fn s9_a_version_that_was_rejected_or_in_part_is_not_taken_for_the_whole() {
    let mut s = settled();
    s.apply([put(EDS, "a", "bad")]);
    s.out();
    s.nack(EDS);
    s.apply([put(EDS, "b", "2")]);
    assert_eq!(s.settle(), ["Endpoints b=2"]);
    let mut again = reconnect(&s, StreamPolicy::ENVOY, &versions(&s));
    assert_eq!(again.settle(), ["Endpoints a=bad b=2"]);

    let config = Config { response_bytes: 1, ..Config::default() };
    let mut s = Stream::with(StreamPolicy::ENVOY, config, [put(EDS, "a", "1"), put(EDS, "b", "1")]);
    s.ask(EDS, &["a", "b"]);
    let part = s.next().unwrap();
    assert_eq!(part.show(), "Endpoints a=1");
    s.ack(EDS);
    let whole = s.next().unwrap();
    assert_eq!(whole.show(), "Endpoints b=1");
    assert_ne!(part.version, whole.version);
}

#[test]
fn o1_o2_order_and_warming() {
    let mut s = settled();
    s.apply([put(CDS, "c", "1"), put(EDS, "c", "1"), put(RDS, "r", "c"), put(EDS, "a", "2")]);
    assert_eq!(s.out(), ["Cluster a=1 b=1 c=1", "Endpoints a=2"]);
    // Rule O7: Envoy acknowledges clusters when they are warm, so endpoints must get through.
    s.ack(EDS);
    s.ask(EDS, &["a", "b", "c"]);
    assert_eq!(s.out(), ["Endpoints c=1"]);
    s.ack(CDS);
    assert_eq!(s.out(), ["Route r=c"]);
}

#[test]
fn o4_a_changed_cluster_brings_its_endpoints() {
    let mut s = settled();
    s.apply([put(CDS, "a", "2")]);
    assert_eq!(s.out(), ["Cluster a=2 b=1", "Endpoints a=1"]);
    // What Envoy asks again meanwhile is stale.
    let mut request = DiscoveryRequest { type_url: EDS.url().into(), ..Default::default() };
    request.resource_names = strings(&["a", "b"]);
    request.response_nonce = "2".into();
    s.request(request);
    assert_eq!(s.settle(), NOTHING);
}

#[test]
fn o3_cluster_outlives_the_last_route() {
    let mut s = settled();
    s.apply([remove(CDS, "a"), remove(EDS, "a"), put(RDS, "r", "b")]);
    assert_eq!(s.out(), ["Route r=b"]);
    s.apply([put(CDS, "c", "1")]);
    assert_eq!(s.out(), ["Cluster b=1 c=1 a=1"]);
    s.ack(CDS);
    assert_eq!(s.out(), NOTHING);
    s.nack(RDS);
    assert_eq!(s.out(), NOTHING);
    s.apply([put(RDS, "r", "c")]);
    assert_eq!(s.settle(), ["Route r=c", "Cluster b=1 c=1"]);
    assert_eq!(s.acknowledged(CDS), 4);
}

#[test]
fn o3_without_routes_a_cluster_is_removed_at_once() {
    let mut s = Stream::new([put(CDS, "a", "1")]);
    s.ask(CDS, &["a"]);
    s.settle();
    s.apply([remove(CDS, "a")]);
    assert_eq!(s.settle(), ["Cluster"]);
}

#[test]
fn k5_endpoints_are_split_and_lists_are_not() {
    let config = Config { response_bytes: 1, ..Config::default() };
    let all = [put(CDS, "a", "1"), put(CDS, "b", "1"), put(EDS, "a", "1"), put(EDS, "b", "1")];
    let mut s = Stream::with(StreamPolicy::ENVOY, config, all);
    s.ask(CDS, &[]);
    s.ask(EDS, &["a", "b"]);
    assert_eq!(s.settle(), ["Cluster a=1 b=1", "Endpoints a=1", "Endpoints b=1"]);
}

#[test]
fn d15_a_route_that_is_removed_while_its_rejection_is_on_the_way() {
    let mut s = Stream::new([put(RDS, "a", "bad"), put(RDS, "b", "1")]);
    s.ask(RDS, &["a", "b"]);
    assert_eq!(s.out(), ["Route a=bad b=1"]);
    s.apply([remove(RDS, "a")]);
    assert_eq!(s.out(), NOTHING);
    s.nack(RDS);
    assert_eq!(s.settle(), ["Route b=1"]);
    assert_eq!(s.acknowledged(RDS), 2);
}

#[test]
fn d10_types_that_are_to_be_sent_anew_are() {
    let old = settled();
    let config = Config { resend_on_reconnect: vec![CDS, EDS], ..Config::default() };
    let s = Stream::on(StreamPolicy::ENVOY, config, old.set.clone());
    let mut s = reconnect_to(s, &old, &versions(&old));
    assert_eq!(s.settle(), ["Cluster a=1 b=1", "Endpoints a=1 b=1"]);
}

#[test]
fn o3_over_a_reconnect_the_routes_come_first() {
    let mut old = settled();
    let before = versions(&old);
    old.apply([remove(CDS, "b"), put(RDS, "r", "none")]);
    let mut s = reconnect(&old, StreamPolicy::ENVOY, &before);
    assert_eq!(s.out(), ["Route r=none"]);
    s.ack(RDS);
    assert_eq!(s.settle(), ["Cluster a=1"]);
    assert_eq!(s.acknowledged(CDS), 2);
}

#[test]
fn o3_over_a_reconnect_in_the_middle_of_a_removal() {
    let mut old = settled();
    old.apply([remove(CDS, "b"), put(CDS, "c", "1"), put(RDS, "r", "bad")]);
    assert_eq!(old.out(), ["Cluster a=1 c=1 b=1"]);
    old.ack(CDS);
    old.out();
    old.nack(RDS);
    let before = versions(&old);
    old.apply([remove(CDS, "c"), put(RDS, "r", "good")]);
    let mut s = reconnect(&old, StreamPolicy::ENVOY, &before);
    assert_eq!(s.settle(), ["Route r=good", "Cluster a=1"]);
}

#[test]
fn s9_a_reconnect_at_a_version_that_is_long_forgotten_is_sent_the_whole() {
    let mut old = settled();
    let before = versions(&old);
    old.apply([remove(CDS, "b")]);
    for n in 0..5000 {
        old.apply([put(CDS, "a", &n.to_string())]);
    }
    let mut s = reconnect(&old, StreamPolicy::ENVOY, &before);
    assert_eq!(s.out(), ["Cluster a=4999", "Endpoints a=1"]);
}

#[test]
fn s9_w5_a_version_means_nothing_any_more_once_the_names_have_changed() {
    let old = settled();
    let before = versions(&old);
    let mut s = Stream::on(StreamPolicy::ENVOY, Config::default(), old.set);
    for names in [&["a", "b"][..], &["a"], &["*"]] {
        s.request(DiscoveryRequest {
            type_url: CDS.url().into(),
            version_info: before[0].clone(),
            resource_names: strings(names),
            ..Default::default()
        });
    }
    assert_eq!(s.settle(), ["Cluster a=1 b=1"]);
}

#[test]
fn s9_a_spelled_out_wildcard_is_trusted_only_with_a_client_that_keeps_what_it_holds() {
    let mut old = Stream::new([put(CDS, "a", "1")]);
    old.ask(CDS, &["*"]);
    old.settle();
    for (policy, want) in [(StreamPolicy::ENVOY, &[][..]), (StreamPolicy::OTHER, &["Cluster a=1"])] {
        let mut s = Stream::on(policy, Config::default(), old.set.clone());
        s.request(DiscoveryRequest {
            type_url: CDS.url().into(),
            version_info: old.accepted[&CDS].clone(),
            resource_names: strings(&["*"]),
            ..Default::default()
        });
        assert_eq!(s.settle(), want, "{policy:?}");
    }
}
