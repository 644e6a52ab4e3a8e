//! Peer sets as an operator and a database meet them: the command line, the API, and an unmodified etcd that founds its cluster by
//! them.

use std::{
    process::{Command, Output},
    time::Duration,
};

use anyhow::{Context as _, ensure};
use serde_json::{Value, json};

use crate::harness::{Disco, PATIENCE, Process, eventually, free_port, request, scene, tool};

/// Runs `disco peers …` and returns what it printed and its exit code.
fn peers(disco: &Disco, arguments: &str) -> anyhow::Result<(i32, String)> {
    let Output { status, stdout, stderr } =
        disco.command()?.arg("peers").args(arguments.split_whitespace()).output()?;
    let text = String::from_utf8_lossy(&stdout).into_owned() + &String::from_utf8_lossy(&stderr);
    Ok((status.code().context("it was killed")?, text))
}

/// As [`peers`], which has to end with `code` and say `want`.
fn check(disco: &Disco, arguments: &str, code: i32, want: &str) -> anyhow::Result<String> {
    let (ended, text) = peers(disco, arguments)?;
    ensure!(
        ended == code && text.contains(want),
        "disco peers {arguments}: {ended} instead of {code}\n{text}"
    );
    Ok(text)
}

fn send(disco: &Disco, method: &str, path: &str, body: &Value) -> anyhow::Result<(u16, Value)> {
    let answer = disco.request(method, path, body.to_string().as_bytes())?;
    Ok((answer.status, answer.json().unwrap_or_default()))
}

/// Registers three founders, the last one by itself.
fn found(disco: &Disco) -> anyhow::Result<()> {
    check(disco, "create db --kind openraft --expect 3", 0, "expects 3 founders")?;
    for n in 1..=3 {
        let next = if n == 3 { "peers show db" } else { "peers wait db" };
        let register =
            format!("register db n{n} --disk d{n} --raft 10.0.0.{n}:1 --client 10.0.0.{n}:2 --zone z{n}");
        check(disco, &register, 0, next)?;
    }
    Ok(())
}

/// Says what each replica does, as the leader's reports would.
fn report(disco: &Disco, roles: &[(&str, &str)], members: &Value) -> anyhow::Result<()> {
    for (key, role) in roles {
        let report = json!({"role": role, "term": 7, "leader": 1, "applied": 100, "config_index": 1, "members": members});
        let (status, answer) = send(disco, "POST", &format!("/v1/peers/db/peers/{key}/report"), &report)?;
        ensure!(status == 200, "{status} {answer}");
    }
    Ok(())
}

fn register_instance(disco: &Disco, key: &str) -> anyhow::Result<()> {
    let path = format!("/v1/services/db/instances/{key}");
    let (status, answer) =
        send(disco, "PUT", &path, &json!({"address": "127.0.0.1", "port": 1, "ttl": "60s"}))?;
    ensure!(status == 200, "{status} {answer}");
    Ok(())
}

#[test]
fn n1_no_list_before_all_have_come_and_then_the_same_for_ever() {
    scene(|folder| {
        let mut disco = Disco::start(folder)?;
        check(&disco, "show db", 1, "disco peers create db")?;
        check(&disco, "create db --expect 2 --kind etcd", 0, "cluster")?;
        check(&disco, "create db --expect 3 --kind etcd", 1, "cannot be changed")?;
        check(&disco, "register db n1 --disk d1 --raft localhost:1 --client 10.0.0.1:2", 65, "host names")?;
        check(&disco, "register db n1 --disk d1 --raft 10.0.0.1:1 --client 10.0.0.1:2", 0, "founder")?;
        // Who has come may be known; where, not.
        let (status, answer) = send(&disco, "GET", "/v1/peers/db", &Value::Null)?;
        ensure!(status == 425 && !answer.to_string().contains("10.0.0.1"), "{status} {answer}");
        check(&disco, "show db", 2, "1 of 2 founders have come (n1)")?;
        check(&disco, "wait db --timeout 100ms", 2, "1 of 2")?;
        check(
            &disco,
            "register db n1 --disk other --raft 10.0.0.1:1 --client 10.0.0.1:2",
            1,
            "another disk",
        )?;

        // Whoever waits has the list with the last founder's answer.
        let mut wait = disco.command()?;
        wait.args(["peers", "wait", "db", "--timeout", "20s"]);
        let mut waiting = Process::start("wait", disco.folder(), &mut wait)?;
        check(&disco, "register db n2 --disk d2 --raft 10.0.0.2:1 --client 10.0.0.2:2", 0, "founder")?;
        ensure!(waiting.ended(PATIENCE)?.success(), "{}", waiting.output());
        let founding = disco.get("/v1/peers/db")?["founding"].take();
        let keys: Vec<_> =
            founding["list"].as_array().into_iter().flatten().map(|f| f["key"].clone()).collect();
        ensure!(keys == ["n1", "n2"], "{founding}");

        disco.kill();
        disco.start_again()?;
        check(
            &disco,
            "register db n3 --disk d3 --raft 10.0.0.3:1 --client 10.0.0.3:2",
            0,
            "node 3 of db, a joiner",
        )?;
        ensure!(disco.get("/v1/peers/db")?["founding"] == founding, "the founding list changed (rule N3)");
        check(&disco, "show db", 0, "n3")?;
        Ok(())
    });
}

