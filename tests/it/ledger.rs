//! The delivery ledger: who has a change, and who has not, since when and why; with real Envoy, a client that never answers and
//! one that rejects.

use std::{net::SocketAddr, process::Output};

use anyhow::{Context as _, ensure};
use envoy_types::pb::{
    envoy::{
        config::core::v3::Node,
        service::{
            discovery::v3::{
                DeltaDiscoveryRequest, aggregated_discovery_service_client::AggregatedDiscoveryServiceClient,
            },
            status::v3::{
                ClientStatusRequest, ClientStatusResponse, ConfigStatus,
                client_status_discovery_service_client::ClientStatusDiscoveryServiceClient,
            },
        },
        r#type::matcher::v3::{NodeMatcher, StringMatcher, string_matcher::MatchPattern},
    },
    google::rpc::Status,
};
use serde_json::Value;
use tokio::{runtime::Runtime, sync::mpsc};
use tokio_stream::wrappers::ReceiverStream;

use crate::harness::{Disco, Envoy, PATIENCE, Protocol, eventually, scene};

const ENDPOINTS: &str = "type.googleapis.com/envoy.config.endpoint.v3.ClusterLoadAssignment";
const REASON: &str = "greeter has an endpoint that I do not like";

/// How a client answers.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Manner {
    /// Not at all.
    Silent,
    /// It takes the first response and no other.
    Picky,
}

/// Subscribes to the endpoints of `greeter` for as long as the runtime lives.
#[allow(clippy::disallowed_methods, reason = "the runtime is the owner of its tasks")]
fn client(runtime: &Runtime, server: SocketAddr, id: &'static str, manner: Manner) {
    runtime.spawn(async move {
        let mut client = AggregatedDiscoveryServiceClient::connect(format!("http://{server}")).await?;
        let (requests, outgoing) = mpsc::channel(4);
        let first = DeltaDiscoveryRequest {
            node: Some(Node { id: id.into(), ..Node::default() }),
            type_url: ENDPOINTS.into(),
            resource_names_subscribe: vec!["greeter".into()],
            ..DeltaDiscoveryRequest::default()
        };
        requests.send(first).await?;
        let mut responses =
            client.delta_aggregated_resources(ReceiverStream::new(outgoing)).await?.into_inner();
        let mut seen = 0;
        while let Some(response) = responses.message().await? {
            let error = Status { code: 13, message: REASON.into(), details: Vec::new() };
            let answer = DeltaDiscoveryRequest {
                type_url: response.type_url,
                response_nonce: response.nonce,
                error_detail: (seen > 0).then_some(error),
                ..DeltaDiscoveryRequest::default()
            };
            seen += 1;
            if manner == Manner::Picky {
                requests.send(answer).await?;
            }
        }
        anyhow::Ok(())
    });
}

