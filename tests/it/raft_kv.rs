//! `examples/raft-kv`, a replicated store over openraft: who its nodes are, who founds it and where they are, only Disco tells them; and
//! callers find the leader through Envoy.

#[path = "../../examples/raft-kv/pb.rs"]
mod pb;

use std::{
    collections::{BTreeMap, BTreeSet},
    net::SocketAddr,
    process::{Command, Output},
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context as _, bail, ensure};
use pb::{GetRequest, PutReply, PutRequest, key_value_client::KeyValueClient};
use rustix::process::{Signal, kill_process};
use serde_json::{Value, json};
use tokio::runtime::Runtime;
use tonic::{
    Code, Request, Status,
    transport::{Channel, Endpoint},
};

use crate::{
    databases::{Set, first_success, loopback},
    harness::{Disco, Envoy, PATIENCE, Process, eventually, free_port, request_within, scene, sibling},
};

/// How long one attempt to write may take.
const ATTEMPT: Duration = Duration::from_millis(500);

/// A node under `disco run`.
struct Replica {
    key: &'static str,
    raft: SocketAddr,
    client: SocketAddr,
    process: Option<Process>,
}

impl Replica {
    fn new(key: &'static str) -> anyhow::Result<Self> {
        Ok(Self { key, raft: loopback()?, client: loopback()?, process: None })
    }

    /// As in the README of the example.
    fn start(&mut self, disco: &Disco) -> anyhow::Result<()> {
        let data = disco.folder().join(self.key);
        let mut command = disco.command()?;
        command.args(["run", "--peer-set", "kv", "--peer-key", self.key, "--health", "http", "/metrics"]);
        command.args([
            "--raft-port",
            &self.raft.port().to_string(),
            "--port",
            &self.client.port().to_string(),
        ]);
        command.arg("--data-dir").arg(&data).arg("--").arg(sibling("examples/raft-kv")?);
        command.arg("--data").arg(data.join("raft"));
        self.process = Some(Process::start(self.key, disco.folder(), &mut command)?);
        Ok(())
    }

    fn metrics(&self) -> anyhow::Result<Value> {
        metrics(self.client)
    }

    /// The voters, once it knows of a leader.
    fn voters(&self) -> anyhow::Result<BTreeSet<u64>> {
        let metrics = eventually(&format!("leader of {}", self.key), PATIENCE, || {
            self.metrics().ok().filter(|metrics| metrics["current_leader"].is_u64())
        })?;
        let voters = metrics["membership_config"]["membership"]["configs"][0].as_array();
        Ok(voters.context("no voters")?.iter().filter_map(Value::as_u64).collect())
    }
}

fn metrics(at: SocketAddr) -> anyhow::Result<Value> {
    request_within(ATTEMPT, at, "GET", "/metrics", b"")?.json()
}

fn leads(at: SocketAddr) -> bool {
    metrics(at).is_ok_and(|metrics| metrics["state"] == "Leader")
}

/// Calls the store, and knows what it has written.
struct Caller {
    runtime: Runtime,
    client: KeyValueClient<Channel>,
    attempts: usize,
    written: BTreeMap<String, String>,
}

impl Caller {
    fn new(at: SocketAddr, authority: &str) -> anyhow::Result<Self> {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
        let endpoint = Endpoint::from_shared(format!("http://{at}"))?;
        let endpoint = endpoint.origin(format!("http://{authority}").parse()?);
        let client = runtime.block_on(async { KeyValueClient::new(endpoint.connect_lazy()) });
        Ok(Self { runtime, client, attempts: 0, written: BTreeMap::new() })
    }

    /// One attempt.
    fn put(&mut self) -> Result<PutReply, Status> {
        self.put_within(ATTEMPT)
    }

    fn put_within(&mut self, bound: Duration) -> Result<PutReply, Status> {
        // Each has a key of its own: one that failed may still be written, at any time.
        self.attempts += 1;
        let key = format!("k{}", self.attempts);
        let value = format!("{:?}", Instant::now());
        let mut request = Request::new(PutRequest { key: key.clone(), value: value.clone() });
        request.set_timeout(bound);
        let reply = self.runtime.block_on(self.client.put(request))?.into_inner();
        self.written.insert(key, value);
        Ok(reply)
    }

