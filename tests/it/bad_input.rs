//! Whatever comes in, it is answered with an error that names the field, and everybody else goes on being served.

use std::{
    io::{Read as _, Write as _},
    net::{SocketAddr, TcpStream},
    path::Path,
    time::Duration,
};

use anyhow::ensure;
use serde_json::{Value, json};

use crate::harness::{Disco, request, scene};

const GOOD: &str = "/v1/services/good/instances/g1";

#[test]
fn registrations_that_cannot_be() {
    let long = "x".repeat(10_000);
    let valid = |changes: Value| {
        let mut body = json!({"address": "127.0.0.1", "port": 50051});
        body.as_object_mut().unwrap().extend(changes.as_object().unwrap().clone());
        body.to_string()
    };
    let path = "/v1/services/greeter/instances/g1".to_owned();
    #[rustfmt::skip]
    let cases: Vec<(String, String, &str)> = vec![
        (path.clone(), valid(json!({"port": "50051"})), "port"),
        (path.clone(), valid(json!({"port": 0})), "port"),
        (path.clone(), valid(json!({"port": 70_000})), "port"),
        (path.clone(), valid(json!({"port": -1})), "port"),
        (path.clone(), valid(json!({"port": 50051.5})), "port"),
        (path.clone(), json!({"address": "127.0.0.1"}).to_string(), "port"),
        (path.clone(), json!({"port": 50051}).to_string(), "address"),
        (path.clone(), valid(json!({"address": "greeter.example.com"})), "address"),
        (path.clone(), valid(json!({"address": "localhost"})), "address"),
        (path.clone(), valid(json!({"address": ""})), "address"),
        (path.clone(), valid(json!({"address": 7})), "address"),
        (path.clone(), valid(json!({"address": null})), "address"),
        (path.clone(), valid(json!({"adress": "127.0.0.1"})), "adress"),
        (path.clone(), valid(json!({"ttl": "0s"})), "ttl"),
        (path.clone(), valid(json!({"ttl": "8760h"})), "ttl"),
        (path.clone(), valid(json!({"ttl": "soon"})), "ttl"),
        (path.clone(), valid(json!({"weight": 0})), "weight"),
        (path.clone(), valid(json!({"weight": 4_294_967_296_u64})), "weight"),
        (path.clone(), valid(json!({"health": "maybe"})), "health"),
        (path.clone(), valid(json!({"locality": "eu"})), "locality"),
        (path.clone(), valid(json!({"locality": {"zone": "a\u{7}b"}})), "locality.zone"),
        (path.clone(), valid(json!({"locality": {"zome": "a"}})), "locality.zome"),
        (path.clone(), valid(json!({"metadata": {"k": 1}})), "metadata.k"),
        (path.clone(), valid(json!({"incarnation": -5})), "incarnation"),
        (path.clone(), "[]".into(), ""),
        (path.clone(), "{".into(), ""),
        (path, "\u{0}\u{1}".into(), ""),
        ("/v1/services/gree%0Ater/instances/g1".into(), valid(json!({})), "service"),
        ("/v1/services/Gree%20ter/instances/g1".into(), valid(json!({})), "service"),
        (format!("/v1/services/{long}/instances/g1"), valid(json!({})), "service"),
        ("/v1/services/greeter/instances/a%00b".into(), valid(json!({})), "id"),
        (format!("/v1/services/greeter/instances/{long}"), valid(json!({})), "id"),
    ];
    served(|disco| {
        for (path, body, field) in cases {
            let asked = format!("PUT {path:.60} {body:.100}");
            let answer = disco.request("PUT", &path, body.as_bytes())?;
            ensure!((400..500).contains(&answer.status), "{asked}: {} {}", answer.status, answer.body);
            let error = &answer.json()?["error"];
            ensure!(error["code"] == "invalid", "{asked}: {}", answer.body);
            let named = named_fields(error).iter().any(|named| named == field);
            ensure!(named || field.is_empty(), "{asked}: does not name {field:?}: {}", answer.body);
            still_served(disco)?;
        }
        Ok(())
    });
}

