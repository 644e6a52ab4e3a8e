//! Where other control planes fell, one test each; the numbers are those of `RULES.md`. Those that need a connection are
//! with the server's tests.

use std::time::Duration;

use envoy_types::pb::envoy::{
    config::cluster::v3::Cluster,
    service::discovery::v3::{DeltaDiscoveryRequest, DiscoveryRequest},
};

use super::{
    Change, Config, Heard, Resource, ResourceSet, ResourceType, StreamPolicy,
    delta::Delta,
    sotw::Sotw,
    testing::{Bench, CDS, EDS, LDS, RDS, Speak, delta, holding, put, remove, strings, version},
};
use crate::model::Revision;

const NOTHING: [&str; 0] = [];

fn start() -> [Change; 6] {
    [
        put(CDS, "a", "1"),
        put(CDS, "b", "1"),
        put(EDS, "a", "1"),
        put(EDS, "b", "1"),
        put(LDS, "l", "1"),
        put(RDS, "r", "a"),
    ]
}

/// An Envoy that has everything, in both forms.
fn on_delta() -> Bench<Delta> {
    let mut s = Bench::<Delta>::new(start());
    for (kind, names) in [(CDS, &[][..]), (EDS, &["a", "b"]), (LDS, &[]), (RDS, &["r"])] {
        s.request(delta(kind, names, &[]));
    }
    s.settle();
    s
}

fn on_sotw() -> Bench<Sotw> {
    let mut s = Bench::<Sotw>::new(start());
    for (kind, names) in [(CDS, &[][..]), (EDS, &["a", "b"]), (LDS, &[]), (RDS, &["r"])] {
        s.ask(kind, names);
    }
    s.settle();
    s
}

/// The same check in both forms.
macro_rules! both {
    ($check:ident) => {
        $check(on_delta());
        $check(on_sotw());
    };
}

#[test]
fn pitfall_01_endless_resend_after_nack() {
    fn check<V: Speak>(mut s: Bench<V>) {
        for kind in [RDS, EDS, LDS] {
            let name = match kind {
                RDS => "r",
                EDS => "a",
                _ => "l",
            };
            for text in ["bad 1", "bad 2", "bad 3"] {
                s.apply([put(kind, name, text)]);
                assert_eq!(s.out(), [format!("{kind:?} {name}={text}")]);
                s.nack(kind);
                for _ in 0..5 {
                    s.wait(Duration::from_secs(100));
                    s.apply([put(CDS, "a", "1")]);
                    assert_eq!(s.out(), NOTHING, "{text}");
                }
            }
        }
    }
    both!(check);
}

#[test]
fn pitfall_02_a_nack_that_carries_the_version_it_rejects() {
    let mut s = on_sotw();
    s.apply([put(RDS, "r", "bad")]);
    s.out();
    let sent = s.last[&RDS].clone();
    s.accepted.insert(RDS, sent.version);
    assert_eq!(s.nack(RDS), Heard::Rejected(RDS, "bad".into()));
    assert_eq!(s.acknowledged(RDS), 1);
}

#[test]
fn pitfall_03_a_delta_resubscription_is_answered() {
    let mut s = on_delta();
    s.request(delta(EDS, &["a"], &[]));
    assert_eq!(s.settle(), ["Endpoints a=1"]);
    s.request(delta(EDS, &[], &["a"]));
    s.request(delta(EDS, &["a"], &[]));
    assert_eq!(s.settle(), ["Endpoints a=1"]);
    s.request(delta(EDS, &["a"], &["a"]));
    assert_eq!(s.settle(), NOTHING);
}

#[test]
fn pitfall_04_a_sotw_name_given_up_and_asked_for_again_is_answered() {
    let mut s = on_sotw();
    for (kind, all, some, want) in
        [(EDS, &["a", "b"][..], &["b"][..], "Endpoints a=1"), (RDS, &["r", "x"], &["x"], "Route r=a")]
    {
        s.ask(kind, some);
        assert_eq!(s.settle(), NOTHING);
        s.ask(kind, all);
        assert_eq!(s.settle(), [want]);
    }
}