    /// Writes some, each by this node.
    fn put_to(&mut self, node: &Value) -> anyhow::Result<()> {
        for _ in 0..20 {
            let reply = self.put_within(PATIENCE)?;
            ensure!(*node == reply.node, "node {} took a write, not {node}", reply.node);
        }
        Ok(())
    }

    /// Checks that all that was written is there.
    fn check(&mut self) -> anyhow::Result<()> {
        for (key, value) in &self.written {
            let request = GetRequest { key: key.clone() };
            let read = self.runtime.block_on(self.client.get(request))?.into_inner();
            ensure!(read.value.as_ref() == Some(value), "{key} was {value} and is {read:?}");
        }
        Ok(())
    }
}

fn create(disco: &Disco) -> anyhow::Result<Set> {
    let spec = json!({"kind": "openraft", "expect": 3, "observe": {"adapter": "openraft"}});
    Set::create(disco, "kv", &spec)
}

/// Three, in any order.
fn found(disco: &Disco) -> anyhow::Result<BTreeMap<&'static str, Replica>> {
    let mut keys = ["n1", "n2", "n3"];
    fastrand::shuffle(&mut keys);
    let replicas = keys.map(|key| {
        let mut replica = Replica::new(key)?;
        replica.start(disco)?;
        anyhow::Ok((key, replica))
    });
    replicas.into_iter().collect()
}

fn leader(set: &Set) -> anyhow::Result<String> {
    set.wait_leader("leader", |leader| leader.is_some())?.context("a leader")
}

fn ran(command: &mut Command) -> anyhow::Result<String> {
    let Output { status, stdout, stderr } = command.output()?;
    let [stdout, stderr] = [stdout, stderr].map(|text| String::from_utf8_lossy(&text).into_owned());
    ensure!(status.success(), "{command:?}: {status}\n{stdout}\n{stderr}");
    Ok(stdout)
}

#[test]
fn a_store_over_openraft_is_founded_grows_and_comes_back_by_disco() {
    scene(|folder| {
        let mut disco = Disco::start(folder)?;
        let set = create(&disco)?;
        let mut replicas = found(&disco)?;
        for replica in replicas.values() {
            ensure!(replica.voters()? == BTreeSet::from([1, 2, 3]), "{:?}", replica.metrics());
        }
        let leads = leader(&set)?;
        let envoy = Envoy::start_with(&disco, free_port()?, &["--on-demand"])?;
        let mut caller = Caller::new(envoy.proxy, "kv.leader")?;
        first_success(PATIENCE, || caller.put().is_ok())?;
        caller.put_to(&set.peer(&leads)?["node_id"])?;
        for replica in replicas.values().filter(|replica| replica.key != leads) {
            let refused = Caller::new(replica.client, "kv")?.put();
            ensure!(refused.as_ref().is_err_and(|status| status.code() == Code::Unavailable), "{refused:?}");
        }

        let mut joiner = Replica::new("n4")?;
        joiner.start(&disco)?;
        eventually("n4", PATIENCE, || set.peer("n4").ok())?;
        ensure!(reach(&disco, &set, &envoy, &["--add", "n4"])? == ["add-learner", "promote"]);
        ensure!(joiner.voters()? == BTreeSet::from([1, 2, 3, 4]), "{:?}", joiner.metrics());
        replicas.insert("n4", joiner);
        ensure!(set.peer("n4")?["birth"] == "joiner", "{}", set.view()?);
        eventually("no drift", PATIENCE, || (set.view().ok()?["drift"] == json!([])).then_some(()))?;
        let verify = |disco: &Disco| ran(disco.command()?.args(["peers", "verify", "kv"]));
        verify(&disco)?;
        caller.check()?;

        // One that does not lead dies for good, and another takes its place under a number of its own.
        let dead =
            replicas.values().map(|replica| replica.key).find(|key| *key != leads).context("a follower")?;
        replicas.remove(dead);
        eventually("end of it", PATIENCE, || (set.peer(dead).ok()?["liveness"] == "down").then_some(()))?;
        let mut instead = Replica::new("n5")?;
        instead.start(&disco)?;
        eventually("n5", PATIENCE, || set.peer("n5").ok())?;
        let gone = set.peer(dead)?["node_id"].as_u64();
        let voters: BTreeSet<_> = (1..=5).filter(|node| Some(*node) != gone).collect();
        let steps = reach(&disco, &set, &envoy, &["--replace", dead, "n5"])?;
        ensure!(steps == ["add-learner", "promote", "remove"], "{steps:?}");
        ensure!(instead.voters()? == voters, "{:?}", instead.metrics());
        replicas.insert("n5", instead);
        caller.check()?;

        // With nobody left to ask, it goes on; and after the end of everything it is what it was.
        disco.kill();
        caller.put_within(PATIENCE)?;
        for replica in replicas.values_mut() {
            replica.process = None;
        }
        for replica in replicas.values_mut() {
            replica.start(&disco)?;
        }
        for (key, replica) in &replicas {
            ensure!(replica.voters()? == voters, "{key}: {:?}", replica.metrics());
        }
        disco.start_again()?;
        first_success(PATIENCE, || caller.put().is_ok())?;
        caller.check()?;
        verify(&disco)?;
        Ok(())
    });
}

