//! Lists of peers, read by the databases that they are for; and replicas that are started with them.

use std::{
    collections::BTreeMap,
    fs,
    net::SocketAddr,
    path::Path,
    process::{Command, Output},
    time::SystemTime,
};

use anyhow::{Context as _, ensure};
use disco::{
    model::Revision,
    peers::{
        Addresses, Change, ClusterId, Kind, Newcomer, NodeId, PeerSet, Pending, Spec,
        render::{Format, Options, render},
    },
};
use rustix::process::Signal;
use serde_json::Value;

use crate::harness::{Disco, PATIENCE, Process, eventually, free_port, request, scene, tool};

/// A set that three have founded, on loopback.
fn founded(kind: Kind) -> anyhow::Result<PeerSet> {
    let name = "db".parse().map_err(anyhow::Error::msg)?;
    let spec = Spec { name, kind, expect: 3, spread: None, observe: None };
    let mut set = PeerSet::new(spec, ClusterId(7));
    for n in 1..=3 {
        come(&mut set, n)?;
    }
    Ok(set)
}

fn come(set: &mut PeerSet, n: u64) -> anyhow::Result<()> {
    let at = || anyhow::Ok(SocketAddr::from(([127, 0, 0, 1], free_port()?)));
    let new = Newcomer {
        key: format!("n{n}").parse().map_err(anyhow::Error::msg)?,
        disk: format!("disk {n}"),
        at: Addresses { raft: at()?, client: at()?, extra: BTreeMap::new() },
        zone: String::new(),
        version: String::new(),
    };
    set.register(new, SystemTime::UNIX_EPOCH)?;
    Ok(())
}

fn added(set: &mut PeerSet, n: u64, change: Change) -> anyhow::Result<()> {
    set.pending = Some(Pending { change, node: NodeId(n), since: SystemTime::UNIX_EPOCH });
    Ok(set.confirm(Revision::default())?)
}

fn given(set: &PeerSet, n: u64, format: Format) -> anyhow::Result<String> {
    let options = Options { recovering: true, ..Options::default() };
    Ok(render(set, set.peers.get(&NodeId(n)), format, &options)?.text)
}

fn ran(command: &mut Command) -> anyhow::Result<String> {
    let Output { status, stdout, stderr } = command.output()?;
    let [stdout, stderr] = [stdout, stderr].map(|text| String::from_utf8_lossy(&text).into_owned());
    ensure!(status.success(), "{command:?}: {status}\n{stdout}\n{stderr}");
    Ok(stdout)
}

/// With nothing but its environment file, and where it listens.
fn start_etcd(set: &PeerSet, n: u64, folder: &Path) -> anyhow::Result<Process> {
    let own = &set.peers[&NodeId(n)];
    let environment = given(set, n, Format::EtcdEnv)?;
    let variables =
        environment.lines().filter(|line| !line.starts_with('#')).filter_map(|l| l.split_once('='));
    let mut command = Command::new(tool("etcd")?);
    command.envs(variables).args([
        "--unsafe-no-fsync",
        "--log-level=error",
        &format!("--data-dir={}", folder.join(format!("e{n}")).display()),
        &format!("--listen-peer-urls=http://{}", own.at.raft),
        &format!("--listen-client-urls=http://{}", own.at.client),
    ]);
    Process::start(&format!("etcd{n}"), folder, &mut command)
}

/// The id of the cluster and the names of its members, once the member works.
fn etcd_cluster(set: &PeerSet, n: u64) -> anyhow::Result<(String, Vec<String>)> {
    let at = set.peers[&NodeId(n)].at.client;
    eventually(&format!("answer of etcd {n}"), PATIENCE, || {
        let answer = request(at, "GET", "/health", b"").ok()?;
        answer.body.contains("true").then_some(())
    })?;
    let answer = request(at, "POST", "/v3/cluster/member/list", b"{}")?.json()?;
    let members = answer["members"].as_array().context("no members")?;
    let mut names: Vec<_> =
        members.iter().filter_map(|member| Some(member["name"].as_str()?.to_owned())).collect();
    names.sort();
    Ok((answer["header"]["cluster_id"].to_string(), names))
}

