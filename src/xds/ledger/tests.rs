use std::time::Duration;

use super::*;
use crate::xds::{
    Change, Node, Progress, Proxies,
    delta::Delta,
    status::Seat,
    testing::{Bench, CDS, EDS, LDS, LEDS, RDS, delta, put, remove, resource},
};

/// Streams in one table.
struct Table {
    proxies: Proxies,
    seats: Vec<Seat>,
}

impl Table {
    fn of(benches: &[(&str, &Bench<Delta>)]) -> Self {
        let proxies = Proxies::default();
        let seats = benches.iter().map(|(id, bench)| {
            let node = Node { id: (*id).into(), ..Node::default() };
            let seat = proxies.join(node, Protocol::Delta);
            seat.serve(bench.served.follower().standing());
            bench.served.report(&seat);
            seat
        });
        Self { seats: seats.collect(), proxies }
    }

    /// The resources of the first stream, e.g. `a@2 sent`.
    fn holds(&self, kind: ResourceType) -> Vec<String> {
        assert!(!self.seats.is_empty());
        let list = self.proxies.list();
        let held = list.first().unwrap().holds(kind);
        let show = |held: Held| {
            let removed = if held.removed { "-" } else { "" };
            let earlier = if held.earlier { " over an earlier" } else { "" };
            format!("{removed}{}@{} {:?}{earlier}", held.name, held.changed.0, held.delivery)
        };
        held.into_iter().map(show).collect()
    }

    fn delivered(&self, revision: u64, services: &[&str], listed: bool) -> Progress {
        let services = services.iter().map(|&name| name.into()).collect();
        self.proxies.progress(Revision(revision), &Concern::Change { services, listed })
    }
}

/// Who lacks what, e.g. `late Endpoints not sent`.
fn lacks(progress: &Progress) -> Vec<String> {
    let show = |lack: &Lack| {
        let why = match &lack.why {
            Why::NotSent => "not sent".to_owned(),
            Why::NotAnswered(_) => "not answered".to_owned(),
            Why::Rejected(rejection) => format!("rejected: {}", rejection.reason),
        };
        format!("{} {:?} {why}", lack.node_id, lack.kind)
    };
    progress.lacking.iter().map(show).collect()
}

fn endpoints(names: &[&str], changes: impl IntoIterator<Item = Change>) -> Bench<Delta> {
    let mut bench = Bench::new(changes);
    bench.request(delta(EDS, names, &[]));
    bench
}

#[test]
fn l4_what_is_in_collections_is_told_as_what_is_in_them() {
    let glob = "xdstp:///envoy.config.endpoint.v3.LbEndpoint/x/*";
    let name = |id: &str| glob.replace('*', id);
    let assignment = |globs: &[&str]| {
        let needs = globs.iter().map(|&glob| glob.into());
        Change::Put(Resource::from_body(EDS, "a", &resource(EDS, "a", "1").body(), needs))
    };
    let member = |id: &str, text: &str| put(LEDS, &name(id), text);
    let mut bench =
        endpoints(&["a"], [put(CDS, "a", "1"), assignment(&[glob]), member("1", "1"), member("2", "1")]);
    bench.request(delta(LEDS, &[glob], &[]));
    bench.settle();
    let holds = |bench: &Bench<Delta>| {
        let held = Table::of(&[("n", bench)]).holds(LEDS);
        held.into_iter().map(|held| held.replace(glob.trim_end_matches('*'), "")).collect::<Vec<_>>()
    };
    assert_eq!(holds(&bench), ["1@1 Acknowledged", "2@1 Acknowledged"]);
    bench.apply([member("2", "2")]);
    let progress = |bench: &Bench<Delta>| {
        let table = Table::of(&[("n", bench)]);
        let endpoints = table.proxies.progress(Revision(2), &Concern::of(Some("a")));
        (lacks(&endpoints), lacks(&table.delivered(2, &["a"], false)))
    };
    let both = |text: &str| (vec![text.to_owned()], vec![text.to_owned()]);
    let _ = bench.next();
    assert_eq!(holds(&bench), ["1@1 Acknowledged", "2@2 Sent over an earlier"]);
    assert_eq!(progress(&bench), both("n LbEndpoint not answered"));
    bench.nack(LEDS);
    bench.out();
    assert_eq!(progress(&bench), both("n LbEndpoint rejected: bad"));
    bench.apply([member("2", "3")]);
    bench.settle();
    assert_eq!(progress(&bench), (vec![], vec![]));

    bench.request(delta(LEDS, &[], &[glob]));
    bench.request(delta(LEDS, &[glob], &[]));
    assert_eq!(holds(&bench), ["1@1 Pending", "2@3 Pending over an earlier"]);
    bench.settle();
    bench.apply([remove(LEDS, &name("1")), remove(LEDS, &name("2"))]);
    bench.settle();
    assert_eq!(holds(&bench), ["*@0 Absent"]);
}

