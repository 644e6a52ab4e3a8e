//! The main job of Disco, from one command: `make demo`.
//!
//! Starts Disco, three instances of the greeter, an Envoy sidecar, and callers that go through it. Then one instance is
//! drained, one is killed, one is started, while the calls go on. Succeeds when no call failed.
#![allow(clippy::print_stdout, reason = "a program for people")]

#[allow(
    dead_code,
    unused_imports,
    clippy::disallowed_methods,
    clippy::expect_used,
    clippy::indexing_slicing,
    clippy::panic,
    reason = "shared with the tests, which use all of it"
)]
#[path = "../tests/it/harness/mod.rs"]
mod harness;
#[path = "../tests/clients/rust/load.rs"]
mod load;
#[path = "greeter/pb.rs"]
mod pb;

use std::{
    fs,
    net::{SocketAddr, TcpListener},
    path::Path,
    process::{self, ExitCode},
    thread,
    time::Duration,
};

use anyhow::Context as _;
use clap::Parser;
use harness::{Disco, Envoy, Greeter, Protocol, free_port, process::descendants, request, sibling};
use load::{Counts, Load, Plan};
use rustix::process::{Signal, getpid, kill_process};
use tokio::{runtime::Runtime, time::Instant};

const PLAN: Plan = Plan { concurrency: 16, rate: 1_500.0, long_calls: 3 };
/// How long the calls go on between two changes.
const SCENE: Duration = Duration::from_secs(3);
/// How long a change may take at most.
const PATIENCE: Duration = Duration::from_secs(10);
const INSTANCES: [&str; 4] = ["g1", "g2", "g3", "g4"];

/// Shows what Disco does: calls through Envoy, none of which fails while instances come and go.
#[derive(Parser)]
struct Args {
    /// Leave everything running at the end, until Ctrl-C.
    #[arg(long)]
    keep: bool,
}

fn main() -> anyhow::Result<ExitCode> {
    let folder = tempfile::tempdir()?;
    match show(&Args::parse(), folder.path()) {
        Ok(true) => return Ok(ExitCode::SUCCESS),
        Ok(false) => {}
        Err(error) => println!("\nThe demo could not go on: {error:#}"),
    }
    println!("\nThe logs are in {}", folder.keep().display());
    Ok(ExitCode::FAILURE)
}