#[test]
fn etcd_is_founded_and_joined_by_its_environment_file() {
    scene(|folder| {
        let mut set = founded(Kind::Etcd)?;
        let mut running = vec![start_etcd(&set, 3, folder)?, start_etcd(&set, 1, folder)?];
        running.push(start_etcd(&set, 2, folder)?);
        let (cluster, names) = etcd_cluster(&set, 1)?;
        ensure!(names == ["n1", "n2", "n3"], "{names:?}");
        for n in [2, 3] {
            ensure!(etcd_cluster(&set, n)? == (cluster.clone(), names.clone()));
        }

        come(&mut set, 4)?;
        ensure!(given(&set, 4, Format::EtcdEnv).is_err(), "it may not start yet");
        let url = format!("http://{}", set.peers[&NodeId(4)].at.raft);
        let endpoint = format!("--endpoints=http://{}", set.peers[&NodeId(1)].at.client);
        // etcd takes changes only when its members have been connected for some seconds.
        eventually("member add", PATIENCE, || {
            let mut command = Command::new(tool("etcdctl").ok()?);
            command.args([&endpoint, "member", "add", "n4", "--learner", &format!("--peer-urls={url}")]);
            command.output().ok()?.status.success().then_some(())
        })?;
        added(&mut set, 4, Change::AddLearner)?;
        running.push(start_etcd(&set, 4, folder)?);
        let (same, names) = eventually("n4 in the cluster", PATIENCE, || {
            let found = etcd_cluster(&set, 1).ok()?;
            (found.1.len() == 4 && !found.1.contains(&String::new())).then_some(found)
        })?;
        ensure!(same == cluster && names == ["n1", "n2", "n3", "n4"], "{names:?}");
        Ok(())
    });
}

#[test]
fn nats_reads_its_routes() {
    scene(|folder| {
        let set = founded(Kind::Nats)?;
        let configuration = "port: 4222\nserver_name: n1\njetstream: enabled\ncluster {\n  name: c\n  listen: 127.0.0.1:6222\n  \
                             include \"routes.conf\"\n}\n";
        fs::write(folder.join("nats.conf"), configuration)?;
        let check = || {
            let mut command = Command::new(tool("nats-server")?);
            ran(command.arg("-t").arg("-c").arg(folder.join("nats.conf")))
        };
        ensure!(check().is_err(), "without the routes it is no configuration");
        fs::write(folder.join("routes.conf"), given(&set, 1, Format::NatsRoutes)?)?;
        check()?;
        Ok(())
    });
}

#[test]
fn hashicorp_raft_reads_its_lists() {
    scene(|folder| {
        let mut set = founded(Kind::HashicorpRaft)?;
        let line = |set: &PeerSet, n: u64, suffrage: &str| {
            format!("n{n} {} {suffrage}\n", set.peers[&NodeId(n)].at.raft)
        };
        let read = |kind: &str, text: String| -> anyhow::Result<String> {
            let file = folder.join(kind);
            fs::write(&file, text)?;
            ran(Command::new(tool("raft-lists")?).arg(kind).arg(file))
        };
        let all: String = (1..=3).map(|n| line(&set, n, "Voter")).collect();
        ensure!(read("configuration", given(&set, 2, Format::HashicorpConfiguration)?)? == all);
        ensure!(read("peers", given(&set, 2, Format::HashicorpPeersJson)?)? == all);
        come(&mut set, 4)?;
        added(&mut set, 4, Change::AddLearner)?;
        let all = all + &line(&set, 4, "Nonvoter");
        ensure!(read("peers", given(&set, 2, Format::HashicorpPeersJson)?)? == all);
        Ok(())
    });
}

/// A replica that writes down its environment and stays.
fn replica(disco: &Disco, n: u64, raft: u16) -> anyhow::Result<Process> {
    let folder = disco.folder();
    let mut command = disco.command()?;
    command.args(["run", "--peer-set", "db", "--peer-key", &format!("n{n}"), "--health", "none"]);
    command.args(["--peers-format", "etcd-env", "--raft-port", &raft.to_string(), "--data-dir"]);
    command.arg(folder.join(format!("disk{n}")));
    let started = folder.join(format!("started{n}"));
    command.args(["--", "/bin/sh", "-c", "env > $0.new; mv $0.new $0; exec sleep 1000"]).arg(started);
    Process::start(&format!("n{n}"), folder, &mut command)
}

