use std::{
    net::SocketAddr,
    path::{Path, PathBuf},
    process::Command,
    time::{Duration, Instant},
};

use anyhow::{Context as _, ensure};
use rustix::process::{Signal, geteuid};
use serde_json::json;

use super::{Set, first_success, loopback};
use crate::harness::{Disco, Envoy, PATIENCE, Process, eventually, free_port, request_within, scene, tool};

/// PostgreSQL refuses to run as root: then it runs as another user in a namespace, to which root's files are that user's.
fn command(name: &str) -> anyhow::Result<Command> {
    let program = tool(name)?;
    if !geteuid().is_root() {
        return Ok(Command::new(program));
    }
    let mut command = Command::new("unshare");
    command.args(["--user", "--map-user=65534", "--map-group=65534"]).arg(program);
    Ok(command)
}

fn start_database(folder: &Path) -> anyhow::Result<(Process, SocketAddr)> {
    let (data, at) = (folder.join("pg"), loopback()?);
    let mut initdb = command("initdb")?;
    initdb.arg("-D").arg(&data).args(["-U", "postgres", "--auth=trust", "--no-sync", "-N"]);
    let output = initdb.output()?;
    ensure!(output.status.success(), "initdb: {}", String::from_utf8_lossy(&output.stderr));
    let mut server = command("postgres")?;
    server.arg("-D").arg(&data).args([
        "-p",
        &at.port().to_string(),
        "-c",
        "fsync=off",
        "-c",
        "listen_addresses=127.0.0.1",
    ]);
    server.args(["-c", "unix_socket_directories="]);
    let mut process = Process::start("postgres", folder, &mut server)?;
    process.wait_for("readiness", PATIENCE, |process| {
        process.output().contains("ready to accept").then_some(())
    })?;
    Ok((process, at))
}

/// A program that works while it holds a lock of the database.
struct Holder {
    key: String,
    at: SocketAddr,
    process: Option<Process>,
}

impl Holder {
    fn start(folder: &Path, key: &str, database: SocketAddr) -> anyhow::Result<Self> {
        let at = loopback()?;
        let script = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("tests/clients/python/lock_holder.py");
        let mut command = Command::new(tool("python-grpc").or_else(|_| anyhow::Ok("python3".into()))?);
        command.arg(script).args([key, &at.to_string(), &database.to_string()]);
        let mut process = Process::start(key, folder, &mut command)?;
        process.wait_for("answer", PATIENCE, |_| ask(at, "/"))?;
        Ok(Self { key: key.to_owned(), at, process: Some(process) })
    }
}

fn ask(at: SocketAddr, path: &str) -> Option<(u16, String)> {
    let answer = request_within(Duration::from_secs(2), at, "GET", path, b"").ok()?;
    Some((answer.status, answer.body))
}

#[test]
fn a_frozen_holder_of_a_lock_leads_no_more_and_calls_fail_fast() {
    scene(|folder| {
        let (_database, database) = start_database(folder)?;
        let disco = Disco::start(folder)?;
        let spec = json!({"kind": "postgres", "expect": 2, "observe": {"adapter": "http", "options": {"path": "/leader"}}});
        let set = Set::create(&disco, "ledger", &spec)?;
        let mut holders =
            vec![Holder::start(folder, "p1", database)?, Holder::start(folder, "p2", database)?];
        for holder in &holders {
            set.add(&holder.key, holder.at, holder.at, json!({}))?;
        }
        let leader = set.wait_leader("leader", |leader| leader.is_some())?.context("a leader")?;
        let position = |leader: &str| usize::from(leader == "p2");
        let port = free_port()?;
        let envoy = Envoy::start_with(&disco, free_port()?, &["--tcp", &format!("ledger.leader={port}")])?;
        let through = SocketAddr::new(envoy.proxy.ip(), port);
        first_success(PATIENCE, || ask(through, "/").is_some_and(|(_, said)| said == leader))?;

        // Frozen: the lock is held still, so nobody leads, and callers are told so at once.
        let record = set.record();
        let frozen = Instant::now();
        holders[position(&leader)].process.as_ref().context("it runs")?.signal(Signal::STOP)?;
        set.wait_leader("empty leader set", |leader| leader.is_none())?;
        let known = frozen.elapsed();
        eventually("empty cluster", PATIENCE, || {
            envoy.hosts("ledger.leader").ok()?.is_empty().then_some(())
        })?;
        let asked = Instant::now();
        ensure!(ask(through, "/").is_none(), "somebody answers");
        let failed = asked.elapsed();
        ensure!(failed < Duration::from_millis(500), "it took {failed:?} to fail");
        eprintln!(
            "PostgreSQL: frozen holder gone after {} ms, then a call fails in {failed:?}",
            known.as_millis()
        );
        ensure!(known < Duration::from_secs(5), "{known:?}");

        holders[position(&leader)].process.as_ref().context("it runs")?.signal(Signal::CONT)?;
        set.wait_leader("the same", |now| now == Some(&leader))?;
        first_success(PATIENCE, || ask(through, "/").is_some_and(|(_, said)| said == leader))?;

        // Dead: the database lets go of the lock, and the other one takes it.
        let killed = Instant::now();
        holders[position(&leader)].process = None;
        let other = if leader == "p1" { "p2" } else { "p1" };
        set.wait_leader("the other", |now| now == Some(other))?;
        let known = killed.elapsed();
        let called = first_success(PATIENCE, || ask(through, "/").is_some_and(|(_, said)| said == other))?;
        eprintln!(
            "PostgreSQL: {} ms from the kill until the other is known, {} ms until a call",
            known.as_millis(),
            called.duration_since(killed).as_millis()
        );
        record.check()
    });
}
