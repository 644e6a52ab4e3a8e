//! What falls silent all at once is doubted: instances that live stay, those that are gone go.

use std::{
    net::TcpListener,
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context as _, ensure};
use rustix::process::Signal;

use crate::harness::{Disco, Envoy, Greeter, PATIENCE, Protocol, eventually, scene};

const CONFIGURATION: &str =
    "roles: [registry, xds, admin]\nstore: memory\nguards: {ask_interval: 1s}\nlimits: {ttl_min: 500ms}\n";

fn register(disco: &Disco, id: &str, port: u64, ttl: &str) -> anyhow::Result<()> {
    let body = format!(r#"{{"address": "127.0.0.1", "port": {port}, "ttl": "{ttl}"}}"#);
    let answer = disco.request("PUT", &format!("/v1/services/payments/instances/{id}"), body.as_bytes())?;
    ensure!(answer.status == 200, "{answer:?}");
    Ok(())
}

/// Ids of the instances, and of those that are stale.
fn instances(disco: &Disco) -> anyhow::Result<(Vec<String>, Vec<String>)> {
    let answer = disco.get("/v1/services/payments/instances")?;
    let all = answer["instances"].as_array().context("no instances")?;
    let id = |it: &serde_json::Value| it["id"].as_str().map(str::to_owned);
    let stale = all.iter().filter(|it| it.get("stale").is_some());
    Ok((all.iter().filter_map(id).collect(), stale.filter_map(id).collect()))
}

fn wait(disco: &Disco, all: &[&str], stale: &[&str]) -> anyhow::Result<()> {
    let mut seen = None;
    let done = eventually(&format!("{all:?}, of them stale {stale:?}"), PATIENCE, || {
        let (ids, held) = instances(disco).ok()?;
        let same = ids == all && held == stale;
        seen = Some((ids, held));
        same.then_some(())
    });
    done.with_context(|| format!("there were {seen:?}"))
}

#[test]
fn living_instances_whose_renewals_stop_stay() {
    scene(|folder| {
        let disco = Disco::serve(folder, CONFIGURATION)?;
        let greeters = ["g1", "g2", "g3"].map(|id| Greeter::start(&disco, id));
        let greeters = greeters.into_iter().collect::<anyhow::Result<Vec<_>>>()?;
        disco.wait_serving(&["g1", "g2", "g3"])?;
        let ports = disco.get("/v1/services/greeter/instances")?;
        let port = |n: usize| ports["instances"][n]["port"].as_u64().context("no port");
        let ids = ["a", "b", "c"];
        // Renewed for a while, then all at once no more.
        let start = Instant::now();
        let mut envoy = None;
        while envoy.is_none() || start.elapsed() < Duration::from_secs(2) {
            for (n, id) in ids.into_iter().enumerate() {
                register(&disco, id, port(n)?, "2s")?;
                thread::sleep(Duration::from_millis(100));
            }
            if envoy.is_none() {
                let started = Envoy::start(&disco, Protocol::Delta)?;
                eventually("a call", PATIENCE, || started.call("payments").ok()?.ok())?;
                envoy = Some(started);
            }
        }
        let envoy = envoy.context("no Envoy")?;
        let before = envoy.updates()?;
        wait(&disco, &ids, &ids)?;
        ensure!(envoy.updates()? == before, "Envoy was sent something: {before:?}, {:?}", envoy.updates()?);
        let said = envoy.call("payments")?;
        ensure!(said.is_ok(), "{said:?}");
        let said = |line: &str| {
            let output = disco.command()?.args(line.split(' ')).output()?;
            ensure!(output.status.success(), "{line}: {}", String::from_utf8_lossy(&output.stderr));
            anyhow::Ok(String::from_utf8(output.stdout)?)
        };
        for (line, want) in [
            ("service list", "payments  3        0         0          3"),
            ("service show payments", "Stale      3: "),
            ("instance list payments", "serving, stale"),
            (
                "instance explain payments/a",
                "its lease of 2s ended without a renewal, but it still accepts connections",
            ),
        ] {
            let text = said(line)?;
            ensure!(text.contains(want), "{line}: no {want:?} in\n{text}");
        }
        let metrics = disco.request("GET", "/metrics", b"")?.body;
        for want in ["disco_registry_held 3", "disco_registry_guard_trips_total 1"] {
            ensure!(metrics.contains(want), "no {want} in\n{metrics}");
        }

        // The owner of one comes back, the process of another ends, the third is let go.
        register(&disco, "a", port(0)?, "10m")?;
        wait(&disco, &ids, &["b", "c"])?;
        greeters[1].crash()?;
        wait(&disco, &["a", "c"], &["c"])?;
        let text = said("service release payments")?;
        ensure!(text.starts_with("payments: 1 stale instance removed"), "{text}");
        wait(&disco, &["a"], &[])?;

        let text = said("service history payments -o jsonl")?;
        for (id, what, why) in [
            ("a", "held", "its lease of 2s ended without a renewal, but it still accepts connections"),
            ("a", "returned", ""),
            ("b", "expired", "by now it refuses connections"),
            ("c", "released", "its lease of 2s ended"),
        ] {
            let found = text
                .lines()
                .filter_map(|line| serde_json::from_str::<serde_json::Value>(line).ok())
                .any(|it| {
                    it["id"] == id
                        && it["what"] == what
                        && it["why"].as_str().is_some_and(|it| it.contains(why))
                });
            ensure!(found, "no {id} {what} {why} in\n{text}");
        }
        let by_us = text.lines().filter(|line| line.contains(r#""by":"127.0.0.1:"#)).count();
        ensure!(by_us >= 5, "callers are not named in\n{text}");
        for (when, want) in [
            ("0s", "not registered\nSince       expired"),
            ("1h", "not known: what is remembered of this service begins at "),
        ] {
            let text = said(&format!("instance explain payments/b --at {when}"))?;
            ensure!(text.contains(want), "at {when}: no {want:?} in\n{text}");
        }
        Ok(())
    });
}

#[test]
fn instances_that_died_together_go() {
    scene(|folder| {
        let disco = Disco::serve(folder, CONFIGURATION)?;
        let processes = (0..20).map(|_| TcpListener::bind("127.0.0.1:0")).collect::<Result<Vec<_>, _>>()?;
        for (n, process) in processes.iter().enumerate() {
            register(&disco, &format!("i{n}"), process.local_addr()?.port().into(), "1s")?;
        }
        drop(processes);
        let start = Instant::now();
        wait(&disco, &[], &[])?;
        ensure!(start.elapsed() < Duration::from_secs(5), "took {:?}", start.elapsed());
        Ok(())
    });
}

#[test]
fn a_server_that_was_stopped_ends_no_lease() {
    scene(|folder| {
        let disco = Disco::serve(folder, CONFIGURATION)?;
        let process = TcpListener::bind("127.0.0.1:0")?;
        let port = process.local_addr()?.port().into();
        for id in ["a", "b"] {
            register(&disco, id, port, "2s")?;
        }
        let before = disco.get("/v1/services")?;
        disco.signal(Signal::STOP)?;
        thread::sleep(Duration::from_secs(4));
        disco.signal(Signal::CONT)?;
        for id in ["a", "b"] {
            register(&disco, id, port, "2s")?;
        }
        let after = disco.get("/v1/services")?;
        ensure!(after == before, "{before} became {after}");
        Ok(())
    });
}