#[test]
fn all_problems_at_once() {
    served(|disco| {
        let body = json!({"address": "nowhere", "port": 70_000, "ttl": "0s", "colour": "red"}).to_string();
        let answer = disco.request("PUT", "/v1/services/greeter/instances/g1", body.as_bytes())?;
        let named = named_fields(&answer.json()?["error"]);
        ensure!(named == ["address", "colour", "port", "ttl"], "{}", answer.body);
        Ok(())
    });
}

#[test]
fn one_id_two_incarnations() {
    served(|disco| {
        let put = |incarnation: u64, port: u16| {
            let body = json!({"address": "127.0.0.1", "port": port, "incarnation": incarnation}).to_string();
            disco.request("PUT", "/v1/services/greeter/instances/g1", body.as_bytes())
        };
        ensure!(put(7, 50051)?.status == 200, "the first is welcome");
        let older = put(6, 50052)?;
        ensure!(older.status == 409, "an older one must not win: {} {}", older.status, older.body);
        ensure!(older.json()?["error"]["code"] == "conflict", "{}", older.body);
        ensure!(older.body.contains("incarnation"), "does not name the field: {}", older.body);
        let kept = disco.get("/v1/services/greeter/instances/g1")?;
        ensure!(kept["port"] == 50051 && kept["incarnation"] == 7, "{kept}");
        Ok(())
    });
}

#[test]
fn a_body_of_100_mb() {
    served(|disco| {
        let body = vec![b'x'; 100_000_000];
        let answer = request(disco.http, "PUT", "/v1/services/greeter/instances/g1", &body);
        // Whoever sends on after the answer may find the connection closed before reading it.
        if let Ok(answer) = answer {
            ensure!(answer.status == 413, "{} {}", answer.status, answer.body);
            ensure!(answer.json()?["error"]["code"] == "too_large", "{}", answer.body);
        }
        // The refusal comes while most of the body is still to be sent.
        let head = "PUT /v1/services/a/instances/b HTTP/1.1\r\nhost: x\r\ncontent-length: 100000000\r\n\r\n";
        let answer = send(disco.http, &[head.as_bytes(), &body[..2_000_000]].concat())?;
        ensure!(answer.starts_with(b"HTTP/1.1 413"), "{}", String::from_utf8_lossy(&answer));
        still_served(disco)
    });
}

#[test]
fn garbage_on_both_ports() {
    let noise: Vec<u8> = (0..200_000_u32).map(|n| (n.wrapping_mul(2_654_435_761) >> 24) as u8).collect();
    let preface = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n".to_vec();
    let frames = [preface.clone(), noise.clone()].concat();
    // A frame that claims 16 MB.
    let giant = [preface, vec![0xff, 0xff, 0xff, 0, 0, 0, 0, 0, 1]].concat();
    served(|disco| {
        for garbage in [noise.as_slice(), &frames, &giant, b"GET / HTTP/1.1\r\n\r\n", b"\r\n\r\n\r\n"] {
            for port in [disco.grpc, disco.http] {
                send(port, garbage)?;
                still_served(disco)?;
            }
        }
        Ok(())
    });
}

#[test]
fn grpc_messages_that_cannot_be_read() {
    served(|disco| {
        for path in [
            "/disco.v1.Registry/Register",
            "/disco.v1.Registry/Session",
            "/envoy.service.discovery.v3.AggregatedDiscoveryService/StreamAggregatedResources",
            "/envoy.service.cluster.v3.ClusterDiscoveryService/DeltaClusters",
            "/envoy.service.load_stats.v3.LoadReportingService/StreamLoadStats",
            "/envoy.service.status.v3.ClientStatusDiscoveryService/StreamClientStatus",
        ] {
            let said = tokio::runtime::Runtime::new()?.block_on(send_a_number(disco.grpc, path)).unwrap_err();
            ensure!(said.code() == tonic::Code::InvalidArgument, "{path}: {said:?}");
            ensure!(said.message().contains("failed to decode"), "{path}: {said:?}");
            still_served(disco)?;
        }
        let metrics = disco.request("GET", "/metrics", b"")?.body;
        ensure!(metrics.contains("disco_grpc_errors_total{code=\"InvalidArgument\"} 1"), "{metrics}");
        Ok(())
    });
}

