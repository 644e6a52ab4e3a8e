//! How long a real Envoy takes to apply a change of one endpoint of a large service, and what that costs it: when the endpoint
//! goes by itself (LEDS), and when all go with it (EDS).

use std::{
    env,
    net::{SocketAddr, TcpListener},
    path::{Path, PathBuf},
    process::{Command, Stdio},
    time::{Duration, Instant},
};

use crate::{
    Bench, Contender,
    common::{self, guard::Server as Guarded},
    load::PATIENCE,
    measure::{bounded, histogram, median, micros, ms},
    report::Figure,
    servers::{Disco, Server as _},
};

/// For the changes of one form.
const BUDGET: Duration = Duration::from_secs(20);

pub(crate) fn run(bench: &mut Bench) {
    let Some(program) = program() else {
        println!("Envoy is left out: `make tools` installs it into .tools/");
        return;
    };
    let (size, rounds) = if bench.quick { (5_000, 10) } else { (20_000, 50) };
    println!(
        "one endpoint of {size} changes; from the write until a real Envoy on delta has acknowledged it"
    );
    for (form, leds_from) in [("LEDS", 1000), ("EDS", 0)] {
        let case = format!("{size} endpoints, {form}");
        bench.attempt("envoy", &case, Contender::Disco, |bench| {
            let mut disco = Disco::start_with(&format!("leds_from: {leds_from}"), 1, size);
            let start = Instant::now();
            let envoy = start_envoy(&disco, &program);
            while !disco.is_synced() {
                assert!(start.elapsed() < PATIENCE, "Envoy has not acknowledged everything");
                std::thread::sleep(Duration::from_millis(20));
            }
            let loaded = start.elapsed();
            disco.change_everywhere();
            let (mut latency, mut cpu) = (histogram(), [vec![], vec![]]);
            bounded(rounds, BUDGET, || {
                let before = [common::cpu(&envoy.0), disco.cpu()];
                latency.saturating_record(micros(disco.change_everywhere()));
                // What Envoy does beside it, such as to hand the change to its workers, is part of the cost.
                std::thread::sleep(Duration::from_millis(50));
                let after = [common::cpu(&envoy.0), disco.cpu()];
                (0..2).for_each(|at| cpu[at].push((after[at] - before[at]) * 1e3));
            });
            let [envoys, discos] = cpu.map(median);
            let figures = [
                Figure::new("to ACK p50", "ms", ms(&latency, 0.5)),
                Figure::new("to ACK p99", "ms", ms(&latency, 0.99)),
                Figure::new("Envoy CPU a change", "ms", envoys),
                Figure::new("Disco CPU a change", "ms", discos),
                Figure::new("first load", "s", loaded.as_secs_f64()),
            ];
            bench.report.add("envoy", &case, Contender::Disco, figures);
        });
        bench.report.print("envoy", &case);
    }
}

fn program() -> Option<PathBuf> {
    let top = Path::new(env!("CARGO_MANIFEST_DIR"));
    let tools = env::var_os("DISCO_TEST_TOOLS").map_or_else(|| top.join(".tools"), PathBuf::from);
    Some(tools.join("bin/envoy")).filter(|program| program.exists())
}

/// `disco envoy run` becomes Envoy.
fn start_envoy(disco: &Disco, program: &Path) -> Guarded {
    let port = || {
        let any = TcpListener::bind(SocketAddr::from(([127, 0, 0, 1], 0))).expect("a port");
        any.local_addr().expect("bound").port().to_string()
    };
    let mut command = Command::new(env!("CARGO_BIN_EXE_disco"));
    command.args(["envoy", "run", "--service", "caller", "--envoy"]).arg(program);
    command.args(["--admin-port", &port(), "--outbound-port", &port()]);
    command.env("DISCO_GRPC", disco.address().to_string());
    Guarded::new(command.stdout(Stdio::null()).stderr(Stdio::null()).spawn().expect("Envoy starts"))
}
