//! Health checks by the server: of real servers, seen by a real Envoy and a real gRPC client.

use std::{
    collections::BTreeMap,
    fs,
    io::{BufRead as _, BufReader, Write as _},
    net::{SocketAddr, TcpListener},
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU16, Ordering},
    },
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context as _, ensure};
use serde_json::Value;

use crate::harness::{Disco, Envoy, PATIENCE, Process, Protocol, eventually, free_port, request, scene};

const CONFIG: &str = "roles: [registry, discovery, xds, admin]\nstore: memory\n";

/// A web server on a port of its own that answers every request with one status.
struct Web {
    address: SocketAddr,
    status: Arc<AtomicU16>,
    ended: Arc<AtomicBool>,
}

impl Web {
    fn start(name: &'static str) -> anyhow::Result<Self> {
        let listener = TcpListener::bind("127.0.0.1:0")?;
        let address = listener.local_addr()?;
        let (status, ended) = (Arc::new(AtomicU16::new(200)), Arc::new(AtomicBool::new(false)));
        let (answer, stop) = (Arc::clone(&status), Arc::clone(&ended));
        thread::spawn(move || {
            for stream in listener.incoming() {
                if stop.load(Ordering::Relaxed) {
                    return;
                }
                let Ok(mut stream) = stream else { continue };
                let answer = Arc::clone(&answer);
                thread::spawn(move || {
                    let mut reader = BufReader::new(stream.try_clone()?);
                    let mut line = String::new();
                    while reader.read_line(&mut line)? > 0 {
                        if line == "\r\n" {
                            let status = answer.load(Ordering::Relaxed);
                            let length = name.len();
                            write!(stream, "HTTP/1.1 {status} So\r\ncontent-length: {length}\r\n\r\n{name}")?;
                        }
                        line.clear();
                    }
                    anyhow::Ok(())
                });
            }
        });
        Ok(Self { address, status, ended })
    }

    fn answer(&self, status: u16) {
        self.status.store(status, Ordering::Relaxed);
    }

    /// It listens no more.
    fn end(&self) {
        self.ended.store(true, Ordering::Relaxed);
        let _ = std::net::TcpStream::connect(self.address);
    }
}