fn register(disco: &Disco, id: &str, port: u16) -> anyhow::Result<u64> {
    let body = format!(r#"{{"address":"127.0.0.1","port":{port},"ttl":"5m"}}"#);
    let path = format!("/v1/services/greeter/instances/{id}");
    let answer = disco.request("PUT", &path, body.as_bytes())?;
    ensure!(answer.status == 200, "{answer:?}");
    answer.json()?["revision"].as_u64().context("no revision")
}

/// Runs a command line, which must end with `code` and print all of `want`.
fn check(disco: &Disco, line: &str, code: i32, want: &[&str]) -> anyhow::Result<String> {
    let Output { status, stdout, stderr } = disco.command()?.args(line.split(' ')).output()?;
    let (stdout, stderr) = (String::from_utf8_lossy(&stdout), String::from_utf8_lossy(&stderr));
    let all = format!("disco {line}: {status}\n{stdout}{stderr}");
    ensure!(status.code() == Some(code), "want code {code}: {all}");
    for want in want {
        ensure!(all.contains(want), "{want:?} is not in {all}");
    }
    Ok(stdout.into_owned())
}

#[test]
fn who_has_a_change_and_who_has_not() {
    scene(|folder| {
        let disco = Disco::start(folder)?;
        let first = register(&disco, "a", 50051)?;
        let envoy = Envoy::start(&disco, Protocol::Delta)?;
        let proxies = || disco.get("/v1/proxies").ok()?["proxies"].as_array().cloned();
        let sidecar = eventually("Envoy with all four types", PATIENCE, || {
            let proxies = proxies()?;
            let [proxy] = proxies.as_slice() else { return None };
            let all = proxy["types"].as_array()?.len() == 4 && proxy["synced"] == true;
            all.then(|| proxy["node_id"].as_str().map(str::to_owned))?
        })?;
        let complete = format!("revision {first} is acknowledged by all that it concerns: 1 proxy");
        check(&disco, &format!("rollout status {first} --wait"), 0, &[&complete])?;

        let runtime = Runtime::new()?;
        client(&runtime, disco.grpc, "silent", Manner::Silent);
        client(&runtime, disco.grpc, "picky", Manner::Picky);
        let picky = |field: &'static str| {
            let answer = disco.get("/v1/proxies/picky").ok()?;
            answer["proxies"][0]["types"][0][field].as_u64().filter(|number| *number > 0)
        };
        eventually("both clients", PATIENCE, || {
            picky("acknowledged").filter(|_| proxies().is_some_and(|proxies| proxies.len() == 3))
        })?;

        let second = register(&disco, "b", 50052)?;
        eventually("a rejection", PATIENCE, || picky("rejected"))?;
        let line = format!("rollout status {second} --wait --timeout 300ms -o wide");
        let named = [
            "silent  endpoints  not answered",
            "picky   endpoints  rejected",
            REASON,
            "1 of 3 proxies acknowledged revision 2 within 300ms; not yet: picky, silent",
        ];
        check(&disco, &line, 2, &named)?;
        let answer = disco.get(&format!("/v1/revisions/{second}"))?;
        ensure!(answer["acknowledged"] == 1, "{answer}");
        for lack in answer["waiting"].as_array().context("no list")? {
            let since = lack["since"].as_str().unwrap_or_default().parse::<jiff::Timestamp>();
            let accepted = answer["accepted_at"].as_str().unwrap_or_default().parse::<jiff::Timestamp>()?;
            // The silent one has been so since before.
            let silent = lack["node_id"] == "silent";
            ensure!(since.is_ok_and(|since| (since < accepted) == silent), "{answer}");
        }

        check(&disco, &format!("proxy diff {sidecar}"), 0, &["holds what it is to hold"])?;
        check(&disco, "proxy diff picky -o wide", 79, &["older  rejected", REASON, "1 difference found"])?;
        check(&disco, "proxy diff silent", 79, &["nothing", "sent, not answered"])?;
        check(&disco, "proxy status picky", 0, &["REASON", "greeter has an endpoint"])?;
        check(&disco, "proxy show pickey", 1, &["no proxy with node id", "did you mean \"picky\"?"])?;
        let json = check(&disco, &format!("proxy resources {sidecar} cluster -o json"), 0, &[])?;
        let held: Value = serde_json::from_str(&json)?;
        let cluster = &held["streams"][0]["resources"][0];
        ensure!(
            cluster["state"] == "acknowledged"
                && cluster["body"]["name"] == "greeter"
                && cluster["body"]["type"] == "EDS",
            "{held:#}"
        );
        let explained = check(
            &disco,
            "instance explain greeter/b -o wide",
            0,
            &["by renewals", "1 of 3 proxies", REASON],
        )?;
        let row = |start: &str| explained.lines().find(|line| line.starts_with(start)).unwrap_or_default();
        ensure!(row(&sidecar).contains(" yes "), "{explained}");
        ensure!(row("picky").contains(" no ") && row("silent").contains("not answered"), "{explained}");

        let status = runtime.block_on(client_status(disco.grpc, &["picky", "silent", &sidecar]))?;
        let mut got: Vec<_> = status
            .config
            .iter()
            .flat_map(|of| of.generic_xds_configs.iter().map(move |config| (of, config)))
            .filter(|(_, config)| config.type_url == ENDPOINTS)
            .map(|(of, config)| {
                let id = of.node.as_ref().map(|node| node.id.as_str()).unwrap_or_default();
                (id, config.config_status(), config.xds_config.is_some())
            })
            .collect();
        got.sort();
        let mut want = [
            (sidecar.as_str(), ConfigStatus::Synced, true),
            ("picky", ConfigStatus::Error, true),
            ("silent", ConfigStatus::Stale, true),
        ];
        want.sort();
        ensure!(got == want, "C5: {got:?}");

        for line in ["xds watch endpoints greeter --count 1", "xds watch endpoints greeter --count 1 --sotw"]
        {
            check(&disco, line, 0, &["endpoints  version", "+ greeter"])?;
        }
        check(&disco, "xds watch cluster --count 1 -o json", 0, &["\"lb_policy\": \"LEAST_REQUEST\""])?;

        let metrics = disco.request("GET", "/metrics", b"")?.body;
        for stage in ["stored", "published", "acknowledged"] {
            let sample = format!("disco_propagation_seconds_count{{stage=\"{stage}\"}} ");
            let count = metrics.lines().find_map(|line| line.strip_prefix(&sample)?.parse::<u64>().ok());
            ensure!(count.is_some_and(|count| count > 0), "{sample}: {count:?}");
        }

        // Whoever has left is waited for no more.
        drop(runtime);
        check(&disco, &format!("rollout status {second} --wait"), 0, &["1 proxy"])?;
        drop(envoy);
        Ok(())
    });
}

/// What CSDS tells of these nodes.
async fn client_status(server: SocketAddr, nodes: &[&str]) -> anyhow::Result<ClientStatusResponse> {
    let mut client = ClientStatusDiscoveryServiceClient::connect(format!("http://{server}")).await?;
    let node_matchers = nodes.iter().map(|node| {
        let exact = Some(MatchPattern::Exact((*node).into()));
        let node_id = Some(StringMatcher { match_pattern: exact, ..StringMatcher::default() });
        NodeMatcher { node_id, ..NodeMatcher::default() }
    });
    let request = ClientStatusRequest { node_matchers: node_matchers.collect(), ..Default::default() };
    let fetched = client.fetch_client_status(request.clone()).await?.into_inner();
    let mut stream = client.stream_client_status(tokio_stream::iter([request])).await?.into_inner();
    let streamed = stream.message().await?.context("no answer")?;
    ensure!(fetched == streamed, "C5: fetched and streamed differ");
    Ok(fetched)
}
