//! One change concerns a few streams, while the catalog and the number of other streams grow.

use std::time::Duration;

use hdrhistogram::Histogram;

use crate::{
    Bench, Contender,
    load::{Ask, ENDPOINTS, Fleet, Plan, Protocol},
    measure::{bounded, content, histogram, median, ms, round, service, sidecar},
    report::Figure,
    servers::{Content, Disco, Server},
};

/// Streams that a change concerns while the catalog grows.
pub(crate) const CONCERNED: usize = 100;

/// Services, and instances of each.
const SMALL: (usize, usize) = (10, 10);

/// For the rounds of a contender. Who needs long for one change makes fewer.
const BUDGET: Duration = Duration::from_secs(12);

/// A change that costs more than this is not measured with thousands of other streams as well: each of them costs too.
const AFFORDABLE_US: f64 = 100_000.0;

pub(crate) fn run(bench: &mut Bench) {
    let (large, others) = if bench.quick { ((2_000, 10), 1_000) } else { ((10_000, 10), 9_000) };
    println!("one change to {CONCERNED} delta streams that name 10 services each");
    let mut discos = [SMALL, large].map(|(services, instances)| Disco::start(services, instances));
    let contents = discos.each_mut().map(|disco| content(disco, sidecar(Protocol::Delta, 0, &["*"])));
    let [small, mut large_one] = discos.map(Box::new);
    let mut small: Box<dyn Server> = small;
    let case = format!("{} instances", large.0 * large.1);
    bench.attempt("catalog", &case, Contender::Disco, |bench| {
        compare(bench, Contender::Disco, [small.as_mut(), large_one.as_mut()], large, others);
    });
    drop((small, large_one));
    for peer in bench.peers() {
        bench.attempt("catalog", &case, peer, |bench| {
            let [mut small, mut large_one] =
                contents.each_ref().map(|content: &Content| bench.start(peer, content, 0, SMALL));
            compare(bench, peer, [small.as_mut(), large_one.as_mut()], large, others);
        });
    }
    for case in cases(large, others) {
        bench.report.print("catalog", &case);
    }
}

/// What is measured: a small catalog, a large one, a large one with other streams.
fn cases(large: (usize, usize), others: usize) -> [String; 3] {
    [
        format!("{} instances", SMALL.0 * SMALL.1),
        format!("{} instances", large.0 * large.1),
        format!("{} instances, {others} other streams", large.0 * large.1),
    ]
}

/// The same change in a small and in a large catalog, in turns; then with other streams.
fn compare(
    bench: &mut Bench,
    contender: Contender,
    [small, large]: [&mut dyn Server; 2],
    size: (usize, usize),
    others: usize,
) {
    let names: Vec<String> = (0..10).map(service).collect();
    let names: Vec<&str> = names.iter().map(String::as_str).collect();
    let concerned: Vec<Plan> = (0..CONCERNED).map(|n| named(n, &names)).collect();
    let fleets = [&*small, &*large].map(|server| Fleet::start(server.address(), concerned.clone()));
    for fleet in &fleets {
        fleet.opened();
    }
    let mut servers = [small, large];
    let rounds = if bench.quick { 20 } else { 50 };
    let cases = cases(size, others);
    let (latency, cpu) = measure(&mut servers, &fleets, rounds);
    for at in [0, 1] {
        record(bench, contender, &cases[at], &latency[at], cpu[at]);
    }
    println!(
        "  {}: the large catalog costs {:.2} x the small one's p50, {:.2} x its p99, {:.2} x its CPU (aim 1.2)",
        contender.name(),
        ms(&latency[1], 0.5) / ms(&latency[0], 0.5),
        ms(&latency[1], 0.99) / ms(&latency[0], 0.99),
        cpu[1] / cpu[0]
    );
    if cpu[1] > AFFORDABLE_US {
        let reason = format!("not tried: a change takes {:.0} ms of CPU without them", cpu[1] / 1000.0);
        bench.report.missing("catalog", &cases[2], contender, &reason);
        return;
    }
    let pick = |n: usize, at: usize| service(10 + (n * 7919 + at * 104_729) % (size.0 - 10));
    let strangers = (0..others).map(|n| {
        let names: Vec<String> = (0..10).map(|at| pick(n, at)).collect();
        named(CONCERNED + n, &names.iter().map(String::as_str).collect::<Vec<_>>())
    });
    let strangers = Fleet::start(servers[1].address(), strangers.collect());
    strangers.opened();
    let (latency, crowded) = measure(&mut servers, &fleets, rounds);
    record(bench, contender, &cases[2], &latency[1], crowded[1]);
    println!(
        "  {}: a stream that the change does not concern costs {:.2} us of CPU a change",
        contender.name(),
        (crowded[1] - cpu[1]) / others as f64
    );
}

fn record(bench: &mut Bench, contender: Contender, case: &str, latency: &Histogram<u64>, cpu_us: f64) {
    let figures = [
        Figure::new("p50", "ms", ms(latency, 0.5)),
        Figure::new("p99", "ms", ms(latency, 0.99)),
        Figure::new("CPU a change", "us", cpu_us),
    ];
    bench.report.add("catalog", case, contender, figures);
}

/// Latencies and the CPU of a change, of each server.
fn measure(
    servers: &mut [&mut dyn Server; 2],
    fleets: &[Fleet; 2],
    rounds: usize,
) -> ([Histogram<u64>; 2], [f64; 2]) {
    let mut latencies = [histogram(), histogram()];
    let mut cpu = [vec![], vec![]];
    bounded(rounds, BUDGET, || {
        for (at, (server, fleet)) in servers.iter_mut().zip(fleets).enumerate() {
            let before = server.cpu();
            round(*server, fleet, CONCERNED, &mut latencies[at]);
            cpu[at].push((server.cpu() - before) * 1e6);
        }
    });
    (latencies, cpu.map(median))
}

/// A client that names what it wants the endpoints of.
pub(crate) fn named(n: usize, names: &[&str]) -> Plan {
    Plan::new(Protocol::Delta, &format!("bench-{n}"), &[Ask::new(ENDPOINTS, names)], 1)
}
