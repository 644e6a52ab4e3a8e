//! Order between types, warming, removal: rules O1 to O11.

use std::time::Duration;

use super::{NOTHING, Stream, settled};
use crate::xds::{
    Config, StreamPolicy,
    testing::{CDS, EDS, LDS, RDS, delta, holding, put, remove, version},
};

#[test]
fn o9_endpoints_first_after_a_reconnect_even_unknown_ones() {
    let mut s = Stream::new([put(CDS, "b", "1"), put(EDS, "b", "1")]);
    s.request(holding(EDS, &["a"], &[("a", version(EDS, "a", "1"))]));
    assert_eq!(s.settle(), ["Endpoints -a"]);
    s.request(holding(CDS, &[], &[("a", version(CDS, "a", "1"))]));
    assert_eq!(s.settle(), ["Cluster b=1"]);
    s.wait(Duration::from_secs(5));
    assert_eq!(s.settle(), ["Cluster -a"]);
}

#[test]
fn o4_a_changed_cluster_brings_its_endpoints() {
    let mut s = settled();
    s.apply([put(CDS, "a", "2")]);
    assert_eq!(s.settle(), ["Cluster a=2", "Endpoints a=1"]);
}

#[test]
fn o4_not_for_grpc() {
    let mut s = Stream::with(StreamPolicy::GRPC, Config::default(), [put(CDS, "a", "1"), put(EDS, "a", "1")]);
    s.request(delta(CDS, &["a"], &[]));
    s.request(delta(EDS, &["a"], &[]));
    s.settle();
    s.apply([put(CDS, "a", "2")]);
    assert_eq!(s.settle(), ["Cluster a=2"]);
}

#[test]
fn o4_over_a_reconnect_whichever_type_comes_first() {
    for endpoints_first in [false, true] {
        let mut s = Stream::new([put(CDS, "a", "2"), put(EDS, "a", "1")]);
        let clusters = holding(CDS, &[], &[("a", version(CDS, "a", "1"))]);
        let endpoints = holding(EDS, &["a"], &[("a", version(EDS, "a", "1"))]);
        if endpoints_first {
            s.request(endpoints);
            assert_eq!(s.settle(), NOTHING);
            s.request(clusters);
            assert_eq!(s.settle(), ["Cluster a=2", "Endpoints a=1"]);
        } else {
            s.request(clusters);
            assert_eq!(s.settle(), ["Cluster a=2"]);
            s.request(endpoints);
            assert_eq!(s.settle(), ["Endpoints a=1"]);
        }
    }
}

#[test]
fn o6_a_new_cluster_on_shared_endpoints_brings_them_unasked() {
    let mut s = settled();
    let shared = crate::xds::Resource::new(
        CDS,
        "b",
        &envoy_types::pb::envoy::config::cluster::v3::Cluster {
            name: "b".into(),
            alt_stat_name: "1".into(),
            ..Default::default()
        },
        ["a".into()],
    );
    s.apply([crate::xds::Change::Put(shared)]);
    assert_eq!(s.settle(), ["Cluster b=1", "Endpoints a=1"]);
}

#[test]
fn o7_endpoints_do_not_wait_for_the_answer_to_clusters() {
    let mut s = settled();
    s.apply([put(CDS, "b", "1"), put(EDS, "b", "1"), put(EDS, "a", "2")]);
    assert_eq!(s.out(), ["Cluster b=1", "Endpoints a=2"]);
    s.ack(EDS);
    s.request(delta(EDS, &["b"], &[]));
    assert_eq!(s.out(), ["Endpoints b=1"]);
}

#[test]
fn o2_o7_routes_wait_until_new_clusters_are_warm() {
    let mut s = settled();
    s.apply([put(CDS, "b", "1"), put(RDS, "r", "b")]);
    assert_eq!(s.out(), ["Cluster b=1"]);
    s.ack(CDS);
    assert_eq!(s.out(), ["Route r=b"]);
}

#[test]
fn o2_routes_wait_for_clusters_that_are_yet_to_be_sent() {
    let mut s = settled();
    s.apply([put(CDS, "a", "2")]);
    assert_eq!(s.out(), ["Cluster a=2", "Endpoints a=1"]);
    s.apply([put(CDS, "b", "1"), put(RDS, "r", "b")]);
    assert_eq!(s.out(), NOTHING);
    s.ack(CDS);
    assert_eq!(s.out(), ["Cluster b=1"]);
    s.ack(CDS);
    assert_eq!(s.out(), ["Route r=b"]);
}

#[test]
fn o7_warming_is_not_waited_for_for_ever() {
    let mut s = settled();
    s.apply([put(CDS, "b", "1"), put(RDS, "r", "b")]);
    assert_eq!(s.out(), ["Cluster b=1"]);
    let deadline = s.served.engine.deadline().unwrap();
    assert_eq!(deadline, s.now + Duration::from_secs(20));
    s.wait(Duration::from_secs(20));
    assert_eq!(s.out(), ["Route r=b"]);
    assert!(s.served.engine.deadline().unwrap() > s.now);
}

#[test]
fn o7_a_nack_of_clusters_does_not_hold_routes() {
    let mut s = settled();
    s.apply([put(CDS, "b", "bad"), put(RDS, "r", "b")]);
    assert_eq!(s.out(), ["Cluster b=bad"]);
    s.nack(CDS);
    assert_eq!(s.out(), ["Route r=b"]);
}

