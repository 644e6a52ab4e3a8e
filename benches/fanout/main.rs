//! What it costs to bring a change to thousands of proxies: Disco beside the limit, a bare tonic server that hands the same
//! ready bytes to as many streams. Servers and load are processes of their own; each row is measured in turns, and ratios
//! are of medians.
//!
//! `cargo bench --profile fast --bench fanout`, with `-- --quick` for a part in less than 40 s.
#![allow(
    clippy::disallowed_methods,
    clippy::expect_used,
    clippy::indexing_slicing,
    clippy::large_futures,
    clippy::panic,
    clippy::print_stdout,
    reason = "a benchmark: it runs in real time, prints, and ends where something is wrong"
)]

#[path = "../common/mod.rs"]
mod common;
mod limit;
mod load;
mod servers;

use std::{
    collections::HashMap,
    fs,
    time::{Duration, Instant},
};

use hdrhistogram::Histogram;

use load::{Ask, Behaviour, CLUSTER, ENDPOINTS, Fleet, LISTENER, Plan, Protocol, ROUTE};
use servers::{Disco, Limit, Server};

fn main() {
    let arguments: Vec<String> = std::env::args().collect();
    let has = |argument: &str| arguments.iter().any(|given| given == argument);
    if has("limit") {
        return limit::serve();
    }
    raise_file_limit();
    let quick = has("--quick");
    let only = arguments.iter().find_map(|argument| argument.strip_prefix("--only="));
    let load = fs::read_to_string("/proc/loadavg").expect("procfs");
    let cores = std::thread::available_parallelism().expect("a number of cores");
    println!("{cores} cores shared with the load; load average before: {}", load.trim());
    println!("aims are ratios to the limit: p99 and CPU 1.2, memory and reconnects 1.3\n");
    let wanted = |part: &str| only.is_none_or(|only| only == part);
    if wanted("change") {
        changes(quick);
    }
    if wanted("reconnect") {
        reconnects(quick);
    }
    if wanted("catalog") {
        catalogs(quick);
    }
    if wanted("names") {
        names(quick);
    }
    if wanted("churn") {
        churn();
    }
    if wanted("bad") {
        bad_proxies(quick);
    }
}

fn raise_file_limit() {
    use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
    let Rlimit { maximum, .. } = getrlimit(Resource::Nofile);
    let _ = setrlimit(Resource::Nofile, Rlimit { current: maximum, maximum });
}

/// Instances of the service that changes.
const INSTANCES: usize = 20;

fn service(n: usize) -> String {
    format!("service-{n:05}")
}

/// An Envoy's opening: clusters, endpoints of these services, the listener, the routes.
fn sidecar(protocol: Protocol, n: usize, services: &[&str]) -> Plan {
    let asks = [
        Ask::new(CLUSTER, &[]),
        Ask::new(ENDPOINTS, services),
        Ask::new(LISTENER, &[]),
        Ask::new(ROUTE, &["outbound"]),
    ];
    Plan::new(protocol, &format!("bench-{n}"), &asks, asks.len())
}

fn sidecars(protocol: Protocol, count: usize, services: &[&str]) -> Vec<Plan> {
    (0..count).map(|n| sidecar(protocol, n, services)).collect()
}

/// What a block of rounds on one server gave.
struct Block {
    opened: f64,
    kib_a_stream: f64,
    latency: Histogram<u64>,
    cpu_us: f64,
}

/// Opens the streams, changes an instance so many times, and lets go.
fn block(server: &mut dyn Server, plans: Vec<Plan>, rounds: usize) -> Block {
    let streams = plans.len();
    let before = server.memory();
    let fleet = Fleet::start(server.address(), plans);
    let opened = fleet.opened().as_secs_f64();
    // Not counted: caches are cold.
    round(server, &fleet, streams, &mut histogram());
    let memory = server.memory();
    let mut latency = histogram();
    let cpu = server.cpu();
    for _ in 0..rounds {
        round(server, &fleet, streams, &mut latency);
    }
    let cpu_us = (server.cpu() - cpu) * 1e6 / (rounds * streams) as f64;
    let kib_a_stream = memory.saturating_sub(before) as f64 / streams as f64;
    assert_eq!(fleet.totals().ended, 0, "streams ended");
    Block { opened, kib_a_stream, latency, cpu_us }
}

