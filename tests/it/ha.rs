//! Several Discos over three etcds: whichever of them die, calls go on, nobody is removed, and no accepted write is lost.

use std::{
    collections::{BTreeMap, BTreeSet},
    process::Command,
};

use anyhow::{Context as _, ensure};
use serde_json::Value;

use crate::harness::{
    Client, Disco, Envoy, Greeter, Load, Nodes, PATIENCE, Protocol, eventually, example_files, scene, sibling,
};

/// Short waits, for the sake of the tests.
const WAITS: &str = "    session_ttl: 2s\n    timeout: 2s\n";

#[test]
fn the_examples_are_good() {
    for (example, nodes) in [("ha3", 3), ("ha9", 9)] {
        let files = example_files(example).unwrap();
        assert_eq!(files.len(), nodes);
        for file in files {
            let check = Command::new(sibling("disco").unwrap()).args(["config", "check"]).arg(&file).output();
            let check = check.unwrap();
            assert!(check.status.success(), "{}: {}", file.display(), String::from_utf8_lossy(&check.stderr));
        }
    }
}

#[test]
fn discos_die_and_are_restarted() {
    scene(|folder| {
        let mut nodes = Nodes::start(folder, "ha3", WAITS)?;
        let stage = Stage::set(&nodes, "n1", "n1")?;
        let before = stage.envoy.updates()?;

        for victim in [stage.holder(&nodes)?, nodes.serves()?] {
            nodes.node_mut(&victim)?.kill();
            let other = nodes.all.iter().find(|node| node.name() != victim).context("no other node")?;
            eventually("sessions that moved", PATIENCE, || {
                (!owners(other).ok()?.contains(&victim)).then_some(())
            })?;
            stage.none_failed(&format!("when {victim} died"))?;
            nodes.node_mut(&victim)?.start_again()?;
            nodes.wait_ready()?;
            nodes.serves()?;
        }

        nodes.all.iter_mut().for_each(Disco::kill);
        stage.none_failed("without any Disco")?;
        nodes.all.iter_mut().try_for_each(Disco::start_again)?;
        nodes.wait_ready()?;
        let serves = nodes.serves()?;
        stage.none_failed("when all were back")?;

        for name in ["n1", "n2", "n3"] {
            let node = nodes.node_mut(name)?;
            node.terminate()?;
            node.start_again()?;
            node.wait_ready()?;
        }
        nodes.serves()?;
        stage.none_failed("in a rolling restart")?;
        ensure!(stage.envoy.updates()? == before, "Envoy was sent something, at last by {serves}");
        stage.same_instances(&nodes.all[0])?;
        stage.end(&nodes)
    });
}

#[test]
fn etcds_die_and_come_back() {
    scene(|folder| {
        let mut nodes = Nodes::start(folder, "ha3", WAITS)?;
        let stage = Stage::set(&nodes, "n1", "n2")?;
        let before = stage.envoy.updates()?;
        for n in 0..nodes.etcd.members() {
            nodes.etcd.kill(n);
            // Before anything notices, and when all have.
            register(&nodes.all[n], &format!("a{n}"))?;
            register(&nodes.all[0], &format!("b{n}"))?;
            stage.none_failed("without one etcd")?;
            nodes.etcd.begin(n)?;
            nodes.etcd.wait_well()?;
        }

        for n in 0..nodes.etcd.members() {
            nodes.etcd.kill(n);
        }
        let disco = &nodes.all[1];
        let read = eventually("a reading that is marked as stale", PATIENCE, || {
            let read = disco.get("/v1/services/payments/instances").ok()?;
            read["stale"].is_object().then_some(read)
        })?;
        ensure!(ids(&read).len() == 6 && read["stale"]["reason"].is_string(), "{read}");
        let refused = disco.request("PUT", "/v1/services/payments/instances/no", &registration())?;
        let said = refused.json()?;
        ensure!(refused.status == 503 && said["error"]["code"] == "unavailable", "{refused:?}");
        stage.none_failed("without any etcd")?;
        for n in 0..nodes.etcd.members() {
            nodes.etcd.begin(n)?;
        }
        nodes.etcd.wait_well()?;
        nodes.wait_ready()?;
        for disco in &nodes.all {
            eventually("a reading that is not stale", PATIENCE, || {
                let read = disco.get("/v1/services/payments/instances").ok()?;
                (read["stale"].is_null() && ids(&read).len() == 6).then_some(())
            })?;
        }
        register(&nodes.all[2], "c")?;
        stage.none_failed("when all etcds were back")?;
        let greeter = |updates: BTreeMap<String, u64>| updates.get("cluster.greeter.update_success").copied();
        ensure!(greeter(stage.envoy.updates()?) == greeter(before), "Envoy was sent greeters again");
        stage.same_instances(&nodes.all[2])?;
        stage.end(&nodes)
    });
}