#[test]
fn o8_a_late_child_ack_does_not_hide_the_parents_change() {
    let mut s = settled();
    s.apply([put(EDS, "a", "2")]);
    assert_eq!(s.out(), ["Endpoints a=2"]);
    s.apply([put(CDS, "a", "2")]);
    assert_eq!(s.out(), ["Cluster a=2"]);
    s.ack(EDS);
    assert_eq!(s.out(), ["Endpoints a=2"]);
}

#[test]
fn o3_cluster_outlives_the_last_route() {
    let mut s = settled();
    s.apply([remove(CDS, "a"), remove(EDS, "a"), put(RDS, "r", "none")]);
    assert_eq!(s.out(), ["Route r=none"]);
    assert_eq!(s.acknowledged(CDS), 1);
    s.ack(RDS);
    assert_eq!(s.out(), ["Cluster -a", "Endpoints -a"]);
    s.ack(CDS);
    s.ack(EDS);
    assert_eq!(s.out(), NOTHING);
    assert_eq!(s.acknowledged(CDS), 2);
}

#[test]
fn o3_cluster_outlives_a_rejected_route() {
    let mut s = settled();
    s.apply([remove(CDS, "a"), put(RDS, "r", "bad")]);
    assert_eq!(s.out(), ["Route r=bad"]);
    s.nack(RDS);
    assert_eq!(s.out(), NOTHING);
    s.apply([put(RDS, "r", "good")]);
    assert_eq!(s.settle(), ["Route r=good", "Cluster -a"]);
}

#[test]
fn o3_a_held_cluster_that_comes_back_is_not_removed() {
    let mut s = settled();
    s.apply([remove(CDS, "a"), put(RDS, "r", "none")]);
    assert_eq!(s.out(), ["Route r=none"]);
    s.request(delta(CDS, &["a"], &[]));
    assert_eq!(s.out(), ["Cluster a=1"]);
    s.ack(CDS);
    s.apply([put(CDS, "a", "2")]);
    assert_eq!(s.out(), ["Cluster a=2", "Endpoints a=1"]);
    s.ack(CDS);
    s.ack(RDS);
    assert_eq!(s.out(), NOTHING);
}

#[test]
fn o3_over_a_reconnect_the_routes_come_first() {
    let mut s = Stream::new([put(LDS, "l", "1"), put(RDS, "r", "none")]);
    s.request(holding(CDS, &[], &[("a", version(CDS, "a", "1"))]));
    assert_eq!(s.settle(), NOTHING);
    s.request(holding(LDS, &[], &[("l", version(LDS, "l", "1"))]));
    assert_eq!(s.settle(), NOTHING);
    s.request(holding(RDS, &["r"], &[("r", version(RDS, "r", "a"))]));
    assert_eq!(s.settle(), ["Route r=none", "Cluster -a"]);
}

#[test]
fn o7_an_answer_is_not_waited_for_for_ever() {
    let mut s = settled();
    s.apply([put(EDS, "a", "2")]);
    s.out();
    s.apply([put(EDS, "a", "3")]);
    s.wait(Duration::from_secs(59));
    assert_eq!(s.out(), NOTHING);
    s.wait(Duration::from_secs(1));
    assert_eq!(s.out(), ["Endpoints a=3"]);
    assert_eq!(s.served.engine.unanswered(), 1);
    s.ack(EDS);
    assert_eq!(s.acknowledged(EDS), 3);
}

#[test]
fn o11_endpoints_that_vanish_are_told_and_come_back() {
    let mut s = Stream::new([put(EDS, "a", "1")]);
    s.request(delta(EDS, &["a"], &[]));
    s.settle();
    s.apply([remove(EDS, "a")]);
    assert_eq!(s.settle(), ["Endpoints -a"]);
    s.apply([put(EDS, "a", "1")]);
    assert_eq!(s.settle(), ["Endpoints a=1"]);
}

#[test]
fn g2_a_stream_of_one_type_waits_for_no_other() {
    let all = || [put(CDS, "a", "1"), put(EDS, "a", "1"), put(LDS, "a", "1"), put(RDS, "a", "a")];
    for (kind, want) in
        [(CDS, "Cluster a=1"), (EDS, "Endpoints a=1"), (LDS, "Listener a=1"), (RDS, "Route a=a")]
    {
        let mut s = Stream::only(kind, all());
        s.request(delta(kind, &["a"], &[]));
        assert_eq!(s.out(), [want]);
        s.ack(kind);
        s.apply([put(CDS, "b", "1"), put(RDS, "a", "b")]);
        s.apply([remove(kind, "a")]);
        assert_eq!(s.settle(), [format!("{kind:?} -a")]);
    }
}

#[test]
fn g2_a_stream_of_clusters_keeps_no_list_of_endpoints() {
    let mut s = Stream::only(CDS, []);
    s.request(delta(CDS, &[], &[]));
    for name in ["a", "b", "c"] {
        s.apply([put(CDS, name, "1"), put(EDS, name, "1")]);
        s.settle();
        s.apply([remove(CDS, name), remove(EDS, name)]);
        s.settle();
    }
    assert!(s.served.engine.track(EDS).is_none_or(|track| track.due.is_empty()));
}
