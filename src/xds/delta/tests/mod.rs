//! Scripts for delta streams, named after the rules that they hold.

mod leds;
mod order;
mod virtual_hosts;

use std::time::Duration;

use envoy_types::pb::envoy::service::discovery::v3::DeltaDiscoveryRequest;

use super::*;
use crate::xds::{
    Heard,
    testing::{Bench, CDS, EDS, LDS, RDS, delta, holding, node, put, remove, version},
};

type Stream = Bench<Delta>;

const NOTHING: [&str; 0] = [];

/// A stream that asked for everything, like Envoy, and has it: cluster and endpoints `a`, listener `l`, route `r` to `a`.
fn settled() -> Stream {
    let mut s = Stream::new([put(CDS, "a", "1"), put(EDS, "a", "1"), put(LDS, "l", "1"), put(RDS, "r", "a")]);
    s.request(delta(CDS, &[], &[]));
    s.request(delta(EDS, &["a"], &[]));
    s.request(delta(LDS, &[], &[]));
    s.request(delta(RDS, &["r"], &[]));
    assert_eq!(s.settle(), ["Cluster a=1", "Endpoints a=1", "Listener l=1", "Route r=a"]);
    s
}

#[test]
fn g1_o1_types_go_out_in_push_order_whatever_the_order_of_requests() {
    let mut s = Stream::new([put(CDS, "a", "1"), put(EDS, "a", "1"), put(LDS, "l", "1"), put(RDS, "r", "a")]);
    s.request(delta(RDS, &["r"], &[]));
    s.request(delta(LDS, &[], &[]));
    s.request(delta(EDS, &["a"], &[]));
    s.request(delta(CDS, &[], &[]));
    assert_eq!(s.settle(), ["Cluster a=1", "Endpoints a=1", "Listener l=1", "Route r=a"]);
    s.apply([put(RDS, "r", "b"), put(LDS, "l", "2"), put(EDS, "a", "2"), put(CDS, "b", "1")]);
    assert_eq!(s.settle(), ["Cluster b=1", "Endpoints a=2", "Listener l=2", "Route r=b"]);
}

#[test]
fn g3_a_request_without_type_is_an_error() {
    let error = Stream::new([]).try_request(DeltaDiscoveryRequest::default()).unwrap_err();
    assert_eq!(error, ProtocolError::NoType);
}

#[test]
fn g4_g5_node_on_every_request_is_fine() {
    let mut s = Stream::new([put(CDS, "a", "1")]);
    for _ in 0..2 {
        s.request(DeltaDiscoveryRequest { node: Some(node("n")), ..delta(CDS, &[], &[]) });
    }
    assert_eq!(s.settle(), ["Cluster a=1"]);
}

#[test]
fn g6_another_node_on_the_same_stream_is_an_error() {
    let mut s = Stream::new([]);
    let error =
        s.try_request(DeltaDiscoveryRequest { node: Some(node("m")), ..delta(CDS, &[], &[]) }).unwrap_err();
    assert_eq!(error, ProtocolError::NodeChanged { was: "n".into(), now: "m".into() });
}

#[test]
fn k2_a_long_type_url_is_an_error() {
    let mut request = delta(CDS, &[], &[]);
    request.type_url = "x".repeat(513);
    let error = Stream::new([]).try_request(request).unwrap_err();
    assert_eq!(error, ProtocolError::LongType { len: 513, limit: 512 });
}

#[test]
fn k3_names_of_unknown_types_do_not_exist() {
    let mut s = Stream::new([]);
    let ask = |names: &[&str]| DeltaDiscoveryRequest { type_url: "t/x".into(), ..delta(CDS, names, &[]) };
    s.request(ask(&["b", "a"]));
    assert_eq!(s.out(), ["t/x -a -b"]);
    s.request(ask(&[]));
    assert_eq!(s.out(), NOTHING);
    s.request(ask(&["c"]));
    assert_eq!(s.out(), ["t/x -c"]);
}

