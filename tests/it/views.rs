//! What a proxy gets depends on its view: near instances first, and only the services that it asks for.

use std::path::Path;

use anyhow::ensure;

use crate::harness::{Client, Disco, Envoy, Greeter, Load, PATIENCE, eventually, free_port, scene};

#[test]
fn envoy_prefers_its_zone() {
    scene(|folder| prefers_its_zone(folder, None));
}

#[test]
fn python_prefers_its_zone() {
    scene(|folder| prefers_its_zone(folder, Some(Client::Python)));
}

#[test]
fn go_prefers_its_zone() {
    scene(|folder| prefers_its_zone(folder, Some(Client::Go)));
}

/// Calls stay in the zone as long as anybody there takes them, go to the other zone when nobody does, and come back.
fn prefers_its_zone(folder: &Path, proxyless: Option<Client>) -> anyhow::Result<()> {
    let disco = Disco::start(folder)?;
    let mut near1 = Greeter::start_in(&disco, "near1", "here")?;
    let mut near2 = Greeter::start_in(&disco, "near2", "here")?;
    let _far = Greeter::start_in(&disco, "far", "there")?;
    disco.wait_serving(&["far", "near1", "near2"])?;

    let envoy = match proxyless {
        Some(_) => None,
        None => Some(Envoy::start_with(&disco, free_port()?, &["--zone", "here"])?),
    };
    let client = envoy.as_ref().map(|envoy| Client::Envoy(envoy.proxy)).or(proxyless);
    let load = Load::start_in(&disco, client.expect("one of both"), "here")?;
    let answers = |id: &str, more: u64| {
        let before = load.stats().of(id);
        load.wait_until(&format!("{more} answers of {id}"), |stats| stats.of(id) >= before + more)
    };
    let far = |want: bool| {
        let stats = load.stats();
        ensure!(stats.failed == 0, "calls failed: {stats:?}");
        ensure!((stats.of("far") > 0) == want, "calls to the other zone: {stats:?}");
        anyhow::Ok(())
    };
    answers("near1", 50)?;
    answers("near2", 50)?;
    far(false)?;

    // The other one stays, and takes all, however long the drain lasts.
    let answer = disco.request("POST", "/v1/services/greeter/instances/near1/drain", b"")?;
    ensure!(answer.status == 200, "{answer:?}");
    disco.wait_serving(&["far", "near2"])?;
    answers("near2", 100)?;
    far(false)?;
    near1.terminate()?;
    near1.ended()?;
    answers("near2", 100)?;
    far(false)?;
    ensure!(load.stats().resumed == 0, "the drain broke a stream: {:?}", load.stats());

    near2.crash()?;
    near2.ended()?;
    answers("far", 100)?;
    far(true)?;

    let mut near3 = Greeter::start_in(&disco, "near3", "here")?;
    answers("near3", 20)?;
    let before = load.stats().of("far");
    answers("near3", 100)?;
    let after = load.stats().of("far");
    ensure!(after <= before + 8, "{} calls still went to the other zone", after - before);

    // The last of the zone: its level goes with it.
    near3.terminate()?;
    near3.ended()?;
    answers("far", 100)?;
    let stats = load.stop()?;
    ensure!(stats.failed == 0, "calls failed: {stats:?}");
    Ok(())
}

#[test]
fn a_sidecar_gets_its_upstreams_only() {
    scene(|folder| {
        let disco = Disco::start(folder)?;
        let _greeter = Greeter::start(&disco, "g1")?;
        disco.wait_serving(&["g1"])?;
        disco.register_alias("other")?;
        let envoy =
            Envoy::start_with(&disco, free_port()?, &["--upstream", "greeter", "--upstream", "later"])?;
        let has = |want: &[&str]| {
            let mut seen = Ok(Default::default());
            eventually(&format!("clusters {want:?}"), PATIENCE, || {
                seen = envoy.clusters();
                seen.as_ref().is_ok_and(|seen| seen.iter().eq(want.iter())).then_some(())
            })
            .map_err(|error| error.context(format!("{seen:?}")))
        };
        has(&["disco_servers", "greeter"])?;
        let said = envoy.call("greeter")?;
        ensure!(said.is_ok(), "{said:?}");
        for authority in ["other", "later"] {
            let said = envoy.call(authority)?;
            let wanted = format!("no service named {authority} among those of disco.upstreams is registered");
            ensure!(said.as_ref().is_err_and(|error| error.contains(&wanted)), "{said:?}");
        }
        disco.register_alias("later")?;
        has(&["disco_servers", "greeter", "later"])?;
        eventually("a call of later", PATIENCE, || envoy.call("later").ok()?.ok())?;

        let proxies = disco.get("/v1/proxies")?;
        ensure!(proxies["proxies"][0]["synced"] == true, "{proxies:#}");
        Ok(())
    });
}