/// Returns whether all calls were answered.
fn show(args: &Args, folder: &Path) -> anyhow::Result<bool> {
    let runtime = Runtime::new()?;
    let _inside = runtime.enter();
    end_on_ctrl_c(&runtime, folder, args.keep);

    println!("Disco demo: instances come, go and crash, and no call fails.\n");
    let start = Instant::now();
    let disco = Disco::start_on(folder, free_or_any(18_000), free_or_any(18_080))?;
    println!("  disco dev        gRPC {}, HTTP {}{}", disco.grpc, disco.http, after(start));

    let start = Instant::now();
    let mut g1 = Greeter::start(&disco, "g1")?;
    let mut g2 = Greeter::start(&disco, "g2")?;
    let _g3 = Greeter::start(&disco, "g3")?;
    disco.wait_serving(&["g1", "g2", "g3"])?;
    println!("  disco run        greeter: instances g1, g2 and g3{}", after(start));

    let start = Instant::now();
    let port = free_or_any(10_000).port();
    let envoy = Envoy::start_on(&disco, Protocol::Delta, if port == 0 { free_port()? } else { port })?;
    println!("  disco envoy run  calls {}, admin {}{}", envoy.proxy, envoy.admin, after(start));

    println!("\n{} callers go through Envoy; some calls take 300 ms, some are streams.", PLAN.concurrency);
    println!("Who answered, from change to change:\n\n{}", Scoreboard::head());
    let greeter = load::through_envoy(envoy.proxy, "greeter").map_err(|error| anyhow::anyhow!("{error}"))?;
    let load = Load::start(greeter, PLAN);
    let mut board = Scoreboard::default();
    thread::sleep(SCENE);
    board.line(load.counts(), "three instances", "");

    let drain = change(&disco, || g1.terminate())?;
    g1.ended()?;
    thread::sleep(SCENE);
    board.line(load.counts(), "g1 drained: SIGTERM", &drain.describe());

    let admin = envoy.admin;
    let retries = thread::spawn(move || watch_retries(admin));
    let crash = change(&disco, || g2.crash())?;
    g2.ended()?;
    let (retried, last) = retries.join().map_err(|_| anyhow::anyhow!("watching the retries failed"))??;
    let last = last.map_or(Duration::ZERO, |last| last.saturating_duration_since(crash.begun));
    let note = format!(
        "{}\n    {retried} calls that it had were sent to another, the last {} ms after the kill",
        crash.describe(),
        ms(last)
    );
    board.line(load.counts(), "g2 crashed: kill -9", &note);

    let mut g4 = None;
    let added = change(&disco, || {
        g4 = Some(Greeter::start(&disco, "g4")?);
        Ok(())
    })?;
    // It registered itself some time after its start, once its health check had passed.
    let registered = added.reached_envoy - since_registration(&disco, "g4")?;
    thread::sleep(SCENE);
    let counts = runtime.block_on(load.stop());
    let first = counts.first.get("g4").copied().context("g4 was never called")? - registered;
    board.line(counts.clone(), "g4 started", &format!("first answer {} ms after it registered", ms(first)));

    println!(
        "\n{} calls, {} failed; drain reached Envoy in {} ms, crash in {} ms, new instance in {} ms",
        thousands(counts.ok + counts.failed),
        thousands(counts.failed),
        ms(drain.reached_envoy - drain.begun),
        ms(crash.reached_envoy - crash.begun),
        ms(added.reached_envoy - registered),
    );
    if counts.resumed > 0 {
        println!("  streams that the crash cut off, and that their readers resumed: {}", counts.resumed);
    }
    for (error, times) in &counts.errors {
        println!("  {times} x {error}");
    }
    if args.keep {
        leave_running(&disco, &envoy)?;
    }
    Ok(counts.failed == 0)
}

/// When a change was begun, accepted by Disco, and acknowledged by Envoy.
struct Change {
    begun: Instant,
    accepted: Instant,
    reached_envoy: Instant,
}

impl Change {
    fn describe(&self) -> String {
        let (accepted, reached) = (self.accepted - self.begun, self.reached_envoy - self.accepted);
        format!("accepted after {} ms, in Envoy {} ms later", ms(accepted), ms(reached))
    }
}

/// Does something that changes the greeter's instances and follows the change to Envoy.
fn change(disco: &Disco, act: impl FnOnce() -> anyhow::Result<()>) -> anyhow::Result<Change> {
    let revision = |body: serde_json::Value| body.get("revision")?.as_u64();
    let instances = "/v1/services/greeter/instances";
    let before = revision(disco.get(instances)?).context("no revision")?;
    thread::scope(|scope| {
        let news = scope.spawn(|| {
            let body = disco.get(&format!("{instances}?index={before}&wait={}s", PATIENCE.as_secs()))?;
            anyhow::Ok((revision(body).context("no revision")?, Instant::now()))
        });
        let begun = Instant::now();
        act()?;
        let (after, accepted) =
            news.join().map_err(|_| anyhow::anyhow!("waiting for the change failed"))??;
        anyhow::ensure!(after > before, "the change was not accepted within {PATIENCE:?}");
        let path = format!("/v1/revisions/{after}?service=greeter&wait={}s", PATIENCE.as_secs());
        let status = disco.get(&path)?;
        let reached_envoy = Instant::now();
        let complete = status.get("complete").is_some_and(|complete| complete == true);
        anyhow::ensure!(complete, "revision {after} did not reach Envoy: {status}");
        Ok(Change { begun, accepted, reached_envoy })
    })
}

/// Follows Envoy's count of retries for a scene: how many there were, and when the last was seen.
fn watch_retries(admin: SocketAddr) -> anyhow::Result<(u64, Option<Instant>)> {
    let start = Instant::now();
    let first = retries(admin)?;
    let (mut count, mut last) = (first, None);
    while start.elapsed() < SCENE {
        let now = retries(admin)?;
        if now > count {
            (count, last) = (now, Some(Instant::now()));
        }
        thread::sleep(Duration::from_millis(2));
    }
    Ok((count - first, last))
}

