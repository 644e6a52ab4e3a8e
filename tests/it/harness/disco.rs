use std::{
    ffi::OsString,
    fs,
    net::SocketAddr,
    path::{Path, PathBuf},
    process::Command,
};

use anyhow::{Context as _, bail};
use rustix::process::Signal;
use serde_json::Value;

use super::{Answer, PATIENCE, Place, Process, eventually, request, sibling};

/// A running `disco dev` or `disco serve`.
#[derive(Debug)]
pub(crate) struct Disco {
    process: Process,
    start: Start,
    folder: PathBuf,
    listen: (SocketAddr, SocketAddr),
    pub(crate) grpc: SocketAddr,
    pub(crate) http: SocketAddr,
    /// The gRPC and HTTP addresses of those that a command which speaks to this one is told of, this one first.
    servers: Vec<(SocketAddr, SocketAddr)>,
}

/// What to start, apart from where it listens.
#[derive(Debug, Clone)]
pub(super) struct Start {
    pub(super) name: String,
    pub(super) place: Place,
    pub(super) arguments: Vec<OsString>,
}

impl Start {
    fn here(arguments: Vec<OsString>) -> Self {
        Self { name: "disco".to_owned(), place: Place::here(), arguments }
    }
}

impl Disco {
    /// Starts one on ports of its own, with its data in `folder`, and waits until it listens.
    pub(crate) fn start(folder: &Path) -> anyhow::Result<Self> {
        let any = SocketAddr::from(([127, 0, 0, 1], 0));
        Self::start_on(folder, any, any)
    }

    /// Starts one on these addresses.
    pub(crate) fn start_on(folder: &Path, grpc: SocketAddr, http: SocketAddr) -> anyhow::Result<Self> {
        let arguments = vec!["dev".into(), "--data".into(), folder.join("data").into()];
        Self::run(folder, Start::here(arguments), grpc, http)
    }

    /// Starts a `disco serve` on ports of its own, with this configuration.
    pub(crate) fn serve(folder: &Path, configuration: &str) -> anyhow::Result<Self> {
        let any = SocketAddr::from(([127, 0, 0, 1], 0));
        Self::serve_on(folder, configuration, any, any)
    }

    /// Likewise, on these addresses.
    pub(crate) fn serve_on(
        folder: &Path,
        configuration: &str,
        grpc: SocketAddr,
        http: SocketAddr,
    ) -> anyhow::Result<Self> {
        let file = folder.join("disco.yaml");
        fs::write(&file, configuration)?;
        Self::run(folder, Start::here(vec!["serve".into(), "--config".into(), file.into()]), grpc, http)
    }

    pub(super) fn run(
        folder: &Path,
        start: Start,
        grpc: SocketAddr,
        http: SocketAddr,
    ) -> anyhow::Result<Self> {
        let _ = fs::remove_file(folder.join(format!("{}.log", start.name)));
        let mut command = start.place.command(sibling("disco")?);
        forget_settings(&mut command).args(&start.arguments);
        command.args(["--grpc-listen", &grpc.to_string(), "--http-listen", &http.to_string()]);
        let mut process = Process::start(&start.name, folder, &mut command)?;
        let line = process.wait_for("line `disco: listening grpc=… http=…`", PATIENCE, |process| {
            process.output().lines().find(|line| line.contains("listening ")).map(str::to_owned)
        })?;
        let port = |key: &str| -> anyhow::Result<Option<u16>> {
            let word = line.split_whitespace().find_map(|word| word.strip_prefix(key));
            let address = word.map(str::parse::<SocketAddr>).transpose().context(line.clone())?;
            Ok(address.map(|address| address.port()))
        };
        // Where it does not listen, what it was told stands for it: nobody will answer.
        let ports = [port("grpc=")?.unwrap_or(grpc.port()), port("http=")?.unwrap_or(http.port())];
        let [grpc, http] = ports.map(|port| SocketAddr::new(start.place.seen, port));
        let servers =
            vec![(SocketAddr::new(start.place.ip, ports[0]), SocketAddr::new(start.place.ip, ports[1]))];
        let listen = start.place.listen();
        let listen = (SocketAddr::new(listen, ports[0]), SocketAddr::new(listen, ports[1]));
        Ok(Self { process, start, folder: folder.to_owned(), listen, grpc, http, servers })
    }

    /// Tells commands of these others.
    pub(super) fn introduce(&mut self, others: impl Iterator<Item = (SocketAddr, SocketAddr)>) {
        let own = self.own();
        self.servers = [own].into_iter().chain(others.filter(|other| *other != own)).collect();
    }

    /// Its addresses for all but the test.
    pub(super) fn own(&self) -> (SocketAddr, SocketAddr) {
        self.servers[0]
    }

    pub(crate) fn name(&self) -> &str {
        &self.start.name
    }

