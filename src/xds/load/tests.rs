use std::{
    collections::{BTreeMap, HashSet},
    sync::Arc,
    time::Duration,
};

use envoy_types::pb::{
    envoy::config::{
        core::v3 as core,
        endpoint::v3::{ClusterStats, UpstreamLocalityStats, cluster_stats::DroppedRequests},
    },
    google::protobuf,
};
use tokio::time::Instant;

use super::{Load, Loads, Reportable, Traffic, report::Report};
use crate::{model::Locality, xds::Node};

const INTERVAL: Duration = Duration::from_secs(10);

/// Services `a` and `b`, each with instances in zones `x` and `y`.
#[derive(Debug)]
struct Two;

impl Reportable for Two {
    fn service(&self, name: &str) -> Option<Arc<str>> {
        ["a", "b"].contains(&name).then(|| name.into())
    }

    fn localities(&self, _: &str) -> HashSet<Locality> {
        ["x", "y"].map(zone).into()
    }

    fn wanted(&self, _: &Node) -> Vec<String> {
        vec![]
    }
}

/// Likewise, but all instances have left.
#[derive(Debug)]
struct Empty;

impl Reportable for Empty {
    fn service(&self, name: &str) -> Option<Arc<str>> {
        Two.service(name)
    }

    fn localities(&self, _: &str) -> HashSet<Locality> {
        HashSet::new()
    }

    fn wanted(&self, _: &Node) -> Vec<String> {
        vec![]
    }
}

fn zone(zone: &str) -> Locality {
    Locality { zone: zone.into(), ..Locality::default() }
}

fn seconds(seconds: i64) -> Option<protobuf::Duration> {
    Some(protobuf::Duration { seconds, nanos: 0 })
}

/// A cluster of that name over 10 s, with `(zone, issued, errors, in progress)`.
fn cluster(name: &str, zones: &[(&str, u64, u64, u64)]) -> ClusterStats {
    let stats = zones.iter().map(|(zone, issued, errors, active)| UpstreamLocalityStats {
        locality: Some(core::Locality { zone: (*zone).into(), ..Default::default() }),
        total_issued_requests: *issued,
        total_error_requests: *errors,
        total_requests_in_progress: *active,
        ..Default::default()
    });
    ClusterStats {
        cluster_name: name.into(),
        upstream_locality_stats: stats.collect(),
        load_report_interval: seconds(10),
        ..Default::default()
    }
}

fn read(stats: &[ClusterStats]) -> Report {
    Report::read(stats, INTERVAL, &Two, &Report::default())
}

/// `(zone, reporters, calls, errors, in progress)` of a service.
type Row<'a> = (&'a str, usize, f64, f64, u64);