/// How many calls Envoy has sent again to another instance so far.
fn retries(admin: SocketAddr) -> anyhow::Result<u64> {
    let stats = request(admin, "GET", "/stats?filter=cluster.greeter.upstream_rq_retry$", b"")?.body;
    let value = stats.lines().find_map(|line| line.rsplit_once(": "));
    Ok(value.map(|(_, value)| value.trim().parse()).transpose()?.unwrap_or_default())
}

/// How long ago an instance registered itself, by the wall clock and to the millisecond.
fn since_registration(disco: &Disco, id: &str) -> anyhow::Result<Duration> {
    let now = jiff::Timestamp::try_from(disco::rt::now())?;
    let instance = disco.get(&format!("/v1/services/greeter/instances/{id}"))?;
    let registered = instance.get("registered_at").and_then(|at| at.as_str()).context("no registered_at")?;
    Ok(Duration::try_from(now.duration_since(registered.parse()?))?)
}

/// Prints what the callers counted since the line before.
#[derive(Default)]
struct Scoreboard {
    before: Counts,
}

impl Scoreboard {
    fn head() -> String {
        let columns: String = INSTANCES.iter().map(|id| format!("{id:>8}")).collect();
        format!("  {:22}{columns}{:>8}", "", "failed")
    }

    fn line(&mut self, counts: Counts, what: &str, note: &str) {
        let of = |counts: &Counts, id: &str| counts.by.get(id).copied().unwrap_or_default();
        let news = INSTANCES.iter().map(|id| of(&counts, id) - of(&self.before, id));
        let columns: String = news.map(|calls| format!("{:>8}", thousands(calls))).collect();
        println!("  {what:22}{columns}{:>8}", thousands(counts.failed - self.before.failed));
        if !note.is_empty() {
            println!("    {note}");
        }
        self.before = counts;
    }
}

fn leave_running(disco: &Disco, envoy: &Envoy) -> anyhow::Result<()> {
    println!("\nEverything goes on running until Ctrl-C. In another terminal, try:\n");
    let program = sibling("disco")?;
    let here = std::env::current_dir()?;
    let shown = |path: &Path| path.strip_prefix(&here).unwrap_or(path).display().to_string();
    println!("  export DISCO_HTTP={} DISCO_GRPC={}", disco.http, disco.grpc);
    for command in ["instance list greeter", "proxy list", "service list", "instance drain greeter/g3"] {
        println!("  {} {command}", shown(&program));
    }
    println!("  {} --proxy {} --calls 6", shown(&sibling("examples/greeter-client")?), envoy.proxy);
    loop {
        thread::park();
    }
}

/// On Ctrl-C, ends all that was started, and the demo; with `keep` that is how it is meant to end.
fn end_on_ctrl_c(runtime: &Runtime, folder: &Path, keep: bool) {
    let folder = folder.to_owned();
    runtime.spawn(async move {
        if tokio::signal::ctrl_c().await.is_ok() {
            for pid in descendants(getpid()) {
                let _ = kill_process(pid, Signal::KILL);
            }
            let _ = fs::remove_dir_all(folder);
            println!();
            process::exit(if keep { 0 } else { 130 });
        }
    });
}

/// This port of the loopback address or, where somebody has it, any.
fn free_or_any(port: u16) -> SocketAddr {
    let wanted = SocketAddr::from(([127, 0, 0, 1], port));
    let free = TcpListener::bind(wanted).is_ok();
    if free { wanted } else { SocketAddr::from(([127, 0, 0, 1], 0)) }
}

fn after(start: Instant) -> String {
    format!(" ({} ms)", start.elapsed().as_millis())
}

fn ms(duration: Duration) -> String {
    let ms = duration.as_secs_f64() * 1_000.0;
    if ms < 9.95 { format!("{ms:.1}") } else { format!("{ms:.0}") }
}

fn thousands(number: u64) -> String {
    let digits = number.to_string();
    let mut text = String::new();
    for (place, digit) in digits.chars().enumerate() {
        if place > 0 && (digits.len() - place).is_multiple_of(3) {
            text.push(',');
        }
        text.push(digit);
    }
    text
}