#[test]
fn pitfall_05_a_missing_delta_resource_is_reported_and_remembered() {
    let mut s = on_delta();
    for (kind, want) in [(CDS, "Cluster"), (EDS, "Endpoints"), (LDS, "Listener"), (RDS, "Route")] {
        s.request(delta(kind, &["new"], &[]));
        assert_eq!(s.settle(), [format!("{want} -new")]);
        s.apply([put(kind, "new", "1")]);
        assert_eq!(s.settle(), [format!("{want} new=1")]);
    }
}

#[test]
fn pitfall_06_a_cluster_change_brings_endpoints() {
    fn check<V: Speak>(mut s: Bench<V>) {
        s.apply([put(CDS, "a", "2")]);
        let sent = s.settle();
        assert!(sent[0].starts_with("Cluster a=2"), "{sent:?}");
        assert_eq!(sent[1], "Endpoints a=1");
    }
    both!(check);
}

#[test]
fn pitfall_07_a_late_ack_of_endpoints_does_not_hide_that_they_are_lost() {
    fn check<V: Speak>(mut s: Bench<V>) {
        s.apply([put(EDS, "a", "2")]);
        assert_eq!(s.out(), ["Endpoints a=2"]);
        s.apply([put(CDS, "a", "2")]);
        assert_eq!(s.out().len(), 1);
        s.ack(EDS);
        assert_eq!(s.out(), ["Endpoints a=2"]);
    }
    both!(check);
}

#[test]
fn pitfall_08_a_request_for_endpoints_after_clusters_is_no_answer() {
    let mut s = on_sotw();
    s.apply([put(CDS, "a", "2")]);
    assert_eq!(s.next().unwrap().show(), "Cluster a=2 b=1");
    assert_eq!(s.ask(EDS, &["a", "b"]), Heard::Request);
    assert_eq!(s.out(), ["Endpoints a=1"]);
}

#[test]
fn pitfall_09_a_cluster_on_endpoints_that_another_has_warms() {
    fn check<V: Speak>(mut s: Bench<V>) {
        let cluster = Cluster { name: "c".into(), alt_stat_name: "1".into(), ..Default::default() };
        s.apply([Change::Put(Resource::new(CDS, "c", &cluster, ["a".into()]))]);
        assert_eq!(s.out()[1], "Endpoints a=1");
    }
    both!(check);
}

#[test]
fn pitfall_10_what_vanished_while_the_client_was_away_is_removed() {
    for kind in ResourceType::ALL {
        let mut s = Bench::<Delta>::new([]);
        s.request(holding(kind, &["x"], &[("x", version(kind, "x", "1"))]));
        s.wait(Duration::ZERO);
        let mut sent = s.settle();
        s.wait(Duration::from_secs(6));
        sent.extend(s.settle());
        assert_eq!(sent, [format!("{kind:?} -x")]);
    }
}

#[test]
fn pitfall_11_a_change_of_one_removes_none_of_the_others() {
    let mut s = on_delta();
    for kind in [EDS, CDS] {
        s.apply([put(kind, "a", "2")]);
        while let Some(sent) = s.next() {
            assert_eq!((sent.resources.len(), sent.removed.len()), (1, 0), "{sent:?}");
            s.ack(sent.kind.unwrap());
        }
    }
    let mut s = on_sotw();
    s.apply([put(CDS, "a", "2")]);
    assert_eq!(s.settle()[0], "Cluster a=2 b=1");
}

