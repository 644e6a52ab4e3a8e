use std::{
    fs,
    io::{BufRead as _, BufReader, Write as _},
    net::{SocketAddr, TcpStream},
    path::{Path, PathBuf},
    process::Command,
    time::{Duration, Instant},
};

use anyhow::ensure;
use serde_json::json;

use super::{Set, first_success, loopback};
use crate::harness::{Disco, Envoy, PATIENCE, Process, eventually, free_port, scene, tool};

/// A Redis, or a sentinel.
struct Server {
    name: String,
    at: SocketAddr,
    folder: PathBuf,
    process: Option<Process>,
}

impl Server {
    fn new(folder: &Path, name: &str) -> anyhow::Result<Self> {
        Ok(Self { name: name.to_owned(), at: loopback()?, folder: folder.to_owned(), process: None })
    }

    fn run(&mut self, arguments: &[&str]) -> anyhow::Result<()> {
        let mut command = Command::new(tool("redis-server")?);
        command.args(arguments);
        let mut process = Process::start(&self.name, &self.folder, &mut command)?;
        let at = self.at;
        process.wait_for("answer", PATIENCE, |_| ask(at, "PING"))?;
        self.process = Some(process);
        Ok(())
    }

    /// As a master, unless it is told of one.
    fn start(&mut self, master: Option<SocketAddr>) -> anyhow::Result<()> {
        let folder = self.folder.display().to_string();
        let port = self.at.port().to_string();
        let mut arguments = vec![
            "--port",
            &port,
            "--bind",
            "127.0.0.1",
            "--save",
            "",
            "--dir",
            &folder,
            "--repl-diskless-sync-delay",
            "0",
        ];
        let of = master.map(|master| (master.ip().to_string(), master.port().to_string()));
        if let Some((ip, port)) = &of {
            arguments.extend(["--replicaof", ip, port]);
        }
        self.run(&arguments)
    }

    fn watch_over(&mut self, master: SocketAddr) -> anyhow::Result<()> {
        let file = self.folder.join(format!("{}.conf", self.name));
        let (port, ip, of) = (self.at.port(), master.ip(), master.port());
        let folder = self.folder.display();
        let settings = format!(
            "port {port}\nbind 127.0.0.1\ndir {folder}\nsentinel monitor m {ip} {of} 2\nsentinel down-after-milliseconds m 1000\n\
             sentinel failover-timeout m 5000\n"
        );
        fs::write(&file, settings)?;
        self.run(&[&file.display().to_string(), "--sentinel"])
    }
}

/// The first line of the answer to a command of plain words; of a text that text.
fn ask(at: SocketAddr, command: &str) -> Option<String> {
    let mut stream = TcpStream::connect_timeout(&at, Duration::from_millis(500)).ok()?;
    stream.set_read_timeout(Some(Duration::from_millis(500))).ok()?;
    stream.write_all(format!("{command}\r\n").as_bytes()).ok()?;
    let mut lines = BufReader::new(stream).lines();
    let first = lines.next()?.ok()?;
    if first.starts_with('$') { lines.next()?.ok() } else { Some(first) }
}

#[test]
#[cfg_attr(not(target_arch = "x86_64"), ignore = "there is no Redis to install")]
fn an_old_redis_master_that_returns_is_never_the_leader() {
    scene(|folder| {
        let disco = Disco::start(folder)?;
        let mut servers = Vec::new();
        for name in ["r1", "r2", "r3"] {
            servers.push(Server::new(folder, name)?);
        }
        let first = servers[0].at;
        servers[0].start(None)?;
        servers[1].start(Some(first))?;
        servers[2].start(Some(first))?;
        let mut sentinels = Vec::new();
        for name in ["s1", "s2", "s3"] {
            let mut sentinel = Server::new(folder, name)?;
            sentinel.watch_over(first)?;
            sentinels.push(sentinel);
        }
        let known: Vec<_> = sentinels.iter().map(|sentinel| sentinel.at.to_string()).collect();
        let options = json!({"master": "m", "sentinels": known.join(",")});
        let spec = json!({"kind": "redis", "expect": 3, "observe": {"adapter": "redis", "options": options}});
        let set = Set::create(&disco, "redis", &spec)?;
        for server in &servers {
            set.add(&server.name, server.at, server.at, json!({}))?;
        }
        set.wait_leader("r1", |leader| leader == Some("r1"))?;
        for replica in ["r2", "r3"] {
            set.wait_role(replica, "follower")?;
        }
        // The sentinels must know each other and the replicas before they can do anything.
        eventually("sentinels that know each other", PATIENCE, || {
            let ready = |at| ask(at, "SENTINEL CKQUORUM m").is_some_and(|said| said.contains("OK 3"));
            sentinels.iter().all(|sentinel| ready(sentinel.at)).then_some(())
        })?;
        let port = free_port()?;
        let envoy = Envoy::start_with(&disco, free_port()?, &["--tcp", &format!("redis.leader={port}")])?;
        let through = SocketAddr::new(envoy.proxy.ip(), port);
        let write = |n: u32| ask(through, &format!("SET k {n}")).is_some_and(|said| said == "+OK");
        first_success(PATIENCE, || write(1))?;
        let mut kept = TcpStream::connect(through)?;
        kept.set_read_timeout(Some(PATIENCE))?;

        let record = set.record();
        let killed = Instant::now();
        servers[0].process = None;
        set.wait_leader("another", |leader| leader.is_some_and(|leader| leader != "r1"))?;
        let known = killed.elapsed();
        let wrote = first_success(PATIENCE, || write(2))?.duration_since(killed);
        eprintln!(
            "Redis: {} ms until another master is known, {} ms until a write",
            known.as_millis(),
            wrote.as_millis()
        );

        // The old master returns as one that takes writes, until the sentinels catch it.
        servers[0].start(None)?;
        ensure!(ask(first, "ROLE").is_some(), "r1 is there");
        let masters = |at| ask_role(at).as_deref() == Some("master");
        let mut alone = 0;
        let end = Instant::now() + PATIENCE;
        while Instant::now() < end && masters(first) {
            alone += 1;
            ensure!(set.leader().as_deref() != Some("r1"), "r1 is published: {}", set.view()?);
            ensure!(envoy.hosts("redis.leader")?.len() <= 1, "two leaders");
            write(3);
        }
        eprintln!("Redis: the old master took itself for one in {alone} looks");
        ensure!(alone > 0, "it was never alone: nothing was tested");
        set.wait_role("r1", "follower")?;
        // Who leads by now may be another one again: that is the sentinels' business.
        eventually("a write at the leader", PATIENCE, || {
            let leader = set.leader()?;
            let server = servers.iter().find(|server| server.name == leader)?;
            (write(4) && ask(server.at, "GET k").as_deref() == Some("4")).then_some(())
        })?;
        record.check()?;
        let returned = record.reigns().iter().skip(1).any(|reign| reign.leader.as_deref() == Some("r1"));
        ensure!(!returned, "r1 was published again: {:?}", record.reigns());
        let mut end = String::new();
        let closed = BufReader::new(&mut kept).read_line(&mut end);
        ensure!(!matches!(closed, Ok(1..)), "a connection from before is open and speaks: {end:?}");
        Ok(())
    });
}

fn ask_role(at: SocketAddr) -> Option<String> {
    let mut stream = TcpStream::connect_timeout(&at, Duration::from_millis(500)).ok()?;
    stream.set_read_timeout(Some(Duration::from_millis(500))).ok()?;
    stream.write_all(b"ROLE\r\n").ok()?;
    // *3, $6, master.
    BufReader::new(stream).lines().nth(2)?.ok()
}
