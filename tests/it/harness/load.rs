use std::{
    collections::BTreeMap,
    fs,
    io::{BufRead as _, BufReader},
    net::SocketAddr,
    path::Path,
    process::{ChildStdin, Command},
    sync::{Arc, Mutex, PoisonError},
    thread,
    time::Duration,
};

use anyhow::{Context as _, ensure};
use serde_json::json;

use super::{Disco, PATIENCE, Process, eventually, sibling, tool};

/// Who calls. `tests/clients/README.md` says what they have in common.
#[derive(Debug, Clone, Copy)]
pub(crate) enum Client {
    /// Plain gRPC through the Envoy that listens here.
    Envoy(SocketAddr),
    Python,
    Node,
    Go,
    /// tonic-xds.
    Rust,
}

/// What a client counted since its start.
#[derive(Debug, Clone, Default, serde::Deserialize)]
pub(crate) struct Stats {
    pub(crate) ok: u64,
    pub(crate) failed: u64,
    /// Streams that broke off and were asked for again; only Rust calls streams.
    #[serde(default)]
    pub(crate) resumed: u64,
    pub(crate) by: BTreeMap<String, u64>,
    pub(crate) errors: BTreeMap<String, u64>,
}

impl Stats {
    /// Calls that `instance` answered.
    pub(crate) fn of(&self, instance: &str) -> u64 {
        self.by.get(instance).copied().unwrap_or_default()
    }
}

/// A client that calls the greeter without a pause.
#[derive(Debug)]
pub(crate) struct Load {
    process: Process,
    stats: Arc<Mutex<Stats>>,
    stdin: Option<ChildStdin>,
    reader: Option<thread::JoinHandle<()>>,
}

impl Load {
    pub(crate) fn start(disco: &Disco, client: Client) -> anyhow::Result<Self> {
        Self::start_in(disco, client, "")
    }

    /// Starts a client that calls `xds:///<service>` and does not wait for a connection.
    pub(crate) fn start_fail_fast(disco: &Disco, client: Client, service: &str) -> anyhow::Result<Self> {
        Self::start_to(disco, client, "", service, &["--fail-fast"])
    }

    /// Starts a client that runs in this zone; the one of Envoy is where its Envoy says.
    pub(crate) fn start_in(disco: &Disco, client: Client, zone: &str) -> anyhow::Result<Self> {
        Self::start_to(disco, client, zone, "greeter", &[])
    }

    fn start_to(
        disco: &Disco,
        client: Client,
        zone: &str,
        service: &str,
        flags: &[&str],
    ) -> anyhow::Result<Self> {
        let mut command = client.command()?;
        match client {
            Client::Envoy(proxy) => {
                command.args(["--proxy", &proxy.to_string(), "--service", service, "--long-calls", "2"]);
            }
            _ => {
                command.args(["--target", &format!("xds:///{service}")]);
                command.env("GRPC_XDS_BOOTSTRAP", client.write_bootstrap(disco, zone)?);
            }
        }
        command.args(["--concurrency", "8", "--rate", "300"]).args(flags);
        let (process, stdin, stdout) = Process::start_piped("client", disco.folder(), &mut command)?;
        let stats = Arc::new(Mutex::new(Stats::default()));
        let latest = Arc::clone(&stats);
        let reader = thread::spawn(move || {
            for line in BufReader::new(stdout).lines().map_while(Result::ok) {
                if let Ok(new) = serde_json::from_str(&line) {
                    *latest.lock().unwrap_or_else(PoisonError::into_inner) = new;
                }
            }
        });
        Ok(Self { process, stats, stdin: Some(stdin), reader: Some(reader) })
    }

    pub(crate) fn stats(&self) -> Stats {
        self.stats.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Waits until the numbers are as `wanted`.
    pub(crate) fn wait_until(&self, what: &str, wanted: impl Fn(&Stats) -> bool) -> anyhow::Result<()> {
        eventually(what, PATIENCE, || wanted(&self.stats()).then_some(()))
            .with_context(|| format!("the client counted {:?}\n{}", self.stats(), self.process.output()))
    }

    /// Waits until `more` further calls have been answered.
    pub(crate) fn wait_more(&self, more: u64) -> anyhow::Result<()> {
        let before = self.stats().ok;
        self.wait_until(&format!("{more} further answers"), |stats| stats.ok >= before + more)
    }

    /// Ends the client after its last call and returns the final numbers.
    pub(crate) fn stop(mut self) -> anyhow::Result<Stats> {
        drop(self.stdin.take());
        let status = self.process.ended(Duration::from_secs(15))?;
        ensure!(status.success(), "the client failed: {status}\n{}", self.process.output());
        if let Some(reader) = self.reader.take() {
            let _ = reader.join();
        }
        Ok(self.stats())
    }
}

impl Client {
    fn command(self) -> anyhow::Result<Command> {
        let source = |path: &str| Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/clients").join(path);
        Ok(match self {
            Self::Envoy(_) | Self::Rust => Command::new(sibling("examples/greeter-client-xds")?),
            Self::Go => Command::new(tool("greeter-client-go")?),
            Self::Python => {
                let mut command = Command::new(tool("python-grpc")?);
                command.arg(source("python/client.py"));
                command
            }
            Self::Node => {
                let mut command = Command::new(tool("node-grpc")?);
                command.arg(source("node/client.js"));
                command
            }
        })
    }

    fn write_bootstrap(self, disco: &Disco, zone: &str) -> anyhow::Result<std::path::PathBuf> {
        // tonic-xds takes its server as a URL only, the others as address and port only.
        let server = match self {
            Self::Rust => format!("http://{}", disco.grpc),
            _ => disco.grpc.to_string(),
        };
        let bootstrap = json!({
            "xds_servers": [{
                "server_uri": server,
                "channel_creds": [{"type": "insecure"}],
                "server_features": ["xds_v3"],
            }],
            // Node insists on a locality, be it empty.
            "node": {"id": "caller", "locality": {"zone": zone}},
        });
        let path = disco.folder().join("bootstrap.json");
        fs::write(&path, bootstrap.to_string())?;
        Ok(path)
    }
}
