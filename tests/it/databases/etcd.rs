use std::{
    collections::{BTreeMap, BTreeSet},
    net::SocketAddr,
    path::{Path, PathBuf},
    process::Command,
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context as _, bail, ensure};
use serde_json::{Value, json};

use super::{Set, first_success, loopback};
use crate::harness::{Disco, Envoy, PATIENCE, Process, eventually, free_port, request_within, scene, tool};

/// An etcd that takes its list from Disco.
struct Member {
    key: String,
    raft: SocketAddr,
    client: SocketAddr,
    folder: PathBuf,
    process: Option<Process>,
}

impl Member {
    fn new(folder: &Path, key: &str) -> anyhow::Result<Self> {
        let (raft, client) = (loopback()?, loopback()?);
        Ok(Self { key: key.to_owned(), raft, client, folder: folder.to_owned(), process: None })
    }

    fn register(&self, set: &Set) -> anyhow::Result<Value> {
        set.add(&self.key, self.raft, self.client, json!({}))
    }

    /// Starts it with this list.
    fn start(&mut self, list: &str, state: &str, token: &str) -> anyhow::Result<()> {
        let data = self.folder.join(format!("{}.data", self.key));
        let (raft, client) = (format!("http://{}", self.raft), format!("http://{}", self.client));
        let mut command = Command::new(tool("etcd")?);
        command.args([
            "--unsafe-no-fsync",
            "--log-level=error",
            "--heartbeat-interval=100",
            "--election-timeout=1000",
        ]);
        command.arg("--data-dir").arg(data).args(["--name", &self.key]);
        command.args(["--listen-client-urls", &client, "--advertise-client-urls", &client]);
        command.args(["--listen-peer-urls", &raft, "--initial-advertise-peer-urls", &raft]);
        command.args([
            "--initial-cluster",
            list,
            "--initial-cluster-state",
            state,
            "--initial-cluster-token",
            token,
        ]);
        self.process = Some(Process::start(&self.key, &self.folder, &mut command)?);
        Ok(())
    }

    /// Registers, waits until the list is frozen, and starts with it.
    fn found(&mut self, set: &Set) -> anyhow::Result<String> {
        self.register(set)?;
        let view = set.view()?;
        let list = founding_list(&view);
        self.start(&list, "new", view["cluster_id"].as_str().unwrap_or_default())?;
        Ok(list)
    }

    fn post(&self, path: &str, body: &Value) -> anyhow::Result<Value> {
        post(self.client, path, body)
    }

    fn id(&self) -> anyhow::Result<String> {
        let status = self.post("/v3/maintenance/status", &json!({}))?;
        Ok(status["header"]["member_id"].as_str().context("no id")?.to_owned())
    }
}

fn post(at: SocketAddr, path: &str, body: &Value) -> anyhow::Result<Value> {
    let answer = request_within(Duration::from_secs(5), at, "POST", path, body.to_string().as_bytes())?;
    ensure!(answer.status == 200, "{path}: {} {}", answer.status, answer.body);
    answer.json()
}

/// What `--initial-cluster` takes.
fn founding_list(view: &Value) -> String {
    let list = view["founding"]["list"].as_array().into_iter().flatten();
    let entries = list.map(|one| {
        format!("{}=http://{}", one["key"].as_str().unwrap_or("?"), one["raft"].as_str().unwrap_or("?"))
    });
    entries.collect::<Vec<_>>().join(",")
}

fn create(disco: &Disco) -> anyhow::Result<Set> {
    Set::create(disco, "db", &json!({"kind": "etcd", "expect": 3, "observe": {"adapter": "etcd"}}))
}

/// Founds one of three.
fn found(folder: &Path, set: &Set) -> anyhow::Result<BTreeMap<String, Member>> {
    let mut members = Vec::new();
    for key in ["n1", "n2", "n3"] {
        members.push(Member::new(folder, key)?);
    }
    fastrand::shuffle(&mut members);
    let lists = thread::scope(|scope| {
        let starting: Vec<_> = members
            .iter_mut()
            .enumerate()
            .map(|(n, member)| {
                scope.spawn(move || {
                    // The last one is late, and all the others wait for it.
                    thread::sleep(Duration::from_millis(if n == 2 { 2000 } else { 100 * n as u64 }));
                    member.found(set)
                })
            })
            .collect();
        let lists = starting.into_iter().map(|one| one.join().expect("no panic"));
        lists.collect::<anyhow::Result<BTreeSet<_>>>()
    })?;
    ensure!(lists.len() == 1, "several lists: {lists:?}");
    Ok(members.into_iter().map(|member| (member.key.clone(), member)).collect())
}