/// Makes each step that Disco proposes, through Envoy, until there is none; which they were.
fn reach(disco: &Disco, set: &Set, envoy: &Envoy, want: &[&str]) -> anyhow::Result<Vec<String>> {
    let mut steps: Vec<String> = Vec::new();
    let end = Instant::now() + PATIENCE;
    while Instant::now() < end {
        let proposed = disco.command()?.args(["peers", "propose", "kv"]).args(want).output()?;
        let said = String::from_utf8_lossy(&proposed.stdout).into_owned();
        if said.contains("nothing to do") {
            return Ok(steps);
        }
        match next(&said) {
            Some((step, arguments)) if steps.last() != Some(&step) => {
                let mut command = Command::new(sibling("examples/raft-kv")?);
                ran(command.arg(&step).args(arguments).args(["--at", &envoy.proxy.to_string()]))?;
                steps.push(step);
            }
            // It was made, or has to wait until the learner has caught up.
            Some(_) | None => thread::sleep(Duration::from_millis(20)),
        }
    }
    bail!("after {steps:?}: {}", set.view()?)
}

/// Reads `next: add-learner n4 (node 4)`, with `add_learner(4, 127.0.0.1:7004) on the leader` in the line below.
fn next(said: &str) -> Option<(String, Vec<String>)> {
    let (step, rest) = said.split_once("next: ")?.1.split_once(' ')?;
    let (node, rest) = rest.split_once("(node ")?.1.split_once(')')?;
    let address = rest.split_once("add_learner(").and_then(|(_, hint)| hint.split_once(')'));
    let address = address.and_then(|(hint, _)| hint.split_once(", ")).map(|(_, address)| address.to_owned());
    Some((step.to_owned(), [node.to_owned()].into_iter().chain(address).collect()))
}

