//! A large service's endpoints one by one (LEDS): it grows, shrinks, moves and comes back under calls, and none fails.

use std::{net::SocketAddr, path::Path};

use anyhow::ensure;

use crate::harness::{Client, Disco, Envoy, Greeter, Load, PATIENCE, Protocol, eventually, scene};

const CONFIGURATION: &str = "roles: [registry, xds, admin]\nxds: {leds_from: 3}\nstore: {file: {dir: DIR}}\n";

fn disco(folder: &Path, grpc: SocketAddr, http: SocketAddr) -> anyhow::Result<Disco> {
    let dir = folder.join("data").display().to_string();
    Disco::serve_on(folder, &CONFIGURATION.replace("DIR", &dir), grpc, http)
}

/// How many members of collections each stream was sent that asked for any.
fn members(disco: &Disco) -> anyhow::Result<Vec<usize>> {
    let proxies = disco.get("/v1/proxies")?;
    let mut all = Vec::new();
    for proxy in proxies["proxies"].as_array().into_iter().flatten() {
        let node = proxy["node_id"].as_str().unwrap_or_default();
        let held = disco.get(&format!("/v1/proxies/{node}/resources?type=lb-endpoint"))?;
        let held = held["streams"][0]["resources"].as_array().cloned().unwrap_or_default();
        let held = held.iter().filter(|held| held["state"] == "acknowledged" && held["removed"] == false);
        all.push(held.count());
    }
    Ok(all)
}

#[test]
fn l4_a_service_grows_and_shrinks_across_the_threshold_under_calls() {
    scene(|folder| {
        let any = SocketAddr::from(([127, 0, 0, 1], 0));
        let disco = disco(folder, any, any)?;
        let wait_members = |want: usize| {
            let mut seen = Ok(Vec::new());
            eventually(&format!("{want} members"), PATIENCE, || {
                seen = members(&disco);
                seen.as_ref().is_ok_and(|seen| *seen == [want]).then_some(())
            })
            .map_err(|error| error.context(format!("{seen:?}")))
        };
        let _g1 = Greeter::start(&disco, "g1")?;
        let mut g2 = Greeter::start_in(&disco, "g2", "z")?;
        disco.wait_serving(&["g1", "g2"])?;
        let envoy = Envoy::start(&disco, Protocol::Delta)?;
        let load = Load::start(&disco, Client::Envoy(envoy.proxy))?;
        let answers = |id: &str| {
            let before = load.stats().of(id);
            load.wait_until(&format!("20 more answers of {id}"), |stats| stats.of(id) >= before + 20)
        };
        let none_failed = |after: &str| {
            load.wait_more(50)?;
            let stats = load.stats();
            ensure!(stats.failed == 0, "{} calls failed {after}: {:#?}", stats.failed, stats.errors);
            anyhow::Ok(())
        };
        for id in ["g1", "g2"] {
            answers(id)?;
        }
        wait_members(0)?;

        let mut g3 = Greeter::start_in(&disco, "g3", "z")?;
        wait_members(3)?;
        for id in ["g1", "g2", "g3"] {
            answers(id)?;
        }
        none_failed("by the switch to LEDS")?;

        // One member goes; it stays a collection. A drain that was acknowledged takes no more calls.
        g3.terminate()?;
        let status = g3.ended()?;
        ensure!(status.success(), "disco run ended with {status} after a drain\n{}", g3.output());
        wait_members(2)?;
        none_failed("by a drain")?;
        ensure!(load.stats().resumed == 0, "the drain broke a stream");

        // The last of its zone, and with it the threshold.
        g2.crash()?;
        g2.ended()?;
        wait_members(0)?;
        answers("g1")?;
        none_failed("by the switch back to EDS")?;

        let _g4 = Greeter::start_in(&disco, "g4", "z")?;
        let _g5 = Greeter::start_in(&disco, "g5", "y")?;
        wait_members(3)?;
        for id in ["g1", "g4", "g5"] {
            answers(id)?;
        }
        let stats = load.stop()?;
        ensure!(stats.failed == 0, "{} calls failed: {:#?}", stats.failed, stats.errors);
        Ok(())
    });
}

/// Envoy does not say which members it holds when it reconnects, so those that went meanwhile cannot be removed by name.
#[test]
fn l4_what_went_while_nobody_was_connected_is_not_kept() {
    scene(|folder| {
        let any = SocketAddr::from(([127, 0, 0, 1], 0));
        let mut first = disco(folder, any, any)?;
        let put = |disco: &Disco, n: u16| {
            let body = format!(r#"{{"address": "127.0.0.1", "port": {n}, "ttl": "10m"}}"#);
            let answer =
                disco.request("PUT", &format!("/v1/services/many/instances/i{n}"), body.as_bytes())?;
            ensure!(answer.status == 200, "{answer:?}");
            anyhow::Ok(())
        };
        for n in 1..=5 {
            put(&first, n)?;
        }
        let envoy = Envoy::start(&first, Protocol::Delta)?;
        let has = |ports: &[u16]| {
            let want = ports.iter().map(|port| format!("127.0.0.1:{port}")).collect();
            let mut seen = Ok(Default::default());
            eventually(&format!("hosts {ports:?}"), PATIENCE, || {
                seen = envoy.hosts("many");
                seen.as_ref().is_ok_and(|seen| *seen == want).then_some(())
            })
            .map_err(|error| error.context(format!("{seen:?}")))
        };
        has(&[1, 2, 3, 4, 5])?;
        let (grpc, http) = (first.grpc, first.http);
        first.kill();

        let mut unseen = disco(folder, any, any)?;
        let answer = unseen.request("DELETE", "/v1/services/many/instances/i2", b"")?;
        ensure!(answer.status == 200, "{answer:?}");
        put(&unseen, 6)?;
        unseen.kill();

        let again = disco(folder, grpc, http)?;
        has(&[1, 3, 4, 5, 6])?;
        let answer = again.request("DELETE", "/v1/services/many/instances/i3", b"")?;
        ensure!(answer.status == 200, "{answer:?}");
        has(&[1, 4, 5, 6])?;
        Ok(())
    });
}