#[test]
fn etcd_is_founded_grows_and_loses_members_by_disco() {
    scene(|folder| {
        let disco = Disco::start(folder)?;
        let set = create(&disco)?;
        let mut members = found(folder, &set)?;
        let leader = set.wait_leader("leader", |leader| leader.is_some())?.context("a leader")?;
        let digest = set.view()?["founding"]["digest"].clone();
        let clusters: BTreeSet<String> = members
            .values()
            .map(|member| {
                let status = member.post("/v3/maintenance/status", &json!({}))?;
                Ok(status["header"]["cluster_id"].to_string())
            })
            .collect::<anyhow::Result<_>>()?;
        ensure!(clusters.len() == 1, "{clusters:?}");
        let leads = members[&leader].post("/v3/maintenance/status", &json!({}))?;
        ensure!(leads["leader"] == leads["header"]["member_id"], "{leader} does not lead: {leads}");

        // Another list is refused, and another disk under a name that is taken.
        let other = json!({"kind": "etcd", "expect": 5});
        ensure!(
            set.send("PUT", "", &other).is_err_and(|error| error.to_string().contains("409")),
            "another list"
        );
        let disk = json!({"disk": "empty", "raft": members["n1"].raft.to_string(), "client": members["n1"].client.to_string()});
        ensure!(set.send("PUT", "/peers/n1", &disk).is_err(), "another disk");

        // Leases of healthy replicas end: it is shown, and nothing else comes of it.
        for key in ["n2", "n3"] {
            set.lease(key, members[key].client, "1s")?;
        }
        eventually("end of the leases", PATIENCE, || {
            let down = |key: &str| Some(set.peer(key).ok()?["liveness"] != "up");
            (down("n2")? && down("n3")?).then_some(())
        })?;
        let view = set.view()?;
        ensure!(view["peers"].as_array().is_some_and(|peers| peers.len() == 3), "{view}");
        ensure!(view["leader"] == leader.as_str() && view["founding"]["digest"] == digest, "{view}");
        ensure!(view["pending"].is_null() && view["drift"] == json!([]), "{view}");
        for key in ["n2", "n3"] {
            set.lease(key, members[key].client, "10m")?;
        }

        for key in ["n4", "n5"] {
            let member = Member::new(folder, key)?;
            ensure!(member.register(&set)?["birth"] == "joiner");
            members.insert(key.to_owned(), member);
            reach(&set, &mut members, &json!({"add": key}))?;
        }
        ensure!(voters(&set)? == 5, "{}", set.view()?);

        // One dies for good and another takes its place, under a number of its own.
        members.get_mut("n1").context("n1")?.process = None;
        let path = "/v1/services/db/instances/n1";
        ensure!(disco.request("DELETE", path, b"")?.status == 200);
        let member = Member::new(folder, "n6")?;
        ensure!(member.register(&set)?["node_id"] == 6);
        members.insert("n6".to_owned(), member);
        reach(&set, &mut members, &json!({"replace": {"old": "n1", "new": "n6"}}))?;
        let view = set.view()?;
        ensure!(voters(&set)? == 5 && view["removed"][0]["key"] == "n1", "{view}");
        ensure!(view["founding"]["digest"] == digest, "the founding list is for ever: {view}");
        eventually("no drift", PATIENCE, || (set.view().ok()?["drift"] == json!([])).then_some(()))?;
        Ok(())
    });
}

fn voters(set: &Set) -> anyhow::Result<usize> {
    let view = set.view()?;
    let peers = view["peers"].as_array().into_iter().flatten();
    Ok(peers.filter(|peer| peer["suffrage"] == "voter").count())
}

/// Does one step after the other, as Disco proposes them, until it is as it is wanted.
fn reach(set: &Set, members: &mut BTreeMap<String, Member>, want: &Value) -> anyhow::Result<()> {
    let end = Instant::now() + PATIENCE;
    let mut done: Option<Value> = None;
    while Instant::now() < end {
        let view = set.view()?;
        if view["leader"].is_null() {
            // Whoever is to be removed may have led.
            thread::sleep(Duration::from_millis(20));
            continue;
        }
        let mut body = want.clone();
        body["from_revision"] = view["set_revision"].clone();
        let step = match set.send("POST", "/propose", &body) {
            Ok(step) => step,
            // Somebody was faster, which here is the observer.
            Err(error) if error.to_string().contains("look again") => continue,
            Err(error) => bail!("{error:#}\n{view}"),
        };
        if step["done"] == true {
            return Ok(());
        }
        if step["step"].is_null() || done.as_ref() == Some(&step["step"]) {
            thread::sleep(Duration::from_millis(20));
            continue;
        }
        change(&view, members, &step["step"])?;
        done = Some(step["step"].clone());
    }
    bail!("{want} was not reached: {}", set.view()?)
}