/// One change, to `responses` streams. Latency counts from when the write is sent: its answer may come after the change where
/// the load shares the cores.
fn round(server: &mut dyn Server, fleet: &Fleet, responses: usize, latency: &mut Histogram<u64>) {
    fleet.expect(responses);
    let sent = server.change();
    for at in fleet.arrived() {
        latency.saturating_record(micros(at.saturating_duration_since(sent)));
    }
    // Acknowledgements are part of the cost, and not of the next round; and changes that come close upon each other are paced.
    std::thread::sleep(Duration::from_millis(60));
}

fn histogram() -> Histogram<u64> {
    Histogram::new_with_bounds(1, 60_000_000, 3).expect("a histogram")
}

fn micros(duration: Duration) -> u64 {
    u64::try_from(duration.as_micros()).unwrap_or(u64::MAX)
}

fn ms(histogram: &Histogram<u64>, quantile: f64) -> f64 {
    histogram.value_at_quantile(quantile) as f64 / 1000.0
}

fn median(mut values: Vec<f64>) -> f64 {
    values.sort_by(f64::total_cmp);
    values[values.len() / 2]
}

/// What Disco sends to the first of these streams: when it opens, and at a change.
fn capture(plan: Plan) -> (Vec<Vec<u8>>, Vec<u8>) {
    let mut disco = Disco::start(1, INSTANCES);
    let fleet = Fleet::start(disco.address(), vec![plan]);
    fleet.opened();
    round(&mut disco, &fleet, 1, &mut histogram());
    let mut messages = fleet.captured();
    let change = messages.pop().expect("a change");
    (messages, change)
}

fn changes(quick: bool) {
    println!(
        "one endpoint change to all streams; p50, p99 in ms from sending the write; CPU of the server a response"
    );
    println!(
        "{:<22} {:>8} {:>8} {:>9} {:>9} {:>9} {:>9}",
        "", "p50", "p99", "us CPU", "KiB", "open s", "bytes"
    );
    let sizes: &[(usize, usize, usize)] =
        if quick { &[(1000, 10, 3)] } else { &[(1000, 15, 5), (10_000, 4, 3)] };
    for &(streams, rounds, blocks) in sizes {
        for protocol in [Protocol::Delta, Protocol::Sotw] {
            let service = service(0);
            let (opening, change) = capture(sidecar(protocol, 0, &[&service]));
            let mut results: [Vec<Block>; 2] = Default::default();
            for _ in 0..blocks {
                let mut limit = Limit::start(&opening, 4, &change);
                results[0].push(block(&mut limit, sidecars(protocol, streams, &[&service]), rounds));
                drop(limit);
                let mut disco = Disco::start(1, INSTANCES);
                results[1].push(block(&mut disco, sidecars(protocol, streams, &[&service]), rounds));
            }
            let figures = results.map(|blocks| {
                let of = |figure: &dyn Fn(&Block) -> f64| median(blocks.iter().map(figure).collect());
                [
                    of(&|block| ms(&block.latency, 0.5)),
                    of(&|block| ms(&block.latency, 0.99)),
                    of(&|block| block.cpu_us),
                    of(&|block| block.kib_a_stream),
                    of(&|block| block.opened),
                ]
            });
            for (name, figures) in ["limit", "Disco"].iter().zip(&figures) {
                let [p50, p99, cpu, memory, open] = figures;
                println!(
                    "{:<22} {p50:>8.2} {p99:>8.2} {cpu:>9.1} {memory:>9.1} {open:>9.2} {:>9}",
                    format!("{streams} {protocol:?}, {name}"),
                    change.len()
                );
            }
            let [limit, disco] = figures;
            let ratios: Vec<String> =
                disco.iter().zip(limit).map(|(disco, limit)| format!("{:.2}", disco / limit)).collect();
            println!(
                "{:<22} {:>8} {:>8} {:>9} {:>9} {:>9}",
                "  ratio", ratios[0], ratios[1], ratios[2], ratios[3], ratios[4]
            );
        }
    }
    println!();
}

