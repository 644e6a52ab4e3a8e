//! All proxies connect in the same second, and hold nothing. What the kernel counts says whether any had to wait for a
//! listener: a SYN that finds a full queue is dropped, and comes again a second later.

use std::{collections::HashMap, fs, time::Duration};

use crate::{
    Bench,
    load::{Fleet, Protocol},
    measure::{INSTANCES, content, median, service, sidecar, sidecars},
    report::Figure,
    servers::Disco,
};

/// Of `TcpExt` in `/proc/net/netstat`.
const COUNTERS: [&str; 3] = ["ListenOverflows", "ListenDrops", "TCPSynRetrans"];

pub(crate) fn run(bench: &mut Bench) {
    let streams = if bench.quick { 2000 } else { 10_000 };
    let blocks = if bench.quick { 1 } else { 3 };
    println!("delta streams connect at once and hold nothing; aim: no SYN is dropped or sent again");
    let case = format!("{streams} {}", Protocol::Delta.name());
    let service = service(0);
    let content = content(&mut Disco::start(1, INSTANCES), sidecar(Protocol::Delta, 0, &[&service]));
    for contender in bench.contenders() {
        let mut times: [Vec<f64>; 3] = Default::default();
        let mut counted = [0.0; COUNTERS.len()];
        for _ in 0..blocks {
            let measured = bench.attempt("storm", &case, contender, |bench| {
                let server = bench.start(contender, &content, 4, (1, INSTANCES));
                let plans = sidecars(Protocol::Delta, streams, &[&service]);
                let before = counters();
                let fleet = Fleet::start(server.address(), plans);
                let opened = fleet.opened();
                let after = counters();
                assert_eq!(fleet.totals().ended, 0, "streams ended");
                let (called, answered) = fleet.called_and_answered();
                let counted =
                    COUNTERS.map(|name| after.get(name).unwrap_or(&0.0) - before.get(name).unwrap_or(&0.0));
                ([called, answered, opened], counted)
            });
            let Some((took, more)) = measured else { break };
            for (times, took) in times.iter_mut().zip(took) {
                times.push(took.as_secs_f64());
            }
            for (counted, more) in counted.iter_mut().zip(more) {
                *counted += more;
            }
            // What the fleet left behind is closed before the next one comes.
            std::thread::sleep(Duration::from_millis(300));
        }
        if times[0].is_empty() {
            continue;
        }
        let [called, answered, opened] = times.map(median);
        let [overflows, drops, again] = counted;
        let figures = [
            Figure::new("all SYNs sent", "s", called),
            Figure::new("all answered", "s", answered),
            Figure::new("all open", "s", opened).aim(1.3),
            Figure::new("overflows", "", overflows),
            Figure::new("drops", "", drops),
            Figure::new("SYNs again", "", again),
        ];
        bench.report.add("storm", &case, contender, figures);
    }
    bench.report.print("storm", &case);
}

/// What the kernel has counted of TCP in this network namespace.
fn counters() -> HashMap<String, f64> {
    let text = fs::read_to_string("/proc/net/netstat").expect("procfs");
    let rows: Vec<&str> = text.lines().filter_map(|line| line.strip_prefix("TcpExt:")).collect();
    let [names, values] = rows[..] else { panic!("TcpExt has names and values") };
    let values = values.split_whitespace().map(|value| value.parse().expect("a number"));
    names.split_whitespace().map(str::to_owned).zip(values).collect()
}