#[test]
fn pitfall_12_a_reconnect_at_the_held_version_does_not_leave_clusters_waiting() {
    // Endpoints that did not change, of a cluster that did.
    let mut old = on_sotw();
    let held = old.accepted.clone();
    old.apply([put(CDS, "a", "2")]);
    let mut s = Bench::<Sotw>::on(StreamPolicy::ENVOY, Config::default(), old.set);
    for (kind, names) in [(EDS, &["a", "b"][..]), (CDS, &[])] {
        s.request(DiscoveryRequest {
            type_url: kind.url().into(),
            version_info: held[&kind].clone(),
            resource_names: strings(names),
            ..Default::default()
        });
        s.names.insert(kind, strings(names));
    }
    assert_eq!(s.settle(), ["Cluster a=2 b=1", "Endpoints a=1"]);
    // And for clients that wait all the same there is a switch.
    let config = Config { resend_on_reconnect: vec![EDS], ..Config::default() };
    let mut s = Bench::<Delta>::with(StreamPolicy::ENVOY, config, start());
    s.request(holding(EDS, &["a"], &[("a", version(EDS, "a", "1"))]));
    assert_eq!(s.settle(), ["Endpoints a=1"]);
}

#[test]
fn pitfall_13_versions_do_not_start_again_at_one() {
    let versions = |changes: Vec<Change>| {
        let mut s = Bench::<Sotw>::new(changes);
        s.ask(CDS, &[]);
        let sotw = s.next().unwrap().version;
        let mut s = Bench::<Delta>::on(StreamPolicy::ENVOY, Config::default(), s.set);
        s.request(delta(CDS, &[], &[]));
        (sotw, s.next().unwrap().resources.remove(0).1)
    };
    let (one, same, other) = (
        versions(vec![put(CDS, "a", "1")]),
        versions(vec![put(CDS, "a", "0"), put(CDS, "a", "1")]),
        versions(vec![put(CDS, "a", "2")]),
    );
    assert_eq!(one, same);
    assert!(one.0 != other.0 && one.1 != other.1, "{one:?} {other:?}");
}

#[test]
fn pitfall_14_an_empty_list_of_a_grpc_client_is_not_the_whole_mesh() {
    let mut s = Bench::<Sotw>::with(StreamPolicy::GRPC, Config::default(), start());
    for kind in [LDS, CDS] {
        s.request(DiscoveryRequest {
            type_url: kind.url().into(),
            version_info: "held".into(),
            ..Default::default()
        });
    }
    assert_eq!(s.settle(), NOTHING);
}

#[test]
fn pitfall_15_a_listener_asked_for_again_is_not_answered_with_none() {
    for policy in [StreamPolicy::GRPC, StreamPolicy::ENVOY] {
        let mut s = Bench::<Sotw>::with(policy, Config::default(), start());
        s.ask(LDS, &["l"]);
        s.settle();
        s.ask(LDS, &[]);
        assert_eq!(s.settle(), NOTHING);
        s.ask(LDS, &["l"]);
        assert_eq!(s.settle(), ["Listener l=1"]);
    }
}

#[test]
fn pitfall_16_no_answer_waits_for_names_that_are_missing() {
    let mut s = Bench::<Sotw>::new(start());
    s.ask(CDS, &["a", "missing"]);
    s.ask(EDS, &["a", "missing"]);
    assert_eq!(s.settle(), ["Cluster a=1", "Endpoints a=1"]);
}

#[test]
fn pitfall_17_types_go_in_order() {
    fn check<V: Speak>(mut s: Bench<V>) {
        s.apply([put(RDS, "r", "c"), put(LDS, "l", "2"), put(EDS, "a", "2"), put(CDS, "c", "1")]);
        let kinds: Vec<String> =
            s.settle().iter().map(|text| text.split(' ').next().unwrap_or_default().to_owned()).collect();
        assert_eq!(kinds, ["Cluster", "Endpoints", "Listener", "Route"]);
    }
    both!(check);
}

#[test]
fn pitfall_18_a_cluster_goes_after_the_last_route_to_it() {
    fn check<V: Speak>(mut s: Bench<V>) {
        s.apply([remove(CDS, "a"), remove(EDS, "a"), put(RDS, "r", "b")]);
        assert_eq!(s.out(), ["Route r=b"]);
        s.ack(RDS);
        assert!(s.out()[0].starts_with("Cluster"));
    }
    both!(check);
}

