use std::{
    fs,
    net::SocketAddr,
    path::{Path, PathBuf},
    process::Command,
    time::Instant,
};

use anyhow::{Context as _, ensure};
use rustix::process::Signal;
use serde_json::{Value, json};

use super::{Set, loopback};
use crate::harness::{Disco, PATIENCE, Process, eventually, scene, tool};

/// A NATS server whose routes are a file of their own.
struct Server {
    key: String,
    route: SocketAddr,
    client: SocketAddr,
    monitor: SocketAddr,
    folder: PathBuf,
    process: Option<Process>,
}

impl Server {
    fn new(folder: &Path, key: &str) -> anyhow::Result<Self> {
        let (route, client, monitor) = (loopback()?, loopback()?, loopback()?);
        Ok(Self { key: key.to_owned(), route, client, monitor, folder: folder.to_owned(), process: None })
    }

    fn register(&self, set: &Set) -> anyhow::Result<Value> {
        set.add(&self.key, self.route, self.client, json!({"http": self.monitor.to_string()}))
    }

    fn file(&self, what: &str) -> PathBuf {
        self.folder.join(format!("{}-{what}.conf", self.key))
    }

    /// Writes the routes to all members of the set.
    fn write_routes(&self, view: &Value, and: &[&Self]) -> anyhow::Result<()> {
        let peers = view["peers"].as_array().into_iter().flatten();
        let members = peers.filter(|peer| peer["suffrage"] != "staging");
        let mut routes: Vec<_> =
            members.map(|peer| format!("nats-route://{}", peer["raft"].as_str().unwrap_or("?"))).collect();
        routes.extend(and.iter().map(|server| format!("nats-route://{}", server.route)));
        Ok(fs::write(self.file("routes"), format!("routes: [{}]\n", routes.join(", ")))?)
    }

    fn start(&mut self) -> anyhow::Result<()> {
        let Self { key, route, client, monitor, folder, .. } = &*self;
        let settings = format!(
            "server_name: {key}\nlisten: {client}\nhttp: {monitor}\njetstream {{ store_dir: \"{}\" }}\n\
             cluster {{ name: C, listen: {route}\n include \"{}-routes.conf\"\n }}\n",
            folder.join(format!("{key}.data")).display(),
            key
        );
        fs::write(self.file("server"), settings)?;
        let mut command = Command::new(tool("nats-server")?);
        command.arg("-c").arg(self.file("server"));
        self.process = Some(Process::start(key, folder, &mut command)?);
        Ok(())
    }
}

#[test]
fn nats_tells_its_leader_and_takes_a_fourth_server_while_it_runs() {
    scene(|folder| {
        let disco = Disco::start(folder)?;
        let spec = json!({"kind": "nats", "expect": 3, "observe": {"adapter": "nats", "port": "http"}});
        let set = Set::create(&disco, "nats", &spec)?;
        let mut servers = Vec::new();
        for key in ["n1", "n2", "n3"] {
            let server = Server::new(folder, key)?;
            server.register(&set)?;
            servers.push(server);
        }
        let view = set.view()?;
        for server in &mut servers {
            server.write_routes(&view, &[])?;
            server.start()?;
        }
        let leader = set.wait_leader("leader", |leader| leader.is_some())?.context("a leader")?;
        let jsz = disco_get(servers[0].monitor, "/jsz")?;
        ensure!(jsz["meta_cluster"]["leader"] == leader.as_str(), "{leader}: {jsz}");

        // A fourth one: its routes reach the others by a reload.
        let mut fourth = Server::new(folder, "n4")?;
        fourth.register(&set)?;
        let mut body = json!({"add": "n4"});
        body["from_revision"] = set.view()?["set_revision"].clone();
        let step = set.send("POST", "/propose", &body)?;
        ensure!(step["step"]["change"] == "add-voter", "{step}");
        let view = set.view()?;
        fourth.write_routes(&view, &[&fourth])?;
        fourth.start()?;
        for server in &servers {
            server.write_routes(&view, &[&fourth])?;
            server.process.as_ref().context("it runs")?.signal(Signal::HUP)?;
        }
        eventually("pending change that is seen to be made", PATIENCE, || {
            set.view().ok()?["pending"].is_null().then_some(())
        })?;
        ensure!(set.peer("n4")?["suffrage"] == "voter", "{}", set.view()?);
        set.wait_role("n4", "follower")?;
        servers.push(fourth);

        let record = set.record();
        let leader = set.leader().context("a leader")?;
        let killed = Instant::now();
        servers.iter_mut().find(|server| server.key == leader).context("unknown")?.process = None;
        set.wait_leader("another", |now| now.is_some_and(|now| now != leader))?;
        eprintln!("NATS: {} ms until another leader is known", killed.elapsed().as_millis());
        record.check()
    });
}

fn disco_get(at: SocketAddr, path: &str) -> anyhow::Result<Value> {
    crate::harness::request(at, "GET", path, b"")?.json()
}
