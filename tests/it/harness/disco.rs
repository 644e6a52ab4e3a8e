use std::{
    fs,
    net::SocketAddr,
    path::{Path, PathBuf},
    process::Command,
};

use anyhow::{Context as _, bail};
use rustix::process::Signal;
use serde_json::Value;

use super::{Answer, PATIENCE, Process, eventually, request, sibling};

/// A running `disco dev` or `disco serve`.
#[derive(Debug)]
pub(crate) struct Disco {
    process: Process,
    folder: PathBuf,
    pub(crate) grpc: SocketAddr,
    pub(crate) http: SocketAddr,
}

impl Disco {
    /// Starts one on ports of its own, with its data in `folder`, and waits until it listens.
    pub(crate) fn start(folder: &Path) -> anyhow::Result<Self> {
        let any = SocketAddr::from(([127, 0, 0, 1], 0));
        Self::start_on(folder, any, any)
    }

    /// Starts one on these addresses.
    pub(crate) fn start_on(folder: &Path, grpc: SocketAddr, http: SocketAddr) -> anyhow::Result<Self> {
        let mut command = disco_command()?;
        command.arg("dev").arg("--data").arg(folder.join("data"));
        Self::run(folder, command, grpc, http)
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
        let mut command = disco_command()?;
        command.arg("serve").arg("--config").arg(file);
        Self::run(folder, command, grpc, http)
    }

    fn run(folder: &Path, mut command: Command, grpc: SocketAddr, http: SocketAddr) -> anyhow::Result<Self> {
        let _ = fs::remove_file(folder.join("disco.log"));
        command.args(["--grpc-listen", &grpc.to_string(), "--http-listen", &http.to_string()]);
        let mut process = Process::start("disco", folder, &mut command)?;
        let line = process.wait_for("line `disco: listening grpc=… http=…`", PATIENCE, |process| {
            process.output().lines().find(|line| line.contains("listening grpc=")).map(str::to_owned)
        })?;
        let address = |key: &str| -> anyhow::Result<SocketAddr> {
            let word = line.split_whitespace().find_map(|word| word.strip_prefix(key));
            word.with_context(|| format!("no {key} in {line:?}"))?.parse().context(line.clone())
        };
        let (grpc, http) = (address("grpc=")?, address("http=")?);
        Ok(Self { process, folder: folder.to_owned(), grpc, http })
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
        *self = Self::start_on(&self.folder, self.grpc, self.http)?;
        Ok(())
    }

    pub(crate) fn folder(&self) -> &Path {
        &self.folder
    }

    /// A `disco` command that speaks to this server.
    pub(crate) fn command(&self) -> anyhow::Result<Command> {
        let mut command = disco_command()?;
        command.env("DISCO_GRPC", self.grpc.to_string()).env("DISCO_HTTP", self.http.to_string());
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

/// `disco` without the settings of whoever runs the tests.
fn disco_command() -> anyhow::Result<Command> {
    let mut command = Command::new(sibling("disco")?);
    for name in ["DISCO_GRPC", "DISCO_HTTP", "DISCO_TOKEN"] {
        command.env_remove(name);
    }
    Ok(command)
}
