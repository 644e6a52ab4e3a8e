//! What the benchmarks share: a Disco process of their own, and what it costs.
#![allow(dead_code, reason = "each benchmark uses a part")]

use std::{
    collections::HashMap,
    ffi::OsStr,
    fs,
    io::{BufRead as _, BufReader},
    path::Path,
    process::{Child, Command, Stdio},
    time::Duration,
};

pub(crate) mod etcd;
pub(crate) mod guard;

/// A `disco dev` on free ports, ended on drop.
pub(crate) struct Disco {
    server: guard::Server,
    pub(crate) grpc: String,
    pub(crate) http: String,
}

impl Disco {
    /// Keeps its state in `data`, or in memory.
    pub(crate) fn start(data: Option<&Path>) -> Self {
        let data = data.into_iter().flat_map(|data| [OsStr::new("--data"), data.as_os_str()]);
        Self::run(Command::new(env!("CARGO_BIN_EXE_disco")).arg("dev").args(data))
    }

    /// With a configuration file.
    pub(crate) fn serve(file: &Path) -> Self {
        Self::run(Command::new(env!("CARGO_BIN_EXE_disco")).args(["serve", "--config"]).arg(file))
    }

    fn run(command: &mut Command) -> Self {
        let child = command
            .args(["--grpc-listen", "127.0.0.1:0", "--http-listen", "127.0.0.1:0"])
            .stdout(Stdio::piped())
            .stderr(Stdio::null())
            .spawn()
            .expect("disco starts");
        let mut server = guard::Server::new(child);
        let mut lines = BufReader::new(server.0.stdout.take().expect("stdout is piped")).lines();
        let line = lines
            .by_ref()
            .map_while(Result::ok)
            .find(|line| line.starts_with("disco: listening"))
            .expect("disco says where it listens");
        let address = |name: &str| {
            let value = line.split_whitespace().find_map(|word| word.strip_prefix(name));
            value.expect("the line names the address").to_owned()
        };
        let (grpc, http) = (address("grpc="), address("http="));
        // Read on, so that the process never blocks on what it prints.
        std::thread::spawn(move || lines.map_while(Result::ok).for_each(drop));
        Self { server, grpc, http }
    }

    /// Resident memory in KiB.
    pub(crate) fn memory(&self) -> u64 {
        memory(&self.server.0)
    }

    /// What `/metrics` says, by name; those with labels are left out.
    pub(crate) async fn metrics(&self) -> HashMap<String, f64> {
        let client = disco::client::Http::new(&self.http, None).expect("an address");
        let path = "/metrics";
        let (_, text) =
            client.raw(http::Method::GET, path, None, Duration::from_secs(5)).await.expect("an answer");
        let text = String::from_utf8_lossy(&text);
        let lines = text.lines().filter(|line| !line.starts_with('#') && !line.contains('{'));
        lines
            .filter_map(|line| line.split_once(' '))
            .filter_map(|(n, v)| Some((n.to_owned(), v.parse().ok()?)))
            .collect()
    }

    /// CPU seconds used so far.
    pub(crate) fn cpu(&self) -> f64 {
        cpu(&self.server.0)
    }
}

/// Resident memory of a process in KiB.
pub(crate) fn memory(process: &Child) -> u64 {
    let status = fs::read_to_string(format!("/proc/{}/status", process.id())).expect("it runs");
    let line = status.lines().find(|line| line.starts_with("VmRSS:")).expect("it has memory");
    line.split_whitespace().nth(1).expect("a number").parse().expect("a number")
}

/// CPU seconds that the threads of a process have used so far, to the nanosecond.
pub(crate) fn cpu(process: &Child) -> f64 {
    let threads = fs::read_dir(format!("/proc/{}/task", process.id())).expect("it runs");
    let used = threads.filter_map(|thread| fs::read_to_string(thread.ok()?.path().join("schedstat")).ok());
    used.map(|line| line.split_whitespace().next().expect("a number").parse::<f64>().expect("a number"))
        .sum::<f64>()
        / 1e9
}

pub(crate) async fn connect(address: &str) -> tonic::transport::Channel {
    let endpoint = tonic::transport::Endpoint::from_shared(format!("http://{address}")).expect("an address");
    endpoint.tcp_nodelay(true).connect().await.expect("disco answers")
}