/// Services and instances of each that a reconnecting proxy holds.
const HELD: (usize, usize) = (100, 5);

fn reconnects(quick: bool) {
    let streams = if quick { 1000 } else { 10_000 };
    let (services, instances) = HELD;
    println!("{streams} delta streams reconnect at once and hold everything ({services} services)");
    let blocks = if quick { 2 } else { 3 };
    let names: Vec<String> = (0..services).map(service).collect();
    let names: Vec<&str> = names.iter().map(String::as_str).collect();
    let (mut times, mut cpu) = ([vec![], vec![]], [vec![], vec![]]);
    let mut resource_bytes = 0;
    for _ in 0..blocks {
        let mut disco = Disco::start(services, instances);
        let plans = {
            let fleet = Fleet::start(disco.address(), sidecars(Protocol::Delta, 1, &names));
            fleet.opened();
            let held = held(&fleet.captured());
            (0..streams).map(|n| returning(n, &names, &held)).collect::<Vec<_>>()
        };
        // The answer that says a stream is served names what does not exist; the limit sends the same.
        let answer = {
            let fleet = Fleet::start(disco.address(), plans[..1].to_vec());
            fleet.opened();
            fleet.captured()
        };
        let mut limit = Limit::start(&answer, 4, &[]);
        for (at, server) in [(0, &mut limit as &mut dyn Server), (1, &mut disco)] {
            let before = server.cpu();
            let fleet = Fleet::start(server.address(), plans.clone());
            times[at].push(fleet.opened().as_secs_f64());
            std::thread::sleep(Duration::from_millis(100));
            cpu[at].push((server.cpu() - before) * 1e6 / streams as f64);
            if at == 1 {
                resource_bytes = resource_bytes.max(fleet.totals().resource_bytes);
            }
            assert_eq!(fleet.totals().ended, 0, "streams ended");
        }
    }
    let ([limit_time, disco_time], [limit_cpu, disco_cpu]) = (times.map(median), cpu.map(median));
    println!("  resource bytes sent: {resource_bytes} (aim 0)");
    println!(
        "  seconds: limit {limit_time:.2}, Disco {disco_time:.2}, ratio {:.2} (aim 1.3)",
        disco_time / limit_time
    );
    println!(
        "  us CPU a stream: limit {limit_cpu:.0}, Disco {disco_cpu:.0}, ratio {:.2}\n",
        disco_cpu / limit_cpu
    );
}

/// Versions by type and name, from delta responses.
fn held(responses: &[Vec<u8>]) -> HashMap<String, HashMap<String, String>> {
    let text = |bytes: &[u8]| String::from_utf8(bytes.to_vec()).expect("text");
    let mut held: HashMap<String, HashMap<String, String>> = HashMap::new();
    for response in responses {
        let (mut url, mut versions) = (String::new(), HashMap::new());
        let mut rest = response.as_slice();
        while let Some((tag, value)) = load::field(&mut rest) {
            match tag {
                2 => {
                    let (mut name, mut version) = (String::new(), String::new());
                    let mut resource = value;
                    while let Some((tag, value)) = load::field(&mut resource) {
                        match tag {
                            1 => version = text(value),
                            3 => name = text(value),
                            _ => {}
                        }
                    }
                    versions.insert(name, version);
                }
                4 => url = text(value),
                _ => {}
            }
        }
        held.entry(url).or_default().extend(versions);
    }
    held
}