/// What it was started with. It is forgotten, so that the next start can be seen.
fn started(disco: &Disco, n: u64) -> anyhow::Result<BTreeMap<String, String>> {
    let file = disco.folder().join(format!("started{n}"));
    let text = eventually(&format!("start of n{n}"), PATIENCE, || fs::read_to_string(&file).ok())?;
    fs::remove_file(file)?;
    let variables = text.lines().filter_map(|line| line.split_once('='));
    Ok(variables.map(|(name, value)| (name.to_owned(), value.to_owned())).collect())
}

fn disco_command(disco: &Disco, line: &str) -> anyhow::Result<String> {
    ran(disco.command()?.args(line.split_whitespace()))
}

/// N1, N2, N4, N11; and what is left when all Disco nodes are dead.
#[test]
fn a_replica_is_started_with_its_list_and_again_without_a_server() {
    scene(|folder| {
        let mut disco = Disco::start(folder)?;
        disco_command(&disco, "peers create db --expect 3 --kind etcd")?;
        let ports = [free_port()?, free_port()?, free_port()?, free_port()?];
        let mut replicas = vec![replica(&disco, 1, ports[0])?, replica(&disco, 2, ports[1])?];
        for replica in &mut replicas {
            replica.wait_for("wait for founders", PATIENCE, |replica| {
                replica.output().contains("of 3 founders").then_some(())
            })?;
        }
        let mut render = disco.command()?;
        render.args(["peers", "render", "db", "--format", "env", "--out"]);
        let rendered = render.arg(folder.join("list")).status()?;
        ensure!(rendered.code() == Some(2) && !folder.join("list").exists());
        ensure!(!folder.join("started1").exists() && !folder.join("started2").exists());

        replicas.push(replica(&disco, 3, ports[2])?);
        let all = [1, 2, 3].map(|n| started(&disco, n));
        let all = all.into_iter().collect::<anyhow::Result<Vec<_>>>()?;
        let (first, second) = (&all[0], &all[1]);
        for (n, variables) in (1..).zip(&all) {
            for name in ["DISCO_PEERS", "DISCO_PEERS_DIGEST", "DISCO_CLUSTER_ID", "DISCO_PEER_SET"] {
                ensure!(variables[name] == first[name], "{name}: {variables:?}");
            }
            ensure!(variables["DISCO_PEER_KEY"] == format!("n{n}"));
            ensure!(variables["DISCO_PEER_BIRTH"] == "founder");
            let list = fs::read_to_string(&variables["DISCO_PEERS_FILE"])?;
            ensure!(list.contains("ETCD_INITIAL_CLUSTER_STATE=new\n"), "{list}");
        }
        eventually("3 instances", PATIENCE, || {
            let answer = disco.get("/v1/services/db/instances").ok()?;
            (answer["instances"].as_array()?.len() == 3).then_some(())
        })?;

        // It joins: not before its add was seen.
        let mut joiner = replica(&disco, 4, ports[3])?;
        joiner.wait_for("wait for its add", PATIENCE, |joiner| {
            joiner.output().contains("n4 is not in the database yet").then_some(())
        })?;
        ensure!(!folder.join("started4").exists());
        disco_command(&disco, "peers propose db --add n4")?;
        disco_command(&disco, "peers finish db")?;
        let variables = started(&disco, 4)?;
        ensure!(variables["DISCO_PEER_BIRTH"] == "joiner" && variables["DISCO_NODE_ID"] == "4");
        let list = fs::read_to_string(&variables["DISCO_PEERS_FILE"])?;
        ensure!(list.contains("ETCD_INITIAL_CLUSTER_STATE=existing\n"), "{list}");

        // Another disk under the same name.
        replicas[1].signal(Signal::TERM)?;
        replicas[1].ended(PATIENCE)?;
        fs::rename(folder.join("disk2"), folder.join("kept"))?;
        let mut other = replica(&disco, 2, ports[1])?;
        ensure!(other.ended(PATIENCE)?.code() == Some(1));
        ensure!(other.output().contains("registered with another disk"), "{}", other.output());
        fs::remove_dir_all(folder.join("disk2"))?;
        fs::rename(folder.join("kept"), folder.join("disk2"))?;

        // Nobody is left to ask: who was started goes on and is started again, and who is new is not.
        disco.kill();
        replicas[1] = replica(&disco, 2, ports[1])?;
        let mut new = replica(&disco, 5, free_port()?)?;
        let again = started(&disco, 2)?;
        for name in ["DISCO_PEERS", "DISCO_PEERS_DIGEST", "DISCO_CLUSTER_ID"] {
            ensure!(again[name] == first[name], "{name}: {again:?}");
        }
        ensure!(again["DISCO_NODE_ID"] == second["DISCO_NODE_ID"], "{again:?}");
        ensure!(new.ended(PATIENCE)?.code() == Some(2), "{}", new.output());
        ensure!(new.output().contains("was never told its list"), "{}", new.output());
        ensure!(!folder.join("started5").exists());

        Ok(())
    });
}