fn load(rows: &[Row<'_>]) -> Load {
    let rows = rows.iter().map(|(place, reporters, calls, errors, in_progress)| {
        let traffic =
            Traffic { reporters: *reporters, calls: *calls, errors: *errors, in_progress: *in_progress };
        (zone(place), traffic)
    });
    Load { localities: rows.collect(), drops: BTreeMap::new() }
}

fn check(report: &Report, service: &str, want: &[Row<'_>]) {
    assert_eq!(report.services.get(service).cloned().unwrap_or_default(), load(want));
}

#[test]
fn c3_counters_become_rates_over_the_reports_own_interval() {
    for (interval, rate) in [
        (seconds(10), 4.0),
        (seconds(20), 2.0),
        (Some(protobuf::Duration { seconds: 0, nanos: 500_000_000 }), 80.0),
        // Nothing that a rate could be told from: as long as was asked for.
        (None, 4.0),
        (seconds(0), 4.0),
        (seconds(-1), 4.0),
        (Some(protobuf::Duration { seconds: 1, nanos: -1 }), 4.0),
    ] {
        let stats = ClusterStats { load_report_interval: interval, ..cluster("a", &[("x", 40, 20, 7)]) };
        check(&read(&[stats]), "a", &[("x", 1, rate, rate / 2.0, 7)]);
    }
}

#[test]
fn c3_clusters_that_share_a_service_are_one() {
    let shared = ClusterStats {
        cluster_service_name: "a".into(),
        ..cluster("canary", &[("x", 10, 0, 1), ("y", 30, 10, 0)])
    };
    // A locality that is there in two priorities is one, too.
    let report =
        read(&[cluster("a", &[("x", 20, 10, 2), ("x", 10, 0, 1)]), shared, cluster("b", &[("y", 10, 0, 0)])]);
    check(&report, "a", &[("x", 1, 4.0, 1.0, 4), ("y", 1, 3.0, 1.0, 0)]);
    check(&report, "b", &[("y", 1, 1.0, 0.0, 0)]);
}

#[test]
fn only_known_services_and_localities_are_kept() {
    let many: Vec<_> = (0..1000).map(|n| format!("zone-{n}")).collect();
    let odd: Vec<_> = many.iter().map(|zone| (zone.as_str(), 1, 1, 1)).collect();
    let report = read(&[cluster("a", &odd), cluster("disco_servers", &[("x", 1, 1, 1)]), cluster("", &odd)]);
    assert_eq!(report.services.keys().map(|name| &**name).collect::<Vec<_>>(), ["a"]);
    check(&report, "a", &[]);

    // Calls to the last instance of a zone end after it has left.
    let before = read(&[cluster("a", &[("x", 10, 0, 1)])]);
    let stats = [cluster("a", &[("x", 10, 0, 0), ("y", 10, 0, 0)])];
    check(&Report::read(&stats, INTERVAL, &Empty, &before), "a", &[("x", 1, 1.0, 0.0, 0)]);
}

#[test]
fn drops_are_told_apart_within_bounds() {
    let dropped = |category: &str, count| DroppedRequests { category: category.into(), dropped_count: count };
    let drops = |total, each: Vec<DroppedRequests>| {
        let stats =
            ClusterStats { total_dropped_requests: total, dropped_requests: each, ..cluster("a", &[]) };
        read(&[stats]).services["a"].drops.clone()
    };
    let want = [("throttle", 2.0), ("other", 1.0)].map(|(name, rate)| (name.to_owned(), rate));
    assert_eq!(drops(30, vec![dropped("throttle", 20)]), want.into());
    assert_eq!(drops(0, vec![dropped("throttle", 0)]), [].into());
    let many: Vec<_> = (0..100).map(|n| dropped(&format!("category {n}"), 10)).collect();
    let kept = drops(1000, many);
    assert_eq!((kept.len(), kept["other"]), (17, 84.0));
    let long = drops(10, vec![dropped(&"x".repeat(1000), 10)]);
    assert_eq!(long, [("other".to_owned(), 1.0)].into());
}

#[test]
fn reports_of_all_clients_are_summed_and_the_newest_of_each_counts() {
    let start = Instant::now();
    let at = |seconds| start + Duration::from_secs(seconds);
    let loads = Loads::new(INTERVAL);
    let report = |id, zones: &[(&str, u64, u64, u64)], seconds| {
        loads.report(id, read(&[cluster("a", zones)]), at(seconds));
    };
    let check = |seconds, want: &[Row<'_>]| assert_eq!(loads.of("a", at(seconds)), load(want), "{seconds} s");

    // Two clients that call themselves the same are two.
    let (first, second) = (loads.join("proxy"), loads.join("proxy"));
    check(0, &[]);
    report(first, &[("x", 10, 0, 1)], 0);
    report(second, &[("x", 20, 10, 2), ("y", 10, 0, 0)], 5);
    check(5, &[("x", 2, 3.0, 1.0, 3), ("y", 1, 1.0, 0.0, 0)]);
    report(second, &[("x", 10, 0, 5)], 15);
    check(15, &[("x", 2, 2.0, 0.0, 6)]);
    // The first has been silent for three intervals.
    check(30, &[("x", 1, 1.0, 0.0, 5)]);
    assert_eq!(loads.of("b", at(15)), Load::default());
}

#[test]
fn a_client_that_left_counts_for_three_intervals_or_until_it_is_back() {
    let start = Instant::now();
    let at = |seconds| start + Duration::from_secs(seconds);
    let loads = Loads::new(INTERVAL);
    let check = |seconds, calls: Option<f64>| {
        let want = calls.map(|calls| load(&[("x", 1, calls, 0.0, 0)])).unwrap_or_default();
        assert_eq!(loads.of("a", at(seconds)), want, "{seconds} s");
    };
    let report = |issued| read(&[cluster("a", &[("x", issued, 0, 0)])]);

    let id = loads.join("proxy");
    loads.report(id, report(10), at(0));
    loads.leave(id, at(5));
    check(29, Some(1.0));
    check(30, None);

    // Back in time: not counted twice, and not forgotten before it reports again.
    let id = loads.join("proxy");
    loads.report(id, report(20), at(40));
    loads.leave(id, at(45));
    let id = loads.join("proxy");
    check(46, Some(2.0));
    loads.report(id, report(30), at(50));
    check(50, Some(3.0));

    // One that claims to report once an hour does not stay for hours.
    let hourly = ClusterStats { load_report_interval: seconds(3600), ..cluster("a", &[("x", 3600, 0, 0)]) };
    loads.report(id, read(&[hourly]), at(60));
    check(1000, Some(1.0));
    loads.leave(id, at(1000));
    check(1029, Some(1.0));
    check(1030, None);
}
