//! What an instance says many times a second reaches who watches, soon, and no proxy.

use std::{collections::BTreeMap, time::Duration};

use anyhow::{Context as _, ensure};
use disco::proto::v1::{InstanceRef, PublishRequest, WatchLiveRequest, registry_client::RegistryClient};
use tokio::{runtime::Runtime, time::Instant};

use crate::harness::{Disco, Envoy, PATIENCE, Protocol, eventually, scene};

/// What is said in all, and how often.
const SAID: u32 = 300;
const EVERY: Duration = Duration::from_millis(5);

#[test]
fn live_metadata_reaches_watchers_within_200_ms_and_no_proxy() {
    scene(|folder| {
        let disco = Disco::start(folder)?;
        let body = r#"{"address":"127.0.0.1","port":50051,"ttl":"5m"}"#;
        let answer = disco.request("PUT", "/v1/services/chain/instances/a", body.as_bytes())?;
        ensure!(answer.status == 200, "{answer:?}");
        let envoy = Envoy::start(&disco, Protocol::Delta)?;
        let synced = || {
            let proxies = disco.get("/v1/proxies").ok()?;
            let types = proxies["proxies"][0]["types"].as_array()?;
            (types.len() == 4 && proxies["proxies"][0]["synced"] == true).then(|| types.clone())
        };
        let before = eventually("Envoy with all four types", PATIENCE, synced)?;

        let mut delays = Runtime::new()?.block_on(publish_and_watch(&disco))?;
        delays.sort_unstable();
        let p99 = delays.get(delays.len() * 99 / 100).copied().context("nothing was heard")?;
        ensure!(p99 < Duration::from_millis(200), "p99 {p99:?} of {}", delays.len());
        ensure!(delays.len() >= 10, "{} were heard of", delays.len());

        ensure!(eventually("Envoy", PATIENCE, synced)? == before, "Envoy was sent something");
        let shown = disco.command()?.args(["service", "live", "chain"]).output()?;
        let shown = String::from_utf8_lossy(&shown.stdout).into_owned();
        ensure!(shown.contains(&format!("block={}", SAID - 1)), "{shown}");
        let bad = disco.request("PUT", "/v1/services/chain/instances/a/live", br#"{"live":{"":"x"}}"#)?;
        ensure!(bad.status == 400 && bad.body.contains("metadata"), "{bad:?}");
        drop(envoy);
        Ok(())
    });
}

/// How long each thing that was heard of took from being said.
async fn publish_and_watch(disco: &Disco) -> anyhow::Result<Vec<Duration>> {
    let mut publisher = RegistryClient::connect(format!("http://{}", disco.grpc)).await?;
    let mut watcher = publisher.clone();
    let request = WatchLiveRequest { service: "chain".into() };
    let mut news = watcher.watch_live(request).await?.into_inner();
    let first = news.message().await?.context("the watch ended")?;
    ensure!(first.snapshot && first.put.is_empty(), "{first:?}");

    let start = Instant::now();
    let say = async {
        for block in 0..SAID {
            tokio::time::sleep_until(start + EVERY * block).await;
            let instance = InstanceRef { service: "chain".into(), id: "a".into(), incarnation: 0 };
            let entries = BTreeMap::from([("block".to_owned(), block.to_string())]);
            publisher.publish(PublishRequest { instance: Some(instance), entries }).await?;
        }
        anyhow::Ok(())
    };
    let hear = async {
        let mut delays = Vec::new();
        loop {
            let response = news.message().await?.context("the watch ended")?;
            for live in response.put {
                let block: u32 = live.entries.get("block").context("no block")?.parse()?;
                delays.push((start + EVERY * block).elapsed());
                if block == SAID - 1 {
                    return anyhow::Ok(delays);
                }
            }
        }
    };
    let (said, heard) = tokio::join!(say, tokio::time::timeout(PATIENCE, hear));
    said?;
    heard?
}