/// A proxy that comes back and holds everything. It asks for one name more, which does not exist: the answer to that says
/// that it is served.
fn returning(n: usize, names: &[&str], held: &HashMap<String, HashMap<String, String>>) -> Plan {
    let names = [names, &["nothing"]].concat();
    let mut asks = [
        Ask::new(CLUSTER, &[]),
        Ask::new(ENDPOINTS, &names),
        Ask::new(LISTENER, &[]),
        Ask::new(ROUTE, &["outbound"]),
    ];
    for ask in &mut asks {
        ask.held = held[ask.url].clone();
    }
    Plan::new(Protocol::Delta, &format!("bench-{n}"), &asks, 1)
}

/// Streams that a change concerns while the catalog grows.
const CONCERNED: usize = 100;

fn catalogs(quick: bool) {
    let (large, others) = if quick { ((2_000, 10), 1_000) } else { ((10_000, 10), 9_000) };
    println!("one change to {CONCERNED} delta streams that name 10 services each");
    println!("{:<58} {:>8} {:>8} {:>15}", "", "p50", "p99", "us CPU a change");
    let mut small_server = Disco::start(10, 10);
    let mut large_server = Disco::start(large.0, large.1);
    let names: Vec<String> = (0..10).map(service).collect();
    let names: Vec<&str> = names.iter().map(String::as_str).collect();
    let concerned: Vec<Plan> = (0..CONCERNED).map(|n| named(n, &names)).collect();
    let small_fleet = Fleet::start(small_server.address(), concerned.clone());
    let large_fleet = Fleet::start(large_server.address(), concerned);
    small_fleet.opened();
    large_fleet.opened();
    let pick = |n: usize, at: usize| service(10 + (n * 7919 + at * 104_729) % (large.0 - 10));
    let mut measure = |with_others: bool| {
        let strangers = with_others.then(|| {
            let plans = (0..others).map(|n| {
                let names: Vec<String> = (0..10).map(|at| pick(n, at)).collect();
                named(CONCERNED + n, &names.iter().map(String::as_str).collect::<Vec<_>>())
            });
            let fleet = Fleet::start(large_server.address(), plans.collect());
            fleet.opened();
            fleet
        });
        let mut latency = [histogram(), histogram()];
        let mut cpu = [vec![], vec![]];
        for _ in 0..if quick { 20 } else { 50 } {
            for (at, (server, fleet)) in
                [(&mut small_server, &small_fleet), (&mut large_server, &large_fleet)].into_iter().enumerate()
            {
                let before = server.cpu();
                round(server, fleet, CONCERNED, &mut latency[at]);
                cpu[at].push((server.cpu() - before) * 1e6);
            }
        }
        drop(strangers);
        (latency, cpu.map(median))
    };
    let (latency, cpu) = measure(false);
    let row = |what: &str, latency: &Histogram<u64>, cpu: f64| {
        println!("{what:<58} {:>8.2} {:>8.2} {cpu:>15.0}", ms(latency, 0.5), ms(latency, 0.99));
    };
    let instances = large.0 * large.1;
    row("100 instances", &latency[0], cpu[0]);
    row(&format!("{instances} instances"), &latency[1], cpu[1]);
    println!(
        "{:<58} {:>8.2} {:>8.2} {:>15.2}",
        "  ratio (aim 1.2)",
        ms(&latency[1], 0.5) / ms(&latency[0], 0.5),
        ms(&latency[1], 0.99) / ms(&latency[0], 0.99),
        cpu[1] / cpu[0]
    );
    let (latency, crowded) = measure(true);
    row(&format!("{instances} instances, {others} more streams that name others"), &latency[1], crowded[1]);
    println!(
        "{:<58} {:>26.2} us CPU a change and stream\n",
        "  what a stream costs that the change does not concern",
        (crowded[1] - cpu[1]) / others as f64
    );
    drop((small_fleet, large_fleet));

    println!("memory of a delta stream that subscribes to all clusters and to all endpoints");
    for (server, services) in [(&small_server, 10), (&large_server, large.0)] {
        let before = server.memory();
        let fleet = Fleet::start(server.address(), sidecars(Protocol::Delta, WILDCARDS, &["*"]));
        fleet.opened();
        // Responses are split, and the last acknowledgements give memory back.
        std::thread::sleep(Duration::from_secs(1));
        let kib = server.memory().saturating_sub(before) as f64 / WILDCARDS as f64;
        println!("  {services} services: {kib:.1} KiB a stream");
    }
    println!();
}