/// Sends a number as field 1, which is a text or a message in all requests there are.
async fn send_a_number(grpc: SocketAddr, path: &'static str) -> Result<(), tonic::Status> {
    let channel =
        tonic::transport::Endpoint::from_shared(format!("http://{grpc}")).unwrap().connect().await.unwrap();
    let mut client = tonic::client::Grpc::new(channel);
    client.ready().await.unwrap();
    let requests = tonic::Request::new(tokio_stream::iter([7_u64]));
    let codec = tonic_prost::ProstCodec::<u64, ()>::default();
    let answers = client.streaming(requests, http::uri::PathAndQuery::from_static(path), codec).await?;
    answers.into_inner().message().await.map(drop)
}

#[test]
fn paths_and_methods_that_do_not_exist() {
    served(|disco| {
        for (method, path, status) in [
            ("GET", "/v1/nothing", 404),
            ("GET", "/v1/services/nobody/instances/n1", 404),
            ("POST", "/v1/services/nobody/instances/n1/drain", 404),
            ("POST", "/v1/services/nobody/instances/n1/renew", 404),
            ("POST", "/v1/services", 405),
            ("GET", "/v1/services/good/instances?wait=forever", 400),
            ("GET", "/v1/services/good/instances?index=-1", 400),
            ("GET", "/v1/revisions/one", 400),
            ("GET", "/v1/revisions/999", 400),
            ("GET", "/v1/services/good/instances/none/explain", 404),
            ("GET", "/v1/proxies/nobody", 404),
            ("GET", "/v1/proxies/nobody/resources", 404),
            ("GET", "/v1/proxies/nobody/resources?type=pod", 400),
            ("GET", "/v1/proxies/nobody/resources?body=maybe", 400),
            ("GET", "/v1/revisions/%ff", 400),
            ("GET", "/v1/services/good/instances/%ff", 400),
        ] {
            let answer = disco.request(method, path, b"")?;
            ensure!(answer.status == status, "{method} {path}: {} {}", answer.status, answer.body);
            ensure!(answer.json()?["error"]["message"].is_string(), "{method} {path}: {}", answer.body);
        }
        Ok(())
    });
}

/// Runs `play` with a Disco that has one good instance, which is still there at the end.
fn served(play: impl FnOnce(&Disco) -> anyhow::Result<()>) {
    scene(|folder: &Path| {
        let disco = Disco::start(folder)?;
        let body = json!({"address": "127.0.0.1", "port": 1, "ttl": "10m"}).to_string();
        let answer = disco.request("PUT", GOOD, body.as_bytes())?;
        ensure!(answer.status == 200, "{} {}", answer.status, answer.body);
        play(&disco)?;
        still_served(&disco)
    });
}

/// The fields that an error names, in order; unknown ones come in quotes.
fn named_fields(error: &Value) -> Vec<String> {
    let fields = error["fields"].as_array().into_iter().flatten();
    let mut named: Vec<_> =
        fields.filter_map(|problem| Some(problem["field"].as_str()?.replace('"', ""))).collect();
    named.sort();
    named
}

fn still_served(disco: &Disco) -> anyhow::Result<()> {
    let good = disco.get(GOOD)?;
    ensure!(good["id"] == "g1" && good["state"] == "serving", "{good}");
    Ok(())
}

/// Sends bytes and returns what comes back within a moment; the server may close whenever it likes.
fn send(server: SocketAddr, bytes: &[u8]) -> anyhow::Result<Vec<u8>> {
    let mut connection = TcpStream::connect(server)?;
    connection.set_read_timeout(Some(Duration::from_millis(500)))?;
    connection.set_write_timeout(Some(Duration::from_secs(5)))?;
    let _ = connection.write_all(bytes);
    let mut answer = vec![0; 4096];
    let length = connection.read(&mut answer).unwrap_or_default();
    answer.truncate(length);
    Ok(answer)
}
