//! An Envoy whose routes come one virtual host at a time (VHDS, rules G2, D16, L3).

use std::{
    path::Path,
    time::{Duration, Instant},
};

use anyhow::ensure;

use crate::harness::{Client, Disco, Envoy, Greeter, Load, PATIENCE, eventually, scene};

#[test]
fn l3_routes_by_virtual_host_over_their_own_service() {
    scene(|folder| prove(folder, false));
}

#[test]
fn l3_routes_by_virtual_host_over_ads() {
    scene(|folder| prove(folder, true));
}

fn prove(folder: &Path, ads: bool) -> anyhow::Result<()> {
    let mut disco = Disco::start(folder)?;
    let _greeter = Greeter::start(&disco, "g1")?;
    disco.wait_serving(&["g1"])?;
    let start = Instant::now();
    let envoy = Envoy::start_virtual_hosts(&disco, ads)?;
    ensure!(start.elapsed() < Duration::from_secs(10), "it waited for its routes: {:?}", start.elapsed());
    for authority in ["greeter", "greeter:50051"] {
        let said = envoy.call(authority)?;
        ensure!(said.as_ref().is_ok_and(|said| said.contains("g1")), "{authority}: {said:?}");
    }

    // Envoy asks for a host that it does not know, and is told at once that there is none; again and again.
    let fails_at_once = |authority: &str| {
        let start = Instant::now();
        let said = envoy.call(authority)?;
        ensure!(
            said.is_err() && start.elapsed() < Duration::from_secs(2),
            "{said:?} after {:?}",
            start.elapsed()
        );
        anyhow::Ok(())
    };
    fails_at_once("later")?;
    fails_at_once("later")?;
    disco.register_alias("later")?;
    eventually("a call of later", PATIENCE, || envoy.call("later").ok()?.ok())?;
    disco.remove_alias("later")?;
    eventually("end of later", PATIENCE, || {
        envoy.clusters().ok()?.iter().eq(["disco_servers", "greeter"]).then_some(())
    })?;
    fails_at_once("later")?;
    disco.register_alias("later")?;
    eventually("a call of later", PATIENCE, || envoy.call("later").ok()?.ok())?;

    // A restart of Disco under calls: nothing is sent again, and news get through.
    let load = Load::start(&disco, Client::Envoy(envoy.proxy))?;
    load.wait_more(50)?;
    let before = envoy.updates()?;
    disco.kill();
    disco.start_again()?;
    let answers = eventually("virtual hosts are synced", PATIENCE, || {
        let proxies = disco.get("/v1/proxies").ok()?;
        let types =
            proxies["proxies"].as_array()?.iter().flat_map(|proxy| proxy["types"].as_array()).flatten();
        let hosts = types.clone().find(|of_type| of_type["type"] == "virtual_host")?;
        (hosts["synced"] == true && types.count() >= 3).then(|| hosts.clone())
    })?;
    load.wait_more(50)?;
    let after = envoy.updates()?;
    ensure!(answers["responses"] == 0 && after == before, "{answers:#}: {before:?} became {after:?}");
    disco.register_alias("another")?;
    eventually("a call of another", PATIENCE, || envoy.call("another").ok()?.ok())?;
    let stats = load.stop()?;
    ensure!(stats.failed == 0, "calls failed: {stats:?}");
    Ok(())
}