#[test]
fn pitfall_21_a_resource_is_encoded_once_for_all_streams() {
    let set = std::sync::Arc::new(ResourceSet::default().apply(Revision(1), start()));
    let at = |mut s: Bench<Delta>| {
        s.request(delta(EDS, &["a"], &[]));
        let response = s.served.engine.next_response(&set, s.now).unwrap().unwrap();
        response.body[0].as_ptr()
    };
    let stream = || Bench::<Delta>::on(StreamPolicy::ENVOY, Config::default(), Some(set.clone()));
    assert_eq!(at(stream()), at(stream()));
    assert_eq!(at(stream()), set.get(EDS, "a").unwrap().resource.delta_field().as_ptr());
}

#[test]
fn pitfall_22_pushes_do_not_pile_up_on_a_client_that_is_slow() {
    fn check<V: Speak>(mut s: Bench<V>) {
        for n in 2..100 {
            s.apply([put(EDS, "a", &n.to_string())]);
            assert_eq!(s.out().len(), usize::from(n == 2), "{n}");
        }
        s.ack(EDS);
        assert_eq!(s.out(), ["Endpoints a=99"]);
    }
    both!(check);
}

#[test]
fn pitfall_24_what_did_not_change_is_not_pushed() {
    fn check<V: Speak>(mut s: Bench<V>) {
        s.apply(start());
        s.apply([]);
        assert_eq!(s.out(), NOTHING);
        assert_eq!(s.acknowledged(CDS), 3);
    }
    both!(check);
}

#[test]
fn pitfall_27_nothing_goes_to_a_type_that_is_not_watched() {
    let mut s = on_sotw();
    s.apply([put(EDS, "a", "2")]);
    s.ask(EDS, &[]);
    s.apply([put(EDS, "b", "2")]);
    assert_eq!(s.out(), NOTHING);
    // The nonces go on.
    s.ask(EDS, &["b"]);
    assert_eq!(s.settle(), ["Endpoints b=2"]);
}

#[test]
fn pitfall_28_the_neighbours_of_a_rejected_resource_go_again() {
    fn check<V: Speak>(mut s: Bench<V>) {
        s.apply([put(EDS, "a", "bad"), put(EDS, "b", "2")]);
        assert_eq!(s.out(), ["Endpoints a=bad b=2"]);
        s.nack(EDS);
        s.apply([put(EDS, "a", "good")]);
        assert_eq!(s.out(), ["Endpoints a=good b=2"]);
    }
    both!(check);
}

#[test]
fn pitfall_29_a_rejected_cluster_does_not_freeze_endpoints_and_the_fix_arrives() {
    fn check<V: Speak>(mut s: Bench<V>) {
        s.apply([put(CDS, "a", "bad")]);
        s.out();
        s.nack(CDS);
        s.ack(EDS);
        s.apply([put(EDS, "a", "2")]);
        assert_eq!(s.settle(), ["Endpoints a=2"]);
        s.apply([put(CDS, "a", "good")]);
        assert!(s.settle()[0].starts_with("Cluster a=good"));
    }
    both!(check);
}

#[test]
fn pitfall_33_endpoints_first_after_a_reconnect_and_of_names_that_are_gone() {
    let mut s = Bench::<Delta>::new(start());
    s.request(holding(EDS, &["gone", "a"], &[("gone", version(EDS, "gone", "1"))]));
    assert_eq!(s.settle(), ["Endpoints a=1 -gone"]);
    s.request(holding(CDS, &[], &[("a", version(CDS, "a", "1"))]));
    assert_eq!(s.settle(), ["Cluster b=1"]);
    let mut s = Bench::<Sotw>::new(start());
    s.ask(EDS, &["gone", "a"]);
    assert_eq!(s.settle(), ["Endpoints a=1"]);
    s.ask(CDS, &[]);
    assert_eq!(s.settle(), ["Cluster a=1 b=1", "Endpoints a=1"]);
}

