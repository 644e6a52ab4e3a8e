//! What it costs to bring a change to thousands of proxies: Disco beside the limit, a bare tonic server that hands the same
//! ready bytes to as many streams, and beside go-control-plane with its LinearCache and its SnapshotCache (`benches/peers`).
//! Servers and load are processes of their own; each row is measured in turns, and ratios are of medians.
//!
//! `cargo bench --profile fast --bench fanout`, and behind `--`: `--quick` for a part of it, `--only=CASE` for one case,
//! `--json=FILE` for a file with all figures, `--without-peers`.
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

mod bad;
mod catalog;
mod change;
mod churn;
mod envoy;
mod leds;
mod limit;
mod load;
mod measure;
mod memory;
mod names;
mod peers;
mod reconnect;
mod report;
mod servers;
mod storm;

use std::{
    fs,
    panic::{AssertUnwindSafe, catch_unwind},
    path::{Path, PathBuf},
    time::{Duration, Instant},
};

use report::Report;
use serde_json::json;
use servers::{Cache, Content, Disco, Server, Steered};

type Case = (&'static str, fn(&mut Bench));

/// The cases, in their order.
const CASES: [Case; 10] = [
    ("change", change::run),
    ("reconnect", reconnect::run),
    ("storm", storm::run),
    ("catalog", catalog::run),
    ("memory", memory::run),
    ("names", names::run),
    ("leds", leds::run),
    ("envoy", envoy::run),
    ("churn", churn::run),
    ("bad", bad::run),
];

/// No case is begun after this.
const ENOUGH: Duration = Duration::from_secs(1200);

/// Everything is over then: what hangs is ended.
const LIMIT: Duration = Duration::from_secs(1500);

fn main() {
    let arguments: Vec<String> = std::env::args().collect();
    let has = |argument: &str| arguments.iter().any(|given| given == argument);
    let value = |argument: &str| arguments.iter().find_map(|given| given.strip_prefix(argument));
    if has("limit") {
        return limit::serve();
    }
    common::guard::start(LIMIT);
    raise_file_limit();
    let only = value("--only=");
    if let Some(only) = only
        && !CASES.iter().any(|(name, _)| *name == only)
    {
        println!("there is no case {only}; there are {}", CASES.map(|(name, _)| name).join(", "));
        std::process::exit(64);
    }
    let start = Instant::now();
    let load = fs::read_to_string("/proc/loadavg").expect("procfs").trim().to_owned();
    let cores = std::thread::available_parallelism().expect("a number of cores").get();
    let peer = if has("--without-peers") { None } else { peers::build() };
    let mut bench = Bench { quick: has("--quick"), peer, report: Report::default() };
    println!("{cores} cores shared with the load; load average before: {load}");
    println!("(… x) is the multiple of the limit's; aims: p99 and CPU 1.2, memory and reconnects 1.3\n");
    let machine = json!({"cores": cores, "load before": load, "cpu": cpu()});
    for (name, run) in CASES {
        if only.is_some_and(|only| only != name) {
            continue;
        }
        if start.elapsed() > ENOUGH {
            println!("{name} is left out: {} s are over; --only={name} measures it\n", ENOUGH.as_secs());
            continue;
        }
        run(&mut bench);
        println!();
        // What there is by now, should the rest take too long.
        if let Some(path) = value("--json=") {
            bench.report.write(Path::new(path), &machine);
        }
    }
    println!("for the README:\n\n{}\n", bench.report.markdown());
    println!("took {:.0} s", start.elapsed().as_secs_f64());
    if bench.report.failed {
        println!("some of it failed");
        std::process::exit(1);
    }
}

/// What the machine calls its processor.
fn cpu() -> String {
    let text = fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    let line = text.lines().find_map(|line| line.strip_prefix("model name")).unwrap_or_default();
    line.trim_start_matches([' ', '\t', ':']).to_owned()
}

fn raise_file_limit() {
    use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
    let Rlimit { maximum, .. } = getrlimit(Resource::Nofile);
    let _ = setrlimit(Resource::Nofile, Rlimit { current: maximum, maximum });
}

/// Who is measured.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Contender {
    Limit,
    Disco,
    LinearCache,
    SnapshotCache,
}

impl Contender {
    const ALL: [Self; 4] = [Self::Limit, Self::Disco, Self::LinearCache, Self::SnapshotCache];

    fn name(self) -> &'static str {
        match self {
            Self::Limit => "limit",
            Self::Disco => "Disco",
            Self::LinearCache => "go-control-plane LinearCache",
            Self::SnapshotCache => "go-control-plane SnapshotCache",
        }
    }
}

/// A run of the benchmark.
pub(crate) struct Bench {
    quick: bool,
    /// The program of `benches/peers`.
    peer: Option<PathBuf>,
    report: Report,
}

impl Bench {
    fn contenders(&self) -> Vec<Contender> {
        [Contender::Limit, Contender::Disco].into_iter().chain(self.peers()).collect()
    }

    fn peers(&self) -> Vec<Contender> {
        if self.peer.is_some() { vec![Contender::LinearCache, Contender::SnapshotCache] } else { vec![] }
    }

    /// A server with this content; Disco with so many services and instances of each. The limit answers after so many requests.
    fn start(
        &self,
        contender: Contender,
        content: &Content,
        requests: u8,
        (services, instances): (usize, usize),
    ) -> Box<dyn Server> {
        let peer = |cache| {
            let program = self.peer.as_deref().expect("it was built");
            Box::new(Steered::peer(program, cache, content))
        };
        match contender {
            Contender::Limit => Box::new(Steered::limit(content, requests)),
            Contender::Disco => Box::new(Disco::start(services, instances)),
            Contender::LinearCache => peer(Cache::Linear),
            Contender::SnapshotCache => peer(Cache::Snapshot),
        }
    }

    /// Measures, once: who does not get through a case is not tried with it again, and the others go on.
    fn attempt<T>(
        &mut self,
        part: &'static str,
        case: &str,
        contender: Contender,
        measure: impl FnOnce(&mut Self) -> T,
    ) -> Option<T> {
        if self.report.is_missing(part, case, contender) {
            return None;
        }
        let result = catch_unwind(AssertUnwindSafe(|| measure(self)));
        let panic = match result {
            Ok(measured) => return Some(measured),
            Err(panic) => panic,
        };
        let reason = panic.downcast_ref::<String>().map(String::as_str);
        let reason = reason.or_else(|| panic.downcast_ref::<&str>().copied()).unwrap_or("it failed");
        self.report.missing(part, case, contender, reason);
        self.report.failed |= matches!(contender, Contender::Limit | Contender::Disco);
        None
    }
}