#[test]
fn a_node_for_proxies_alone_starts_from_its_copy() {
    scene(|folder| {
        let mut nodes = Nodes::start(folder, "ha9", WAITS)?;
        let stage = Stage::set(&nodes, "r1", "x1")?;
        let copies = |name: &str| folder.join(format!("{name}.data/catalog-{name}.copy")).exists();
        // Its first copy is of what was there when it came: now that is everything.
        for name in ["x1", "x2", "x3"] {
            nodes.node_mut(name)?.terminate()?;
            let _ = std::fs::remove_dir_all(folder.join(format!("{name}.data")));
            nodes.node_mut(name)?.start_again()?;
            eventually("a copy on disk", PATIENCE, || copies(name).then_some(()))?;
        }
        nodes.serves()?;
        stage.none_failed("when nodes for proxies were restarted")?;
        let before = stage.envoy.updates()?;

        for n in 0..nodes.etcd.members() {
            nodes.etcd.kill(n);
        }
        nodes.all.iter_mut().for_each(Disco::kill);
        for name in ["x1", "x2", "x3"] {
            nodes.node_mut(name)?.start_again()?;
        }
        let serves = nodes.serves()?;
        let disco = nodes.node(&serves)?;
        let read = disco.get("/v1/services/greeter/instances")?;
        ensure!(read["stale"]["since"].is_string() && ids(&read) == ["g1", "g2", "g3"], "{read}");
        ensure!(disco.output().contains("serving the copy of the catalog on disk"), "{}", disco.output());
        stage.none_failed("with nothing but the copy")?;
        ensure!(stage.envoy.updates()? == before, "Envoy was sent something: {before:?}");
        // One that comes new gets everything from the copy.
        let second = Envoy::start(disco, Protocol::Sotw)?;
        eventually("an answer through another Envoy", PATIENCE, || second.call("greeter").ok()?.ok())?;

        for n in 0..nodes.etcd.members() {
            nodes.etcd.begin(n)?;
        }
        nodes.etcd.wait_well()?;
        nodes
            .all
            .iter_mut()
            .filter(|disco| !disco.name().starts_with('x'))
            .try_for_each(Disco::start_again)?;
        nodes.wait_ready()?;
        for disco in &nodes.all {
            eventually("a reading that is not stale", PATIENCE, || {
                disco.get("/v1/services/greeter/instances").ok()?["stale"].is_null().then_some(())
            })?;
        }
        stage.none_failed("when all were back")?;
        stage.same_instances(nodes.node("r1")?)?;
        stage.end(&nodes)
    });
}

/// Three greeters, an Envoy, and calls through it.
struct Stage {
    greeters: Vec<Greeter>,
    envoy: Envoy,
    load: Load,
    /// What was registered, without what may change with the node that holds it.
    instances: Vec<Value>,
}

impl Stage {
    /// `registry` is where the greeters register at first, `xds` the server that Envoy knows first.
    fn set(nodes: &Nodes, registry: &str, xds: &str) -> anyhow::Result<Self> {
        let disco = nodes.node(registry)?;
        let greeters = ["g1", "g2", "g3"].map(|id| Greeter::start(disco, id));
        let greeters = greeters.into_iter().collect::<anyhow::Result<Vec<_>>>()?;
        disco.wait_serving(&["g1", "g2", "g3"])?;
        let envoy = Envoy::start(nodes.node(xds)?, Protocol::Delta)?;
        let load = Load::start(disco, Client::Envoy(envoy.proxy))?;
        load.wait_until("20 answers of each", |stats| {
            ["g1", "g2", "g3"].iter().all(|id| stats.of(id) >= 20)
        })?;
        let instances = registered(disco)?;
        let stage = Self { greeters, envoy, load, instances };
        stage.none_failed("at the start")?;
        Ok(stage)
    }

