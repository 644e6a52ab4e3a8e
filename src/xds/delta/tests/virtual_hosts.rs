use super::{Stream, *};
use crate::{model::Revision, xds::testing::VHDS};

/// Like Envoy, whose first request is empty, and which then asks for the hosts that it does not know.
fn asked(names: &[&str]) -> Stream {
    let mut s = Stream::new([put(VHDS, "t/a", "1")]);
    s.request(delta(VHDS, &[], &[]));
    assert_eq!(s.settle(), ["VirtualHost t/a=1"]);
    if !names.is_empty() {
        s.request(delta(VHDS, names, &[]));
    }
    s
}

#[test]
fn l3_an_empty_first_request_asks_for_all_hosts() {
    let mut s = asked(&[]);
    s.apply([put(VHDS, "t/b", "1"), remove(VHDS, "t/a")]);
    assert_eq!(s.settle(), ["VirtualHost t/b=1 -t/a"]);
    let mut none = Stream::new([]);
    none.request(delta(VHDS, &[], &[]));
    assert_eq!(none.settle(), ["VirtualHost"], "or Envoy waits for its first hosts");
}

#[test]
fn l3_d16_an_unknown_host_is_told_by_alias_each_time_and_sent_when_it_comes() {
    let mut s = asked(&["t/x"]);
    assert_eq!(s.settle(), ["VirtualHost t/x=?"]);
    s.request(delta(VHDS, &["t/x", "t/a"], &[]));
    assert_eq!(s.settle(), ["VirtualHost t/a=1 t/x=?"]);
    s.apply([put(VHDS, "t/x", "1")]);
    assert_eq!(s.settle(), ["VirtualHost t/x=1"]);
    // What it has is removed, and unknown again from then on.
    s.apply([remove(VHDS, "t/x")]);
    assert_eq!(s.settle(), ["VirtualHost -t/x"]);
    s.request(delta(VHDS, &["t/x"], &[]));
    assert_eq!(s.settle(), ["VirtualHost t/x=?"]);
}

#[test]
fn l3_d9_a_reconnect_is_told_what_is_gone_and_what_is_still_unknown() {
    let mut s = Stream::new([put(VHDS, "t/a", "1")]);
    let held = [("t/a", version(VHDS, "t/a", "1")), ("t/gone", "1".into()), ("t/asked", "1".into())];
    s.request(holding(VHDS, &["*", "t/asked", "t/nope"], &held));
    assert_eq!(s.settle(), ["VirtualHost t/nope=? -t/asked -t/gone"]);
}

#[test]
fn o2_o3_hosts_come_after_new_clusters_and_go_before_them() {
    let mut s = settled();
    s.request(delta(VHDS, &[], &[]));
    assert_eq!(s.settle(), ["VirtualHost"]);
    s.apply([put(VHDS, "t/b", "b"), put(CDS, "b", "1"), put(EDS, "b", "1")]);
    assert_eq!(s.settle(), ["Cluster b=1", "VirtualHost t/b=b"]);
    s.apply([remove(VHDS, "t/b"), remove(CDS, "b")]);
    assert_eq!(s.settle(), ["VirtualHost -t/b", "Cluster -b"]);
    assert!(s.served.engine.status().iter().all(|of| of.acknowledged == Revision(3)));
}

#[test]
fn who_never_asks_for_hosts_pays_nothing_for_them() {
    let mut s = settled();
    s.apply([put(VHDS, "t/b", "b")]);
    assert_eq!(s.settle(), NOTHING);
    assert!(s.served.engine.track(VHDS).is_none());
    assert_eq!(s.acknowledged(RDS), 2);
}
