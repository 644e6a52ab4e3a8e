//! Changes that come faster than any stream can take them.

use std::time::{Duration, Instant};

use crate::{
    Bench, Contender,
    load::{Fleet, Protocol},
    measure::{INSTANCES, histogram, round, service, sidecars},
    report::Figure,
    servers::{Disco, Server as _},
};

pub(crate) fn run(bench: &mut Bench) {
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
        let figures = [
            Figure::new("changes", "/s", f64::from(changes) / span.as_secs_f64()),
            Figure::new("converged after the last", "ms", converged.as_secs_f64() * 1000.0),
            Figure::new("memory at most", "MiB", most as f64 / 1024.0),
        ];
        bench.report.add("churn", &format!("{STREAMS} {}", protocol.name()), Contender::Disco, figures);
    }
    println!();
}