/// Streams that are sent the whole catalog.
const WILDCARDS: usize = 50;

/// A client that names what it wants the endpoints of.
fn named(n: usize, names: &[&str]) -> Plan {
    Plan::new(Protocol::Delta, &format!("bench-{n}"), &[Ask::new(ENDPOINTS, names)], 1)
}

/// Services that each of many streams names.
const NAMED: usize = 10;

fn names(quick: bool) {
    let services = if quick { 2_000 } else { 10_000 };
    let crowds = if quick { [100, 2_000] } else { [100, 10_000] };
    println!(
        "one change to {CONCERNED} streams, beside others that each name {NAMED} other ones of {services} services"
    );
    println!("{:<22} {:>8} {:>8} {:>15} {:>9}", "", "p50", "p99", "us CPU a change", "responses");
    let ours: Vec<String> = (0..NAMED).map(service).collect();
    let ours: Vec<&str> = ours.iter().map(String::as_str).collect();
    let mut disco = Disco::start(services, 1);
    let fleet = Fleet::start(disco.address(), (0..CONCERNED).map(|n| named(n, &ours)).collect());
    fleet.opened();
    let figures = crowds.map(|crowd| {
        let plans = (0..crowd).map(|n| {
            let theirs = (0..NAMED).map(|at| NAMED + (n * NAMED + at) % (services - NAMED));
            let theirs: Vec<String> = theirs.map(service).collect();
            named(CONCERNED + n, &theirs.iter().map(String::as_str).collect::<Vec<_>>())
        });
        let others = Fleet::start(disco.address(), plans.collect());
        others.opened();
        std::thread::sleep(Duration::from_secs(1));
        let before = others.totals().responses;
        let (mut latency, mut cpu) = (histogram(), vec![]);
        for _ in 0..if quick { 30 } else { 100 } {
            let before = disco.cpu();
            round(&mut disco, &fleet, CONCERNED, &mut latency);
            cpu.push((disco.cpu() - before) * 1e6);
        }
        let (p50, p99, cpu) = (ms(&latency, 0.5), ms(&latency, 0.99), median(cpu));
        let sent = others.totals().responses - before;
        println!("{:<22} {p50:>8.2} {p99:>8.2} {cpu:>15.0} {sent:>9}", format!("{crowd} others"));
        (crowd as f64, cpu)
    });
    let [(few, with_few), (many, with_many)] = figures;
    let each = (with_many - with_few) / (many - few);
    println!(
        "  ratio {:.2}; {each:.3} us CPU a change and stream that it does not concern\n",
        with_many / with_few
    );
}