#[test]
fn what_a_stream_holds_is_known_without_a_list_of_it() {
    let mut bench = endpoints(&["a", "b", "none"], [put(EDS, "a", "1"), put(EDS, "b", "1")]);
    assert_eq!(Table::of(&[("n", &bench)]).holds(EDS), ["a@1 Pending", "b@1 Pending", "none@0 Absent"]);
    bench.next();
    assert_eq!(Table::of(&[("n", &bench)]).holds(EDS), ["a@1 Sent", "b@1 Sent", "none@0 Absent"]);
    bench.ack(EDS);
    bench.settle();
    let all = ["a@1 Acknowledged", "b@1 Acknowledged", "none@0 Absent"];
    assert_eq!(Table::of(&[("n", &bench)]).holds(EDS), all);

    bench.apply([put(EDS, "a", "2")]);
    bench.next();
    bench.apply([put(EDS, "b", "3")]);
    bench.out();
    let want = ["a@2 Sent over an earlier", "b@3 Pending over an earlier", "none@0 Absent"];
    assert_eq!(Table::of(&[("n", &bench)]).holds(EDS), want);
    bench.nack(EDS);
    bench.settle();
    let want = ["a@2 Rejected over an earlier", "b@3 Acknowledged over an earlier", "none@0 Absent"];
    assert_eq!(Table::of(&[("n", &bench)]).holds(EDS), want);

    // Asked for anew: what was acknowledged before it was given up does not count.
    bench.request(delta(EDS, &[], &["b"]));
    bench.request(delta(EDS, &["b"], &[]));
    bench.next();
    assert_eq!(Table::of(&[("n", &bench)]).holds(EDS)[1], "b@3 Sent over an earlier");
}

#[test]
fn what_was_removed_is_held_until_that_is_acknowledged() {
    let mut bench = Bench::new([put(CDS, "a", "1"), put(CDS, "b", "1")]);
    bench.request(delta(CDS, &[], &[]));
    bench.settle();
    bench.apply([remove(CDS, "a")]);
    bench.next();
    let sent = ["-a@2 Sent over an earlier", "b@1 Acknowledged"];
    assert_eq!(Table::of(&[("n", &bench)]).holds(CDS), sent);
    bench.ack(CDS);
    bench.settle();
    assert_eq!(Table::of(&[("n", &bench)]).holds(CDS), ["b@1 Acknowledged"]);
}

#[test]
fn a_change_concerns_whoever_is_sent_what_it_changed() {
    let start = || [put(CDS, "a", "1"), put(EDS, "a", "1"), put(CDS, "b", "1"), put(EDS, "b", "1")];
    let [mut has, mut silent, mut other] = [["a"], ["a"], ["b"]].map(|names| endpoints(&names, start()));
    for bench in [&mut has, &mut silent, &mut other] {
        bench.settle();
        bench.apply([put(EDS, "a", "2")]);
    }
    has.settle();
    silent.next();
    let table = Table::of(&[("has", &has), ("other", &other), ("silent", &silent)]);
    let progress = table.delivered(2, &["a"], false);
    assert_eq!((progress.acknowledged, progress.complete), (1, false));
    assert_eq!(lacks(&progress), ["silent Endpoints not answered"]);
    assert_eq!(progress.pending, ["silent"]);
    // It is not known of the next change whom it concerns until it is there.
    assert_eq!(lacks(&table.delivered(3, &["b"], false)), ["other Endpoints not sent"]);
    silent.nack(EDS);
    silent.settle();
    let table = Table::of(&[("has", &has), ("silent", &silent)]);
    assert_eq!(lacks(&table.delivered(2, &["a"], false)), ["silent Endpoints rejected: bad"]);
}

#[test]
fn a_service_that_comes_concerns_the_routes_that_list_it() {
    let mut bench =
        Bench::<Delta>::new([put(LDS, "outbound", "1"), put(RDS, "outbound", "1"), put(CDS, "a", "1")]);
    for kind in [LDS, RDS] {
        bench.request(delta(kind, &["outbound"], &[]));
    }
    bench.settle();
    bench.apply([put(CDS, "b", "1"), put(RDS, "outbound", "2")]);
    bench.next();
    let table = Table::of(&[("n", &bench)]);
    assert_eq!(lacks(&table.delivered(2, &["b"], true)), ["n Route not answered"]);
    assert_eq!(table.delivered(2, &["b"], false).acknowledged, 0);
    assert!(table.delivered(2, &["b"], false).complete);
}

#[tokio::test(start_paused = true)]
async fn silence_lasts_since_the_first_response_without_an_answer() {
    let mut bench = endpoints(&["a"], [put(EDS, "a", "1")]);
    bench.next();
    let since = |bench: &Bench<Delta>| bench.served.engine.status()[0].flight.unanswered.as_ref().unwrap().0;
    let first = since(&bench);
    bench.wait(Duration::from_secs(3600));
    bench.apply([put(EDS, "a", "2")]);
    assert_eq!(bench.out(), ["Endpoints a=2"]);
    assert_eq!(since(&bench), first);
    bench.ack(EDS);
    bench.settle();
    assert!(bench.served.engine.status()[0].unanswered_since().is_none());
}