fn put(disco: &Disco, id: &str, port: u16, health: &str) -> anyhow::Result<Value> {
    let body = format!(r#"{{"address": "127.0.0.1", "port": {port}, "ttl": "10m", "health": {health}}}"#);
    let answer = disco.request("PUT", &format!("/v1/services/web/instances/{id}"), body.as_bytes())?;
    ensure!(answer.status == 200, "{answer:?}");
    answer.json()
}

/// Waits for a verdict, and returns how long that took.
fn verdict(disco: &Disco, id: &str, want: &str) -> anyhow::Result<Duration> {
    let began = Instant::now();
    let mut seen = Value::Null;
    let done = eventually(&format!("verdict {want} on {id}"), PATIENCE, || {
        seen = disco.get(&format!("/v1/services/web/instances/{id}")).ok()?;
        (seen["health"]["verdict"] == want).then_some(())
    });
    done.with_context(|| seen.to_string())?;
    Ok(began.elapsed())
}

/// Who answers `calls` calls through the sidecar, and how often.
fn answers(envoy: &Envoy, calls: usize) -> anyhow::Result<BTreeMap<String, usize>> {
    let mut counts = BTreeMap::new();
    for _ in 0..calls {
        let answer = request(envoy.proxy, "GET", "http://web/", b"")?;
        *counts.entry(answer.body).or_default() += 1;
    }
    Ok(counts)
}

const OFTEN: &str = r#""interval": "500ms", "timeout": "500ms""#;

#[test]
fn traffic_leaves_what_fails_its_check_and_comes_back() {
    scene(|folder| {
        let disco = Disco::serve(folder, CONFIG)?;
        let (a, b) = (Web::start("a")?, Web::start("b")?);
        let http =
            format!(r#"{{"kind": "http", "path": "/healthz", "expect": [200], "degraded": [429], {OFTEN}}}"#);
        let tcp = format!(r#"{{"kind": "tcp", {OFTEN}}}"#);
        let first = put(&disco, "a", a.address.port(), &http)?;
        ensure!(first["instance"]["health"]["verdict"] == "unknown", "published unseen: {first}");
        put(&disco, "b", b.address.port(), &tcp)?;
        for id in ["a", "b"] {
            verdict(&disco, id, "healthy")?;
        }
        let envoy = Envoy::start(&disco, Protocol::Delta)?;
        eventually("answers of both", PATIENCE, || answers(&envoy, 10).ok().filter(|seen| seen.len() == 2))?;
        let only = |id: &str| {
            eventually(&format!("answers of {id} only"), PATIENCE, || {
                answers(&envoy, 10).ok().filter(|seen| seen.len() == 1 && seen.contains_key(id))
            })
        };

        // An answer that is not expected.
        a.answer(500);
        let began = Instant::now();
        verdict(&disco, "a", "unhealthy")?;
        only("b")?;
        let took = began.elapsed();
        eprintln!("from the first bad answer to the last call: {took:?}, interval and time-out 1 s");
        ensure!(took < Duration::from_secs(5), "{took:?}");
        let explained = disco.get("/v1/services/web/instances/a/explain")?;
        ensure!(explained["proxies"][0]["why"] == "without new calls: its checks fail", "{explained:#}");
        ensure!(
            explained["instance"]["health"]["reason"]
                == "http /healthz: GET /healthz answered 500 Internal Server Error"
        );
        a.answer(200);
        verdict(&disco, "a", "healthy")?;
        eventually("answers of both", PATIENCE, || answers(&envoy, 10).ok().filter(|seen| seen.len() == 2))?;

        // One that says that others are better.
        a.answer(429);
        verdict(&disco, "a", "degraded")?;
        only("b")?;

        // The other ends: who is left serves, and when all fail all are tried.
        b.end();
        verdict(&disco, "b", "unhealthy")?;
        only("a")?;
        a.answer(503);
        verdict(&disco, "a", "unhealthy")?;
        let services = disco.get("/v1/services/web")?;
        ensure!((&services["serving"], &services["unhealthy"]) == (&0.into(), &2.into()), "{services}");
        let last = eventually("answers of a", PATIENCE, || {
            answers(&envoy, 3).ok().filter(|seen| seen.contains_key("a"))
        })?;
        ensure!(!last.is_empty());
        Ok(())
    });
}

#[test]
fn an_instance_is_published_once_it_passes_and_verdicts_outlive_a_crash() {
    scene(|folder| {
        let mut disco = Disco::start(folder)?;
        let web = Web::start("a")?;
        web.answer(503);
        put(&disco, "a", web.address.port(), &format!(r#"{{"kind": "http", {OFTEN}}}"#))?;
        verdict(&disco, "a", "unhealthy")?;
        let envoy = Envoy::start(&disco, Protocol::Sotw)?;
        eventually("503", PATIENCE, || {
            let answer = request(envoy.proxy, "GET", "http://web/", b"").ok()?;
            (answer.status == 503 && answer.body.contains("no healthy upstream")).then_some(())
        })?;
        let explained = disco.get("/v1/services/web/instances/a/explain")?;
        let why = "it has not passed its check yet: proxies are told of it once it does";
        ensure!(explained["proxies"][0]["why"] == why, "{explained:#}");
        web.answer(200);
        eventually("answers", PATIENCE, || answers(&envoy, 1).ok().filter(|seen| seen.contains_key("a")))?;

        web.answer(500);
        verdict(&disco, "a", "unhealthy")?;
        let before = disco.get("/v1/services/web/instances/a")?;
        disco.kill();
        disco.start_again()?;
        let after = disco.get("/v1/services/web/instances/a")?;
        ensure!(before["health"] == after["health"], "{before}\n{after}");
        web.answer(200);
        verdict(&disco, "a", "healthy")?;
        Ok(())
    });
}

#[test]
fn grpc_health_of_a_server_that_stops_and_goes_on() {
    scene(|folder| {
        let disco = Disco::serve(folder, CONFIG)?;
        let check = format!(r#"{{"kind": "grpc", "service": "greeter.v1.Greeter", {OFTEN}}}"#);
        let runtime = tokio::runtime::Runtime::new()?;
        let (reporter, health) = tonic_health::server::health_reporter();
        let listener = runtime.block_on(tokio::net::TcpListener::bind("127.0.0.1:0"))?;
        let port = listener.local_addr()?.port();
        runtime.spawn(
            tonic::transport::Server::builder()
                .add_service(health)
                .serve_with_incoming(tokio_stream::wrappers::TcpListenerStream::new(listener)),
        );
        let serving = |status| runtime.block_on(reporter.set_service_status("greeter.v1.Greeter", status));
        put(&disco, "a", port, &check)?;
        verdict(&disco, "a", "unhealthy")?;
        serving(tonic_health::ServingStatus::Serving);
        verdict(&disco, "a", "healthy")?;
        serving(tonic_health::ServingStatus::NotServing);
        let took = verdict(&disco, "a", "unhealthy")?;
        eprintln!("NOT_SERVING to the verdict: {took:?}, interval and time-out 1 s");
        ensure!(took < Duration::from_secs(5), "{took:?}");
        let seen = disco.get("/v1/services/web/instances/a")?;
        ensure!(
            seen["health"]["reason"] == "grpc greeter.v1.Greeter: grpc.health.v1 answered NOT_SERVING",
            "{seen}"
        );
        serving(tonic_health::ServingStatus::Serving);
        verdict(&disco, "a", "healthy")?;

        let metrics = disco.request("GET", "/metrics", b"")?.body;
        let passed =
            metrics.lines().find(|line| line.starts_with("disco_health_checks_total{result=\"passed\"}"));
        ensure!(passed.is_some(), "{metrics}");
        Ok(())
    });
}

#[test]
fn a_command_beside_the_service_tells_its_health() {
    scene(|folder| {
        let mut disco = Disco::start(folder)?;
        let port = free_port()?.to_string();
        let state = folder.join("state");
        fs::write(&state, "0")?;
        let health = format!("echo state; exit $(cat {})", state.display());
        let mut command = disco.command()?;
        command.args(["run", "--service", "web", "--id", "a", "--port", &port]);
        command.args([
            "--health-command",
            &health,
            "--health-recheck",
            "100ms",
            "--health-failures",
            "2",
            "--",
        ]);
        command.args(["sleep", "1000"]);
        let _run = Process::start("a", folder, &mut command)?;
        verdict(&disco, "a", "healthy")?;
        for (code, want) in [("1", "unhealthy"), ("75", "degraded"), ("0", "healthy"), ("3", "unhealthy")] {
            fs::write(&state, code)?;
            verdict(&disco, "a", want)?;
        }
        let seen = disco.get("/v1/services/web/instances/a")?;
        ensure!(seen["health"]["reason"] == "exit code 3: \"state\"", "{seen}");
        ensure!(seen["check"]["kind"] == "owner", "{seen}");
        // Another server, with nothing stored, is told as well.
        disco.kill();
        fs::remove_dir_all(folder.join("data"))?;
        disco.start_again()?;
        verdict(&disco, "a", "unhealthy")?;
        Ok(())
    });
}
