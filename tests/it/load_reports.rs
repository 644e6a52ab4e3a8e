//! What clients report of their calls arrives, by where the calls went.

use std::{path::Path, time::Instant};

use anyhow::ensure;
use serde_json::Value;

use crate::harness::{Client, Disco, Envoy, Greeter, Load, PATIENCE, eventually, free_port, scene};

#[test]
fn loads_of_envoy_and_python_by_zone() {
    scene(|folder| loads_by_zone(folder, None, Client::Python));
}

#[test]
fn loads_of_node_and_go_by_zone() {
    scene(|folder| loads_by_zone(folder, Some(Client::Node), Client::Go));
}

/// A client in each of two zones, each calling the greeter of its own; the first is Envoy unless it is said to be another.
fn loads_by_zone(folder: &Path, first: Option<Client>, second: Client) -> anyhow::Result<()> {
    let configuration = "roles: [registry, xds, admin]\nstore: memory\nxds: {load_report_interval: 1s}\n";
    let disco = Disco::serve(folder, configuration)?;
    let _g1 = Greeter::start_in(&disco, "g1", "here")?;
    let _g2 = Greeter::start_in(&disco, "g2", "there")?;
    disco.wait_serving(&["g1", "g2"])?;
    disco.register_alias("idle")?;
    let envoy = match first {
        Some(_) => None,
        None => Some(Envoy::start_with(&disco, free_port()?, &["--zone", "here"])?),
    };
    let client = envoy.as_ref().map(|envoy| Client::Envoy(envoy.proxy)).or(first);
    let here = Load::start_in(&disco, client.expect("one of both"), "here")?;
    here.wait_more(100)?;
    let there = Load::start_in(&disco, second, "there")?;
    there.wait_more(100)?;

    // Against what the clients themselves count meanwhile: on a busy machine they are slower than they want to be.
    let started = Instant::now();
    let before = [here.stats().ok, there.stats().ok];
    let mut seen = Value::Null;
    let zone = |load: &Value, zone: &str| {
        let localities = load["localities"].as_array().cloned().unwrap_or_default();
        localities.into_iter().find(|locality| locality["zone"] == zone)
    };
    let sensible = |load: &Value, name: &str, calls: u64, seconds: f64| {
        let Some(locality) = zone(load, name) else { return false };
        #[allow(clippy::cast_precision_loss, reason = "a few thousand")]
        let rate = calls as f64 / seconds;
        let rps = locality["rps"].as_f64().unwrap_or_default();
        locality["reporters"] == 1
            && (rate * 0.7..rate * 1.4).contains(&rps)
            && locality["errors_per_second"] == 0.0
    };
    let done = eventually("load of both zones", PATIENCE, || {
        let seconds = started.elapsed().as_secs_f64();
        seen = disco.get("/v1/services/greeter/load").ok()?;
        let now = [here.stats().ok - before[0], there.stats().ok - before[1]];
        // The first reports are about the time before.
        let fair = seconds > 2.0 && seen["drops"] == serde_json::json!({});
        (fair && sensible(&seen, "here", now[0], seconds) && sensible(&seen, "there", now[1], seconds))
            .then_some(())
    });
    done.map_err(|error| error.context(format!("{seen:#}\n{:?}\n{:?}", here.stats(), there.stats())))?;
    // The client behind Envoy keeps two streams open.
    let open = zone(&seen, "here").and_then(|locality| locality["in_progress"].as_u64());
    ensure!(envoy.is_none() || open.is_some_and(|open| (2..20).contains(&open)), "{seen:#}");
    ensure!(disco.get("/v1/services/idle/load")?["localities"].as_array().is_some_and(Vec::is_empty));
    ensure!(disco.request("GET", "/v1/services/nobodys/load", b"")?.status == 404);

    let shown = disco.command()?.args(["service", "load", "greeter"]).output()?;
    let text = String::from_utf8_lossy(&shown.stdout).into_owned();
    ensure!(shown.status.success() && text.contains("CALLS/S") && text.contains("there"), "{text}");

    // One that left is forgotten after a while.
    there.stop()?;
    eventually("load of one zone", PATIENCE, || {
        let load = disco.get("/v1/services/greeter/load").ok()?;
        (zone(&load, "there").is_none() && zone(&load, "here").is_some()).then_some(())
    })
}