fn churn() {
    const STREAMS: usize = 1000;
    let (span, rate) = (Duration::from_secs(5), 1000.0);
    println!(
        "changes for {} s, one client, at most {rate} a second; {STREAMS} streams; aim: all converged 100 ms after the last",
        span.as_secs()
    );
    for protocol in [Protocol::Delta, Protocol::Sotw] {
        let mut disco = Disco::start(1, INSTANCES);
        let service = service(0);
        let fleet = Fleet::start(disco.address(), sidecars(protocol, STREAMS, &[&service]));
        fleet.opened();
        round(&mut disco, &fleet, STREAMS, &mut histogram());
        let (idle, cpu, before) = (disco.memory(), disco.cpu(), fleet.totals());
        let (mut most, mut changes) = (idle, 0_u32);
        let start = Instant::now();
        let mut last = start;
        while start.elapsed() < span {
            let due = start + Duration::from_secs_f64(f64::from(changes) / rate);
            std::thread::sleep(due.saturating_duration_since(Instant::now()));
            disco.change();
            last = Instant::now();
            changes += 1;
            if changes % 100 == 0 {
                most = most.max(disco.memory());
            }
        }
        let converged = fleet.converged(Duration::from_millis(300)).saturating_duration_since(last);
        let responses = fleet.totals().responses - before.responses;
        let all = f64::from(changes) * STREAMS as f64;
        println!(
            "  {protocol:?}: {changes} changes ({:.0}/s), {responses} responses ({:.1} % of changes x streams), \
             {:.1} us CPU each, memory {:.1} -> {:.1} MiB at most, all converged after {:.0} ms",
            f64::from(changes) / span.as_secs_f64(),
            100.0 * responses as f64 / all,
            (disco.cpu() - cpu) * 1e6 / responses as f64,
            idle as f64 / 1024.0,
            most as f64 / 1024.0,
            converged.as_secs_f64() * 1000.0,
        );
        assert_eq!(fleet.totals().ended, 0, "streams ended");
    }
    println!();
}

fn bad_proxies(quick: bool) {
    const HEALTHY: usize = 1000;
    let rounds = if quick { 10 } else { 20 };
    println!(
        "{HEALTHY} healthy delta streams without and with 50 bad ones: 10 each stop reading, read a byte a second,"
    );
    println!("never acknowledge, reconnect every 10 ms, subscribe to a million names");
    let service = service(0);
    let mut disco = Disco::start(1, INSTANCES);
    let fleet = Fleet::start(disco.address(), sidecars(Protocol::Delta, HEALTHY, &[&service]));
    fleet.opened();
    let mut latency = [vec![], vec![]];
    let mut memory = [0, 0];
    let address = disco.address();
    let blocks = if quick { 2 } else { 3 };
    let bad = |behaviour, from: usize| {
        let plans = (from..from + 10).map(|n| sidecar(Protocol::Delta, n, &[&service]).behaves(behaviour));
        Fleet::start(address, plans.collect())
    };
    for _ in 0..blocks {
        for with in [false, true] {
            let company = with.then(|| {
                let fleets = [
                    Behaviour::StopsReading,
                    Behaviour::ByteASecond,
                    Behaviour::NeverAcknowledges,
                    Behaviour::Reconnects,
                ]
                .into_iter()
                .enumerate()
                .map(|(at, behaviour)| bad(behaviour, HEALTHY + at * 10));
                (fleets.collect::<Vec<_>>(), servers::Greedy::start(address, 10, 1_000_000))
            });
            std::thread::sleep(Duration::from_millis(200));
            let mut histogram = histogram();
            for _ in 0..rounds {
                round(&mut disco, &fleet, HEALTHY, &mut histogram);
            }
            latency[usize::from(with)].push(histogram);
            memory[usize::from(with)] = memory[usize::from(with)].max(disco.memory());
            drop(company);
            std::thread::sleep(Duration::from_millis(200));
        }
    }
    let p = |at: usize, quantile| median(latency[at].iter().map(|h| ms(h, quantile)).collect());
    println!(
        "  p50 {:.2} -> {:.2} ms, p99 {:.2} -> {:.2} ms (ratio {:.2}), memory {:.1} -> {:.1} MiB at most",
        p(0, 0.5),
        p(1, 0.5),
        p(0, 0.99),
        p(1, 0.99),
        p(1, 0.99) / p(0, 0.99),
        memory[0] as f64 / 1024.0,
        memory[1] as f64 / 1024.0,
    );
    assert_eq!(fleet.totals().ended, 0, "healthy streams ended");
}
