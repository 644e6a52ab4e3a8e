//! One change concerns a few streams; thousands of others name other services.

use std::time::Duration;

use crate::{
    Bench, Contender,
    catalog::{CONCERNED, named},
    load::Fleet,
    measure::{histogram, median, ms, round, service},
    report::Figure,
    servers::{Disco, Server as _},
};

/// Services that each of many streams names.
const NAMED: usize = 10;

pub(crate) fn run(bench: &mut Bench) {
    let services = if bench.quick { 2_000 } else { 10_000 };
    let crowds = if bench.quick { [100, 2_000] } else { [100, 10_000] };
    println!(
        "one change to {CONCERNED} streams, beside others that each name {NAMED} other ones of {services} services"
    );
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
        for _ in 0..if bench.quick { 30 } else { 100 } {
            let before = disco.cpu();
            round(&mut disco, &fleet, CONCERNED, &mut latency);
            cpu.push((disco.cpu() - before) * 1e6);
        }
        let cpu = median(cpu);
        let figures = [
            Figure::new("p50", "ms", ms(&latency, 0.5)),
            Figure::new("p99", "ms", ms(&latency, 0.99)),
            Figure::new("CPU a change", "us", cpu),
            Figure::new("responses to the others", "", (others.totals().responses - before) as f64),
        ];
        let case = format!("{crowd} others");
        bench.report.add("names", &case, Contender::Disco, figures);
        bench.report.print("names", &case);
        (crowd as f64, cpu)
    });
    let [(few, with_few), (many, with_many)] = figures;
    let each = (with_many - with_few) / (many - few);
    println!(
        "  ratio {:.2}; {each:.3} us CPU a change and stream that it does not concern",
        with_many / with_few
    );
}