#[test]
fn g8_d13_the_response_says_who_and_what() {
    let mut s = Stream::new([put(CDS, "a", "1")]);
    s.request(delta(CDS, &[], &[]));
    let sent = s.next().unwrap();
    assert_eq!(sent.identifier, "disco");
    assert_eq!(sent.version, "1");
    assert_eq!(sent.resources, [("a".into(), version(CDS, "a", "1"), "1".into())]);
}

#[test]
fn d12_an_empty_wildcard_is_answered_once() {
    let mut s = Stream::new([]);
    s.request(delta(CDS, &[], &[]));
    assert_eq!(s.settle(), ["Cluster"]);
    s.apply([put(CDS, "a", "1")]);
    assert_eq!(s.settle(), ["Cluster a=1"]);
    assert_eq!(s.acknowledged(CDS), 2);
}

#[test]
fn k4_nothing_is_answered_before_there_is_a_set() {
    let mut s = Stream::on(StreamPolicy::ENVOY, Config::default(), None);
    s.request(holding(CDS, &[], &[("a", version(CDS, "a", "1")), ("b", version(CDS, "b", "1"))]));
    assert_eq!(s.out(), NOTHING);
    s.apply([put(CDS, "a", "1"), put(CDS, "b", "2")]);
    assert_eq!(s.settle(), ["Cluster b=2"]);
}

#[test]
fn d5_w7_a_missing_name_is_told_and_remembered() {
    let mut s = Stream::new([]);
    s.request(delta(EDS, &["a"], &[]));
    assert_eq!(s.settle(), ["Endpoints -a"]);
    s.apply([put(EDS, "a", "1"), put(EDS, "b", "1")]);
    assert_eq!(s.settle(), ["Endpoints a=1"]);
}

#[test]
fn d6_removals_are_told_by_name_and_by_wildcard() {
    let mut s = settled();
    s.apply([remove(LDS, "l"), remove(RDS, "r"), remove(EDS, "a"), remove(CDS, "a")]);
    assert_eq!(s.settle(), ["Listener -l", "Route -r", "Cluster -a", "Endpoints -a"]);
    assert_eq!(s.acknowledged(CDS), 2);
}

#[test]
fn d6_what_came_and_went_unseen_is_not_told() {
    let mut s = settled();
    s.apply([put(CDS, "x", "1")]);
    s.apply([remove(CDS, "x")]);
    assert_eq!(s.settle(), NOTHING);
    assert_eq!(s.acknowledged(CDS), 3);
}

#[test]
fn d6_what_came_back_between_and_went_again_is_told() {
    let mut s = settled();
    s.apply([remove(LDS, "l")]);
    s.apply([put(LDS, "l", "9")]);
    s.apply([remove(LDS, "l")]);
    assert_eq!(s.settle(), ["Listener -l"]);
}

#[test]
fn d4_a_subscribed_name_is_answered_again() {
    let mut s = settled();
    s.request(delta(EDS, &["a"], &[]));
    assert_eq!(s.settle(), ["Endpoints a=1"]);
    s.request(delta(CDS, &["a"], &[]));
    assert_eq!(s.settle(), ["Cluster a=1", "Endpoints a=1"]);
}

#[test]
fn d1_d3_an_ack_may_subscribe() {
    let mut s = Stream::new([put(EDS, "a", "1"), put(EDS, "b", "1")]);
    s.request(delta(EDS, &["a"], &[]));
    let sent = s.next().unwrap();
    let heard = s.request(DeltaDiscoveryRequest { response_nonce: sent.nonce, ..delta(EDS, &["b"], &["a"]) });
    assert!(matches!(heard, Heard::Acknowledged(EDS, _)), "{heard:?}");
    assert_eq!(s.settle(), ["Endpoints b=1"]);
    s.apply([put(EDS, "a", "2")]);
    assert_eq!(s.settle(), NOTHING);
}

#[test]
fn d2_a_stale_nonce_still_subscribes_but_answers_nothing() {
    let mut s = Stream::new([put(EDS, "a", "1"), put(EDS, "b", "1")]);
    s.request(delta(EDS, &["a"], &[]));
    let first = s.next().unwrap();
    s.ack(EDS);
    s.apply([put(EDS, "a", "2")]);
    s.next().unwrap();
    let heard = s.request(DeltaDiscoveryRequest { response_nonce: first.nonce, ..delta(EDS, &["b"], &[]) });
    assert_eq!(heard, Heard::Request);
    assert_eq!(s.out(), NOTHING);
    s.ack(EDS);
    assert_eq!(s.settle(), ["Endpoints b=1"]);
}