/// N7.
#[test]
fn a_leader_of_openraft_that_was_frozen_is_not_called_again() {
    scene(|folder| {
        let disco = Disco::start(folder)?;
        let set = create(&disco)?;
        let replicas = found(&disco)?;
        let envoy = Envoy::start_with(&disco, free_port()?, &["--upstream", "kv.leader"])?;
        let mut caller = Caller::new(envoy.proxy, "kv.leader")?;
        let frozen = leader(&set)?;
        first_success(PATIENCE, || caller.put().is_ok())?;
        let record = set.record();
        let server = replicas[frozen.as_str()].process.as_ref().context("it runs")?.descendants();
        let server = *server.first().context("the server does not run")?;
        kill_process(server, Signal::STOP)?;
        let next = set.wait_leader("another", |now| now.is_some_and(|now| now != frozen))?;
        let next = set.peer(&next.context("a leader")?)?["node_id"].clone();
        first_success(PATIENCE, || caller.put().is_ok())?;
        caller.put_to(&next)?;

        // It takes itself for the leader until it hears of the other one.
        kill_process(server, Signal::CONT)?;
        caller.put_to(&next)?;
        set.wait_role(&frozen, "follower")?;
        caller.put_to(&next)?;
        caller.check()?;
        record.check()?;
        let again = record.reigns();
        let again = again.iter().skip_while(|reign| reign.leader.as_ref() == Some(&frozen));
        let again: Vec<_> = again.filter(|reign| reign.leader.as_ref() == Some(&frozen)).collect();
        ensure!(again.is_empty(), "published again: {again:?}");
        Ok(())
    });
}

/// How much later than the store has another leader Disco knows it, and a write through Envoy to `kv.leader` works.
/// `DISCO_KILLS` says how often; the figures go to standard error.
#[test]
fn a_dead_leader_of_openraft_costs_little_more_than_the_election() {
    scene(|folder| {
        let kills: usize = std::env::var("DISCO_KILLS").ok().and_then(|text| text.parse().ok()).unwrap_or(2);
        let disco = Disco::start(folder)?;
        let set = create(&disco)?;
        let mut replicas = found(&disco)?;
        leader(&set)?;
        let envoy = Envoy::start_with(&disco, free_port()?, &["--upstream", "kv.leader"])?;
        let mut caller = Caller::new(envoy.proxy, "kv.leader")?;
        first_success(PATIENCE, || caller.put().is_ok())?;
        let (mut seen, mut called) = (Vec::new(), Vec::new());
        for _ in 0..kills {
            let dies = leader(&set)?;
            let record = set.record();
            eventually("first entry", PATIENCE, || record.reigns().first().map(|_| ()))?;
            let others: Vec<_> =
                replicas.values().filter(|it| it.key != dies).map(|replica| replica.client).collect();
            let dead = replicas.get_mut(dies.as_str()).context("unknown")?;
            let began = Instant::now();
            dead.process = None;
            let (elected, written) = thread::scope(|scope| {
                let elected =
                    scope.spawn(move || first_success(PATIENCE, || others.iter().any(|at| leads(*at))));
                let written = first_success(PATIENCE, || caller.put().is_ok());
                anyhow::Ok((elected.join().expect("no panic")?, written?))
            })?;
            let next = set.wait_leader("another", |now| now.is_some_and(|now| now != dies))?;
            let known = eventually("entry", PATIENCE, || {
                record.reigns().iter().find(|reign| reign.leader == next).map(|reign| reign.at)
            })?;
            record.check()?;
            let since =
                |from: Instant, to: Instant| to.saturating_duration_since(from).as_secs_f64() * 1000.0;
            let after = |at: Instant| since(elected, at) - since(at, elected);
            eprintln!(
                "kill: election {:.0} ms, first write through Envoy {:.0} ms; Disco knows {:+.1} ms, through Envoy {:+.1} ms",
                since(began, elected),
                since(began, written),
                after(known),
                after(written),
            );
            seen.push(after(known));
            called.push(after(written));
            let node = set.peer(&dies)?["node_id"].clone();
            dead.start(&disco)?;
            set.wait_role(&dies, "follower")?;
            ensure!(dead.metrics()?["id"] == node, "it is another node than before");
        }
        caller.check()?;
        for (what, mut times) in [("Disco knows", seen), ("through Envoy", called)] {
            times.sort_by(f64::total_cmp);
            let at = |share: f64| times[((times.len() - 1) as f64 * share).round() as usize];
            eprintln!("{what}: p50 {:+.1} ms, p99 {:+.1} ms of {} kills", at(0.5), at(0.99), times.len());
            ensure!(at(0.5) < 500.0, "{what} takes too long");
        }
        Ok(())
    });
}
