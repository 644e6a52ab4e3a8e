//! What the benchmarks share: a Disco process of their own, and its memory.

use std::{
    fs,
    io::{BufRead as _, BufReader},
    path::Path,
    process::{Child, Command, Stdio},
};

/// A `disco dev` on free ports, ended on drop.
pub(crate) struct Disco {
    child: Child,
    pub(crate) grpc: String,
}

impl Disco {
    pub(crate) fn start(data: &Path) -> Self {
        let mut child = Command::new(env!("CARGO_BIN_EXE_disco"))
            .args(["dev", "--grpc-listen", "127.0.0.1:0", "--http-listen", "127.0.0.1:0", "--data"])
            .arg(data)
            .stderr(Stdio::piped())
            .stdout(Stdio::null())
            .spawn()
            .expect("disco starts");
        let mut lines = BufReader::new(child.stderr.take().expect("stderr is piped")).lines();
        let line = lines
            .by_ref()
            .map_while(Result::ok)
            .find(|line| line.starts_with("disco: listening"))
            .expect("disco says where it listens");
        let address = |name: &str| {
            let value = line.split_whitespace().find_map(|word| word.strip_prefix(name));
            value.expect("the line names the address").to_owned()
        };
        let grpc = address("grpc=");
        // Read on, so that the process never blocks on its own log.
        std::thread::spawn(move || lines.map_while(Result::ok).for_each(drop));
        Self { child, grpc }
    }

    /// Resident memory in KiB.
    pub(crate) fn memory(&self) -> u64 {
        let status = fs::read_to_string(format!("/proc/{}/status", self.child.id())).expect("it runs");
        let line = status.lines().find(|line| line.starts_with("VmRSS:")).expect("it has memory");
        line.split_whitespace().nth(1).expect("a number").parse().expect("a number")
    }

    /// CPU seconds used so far.
    pub(crate) fn cpu(&self) -> f64 {
        let stat = fs::read_to_string(format!("/proc/{}/stat", self.child.id())).expect("it runs");
        let fields: Vec<&str> = stat.rsplit(')').next().expect("fields").split_whitespace().collect();
        let ticks: f64 = [11, 12].iter().map(|at| fields[*at].parse::<f64>().expect("ticks")).sum();
        ticks / 100.0
    }
}

impl Drop for Disco {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}