#[test]
fn d7_plain_unsubscribe_is_not_answered() {
    let mut s = settled();
    s.request(delta(EDS, &[], &["a", "phantom"]));
    s.apply([put(EDS, "a", "2")]);
    assert_eq!(s.settle(), NOTHING);
}

#[test]
fn d7_unsubscribe_beside_a_wildcard_is_answered() {
    let mut s = Stream::new([put(CDS, "a", "1")]);
    s.request(delta(CDS, &["*", "a", "b"], &[]));
    assert_eq!(s.settle(), ["Cluster a=1 -b"]);
    s.request(delta(CDS, &[], &["a", "b", "phantom"]));
    assert_eq!(s.settle(), ["Cluster a=1 -b"]);
}

#[test]
fn w4_walk_delta() {
    let mut s = Stream::new([put(CDS, "a", "1"), put(CDS, "b", "1")]);
    s.request(delta(CDS, &[], &[]));
    assert_eq!(s.settle(), ["Cluster a=1 b=1"]);
    s.request(delta(CDS, &["a"], &[]));
    assert_eq!(s.settle(), ["Cluster a=1"]);
    s.request(delta(CDS, &[], &["*"]));
    s.apply([put(CDS, "a", "2"), put(CDS, "b", "2")]);
    assert_eq!(s.settle(), ["Cluster a=2"]);
    s.request(delta(CDS, &[], &["a"]));
    s.apply([put(CDS, "a", "3"), put(CDS, "b", "3")]);
    assert_eq!(s.settle(), NOTHING);
}

#[test]
fn d9_a_reconnect_gets_what_differs_and_what_is_gone() {
    let held = [("a", version(CDS, "a", "1")), ("b", version(CDS, "b", "1")), ("x", version(CDS, "x", "1"))];
    let mut s = Stream::new([put(CDS, "a", "1"), put(CDS, "b", "2"), put(CDS, "c", "1")]);
    s.request(holding(CDS, &[], &held));
    s.request(holding(LDS, &[], &[("l", version(LDS, "l", "1"))]));
    s.request(delta(RDS, &["r"], &[]));
    assert_eq!(s.settle(), ["Cluster b=2 c=1", "Listener -l", "Route -r", "Cluster -x"]);
}

#[test]
fn d9_d10_a_reconnect_that_holds_everything_is_sent_nothing() {
    let old = settled();
    let mut s = Stream::on(StreamPolicy::ENVOY, Config::default(), old.set);
    s.request(holding(CDS, &[], &[("a", version(CDS, "a", "1"))]));
    s.request(holding(EDS, &["a"], &[("a", version(EDS, "a", "1"))]));
    s.request(holding(LDS, &[], &[("l", version(LDS, "l", "1"))]));
    s.request(holding(RDS, &["r"], &[("r", version(RDS, "r", "a"))]));
    assert_eq!(s.settle(), NOTHING);
    assert_eq!([CDS, EDS, LDS, RDS].map(|kind| s.acknowledged(kind)), [1; 4]);
    s.apply([put(EDS, "a", "2")]);
    assert_eq!(s.settle(), ["Endpoints a=2"]);
}

#[test]
fn d9_d5_a_reconnect_with_a_name_that_it_does_not_hold() {
    let mut s = Stream::new([put(EDS, "a", "1"), put(EDS, "b", "1")]);
    s.request(holding(EDS, &["a", "b", "c"], &[("a", version(EDS, "a", "1"))]));
    assert_eq!(s.settle(), ["Endpoints b=1 -c"]);
}