    /// Ends it as a supervisor does, with SIGTERM.
    pub(crate) fn terminate(&mut self) -> anyhow::Result<()> {
        self.process.signal(Signal::TERM)?;
        let status = self.process.ended(PATIENCE)?;
        if !status.success() {
            bail!("{} ended with {status} on SIGTERM\n{}", self.name(), self.process.output());
        }
        Ok(())
    }

    /// What it has logged.
    pub(crate) fn output(&self) -> String {
        self.process.output()
    }

    pub(crate) fn wait_ready(&self) -> anyhow::Result<()> {
        eventually(&format!("readiness of {}", self.name()), PATIENCE, || {
            let answer = request(self.http, "GET", "/readyz", b"").ok()?;
            (answer.status == 200).then_some(())
        })
    }

    /// `kill -9`.
    pub(crate) fn kill(&mut self) {
        self.process.kill();
    }

    /// Stops or continues it, say.
    pub(crate) fn signal(&self, signal: Signal) -> anyhow::Result<()> {
        self.process.signal(signal)
    }

    /// Starts it again, with the same data and on the same ports.
    pub(crate) fn start_again(&mut self) -> anyhow::Result<()> {
        self.process.kill();
        let servers = std::mem::take(&mut self.servers);
        let (grpc, http) = self.listen;
        *self = Self { servers, ..Self::run(&self.folder, self.start.clone(), grpc, http)? };
        Ok(())
    }

    pub(crate) fn folder(&self) -> &Path {
        &self.folder
    }

    /// A `disco` command that speaks to this server.
    pub(crate) fn command(&self) -> anyhow::Result<Command> {
        self.command_at(&Place::here())
    }

    /// Likewise, run elsewhere.
    pub(crate) fn command_at(&self, place: &Place) -> anyhow::Result<Command> {
        let mut command = place.command(sibling("disco")?);
        let list = |address: fn(&(SocketAddr, SocketAddr)) -> SocketAddr| {
            self.servers.iter().map(|of| address(of).to_string()).collect::<Vec<_>>().join(",")
        };
        forget_settings(&mut command).env("DISCO_GRPC", list(|it| it.0)).env("DISCO_HTTP", list(|it| it.1));
        Ok(command)
    }

    pub(crate) fn request(&self, method: &str, path: &str, body: &[u8]) -> anyhow::Result<Answer> {
        request(self.http, method, path, body)
    }

    /// The JSON at `path`.
    pub(crate) fn get(&self, path: &str) -> anyhow::Result<Value> {
        let answer = self.request("GET", path, b"")?;
        if answer.status != 200 {
            bail!("GET {path}: {} {}", answer.status, answer.body);
        }
        answer.json()
    }

    /// Registers the first greeter that there is as an instance of another service, too.
    pub(crate) fn register_alias(&self, service: &str) -> anyhow::Result<()> {
        let greeters = self.get("/v1/services/greeter/instances")?;
        let port = &greeters["instances"][0]["port"];
        let body = format!(r#"{{"address": "127.0.0.1", "port": {port}, "ttl": "10m"}}"#);
        let answer =
            self.request("PUT", &format!("/v1/services/{service}/instances/alias"), body.as_bytes())?;
        if answer.status != 200 {
            bail!("cannot register {service}: {} {}", answer.status, answer.body);
        }
        Ok(())
    }

    /// Takes that back, and the service with it.
    pub(crate) fn remove_alias(&self, service: &str) -> anyhow::Result<()> {
        for path in [format!("/v1/services/{service}/instances/alias"), format!("/v1/services/{service}")] {
            let answer = self.request("DELETE", &path, b"")?;
            if answer.status != 200 {
                bail!("cannot remove {path}: {} {}", answer.status, answer.body);
            }
        }
        Ok(())
    }

    /// Ids of the greeters that take calls, in order.
    pub(crate) fn serving(&self) -> anyhow::Result<Vec<String>> {
        let answer = self.request("GET", "/v1/services/greeter/instances", b"")?;
        if answer.status == 404 {
            return Ok(Vec::new());
        }
        let body = answer.json()?;
        let instances = body["instances"].as_array().context("no instances")?;
        let serving = instances.iter().filter(|instance| instance["state"] == "serving");
        let mut ids: Vec<_> =
            serving.filter_map(|instance| instance["id"].as_str().map(str::to_owned)).collect();
        ids.sort();
        Ok(ids)
    }

    /// Waits until exactly these greeters take calls.
    pub(crate) fn wait_serving(&self, ids: &[&str]) -> anyhow::Result<()> {
        let mut seen = Ok(Vec::new());
        let done = eventually(&format!("service greeter with {ids:?}"), PATIENCE, || {
            seen = self.serving();
            seen.as_ref().is_ok_and(|seen| seen == ids).then_some(())
        });
        done.with_context(|| format!("registered were {seen:?}"))
    }
}

/// The settings of whoever runs the tests are not for what they start.
fn forget_settings(command: &mut Command) -> &mut Command {
    for name in ["DISCO_GRPC", "DISCO_HTTP", "DISCO_TOKEN"] {
        command.env_remove(name);
    }
    command
}
