//! Connections that get old under calls (rule K7): proxies go to other connections, and to other servers; registrations stay.

use anyhow::ensure;

use crate::harness::{Client, Disco, Envoy, Greeter, Load, PATIENCE, Protocol, eventually, scene};

#[test]
fn k7_proxies_move_to_another_connection_and_no_call_fails() {
    scene(|folder| prove(folder, Protocol::Delta));
}

#[test]
fn k7_proxies_on_sotw_move_to_another_connection_and_no_call_fails() {
    scene(|folder| prove(folder, Protocol::Sotw));
}

fn prove(folder: &std::path::Path, protocol: Protocol) -> anyhow::Result<()> {
    let configuration = "roles: [registry, xds, admin]\nstore: memory\n\
                         xds: {max_connection_age: 500ms, load_report_interval: 1s}\n\
                         registry: {session_grace: 0s}\n";
    let disco = Disco::serve(folder, configuration)?;
    let mut g1 = Greeter::start(&disco, "g1")?;
    let _g2 = Greeter::start(&disco, "g2")?;
    disco.wait_serving(&["g1", "g2"])?;
    let registered = disco.get("/v1/services/greeter")?;
    let envoy = Envoy::start(&disco, protocol)?;
    let load = Load::start(&disco, Client::Envoy(envoy.proxy))?;
    load.wait_more(100)?;
    let before = envoy.updates()?;
    let mut seen = std::collections::BTreeSet::new();
    eventually("four connections of the proxy", PATIENCE, || {
        let proxies = disco.get("/v1/proxies").ok()?;
        for proxy in proxies["proxies"].as_array()? {
            let synced = proxy["synced"] == true && proxy["types"].as_array()?.len() == 4;
            if synced && proxy["types"].as_array()?.iter().all(|of_type| of_type["responses"] == 0) {
                seen.insert(proxy["peer"].to_string());
            }
        }
        (seen.len() >= 4).then_some(())
    })?;
    load.wait_more(100)?;
    let after = envoy.updates()?;
    ensure!(after == before, "Envoy took updates: {before:?} became {after:?}");
    // A session stays on the connection that it has: nothing lapsed, though there is no grace.
    ensure!(disco.get("/v1/services/greeter")? == registered, "{registered}");
    // What changes still gets through.
    let _g3 = Greeter::start(&disco, "g3")?;
    load.wait_until("20 answers of g3", |stats| stats.of("g3") >= 20)?;
    // And the session on its old connection still works.
    g1.terminate()?;
    let status = g1.ended()?;
    ensure!(status.success(), "disco run ended with {status} after a drain\n{}", g1.output());
    disco.wait_serving(&["g2", "g3"])?;
    let stats = load.stop()?;
    ensure!(stats.failed == 0, "calls failed: {stats:?}");
    Ok(())
}
