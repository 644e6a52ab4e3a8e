//! Very large services: what one changed endpoint costs when it goes by itself (LEDS) and when all go with it (EDS).

use std::time::{Duration, Instant};

use crate::{
    Bench,
    load::{Ask, CLUSTER, ENDPOINTS, Fleet, LB_ENDPOINT, LISTENER, Plan, Protocol, ROUTE},
    measure::{histogram, median, ms, round, service},
    servers::{Disco, Server as _},
};

const STREAMS: usize = 10;

pub(crate) fn run(bench: &mut Bench) {
    let quick = bench.quick;
    println!(
        "one endpoint of a large service changes, {STREAMS} delta streams: one by one (LEDS), all together (EDS)"
    );
    println!(
        "{:<22} {:>10} {:>10} {:>8} {:>8} {:>12} {:>10} {:>10}",
        "", "first load", "a change", "p50", "p99", "CPU a change", "open s", "KiB each"
    );
    let rounds = if quick { 5 } else { 20 };
    let sizes: &[usize] = if quick { &[5000] } else { &[1000, 5000, 20_000] };
    for &size in sizes {
        let mut disco = Disco::start(1, size);
        for one_by_one in [true, false] {
            // Views that nobody has in use any more cost nothing.
            std::thread::sleep(Duration::from_secs(11));
            measure(&mut disco, size, one_by_one, rounds);
        }
    }
    println!();
}

/// An Envoy. One that asks for its endpoints first may have its clusters from elsewhere, and gets all endpoints together.
fn plan(n: usize, globs: &[&str], answers: usize) -> Plan {
    let service = service(0);
    let clusters = Ask::new(CLUSTER, &[]);
    let endpoints = Ask::new(ENDPOINTS, &[&service]);
    let rest = [Ask::new(LISTENER, &[]), Ask::new(ROUTE, &["outbound"])];
    let first = if globs.is_empty() { [endpoints, clusters] } else { [clusters, endpoints] };
    let members = Some(Ask::new(LB_ENDPOINT, globs)).filter(|_| !globs.is_empty());
    let asks: Vec<Ask> = first.into_iter().chain(members).chain(rest).collect();
    Plan::new(Protocol::Delta, &format!("bench-{n}"), &asks, answers)
}

fn measure(disco: &mut Disco, size: usize, one_by_one: bool, rounds: usize) {
    // Names of collections are found out by asking; so is how many responses there are.
    let probe = |globs: &[&str]| {
        let fleet = Fleet::start(disco.address(), vec![plan(0, globs, 4)]);
        fleet.opened();
        std::thread::sleep(Duration::from_secs(2));
        (fleet.captured(), fleet.totals())
    };
    let globs = if one_by_one { find_globs(&probe(&["none"]).0) } else { Vec::new() };
    if one_by_one && globs.is_empty() {
        return;
    }
    let globs: Vec<&str> = globs.iter().map(String::as_str).collect();
    let (_, all) = probe(&globs);
    let answers = usize::try_from(all.responses).expect("few");
    let before = disco.memory();
    let fleet = Fleet::start(disco.address(), (0..STREAMS).map(|n| plan(n, &globs, answers)).collect());
    let opened = fleet.opened();
    round(disco, &fleet, STREAMS, &mut histogram());
    let kib = disco.memory().saturating_sub(before) as f64 / STREAMS as f64;
    let (mut latency, mut cpu) = (histogram(), Vec::new());
    let sent = fleet.totals();
    for _ in 0..rounds {
        let (start, used) = (Instant::now(), disco.cpu());
        round(disco, &fleet, STREAMS, &mut latency);
        assert!(start.elapsed() < Duration::from_secs(30), "a round takes for ever");
        cpu.push((disco.cpu() - used) * 1e6);
    }
    let changed = fleet.totals().resource_bytes - sent.resource_bytes;
    let mean = cpu.iter().sum::<f64>() / cpu.len() as f64;
    println!(
        "{:<22} {:>10} {:>10} {:>8.2} {:>8.2} {:>9.0} us {:>10.2} {kib:>10.0}",
        format!("{size}, {}", if one_by_one { "LEDS" } else { "EDS" }),
        all.resource_bytes,
        changed / (rounds * STREAMS) as u64,
        ms(&latency, 0.5),
        ms(&latency, 0.99),
        median(cpu).max(mean),
        opened.as_secs_f64(),
    );
    assert_eq!(fleet.totals().ended, 0, "streams ended");
}

/// The names of collections that endpoints refer to.
fn find_globs(responses: &[Vec<u8>]) -> Vec<String> {
    let mut found = Vec::new();
    for response in responses {
        let text = String::from_utf8_lossy(response);
        for part in text.split("xdstp:").skip(1) {
            if let Some((name, _)) = part.split_once("/*") {
                found.push(format!("xdstp:{name}/*"));
            }
        }
    }
    found
}