#[test]
fn n6_one_safe_step_at_a_time_and_over_when_the_database_says_so() {
    scene(|folder| {
        let disco = Disco::start(folder)?;
        found(&disco)?;
        for key in ["n1", "n2", "n3"] {
            register_instance(&disco, key)?;
        }
        check(&disco, "wait db --up 3 --timeout 5s", 0, "founder")?;
        check(&disco, "register db n4 --disk d4 --raft 10.0.0.4:1 --client 10.0.0.4:2", 0, "joiner")?;
        check(&disco, "wait db --added n4 --timeout 100ms", 2, "n4 has not been added")?;
        check(&disco, "propose db --add n4 --from 1", 1, "look again")?;
        check(&disco, "propose db --add n4", 0, "add_learner(4, 10.0.0.4:1)")?;
        check(&disco, "propose db --remove n2", 1, "add-learner of n4 is under way")?;

        let member = |n: u64, voter: bool| json!({"id": n, "raft": format!("10.0.0.{n}:1"), "voter": voter});
        let with = |voter: Option<bool>| {
            let mut members: Vec<_> = (1..=3).map(|n| member(n, true)).collect();
            members.extend(voter.map(|voter| member(4, voter)));
            Value::Array(members)
        };
        let roles = [("n1", "leader"), ("n2", "follower"), ("n3", "follower")];
        report(&disco, &roles, &with(None))?;
        check(&disco, "verify db", 0, "n1")?;
        report(&disco, &[("n1", "leader")], &with(Some(false)))?;
        check(&disco, "wait db --added n4 --leader --timeout 5s", 0, "learner")?;
        // It does not run, and nobody knows how far it is.
        check(&disco, "propose db --add n4", 2, "n4 has not told how far it has come")?;
        report(&disco, &[("n4", "learner")], &with(Some(false)))?;
        check(&disco, "propose db --add n4", 1, "n4 does not run")?;
        register_instance(&disco, "n4")?;
        eventually("n4 runs", PATIENCE, || {
            check(&disco, "propose db --add n4", 0, "promote n4").ok().map(drop)
        })?;
        report(&disco, &[("n1", "leader")], &with(Some(true)))?;
        check(&disco, "propose db --add n4", 0, "nothing to do")?;
        // The database has somebody whom nobody proposed.
        let mut stranger = with(Some(true));
        stranger.as_array_mut().context("a list")?.push(member(9, true));
        report(&disco, &[("n1", "leader")], &stranger)?;
        check(&disco, "verify db", 79, "9 is a member of the database and not of the set")?;
        Ok(())
    });
}

struct Etcd {
    name: String,
    process: Process,
    client: u16,
}

impl Etcd {
    fn start(disco: &Disco, name: &str) -> anyhow::Result<Self> {
        let (peer, client) = (free_port()?, free_port()?);
        let [peer_url, client_url] = [peer, client].map(|port| format!("http://127.0.0.1:{port}"));
        let mut command = Command::new(tool("etcd")?);
        command.args(["--name", name, "--data-dir"]).arg(disco.folder().join(name));
        command.args(["--listen-peer-urls", &peer_url, "--initial-advertise-peer-urls", &peer_url]);
        command.args(["--listen-client-urls", &client_url, "--advertise-client-urls", &client_url]);
        let server = disco.http;
        command.args(["--discovery", &format!("http://{server}/v1/etcd/db"), "--discovery-fallback", "exit"]);
        let process = Process::start(name, disco.folder(), &mut command)?;
        Ok(Self { name: name.to_owned(), process, client })
    }

    /// The id of the cluster that it is in, once it is in one.
    fn cluster(&self) -> Option<String> {
        let at = ([127, 0, 0, 1], self.client).into();
        let answer = request(at, "POST", "/v3/maintenance/status", b"{}").ok()?;
        Some(answer.json().ok()?.pointer("/header/cluster_id")?.as_str()?.to_owned())
    }
}

#[test]
fn n2_real_etcds_in_any_order_one_late_found_one_cluster() {
    scene(|folder| {
        let disco = Disco::start(folder)?;
        check(&disco, "create db --expect 3 --kind etcd", 0, "cluster")?;
        let mut etcds = vec![Etcd::start(&disco, "n3")?, Etcd::start(&disco, "n1")?];
        eventually("two founders", PATIENCE, || check(&disco, "list", 0, "2 of 3 have come").ok().map(drop))?;
        ensure!(etcds.iter().all(|etcd| etcd.cluster().is_none()), "a cluster of two");
        etcds.push(Etcd::start(&disco, "n2")?);
        let mut clusters = Vec::new();
        for etcd in &etcds {
            clusters.push(eventually(&etcd.name, Duration::from_secs(20), || etcd.cluster())?);
        }
        clusters.dedup();
        ensure!(clusters.len() == 1, "{clusters:?}");
        check(&disco, "show db", 0, "3 founders")?;

        // One too many finds the cluster full and ends.
        let mut surplus = Etcd::start(&disco, "n4")?;
        ensure!(!surplus.process.ended(PATIENCE)?.success());
        ensure!(surplus.process.output().contains("cluster is full"), "{}", surplus.process.output());
        Ok(())
    });
}
