//! What the cases share: how a client opens, what a change is, how it is measured.

use std::time::{Duration, Instant};

use hdrhistogram::Histogram;

use crate::{
    load::{Ask, CLUSTER, ENDPOINTS, Fleet, LISTENER, Plan, Protocol, ROUTE},
    servers::{Content, Disco, Server},
};

/// Instances of the service that changes.
pub(crate) const INSTANCES: usize = 20;

pub(crate) fn service(n: usize) -> String {
    format!("service-{n:05}")
}

/// An Envoy's opening: clusters, endpoints of these services, the listener, the routes.
pub(crate) fn sidecar(protocol: Protocol, n: usize, services: &[&str]) -> Plan {
    let asks = [
        Ask::new(CLUSTER, &[]),
        Ask::new(ENDPOINTS, services),
        Ask::new(LISTENER, &[]),
        Ask::new(ROUTE, &["outbound"]),
    ];
    Plan::new(protocol, &format!("bench-{n}"), &asks, asks.len())
}

pub(crate) fn sidecars(protocol: Protocol, count: usize, services: &[&str]) -> Vec<Plan> {
    (0..count).map(|n| sidecar(protocol, n, services)).collect()
}

/// What a block of rounds on one server gave.
pub(crate) struct Block {
    pub(crate) opened: f64,
    pub(crate) kib_a_stream: f64,
    pub(crate) latency: Histogram<u64>,
    pub(crate) cpu_us: f64,
}

/// Opens the streams, changes an instance so many times, and lets go.
pub(crate) fn block(server: &mut dyn Server, plans: Vec<Plan>, rounds: usize) -> Block {
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
pub(crate) fn round(server: &mut dyn Server, fleet: &Fleet, responses: usize, latency: &mut Histogram<u64>) {
    fleet.expect(responses);
    let sent = server.change();
    for at in fleet.arrived() {
        latency.saturating_record(micros(at.saturating_duration_since(sent)));
    }
    // Acknowledgements are part of the cost, and not of the next round; and changes that come close upon each other are paced.
    std::thread::sleep(Duration::from_millis(60));
}

pub(crate) fn histogram() -> Histogram<u64> {
    Histogram::new_with_bounds(1, 60_000_000, 3).expect("a histogram")
}

pub(crate) fn micros(duration: Duration) -> u64 {
    u64::try_from(duration.as_micros()).unwrap_or(u64::MAX)
}

pub(crate) fn ms(histogram: &Histogram<u64>, quantile: f64) -> f64 {
    histogram.value_at_quantile(quantile) as f64 / 1000.0
}

pub(crate) fn median(mut values: Vec<f64>) -> f64 {
    values.sort_by(f64::total_cmp);
    values[values.len() / 2]
}

/// What this Disco sends to a stream: when it opens, and at two changes.
pub(crate) fn content(disco: &mut Disco, plan: Plan) -> Content {
    let fleet = Fleet::start(disco.address(), vec![plan]);
    fleet.opened();
    fleet.settled(SETTLED);
    let opened = fleet.captured().len();
    round(disco, &fleet, 1, &mut histogram());
    round(disco, &fleet, 1, &mut histogram());
    let mut opening = fleet.captured();
    let changes = opening.split_off(opened);
    assert_eq!(changes.len(), 2, "a response for each change");
    Content { opening, changes }
}

/// A single client that is sent nothing for so long has everything.
const SETTLED: Duration = Duration::from_millis(100);

/// Runs until `budget` is used up, three times at least and `most` times at most.
pub(crate) fn bounded(most: usize, budget: Duration, mut run: impl FnMut()) {
    let start = Instant::now();
    for n in 0..most {
        if n >= 3 && start.elapsed() > budget {
            return;
        }
        run();
    }
}