    /// Nothing has failed so far, also not among 100 calls from now on.
    fn none_failed(&self, when: &str) -> anyhow::Result<()> {
        self.load.wait_more(100)?;
        let stats = self.load.stats();
        ensure!(stats.failed == 0 && stats.resumed == 0, "calls failed {when}: {stats:#?}");
        Ok(())
    }

    /// The node that holds a session.
    fn holder(&self, nodes: &Nodes) -> anyhow::Result<String> {
        owners(&nodes.all[0])?.pop_first().context("nobody holds a session")
    }

    /// The instances are those of the start, and never were any others.
    fn same_instances(&self, disco: &Disco) -> anyhow::Result<()> {
        let now = registered(disco)?;
        ensure!(now == self.instances, "{:#?} became {now:#?}", self.instances);
        let history = disco.command()?.args(["service", "history", "greeter", "-o", "jsonl"]).output()?;
        let history = String::from_utf8(history.stdout)?;
        let what = history.lines().map(|line| Ok(serde_json::from_str::<Value>(line)?["what"].clone()));
        let what = what.collect::<anyhow::Result<Vec<_>>>()?;
        let moved = what.iter().filter(|what| **what == "moved").count();
        let arrived = what.iter().filter(|what| **what == "registered").count();
        ensure!(arrived == 3 && arrived + moved == what.len(), "{history}");
        Ok(())
    }

    /// What changes still gets through, and is told to the client.
    fn end(mut self, nodes: &Nodes) -> anyhow::Result<()> {
        let mut last = self.greeters.remove(0);
        last.terminate()?;
        let status = last.ended()?;
        ensure!(status.success(), "disco run ended with {status} after a drain\n{}", last.output());
        // Whoever serves it.
        let told = "acknowledged revision ";
        ensure!(last.output().contains(told), "no {told:?} in\n{}", last.output());
        let disco = nodes.all.iter().find(|disco| !disco.name().starts_with('x')).context("no node")?;
        disco.wait_serving(&["g2", "g3"])?;
        self.none_failed("by the drain")?;
        let stats = self.load.stop()?;
        ensure!(stats.failed == 0, "{stats:#?}");
        Ok(())
    }
}

/// Greeters, without what changes with the node that counts the lease.
fn registered(disco: &Disco) -> anyhow::Result<Vec<Value>> {
    let mut instances = disco.get("/v1/services/greeter/instances")?["instances"].clone();
    for instance in instances.as_array_mut().context("no instances")? {
        let fields = instance.as_object_mut().context("no fields")?;
        for changing in ["revision", "owner"] {
            fields.remove(changing);
        }
    }
    Ok(instances.as_array().cloned().unwrap_or_default())
}

/// Nodes that hold sessions of greeters.
fn owners(disco: &Disco) -> anyhow::Result<BTreeSet<String>> {
    let instances = disco.get("/v1/services/greeter/instances")?;
    let instances = instances["instances"].as_array().context("no instances")?;
    Ok(instances.iter().filter_map(|instance| instance["owner"].as_str().map(str::to_owned)).collect())
}

fn registration() -> Vec<u8> {
    br#"{"address": "127.0.0.1", "port": 9, "ttl": "10m"}"#.to_vec()
}

/// Registers an instance of another service; it must be accepted.
fn register(disco: &Disco, id: &str) -> anyhow::Result<()> {
    eventually(&format!("registration of {id}"), PATIENCE, || {
        let path = format!("/v1/services/payments/instances/{id}");
        let answer = disco.request("PUT", &path, &registration()).ok()?;
        (answer.status == 200).then_some(())
    })
}

fn ids(read: &Value) -> Vec<&str> {
    let instances = read["instances"].as_array().map(Vec::as_slice).unwrap_or_default();
    instances.iter().filter_map(|instance| instance["id"].as_str()).collect()
}