#[test]
fn d15_s4_a_rejected_response_goes_again_with_the_next_change_of_any_of_it() {
    let mut s = Stream::new([put(EDS, "a", "bad"), put(EDS, "b", "1"), put(EDS, "c", "1")]);
    s.request(delta(EDS, &["a", "b"], &[]));
    assert_eq!(s.out(), ["Endpoints a=bad b=1"]);
    assert_eq!(s.nack(EDS), Heard::Rejected(EDS, "bad".into()));
    assert_eq!(s.out(), NOTHING);
    s.request(delta(EDS, &["c"], &[]));
    assert_eq!(s.settle(), ["Endpoints c=1"]);
    assert_eq!(s.acknowledged(EDS), 0);
    assert_eq!(s.served.engine.status()[0].last_error(), "bad");
    s.apply([put(EDS, "a", "good")]);
    assert_eq!(s.settle(), ["Endpoints a=good b=1"]);
    assert_eq!(s.acknowledged(EDS), 2);
    assert_eq!(s.served.engine.status()[0].last_error(), "");
    s.apply([put(EDS, "b", "2")]);
    assert_eq!(s.settle(), ["Endpoints b=2"]);
}

#[test]
fn d15_the_removal_of_the_bad_one_brings_its_neighbours() {
    let mut s = Stream::new([put(LDS, "a", "bad"), put(LDS, "b", "1")]);
    s.request(delta(LDS, &[], &[]));
    assert_eq!(s.out(), ["Listener a=bad b=1"]);
    s.nack(LDS);
    s.apply([remove(LDS, "a")]);
    assert_eq!(s.settle(), ["Listener b=1 -a"]);
}

#[test]
fn s4_nack_is_not_sent_again_until_a_change() {
    let mut s = settled();
    s.apply([put(CDS, "a", "bad")]);
    assert_eq!(s.out(), ["Cluster a=bad", "Endpoints a=1"]);
    s.nack(CDS);
    s.ack(EDS);
    for _ in 0..3 {
        s.wait(Duration::from_secs(100));
        s.apply([put(LDS, "l", "1")]);
        assert_eq!(s.out(), NOTHING);
    }
    let status = &s.served.engine.status()[0];
    assert_eq!((status.rejected, status.synced, status.last_error()), (1, false, "bad"));
}

#[test]
fn d14_newer_state_replaces_older_while_an_answer_is_awaited() {
    let mut s = settled();
    s.apply([put(EDS, "a", "2")]);
    assert_eq!(s.out(), ["Endpoints a=2"]);
    for text in ["3", "4", "5"] {
        s.apply([put(EDS, "a", text)]);
        assert_eq!(s.out(), NOTHING);
    }
    s.ack(EDS);
    assert_eq!(s.acknowledged(EDS), 2);
    assert_eq!(s.settle(), ["Endpoints a=5"]);
    assert_eq!(s.acknowledged(EDS), 5);
}

#[test]
fn d18_k5_large_responses_are_split() {
    let config = Config { response_bytes: 300, ..Config::default() };
    let clusters = (0..9).map(|i| put(CDS, &format!("c{i}"), "1"));
    let mut s = Stream::with(StreamPolicy::ENVOY, config, clusters.chain([put(LDS, "l", "1")]));
    s.request(delta(CDS, &[], &[]));
    s.request(delta(LDS, &[], &[]));
    let sent = s.settle();
    assert!(sent.len() > 3, "{sent:?}");
    assert_eq!(sent.last().unwrap(), "Listener l=1");
    let all: Vec<&str> = sent.iter().flat_map(|text| text.split(' ').skip(1)).collect();
    assert_eq!(all.len(), 10, "{sent:?}");
}

#[test]
fn w12_too_many_names_over_all_types() {
    let config = Config { names_per_stream: 3, ..Config::default() };
    let mut s = Stream::with(StreamPolicy::ENVOY, config, []);
    s.request(delta(EDS, &["a", "b"], &[]));
    s.request(delta(EDS, &["c"], &["a"]));
    let error = s.try_request(delta(RDS, &["r", "q"], &[])).unwrap_err();
    assert_eq!(error, ProtocolError::ManyNames { names: 4, limit: 3 });
}