/// Makes the change in etcd.
fn change(view: &Value, members: &mut BTreeMap<String, Member>, pending: &Value) -> anyhow::Result<()> {
    let key = pending["key"].as_str().context("no key")?.to_owned();
    let leader = members[view["leader"].as_str().context("no leader")?].client;
    let attempt = |path: &str, body: &Value| {
        // etcd refuses changes for some seconds after another one.
        eventually(path, PATIENCE, || post(leader, path, body).ok())
    };
    match pending["change"].as_str() {
        Some("add-learner") => {
            let url = format!("http://{}", members[&key].raft);
            let added = attempt("/v3/cluster/member/add", &json!({"peerURLs": [url], "isLearner": true}))?;
            let list = added["members"].as_array().into_iter().flatten().map(|member| {
                let name = member["name"].as_str().filter(|name| !name.is_empty()).unwrap_or(&key);
                format!("{name}={}", member["peerURLs"][0].as_str().unwrap_or("?"))
            });
            let list = list.collect::<Vec<_>>().join(",");
            members.get_mut(&key).context("unknown")?.start(&list, "existing", "")
        }
        Some("promote") => {
            attempt("/v3/cluster/member/promote", &json!({"ID": members[&key].id()?})).map(|_| ())
        }
        Some("remove") => {
            let list = post(leader, "/v3/cluster/member/list", &json!({}))?;
            let list = list["members"].as_array().into_iter().flatten();
            let id = list.into_iter().find(|member| member["name"] == key.as_str()).context("not there")?;
            attempt("/v3/cluster/member/remove", &json!({"ID": id["ID"]})).map(|_| ())
        }
        other => bail!("an unknown change: {other:?}"),
    }
}

fn put(at: SocketAddr) -> bool {
    // Base64 of `k` and `v`.
    let body = br#"{"key":"aw==","value":"dg=="}"#;
    let answer = request_within(Duration::from_millis(500), at, "POST", "/v3/kv/put", body);
    answer.is_ok_and(|answer| answer.status == 200)
}

fn leads(at: SocketAddr) -> bool {
    let answer = request_within(Duration::from_millis(500), at, "POST", "/v3/maintenance/status", b"{}");
    let status = answer.and_then(|answer| answer.json()).unwrap_or_default();
    status["leader"].is_string() && status["leader"] == status["header"]["member_id"]
}

/// How much later than the database has another leader Disco knows it, and a write through Envoy to `db.leader` works.
/// `DISCO_KILLS` says how often; the figures go to standard error.
#[test]
fn a_dead_leader_costs_little_more_than_the_election() {
    scene(|folder| {
        let kills: usize = std::env::var("DISCO_KILLS").ok().and_then(|text| text.parse().ok()).unwrap_or(2);
        let disco = Disco::start(folder)?;
        let set = create(&disco)?;
        let mut members = found(folder, &set)?;
        set.wait_leader("leader", |leader| leader.is_some())?;
        let port = free_port()?;
        let envoy = Envoy::start_with(&disco, free_port()?, &["--tcp", &format!("db.leader={port}")])?;
        let through = SocketAddr::new(envoy.proxy.ip(), port);
        first_success(PATIENCE, || put(through))?;
        let list = founding_list(&set.view()?);
        let (mut seen, mut called) = (Vec::new(), Vec::new());
        for _ in 0..kills {
            let leader = set.wait_leader("leader", |leader| leader.is_some())?.context("a leader")?;
            let record = set.record();
            eventually("first entry", PATIENCE, || record.reigns().first().map(|_| ()))?;
            let dead = members.get_mut(&leader).context("unknown")?;
            let began = Instant::now();
            dead.process = None;
            let others: Vec<_> =
                members.values().filter(|member| member.key != leader).map(|member| member.client).collect();
            let (elected, envoy) = thread::scope(|scope| {
                let others = &others;
                let elected =
                    scope.spawn(move || first_success(PATIENCE, || others.iter().any(|other| leads(*other))));
                let envoy = scope.spawn(move || first_success(PATIENCE, || put(through)));
                anyhow::Ok((elected.join().expect("no panic")?, envoy.join().expect("no panic")?))
            })?;
            let next = set.wait_leader("another", |now| now.is_some_and(|now| now != leader))?;
            let known = eventually("entry", PATIENCE, || {
                record.reigns().iter().find(|reign| reign.leader == next).map(|reign| reign.at)
            })?;
            record.check()?;
            let since =
                |from: Instant, to: Instant| to.saturating_duration_since(from).as_secs_f64() * 1000.0;
            let after = |at: Instant| since(elected, at) - since(at, elected);
            eprintln!(
                "kill: election {:.0} ms; Disco knows {:+.1} ms, through Envoy {:+.1} ms",
                since(began, elected),
                after(known),
                after(envoy),
            );
            seen.push(after(known));
            called.push(after(envoy));
            members.get_mut(&leader).context("unknown")?.start(&list, "new", "")?;
            set.wait_role(&leader, "follower")?;
        }
        for (what, mut times) in [("Disco knows", seen), ("through Envoy", called)] {
            times.sort_by(f64::total_cmp);
            let at = |share: f64| times[((times.len() - 1) as f64 * share).round() as usize];
            eprintln!("{what}: p50 {:+.1} ms, p99 {:+.1} ms of {} kills", at(0.5), at(0.99), times.len());
            ensure!(at(0.5) < 500.0, "{what} takes too long");
        }
        Ok(())
    });
}