#[test]
fn pitfall_34_an_on_demand_cluster_beside_the_wildcard_is_answered_at_once() {
    let mut s = on_delta();
    s.request(delta(CDS, &["late"], &[]));
    assert_eq!(s.settle(), ["Cluster -late"]);
    s.apply([put(CDS, "late", "1"), put(EDS, "late", "1")]);
    assert_eq!(s.settle(), ["Cluster late=1"]);
    s.request(delta(CDS, &["late"], &[]));
    assert_eq!(s.settle(), ["Cluster late=1"]);
}

/// Every nonce that is not the newest of its type, as ACK and as NACK: nothing is counted, nothing is answered, and the
/// answer that counts still does.
#[test]
fn s5_d2_stale_and_crossed_nonces() {
    fn check<V: Speak>(fresh: impl Fn() -> Bench<V>, of: impl Fn(ResourceType, String, bool) -> V::Request) {
        for error in [false, true] {
            let nonces = |s: &Bench<V>| {
                let (stale, crossed) = (s.last[&EDS].nonce.clone(), s.last[&RDS].nonce.clone());
                [stale, crossed, "ffff".into(), "no number".into(), String::new()]
            };
            for n in 0..5 {
                let mut s = fresh();
                let nonce = nonces(&s)[n].clone();
                s.apply([put(EDS, "a", "2")]);
                assert_eq!(s.out(), ["Endpoints a=2"]);
                assert_eq!(s.request(of(EDS, nonce.clone(), error)), Heard::Request, "{nonce}");
                assert_eq!((s.acknowledged(EDS), s.out().len()), (1, 0), "{nonce}");
                assert!(matches!(s.ack(EDS), Heard::Acknowledged(EDS, _)));
                assert_eq!((s.acknowledged(EDS), s.out().len()), (2, 0), "{nonce}");
            }
        }
    }
    let status = |error: bool| error.then(Default::default);
    check(on_delta, |kind, response_nonce, error| DeltaDiscoveryRequest {
        response_nonce,
        error_detail: status(error),
        ..delta(kind, &[], &[])
    });
    check(
        || {
            let mut s = on_sotw();
            s.names.insert(EDS, strings(&["a", "b"]));
            s
        },
        |kind, response_nonce, error| DiscoveryRequest {
            type_url: kind.url().into(),
            resource_names: strings(&["a", "b"]),
            response_nonce,
            error_detail: status(error),
            ..Default::default()
        },
    );
}

#[test]
fn w9_one_member_of_the_wildcard_cannot_be_given_up() {
    let mut s = on_delta();
    s.request(delta(CDS, &[], &["a"]));
    s.apply([put(CDS, "a", "2")]);
    assert_eq!(s.settle()[0], "Cluster a=2");
}

#[test]
fn x3_x8_names_are_opaque() {
    let mut s = on_delta();
    for name in ["xdstp://authority/type/id?b=1&a=2", "xdstp://authority/type/*", "a b%\u{e9}\u{0}", "a/*"] {
        s.request(delta(EDS, &[name], &[]));
        assert_eq!(s.settle(), [format!("Endpoints -{name}")]);
        s.apply([put(EDS, name, "1")]);
        assert_eq!(s.settle(), [format!("Endpoints {name}=1")]);
    }
}

#[test]
fn s12_a_long_reason_is_kept_in_part() {
    let mut s = on_delta();
    s.apply([put(EDS, "a", "bad")]);
    s.out();
    s.answer(EDS, Some(&"é".repeat(5000)));
    let status = s.served.engine.status();
    let reason = &status[1].rejections[0].reason;
    assert!(reason.starts_with('é') && reason.len() <= 2048, "{}", reason.len());
}