/// N2.
#[test]
fn a_replica_of_a_database_that_was_given_up_is_stopped() {
    scene(|folder| {
        let disco = Disco::start(folder)?;
        disco_command(&disco, "peers create db --expect 1 --kind etcd")?;
        let port = free_port()?;
        let mut first = replica(&disco, 1, port)?;
        let cluster = started(&disco, 1)?["DISCO_CLUSTER_ID"].clone();
        disco_command(&disco, &format!("peers refound db --give-up {cluster} --expect 1"))?;
        first.ended(PATIENCE)?;
        let mut again = replica(&disco, 1, port)?;
        ensure!(again.ended(PATIENCE)?.code() == Some(1));
        ensure!(again.output().contains(&cluster), "{}", again.output());
        let sets: Value = disco.get("/v1/peers")?;
        ensure!(sets["sets"][0]["peers"] == 0, "nobody of the first took a place: {sets}");
        Ok(())
    });
}

/// N1, N5: the file is there once the set is founded, and follows its members; who is dead stays in it.
#[test]
fn a_file_follows_the_members() {
    scene(|folder| {
        let disco = Disco::start(folder)?;
        disco_command(&disco, "peers create q --expect 2 --kind nats")?;
        let (file, changes) = (folder.join("routes.conf"), folder.join("changes"));
        let mut command = disco.command()?;
        command.args(["peers", "render", "q", "--format", "nats-routes", "--watch", "--out"]).arg(&file);
        command.arg("--on-change").arg(format!("cat $DISCO_PEERS_FILE >> {}; false", changes.display()));
        let mut watch = Process::start("watch", folder, &mut command)?;
        let register = |n: u64| {
            let line =
                format!("peers register q n{n} --disk {n} --raft 127.0.0.1:700{n} --client 127.0.0.1:800{n}");
            disco_command(&disco, &line)
        };
        register(1)?;
        ensure!(!file.exists());
        register(2)?;
        let told = |routes: usize| {
            let told = |text: String| text.matches("nats-route://").count() == routes;
            eventually("change told", PATIENCE, || {
                fs::read_to_string(&changes).ok().filter(|t| told(t.clone()))
            })
        };
        let first = told(2)?;
        ensure!(first == fs::read_to_string(&file)?);
        watch.wait_for("failure of the command", PATIENCE, |watch| {
            watch.output().contains("ended with exit status: 1").then_some(())
        })?;

        register(3)?;
        let body = br#"{"address": "127.0.0.1", "port": 8003, "ttl": "10m"}"#;
        for n in [1, 2, 3] {
            let answer = disco.request("PUT", &format!("/v1/services/q/instances/n{n}"), body)?;
            ensure!(answer.status == 200, "{answer:?}");
        }
        disco_command(&disco, "peers propose q --add n3")?;
        disco_command(&disco, "peers finish q")?;
        let both = told(2 + 3)?;
        ensure!(both == first + &fs::read_to_string(&file)?, "{both}");
        let answer = disco.request("DELETE", "/v1/services/q/instances/n1", b"")?;
        ensure!(answer.status == 200, "{answer:?}");
        let rendered = disco_command(&disco, "peers render q --format nats-routes")?;
        ensure!(rendered.contains("127.0.0.1:7001"), "{rendered}");
        Ok(())
    });
}
