//! The main job, with every client that Disco serves: instances come, go and crash, Disco itself is killed, and no call fails.

use std::path::Path;

use anyhow::ensure;
use serde_json::Value;

use crate::harness::{Client, Disco, Envoy, Greeter, Load, PATIENCE, Protocol, eventually, scene};

#[test]
fn envoy_delta() {
    scene(|folder| prove(folder, Caller::Envoy(Protocol::Delta)));
}

#[test]
fn envoy_sotw() {
    scene(|folder| prove(folder, Caller::Envoy(Protocol::Sotw)));
}

#[test]
fn python() {
    scene(|folder| prove(folder, Caller::Proxyless(Client::Python)));
}

#[test]
fn node() {
    scene(|folder| prove(folder, Caller::Proxyless(Client::Node)));
}

#[test]
fn go() {
    scene(|folder| prove(folder, Caller::Proxyless(Client::Go)));
}

#[test]
fn rust() {
    scene(|folder| prove(folder, Caller::Proxyless(Client::Rust)));
}

enum Caller {
    Envoy(Protocol),
    Proxyless(Client),
}

fn prove(folder: &Path, caller: Caller) -> anyhow::Result<()> {
    let mut disco = Disco::start(folder)?;
    let mut g1 = Greeter::start(&disco, "g1")?;
    let mut g2 = Greeter::start(&disco, "g2")?;
    let _g3 = Greeter::start(&disco, "g3")?;
    disco.wait_serving(&["g1", "g2", "g3"])?;

    let (client, envoy) = match caller {
        Caller::Proxyless(client) => (client, None),
        Caller::Envoy(protocol) => {
            let envoy = Envoy::start(&disco, protocol)?;
            (Client::Envoy(envoy.proxy), Some(envoy))
        }
    };
    let load = Load::start(&disco, client)?;
    let answers = |id: &str| load.wait_until(&format!("20 answers of {id}"), |stats| stats.of(id) >= 20);
    // Nothing has failed so far, also not among the calls that went on after the change.
    let none_failed = |after: &str| {
        load.wait_more(100)?;
        let stats = load.stats();
        ensure!(
            stats.failed == 0,
            "{} of {} calls failed {after}: {:#?}",
            stats.failed,
            stats.ok,
            stats.errors
        );
        anyhow::Ok(())
    };
    for id in ["g1", "g2", "g3"] {
        answers(id)?;
    }
    none_failed("at the start")?;

    // Drained: `disco run` ends once nobody calls it any more.
    g1.terminate()?;
    let status = g1.ended()?;
    ensure!(status.success(), "disco run ended with {status} after a drain\n{}", g1.output());
    disco.wait_serving(&["g2", "g3"])?;
    none_failed("by the drain")?;
    ensure!(load.stats().resumed == 0, "the drain broke a stream");

    // Crashed: `disco run` reports it at once and ends as its command did.
    g2.crash()?;
    let status = g2.ended()?;
    ensure!(!status.success(), "disco run ended with {status} after a crash\n{}", g2.output());
    disco.wait_serving(&["g3"])?;
    none_failed("by the crash")?;

    // Added.
    let _g4 = Greeter::start(&disco, "g4")?;
    answers("g4")?;
    none_failed("by the new instance")?;

    // Without Disco, and with another one that has the same data.
    let before = envoy.as_ref().map(Envoy::updates).transpose()?;
    disco.kill();
    none_failed("by Disco's end")?;
    disco.start_again()?;
    let types = eventually("client connected again", PATIENCE, || synced_types(&disco))?;
    if let (Some(envoy), Some(before)) = (&envoy, before) {
        let resent: Vec<_> = types.iter().filter(|of_type| of_type["responses"] != 0).collect();
        ensure!(resent.is_empty(), "sent again after the restart: {resent:#?}\n{}", envoy.output());
        let after = envoy.updates()?;
        ensure!(after == before, "Envoy took updates after the restart: {before:?} became {after:?}");
    }
    disco.wait_serving(&["g3", "g4"])?;
    none_failed("by Disco's restart")?;
    let _g5 = Greeter::start(&disco, "g5")?;
    answers("g5")?;

    let stats = load.stop()?;
    ensure!(
        stats.failed == 0,
        "{} of {} calls failed: {:#?}",
        stats.failed,
        stats.ok + stats.failed,
        stats.errors
    );
    Ok(())
}

/// The resource types of the one client, once it has asked for all four and has all that Disco has.
fn synced_types(disco: &Disco) -> Option<Vec<Value>> {
    let proxies = disco.get("/v1/proxies").ok()?;
    let [proxy] = proxies["proxies"].as_array()?.as_slice() else { return None };
    let types = proxy["types"].as_array()?;
    (types.len() == 4 && proxy["synced"] == true).then(|| types.clone())
}
