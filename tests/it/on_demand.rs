//! A sidecar that starts with no clusters and takes each when it is first called (rule L1).

use std::time::{Duration, Instant};

use anyhow::{Context as _, ensure};
use serde_json::Value;

use crate::harness::{Client, Disco, Envoy, Greeter, Load, PATIENCE, eventually, free_port, scene};

#[test]
fn a_cluster_comes_with_its_first_call() {
    scene(|folder| {
        let disco = Disco::start(folder)?;
        let _greeter = Greeter::start(&disco, "g1")?;
        disco.wait_serving(&["g1"])?;
        disco.register_alias("unused")?;
        let envoy = Envoy::start_with(&disco, free_port()?, &["--on-demand"])?;
        let clusters = envoy.clusters()?;
        ensure!(clusters.iter().eq(["disco_servers"]), "{clusters:?}");

        // With a port, too.
        for authority in ["greeter", "greeter:50051"] {
            let said = envoy.call(authority)?;
            ensure!(said.as_ref().is_ok_and(|said| said.contains("g1")), "{authority}: {said:?}");
        }
        let clusters = envoy.clusters()?;
        ensure!(clusters.iter().eq(["disco_servers", "greeter"]), "{clusters:?}");

        // Others fail at once, also the second time, and say why. Nobody gets to Disco itself, and Envoy asks for nothing.
        for authority in ["later", "later", "Greeter", "not_a.name", "disco_servers"] {
            let start = Instant::now();
            let said = envoy.call(authority)?;
            let took = start.elapsed();
            let wanted = format!("disco: no service named {authority} is registered");
            ensure!(said.as_ref().is_err_and(|error| error.contains(&wanted)), "{authority}: {said:?}");
            ensure!(took < Duration::from_secs(1), "{authority} took {took:?}");
        }

        // Somebody registers under the name, goes, and comes back.
        disco.register_alias("later")?;
        eventually("a call of later", PATIENCE, || envoy.call("later").ok()?.ok())?;
        let of_clusters = types(&disco)?;
        ensure!(of_clusters["wildcard"] == false && of_clusters["names"] == 2, "{of_clusters:#}");
        disco.remove_alias("later")?;
        eventually("end of later", PATIENCE, || {
            envoy.clusters().ok()?.iter().eq(["disco_servers", "greeter"]).then_some(())
        })?;
        let start = Instant::now();
        let said = envoy.call("later")?;
        ensure!(said.is_err() && start.elapsed() < Duration::from_secs(1), "{said:?}");
        disco.register_alias("later")?;
        eventually("a call of later", PATIENCE, || envoy.call("later").ok()?.ok())?;
        Ok(())
    });
}

#[test]
fn what_it_has_survives_a_restart_of_disco() {
    scene(|folder| {
        let mut disco = Disco::start(folder)?;
        let _g1 = Greeter::start(&disco, "g1")?;
        disco.wait_serving(&["g1"])?;
        let envoy = Envoy::start_with(&disco, free_port()?, &["--on-demand"])?;
        let load = Load::start(&disco, Client::Envoy(envoy.proxy))?;
        load.wait_more(50)?;
        let before = envoy.updates()?;

        disco.kill();
        load.wait_more(50)?;
        disco.start_again()?;
        let of_clusters = eventually("proxy with its cluster", PATIENCE, || {
            types(&disco).ok().filter(|of_type| of_type["synced"] == true)
        })?;
        ensure!(of_clusters["responses"] == 0 && of_clusters["names"] == 1, "{of_clusters:#}");
        ensure!(of_clusters["wildcard"] == false, "{of_clusters:#}");
        let after = envoy.updates()?;
        ensure!(after == before, "Envoy took updates after the restart: {before:?} became {after:?}");

        // What it has is kept up, and more can be had.
        let _g2 = Greeter::start(&disco, "g2")?;
        load.wait_until("20 answers of g2", |stats| stats.of("g2") >= 20)?;
        disco.register_alias("later")?;
        eventually("a call of later", PATIENCE, || envoy.call("later").ok()?.ok())?;
        let stats = load.stop()?;
        ensure!(stats.failed == 0, "calls failed: {stats:?}");
        Ok(())
    });
}

/// What `/v1/proxies` says of the clusters of the one proxy.
fn types(disco: &Disco) -> anyhow::Result<Value> {
    let proxies = disco.get("/v1/proxies")?;
    let types = proxies["proxies"][0]["types"].as_array().context("no proxy")?;
    types.iter().find(|of_type| of_type["type"] == "cluster").cloned().context("no clusters")
}