#[test]
fn d19_a_stream_that_is_behind_the_log_looks_at_everything_and_removes_nothing_else() {
    let mut s = settled();
    s.apply([put(EDS, "a", "2")]);
    assert_eq!(s.next().unwrap().show(), "Endpoints a=2");
    for round in 0..5 {
        s.apply((0..1000).map(|i| put(EDS, &format!("x{i}"), &round.to_string())));
    }
    s.apply([put(EDS, "a", "3")]);
    for round in 0..5 {
        s.apply((0..1000).map(|i| put(EDS, &format!("x{i}"), &format!("again {round}"))));
    }
    assert!(s.set.as_ref().unwrap().changed_since(EDS, crate::model::Revision(2)).is_none());
    s.ack(EDS);
    assert_eq!(s.settle(), ["Endpoints a=3"]);
    assert_eq!(s.acknowledged(EDS), 13);
}

#[test]
fn d6_a_stream_that_is_behind_all_memory_of_removals_must_reconnect() {
    let mut s = settled();
    s.apply([put(LDS, "l", "2")]);
    s.out();
    for round in 0..17 {
        s.apply((0..1000).map(|i| put(LDS, &format!("x{round} {i}"), "1")));
        s.apply((0..1000).map(|i| remove(LDS, &format!("x{round} {i}"))));
    }
    s.ack(LDS);
    let set = s.set.clone().unwrap();
    let error = s.served.engine.next_response(&set, s.now).unwrap_err();
    assert_eq!(error.code(), crate::xds::Code::Unavailable);
}

#[test]
fn g9_unknown_fields_are_ignored() {
    use prost::Message as _;
    let mut bytes = delta(CDS, &[], &[]).encode_to_vec();
    // Field 99, a string.
    bytes.extend([0x9a, 0x06, 0x01, b'x']);
    let mut s = Stream::new([put(CDS, "a", "1")]);
    s.request(DeltaDiscoveryRequest::decode(bytes.as_slice()).unwrap());
    assert_eq!(s.settle(), ["Cluster a=1"]);
}

#[test]
fn d11_w2_the_wildcard_may_be_spelled_out_and_mixed_with_names() {
    for (names, want) in [(&["*"][..], "Cluster a=1 b=1"), (&["*", "a", "x"], "Cluster a=1 b=1 -x")] {
        let mut s = Stream::new([put(CDS, "a", "1"), put(CDS, "b", "1")]);
        s.request(delta(CDS, names, &[]));
        assert_eq!(s.settle(), [want]);
    }
}

#[test]
fn d17_w8_only_what_was_asked_for_is_sent() {
    let mut s = Stream::new([put(CDS, "a", "1"), put(CDS, "b", "1"), put(LDS, "l", "1")]);
    s.request(delta(CDS, &["a"], &[]));
    assert_eq!(s.settle(), ["Cluster a=1"]);
    s.apply([put(CDS, "b", "2"), put(LDS, "l", "2"), put(EDS, "a", "1")]);
    assert_eq!(s.settle(), NOTHING);
    assert_eq!(s.acknowledged(CDS), 2);
}

#[test]
fn s10_versions_come_from_content_only() {
    let history = || [put(CDS, "a", "1"), put(CDS, "b", "1"), put(CDS, "a", "2")];
    let (mut one, mut other) = (Stream::new([]), Stream::new(history().into_iter().rev()));
    for change in history() {
        one.apply([change]);
    }
    other.apply([put(CDS, "a", "2")]);
    let [one, other] = [one, other].map(|mut s| {
        s.request(delta(CDS, &[], &[]));
        s.next().unwrap().resources
    });
    assert_eq!(one, other);
}

#[test]
fn d15_giving_up_the_bad_one_brings_its_neighbours() {
    let mut s = Stream::new([put(EDS, "a", "bad"), put(EDS, "b", "1")]);
    s.request(delta(EDS, &["a", "b"], &[]));
    s.out();
    s.nack(EDS);
    s.request(delta(EDS, &[], &["a"]));
    assert_eq!(s.settle(), ["Endpoints b=1"]);
    assert_eq!(s.acknowledged(EDS), 1);
}

