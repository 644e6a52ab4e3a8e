//! Healthy streams beside clients that do not read, do not acknowledge, come and go, or ask for too much.

use std::time::Duration;

use crate::{
    Bench, Contender,
    load::{Behaviour, Fleet, Protocol},
    measure::{INSTANCES, histogram, median, ms, round, service, sidecar, sidecars},
    report::Figure,
    servers::{Disco, Greedy, Server as _},
};

pub(crate) fn run(bench: &mut Bench) {
    const HEALTHY: usize = 1000;
    let rounds = if bench.quick { 10 } else { 20 };
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
    let blocks = if bench.quick { 2 } else { 3 };
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
                (fleets.collect::<Vec<_>>(), Greedy::start(address, 10, 1_000_000))
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
    for (at, case) in [(0, "alone"), (1, "beside 50 bad ones")] {
        let case = format!("{HEALTHY} {} {case}", Protocol::Delta.name());
        let figures = [Figure::new("p50", "ms", p(at, 0.5)), Figure::new("p99", "ms", p(at, 0.99))];
        bench.report.add("bad", &case, Contender::Disco, figures);
    }
}