#[test]
fn d15_rejected_responses_that_share_a_name_are_one() {
    let mut s = settled();
    s.request(delta(EDS, &["b"], &[]));
    s.settle();
    s.apply([put(EDS, "a", "bad"), put(EDS, "b", "1")]);
    assert_eq!(s.out(), ["Endpoints a=bad b=1"]);
    s.nack(EDS);
    s.apply([put(CDS, "a", "2")]);
    assert_eq!(s.out(), ["Cluster a=2", "Endpoints a=bad"]);
    s.nack(EDS);
    s.apply([put(EDS, "a", "good")]);
    assert_eq!(s.out(), ["Endpoints a=good b=1"]);
}

#[test]
fn latency_counts_from_publication_to_ack_also_while_an_answer_is_awaited() {
    let second = Duration::from_secs(1);
    let mut s = settled();
    s.apply([put(EDS, "a", "2")]);
    s.wait(second);
    s.out();
    s.wait(second);
    s.apply([put(EDS, "a", "3"), put(CDS, "b", "1")]);
    assert_eq!(s.out(), ["Cluster b=1"]);
    s.wait(second);
    s.apply([put(LDS, "l", "1")]);
    s.out();
    assert_eq!(s.ack(EDS), Heard::Acknowledged(EDS, 3 * second));
    assert_eq!(s.ack(CDS), Heard::Acknowledged(CDS, second));
    s.out();
    s.wait(second);
    assert_eq!(s.ack(EDS), Heard::Acknowledged(EDS, 2 * second));
}

#[test]
fn s4_a_rejected_response_with_removals_is_not_sent_again() {
    let mut s = Stream::new([put(RDS, "a", "1"), put(RDS, "b", "1")]);
    s.request(delta(RDS, &["a", "b", "x"], &[]));
    s.settle();
    s.apply([put(RDS, "a", "bad"), remove(RDS, "b")]);
    assert_eq!(s.out(), ["Route a=bad -b"]);
    s.nack(RDS);
    assert_eq!(s.out(), NOTHING);
    s.apply([put(RDS, "a", "good")]);
    assert_eq!(s.settle(), ["Route a=good -b"]);
}

#[test]
fn d10_types_that_are_to_be_sent_anew_are() {
    let old = settled();
    let config = Config { resend_on_reconnect: vec![EDS], ..Config::default() };
    let mut s = Stream::on(StreamPolicy::ENVOY, config, old.set);
    s.request(holding(CDS, &[], &[("a", version(CDS, "a", "1"))]));
    s.request(holding(EDS, &["a"], &[("a", version(EDS, "a", "1")), ("x", version(EDS, "x", "1"))]));
    s.request(holding(RDS, &["r"], &[("r", version(RDS, "r", "a"))]));
    assert_eq!(s.settle(), ["Endpoints a=1"]);
    s.request(delta(EDS, &["x"], &[]));
    assert_eq!(s.settle(), ["Endpoints -x"]);
}

#[test]
fn d4_d10_what_is_asked_for_again_is_answered_though_it_was_held_at_first() {
    let held = [("a", version(EDS, "a", "1"))];
    for gives_up in [false, true] {
        let mut s = Stream::new([put(EDS, "a", "1")]);
        s.request(holding(EDS, &["a"], &held));
        if gives_up {
            s.request(delta(EDS, &[], &["a"]));
        }
        s.request(delta(EDS, &["a"], &[]));
        assert_eq!(s.settle(), ["Endpoints a=1"], "gives up: {gives_up}");
    }
    let mut s = Stream::new([put(CDS, "a", "1")]);
    s.request(holding(CDS, &["a"], &[("a", version(CDS, "a", "1"))]));
    s.request(delta(CDS, &[], &["a"]));
    s.request(delta(CDS, &["*"], &[]));
    assert_eq!(s.settle(), ["Cluster a=1"]);
    let mut s = Stream::new([put(LDS, "a", "1")]);
    s.request(holding(LDS, &[], &[("a", version(LDS, "a", "1")), ("x", version(LDS, "x", "1"))]));
    s.request(delta(LDS, &["*"], &[]));
    assert_eq!(s.settle(), ["Listener a=1 -x"]);
}
