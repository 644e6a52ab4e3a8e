//! Many instances: what their renewals, their memory and a restart cost, with the embedded store and over etcd.
//!
//! `make tools`, then `cargo bench --profile fast --bench scale`; `-- --quick` with a tenth of the instances, `-- --file` or
//! `-- --etcd` for one store only, `-- --restart` for the restarts only. A real `disco serve` is measured, the load is this process. What calls alone cost shows
//! beside: the same number of health checks of the server, which do nothing.

#![allow(
    clippy::expect_used,
    clippy::indexing_slicing,
    clippy::print_stdout,
    clippy::unwrap_used,
    reason = "a benchmark prints, and stops when anything fails"
)]

use std::{env, fs, path::Path, sync::Arc, time::Duration};

#[path = "common/mod.rs"]
mod common;

use disco::{
    catalog,
    model::{InstanceKey, Limits, Members, Problems, RawRegistration, Registration},
    proto::{
        etcd::kv_client::KvClient,
        v1::{InstanceRef, RegisterRequest, RenewManyRequest, RenewRequest, registry_client::RegistryClient},
    },
    registry::{Config, Mirror, Patience, Registry},
    rt::{Readiness, Shutdown, Tasks},
    store::MemoryStore,
    telemetry::Metrics,
};
use http::Method;
use tempfile::TempDir;
use tokio::{runtime::Builder, sync::watch, task::JoinSet, time::Instant};
use tonic::transport::Channel;
use tonic_health::pb::{HealthCheckRequest, health_client::HealthClient};

/// How often each lease is renewed.
const EVERY: Duration = Duration::from_secs(10);
/// Far longer, so that a slow machine ends none.
const TTL: Duration = Duration::from_secs(120);
const PER_SERVICE: usize = 20;
const CONNECTIONS: usize = 16;
/// Registrations under way at once while the registry is filled.
const FILLERS: usize = 256;
const RESTARTS: usize = 5;
/// For one row of registrations over etcd.
const ROUND: Duration = Duration::from_secs(2);

fn main() {
    common::guard::start(Duration::from_secs(480));
    let has = |word: &str| env::args().any(|argument| argument == word);
    let restart_only = has("--restart");
    let (file, etcd) = (!has("--etcd"), !has("--file") && !restart_only);
    let share = if has("--quick") { 10 } else { 1 };
    if file && !restart_only {
        in_process(200_000 / share);
    }
    Builder::new_multi_thread().enable_all().build().unwrap().block_on(async {
        if file {
            embedded(200_000 / share, 0, restart_only).await;
            embedded(200_000 / share, 100_000 / share, restart_only).await;
        }
        if etcd {
            over_etcd(100_000 / share).await;
        }
    });
}

fn service(n: usize) -> String {
    format!("service-{:05}", n / PER_SERVICE)
}

fn id(n: usize) -> String {
    format!("instance-{n:06}")
}

/// One thread renews, with nothing around it.
fn in_process(instances: usize) {
    let renew = async {
        let tasks = Tasks::new(Shutdown::default());
        let (writer, reader) = catalog::catalog();
        let store = Arc::new(MemoryStore::default());
        let gate = Readiness::default().gate("registry");
        let mirror = Mirror::new(store.clone(), writer, reader.clone());
        mirror.start(Patience::None, &tasks, gate).await.unwrap();
        let members = watch::channel(Members::alone("n1".parse().unwrap())).1;
        let registry =
            Registry::start(Config::default(), store, reader, members, None, &Metrics::default(), &tasks);
        let mut keys: Vec<InstanceKey> = Vec::with_capacity(instances);
        let mut registrations = JoinSet::new();
        for n in 0..instances {
            let raw = RawRegistration {
                service: service(n),
                id: id(n),
                address: Some("127.0.0.1".into()),
                port: Some(50_051),
                ttl: Some(TTL),
                ..RawRegistration::default()
            };
            let mut problems = Problems::default();
            let registration = Registration::check_into(raw, &Limits::default(), &mut problems).unwrap();
            keys.push(registration.key.clone());
            let registry = registry.clone();
            registrations.spawn(async move { registry.register(registration).await.unwrap() });
            if registrations.len() >= 1024 {
                registrations.join_next().await;
            }
        }
        registrations.join_all().await;
        fastrand::shuffle(&mut keys);
        let start = cpu_of_thread();
        for key in keys {
            registry.renew(key, None).await.unwrap();
        }
        cpu_of_thread() - start
    };
    let runtime = Builder::new_current_thread().enable_all().build().unwrap();
    let each = runtime.block_on(renew) / instances as f64;
    println!(
        "{instances} leases in process: {:.2} us of CPU a renewal, {:.0} renewals/s on one core; every {EVERY:?}: {:.1} % of it\n",
        each * 1e6,
        1.0 / each,
        100.0 * each * instances as f64 / EVERY.as_secs_f64(),
    );
}

fn cpu_of_thread() -> f64 {
    let line = fs::read_to_string("/proc/thread-self/schedstat").unwrap();
    line.split_whitespace().next().unwrap().parse::<f64>().unwrap() / 1e9
}

/// A directory on the disk that the build is on; `/tmp` may be memory.
fn directory() -> TempDir {
    TempDir::new_in(env!("CARGO_TARGET_TMPDIR")).unwrap()
}

async fn embedded(instances: usize, history: usize, restart_only: bool) {
    let dir = directory();
    let (file, store) = (dir.path().join("disco.yaml"), dir.path().join("store"));
    let store_of = format!("store: {{file: {{dir: {}}}}}", store.display());
    fs::write(&file, settings(&store_of, history)).unwrap();
    println!("{instances} instances, embedded store, a history of {history} entries");
    let disco = common::Disco::serve(&file);
    fill(&disco, instances).await;
    if !restart_only {
        renewals(&disco, instances).await;
    }
    drop(disco);
    restart(&file, &store, instances).await;
    println!();
}

fn settings(store: &str, history: usize) -> String {
    format!("roles: [registry, xds, admin]\n{store}\nhistory: {{entries: {history}}}\n")
}

async fn connections(disco: &common::Disco) -> Vec<Channel> {
    let mut channels = vec![];
    for _ in 0..CONNECTIONS {
        channels.push(common::connect(&disco.grpc).await);
    }
    channels
}

async fn register(registry: &mut RegistryClient<Channel>, n: usize) {
    let request = RegisterRequest {
        service: service(n),
        id: id(n),
        address: "127.0.0.1".into(),
        port: 50_051,
        ttl: TTL.try_into().ok(),
        weight: fastrand::u32(1..60_000),
        ..RegisterRequest::default()
    };
    registry.register(request).await.unwrap();
}

/// Registers all instances, and says what they take.
async fn fill(disco: &common::Disco, instances: usize) {
    let channels = connections(disco).await;
    let (memory, cpu, start) = (disco.memory(), disco.cpu(), Instant::now());
    let mut tasks = JoinSet::new();
    for filler in 0..FILLERS {
        let mut registry = RegistryClient::new(channels[filler % CONNECTIONS].clone());
        tasks.spawn(async move {
            for n in (filler..instances).step_by(FILLERS) {
                register(&mut registry, n).await;
            }
        });
    }
    tasks.join_all().await;
    let (count, took) = (instances as f64, start.elapsed().as_secs_f64());
    println!(
        "  registered by {FILLERS} clients: {:.0}/s, {:.0} us of CPU and {:.0} bytes of memory each",
        count / took,
        (disco.cpu() - cpu) * 1e6 / count,
        (disco.memory() - memory) as f64 * 1024.0 / count,
    );
}

/// What one call carries.
#[derive(Clone, Copy)]
enum Call {
    Check,
    Renew,
    RenewMany(usize),
}

async fn renewals(disco: &common::Disco, instances: usize) {
    println!("  each lease renewed every {EVERY:?}        calls/s  renewals/s  share of a core  us CPU each");
    for call in [Call::Check, Call::Renew, Call::RenewMany(10), Call::RenewMany(100)] {
        let channels = connections(disco).await;
        let (cpu, before, start) = (disco.cpu(), disco.metrics().await, Instant::now());
        let calls = send(channels, instances, call).await;
        let took = start.elapsed().as_secs_f64();
        let (cpu, after) = (disco.cpu() - cpu, disco.metrics().await);
        let renewals = "disco_registry_renewals_total";
        let renewed = after[renewals] - before[renewals];
        let of = if renewed > 0.0 { renewed } else { calls as f64 };
        let name = match call {
            Call::Check => "a health check, in its place".to_owned(),
            Call::Renew => "Renew".to_owned(),
            Call::RenewMany(size) => format!("RenewMany of {size}"),
        };
        println!(
            "    {name:<31} {:>9.0} {:>11.0} {:>14.1} % {:>12.2}",
            calls as f64 / took,
            renewed / took,
            100.0 * cpu / took,
            cpu * 1e6 / of,
        );
    }
}

/// Renews every instance once, spread evenly over the time in which that is due. Returns how many calls that took.
async fn send(channels: Vec<Channel>, instances: usize, call: Call) -> usize {
    let size = if let Call::RenewMany(size) = call { size } else { 1 };
    let calls = instances.div_ceil(size);
    let start = Instant::now();
    let mut tasks = JoinSet::new();
    let workers = 4 * CONNECTIONS;
    for worker in 0..workers {
        let channel = channels[worker % CONNECTIONS].clone();
        let mut registry = RegistryClient::new(channel.clone());
        let mut health = HealthClient::new(channel);
        tasks.spawn(async move {
            for n in (worker..calls).step_by(workers) {
                tokio::time::sleep_until(start + EVERY.mul_f64(n as f64 / calls as f64)).await;
                let refer = |n| InstanceRef { service: service(n), id: id(n), incarnation: 0 };
                match call {
                    Call::Check => {
                        health.check(HealthCheckRequest::default()).await.unwrap();
                    }
                    Call::Renew => {
                        registry.renew(RenewRequest { instance: Some(refer(n)) }).await.unwrap();
                    }
                    Call::RenewMany(size) => {
                        let instances = (n * size..instances.min((n + 1) * size)).map(refer).collect();
                        let answer = registry.renew_many(RenewManyRequest { instances }).await.unwrap();
                        assert_eq!(answer.into_inner().failures, []);
                    }
                }
            }
        });
    }
    tasks.join_all().await;
    tokio::time::sleep_until(start + EVERY).await;
    calls
}

/// Ready again after `kill -9`, beside reading the files.
async fn restart(file: &Path, store: &Path, instances: usize) {
    let (mut starts, mut cpu, mut reads, mut bytes, mut memory) = (vec![], vec![], vec![], 0, 0);
    for _ in 0..RESTARTS {
        let start = Instant::now();
        let files = fs::read_dir(store).unwrap();
        bytes = files.map(|entry| fs::read(entry.unwrap().path()).unwrap().len()).sum();
        reads.push(start.elapsed().as_secs_f64() * 1000.0);
        let start = Instant::now();
        let disco = common::Disco::serve(file);
        let http = disco::client::Http::new(&disco.http, None).unwrap();
        let (status, _) = http.raw(Method::GET, "/readyz", None, Duration::from_secs(5)).await.unwrap();
        assert!(status.is_success());
        starts.push(start.elapsed().as_secs_f64() * 1000.0);
        cpu.push(disco.cpu() * 1000.0);
        memory = disco.memory();
    }
    println!(
        "  restart: serving after {:.0} ms ({:.0} ms of CPU); reading the {:.0} MiB of the store {:.0} ms; {:.0} bytes of memory an instance",
        median(starts),
        median(cpu),
        bytes as f64 / 1_048_576.0,
        median(reads),
        memory as f64 * 1024.0 / instances as f64,
    );
}

async fn over_etcd(instances: usize) {
    let etcd = common::etcd::Etcd::start();
    let dir = directory();
    let file = dir.path().join("disco.yaml");
    let store = format!(
        "data_dir: {}\nstore: {{etcd: {{endpoints: [\"{}\"]}}}}",
        dir.path().join("data").display(),
        etcd.address
    );
    fs::write(&file, settings(&store, 100_000)).unwrap();
    println!("{instances} instances over one etcd, a history of 100000 entries");
    let disco = common::Disco::serve(&file);
    let ready = async || {
        let http = disco::client::Http::new(&disco.http, None).unwrap();
        let answer = http.raw(Method::GET, "/readyz", None, Duration::from_secs(5)).await;
        answer.is_ok_and(|(status, _)| status.is_success())
    };
    while !ready().await {
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    let channels = connections(&disco).await;
    let raw = KvClient::connect(etcd.address.clone()).await.unwrap();
    for clients in [1, 16, 256] {
        // Each instance is another one or another weight: a change. In turns, because etcd gets slower as it grows.
        let (mut rates, mut limits) = (vec![], vec![]);
        for _ in 0..3 {
            let mut count = JoinSet::new();
            let start = Instant::now();
            for client in 0..clients {
                let mut registry = RegistryClient::new(channels[client % CONNECTIONS].clone());
                count.spawn(async move {
                    let mut count = 0;
                    while start.elapsed() < ROUND {
                        register(&mut registry, fastrand::usize(..instances / 10)).await;
                        count += 1;
                    }
                    count
                });
            }
            rates.push(f64::from(count.join_all().await.iter().sum::<u32>()) / start.elapsed().as_secs_f64());
            let mut count = JoinSet::new();
            let start = Instant::now();
            for _ in 0..clients {
                let mut raw = raw.clone();
                count.spawn(async move {
                    let mut count = 0;
                    while start.elapsed() < ROUND {
                        let n = fastrand::usize(..instances / 10);
                        common::etcd::put(&mut raw, &id(n), vec![b'v'; 180].into()).await;
                        count += 1;
                    }
                    count
                });
            }
            limits
                .push(f64::from(count.join_all().await.iter().sum::<u32>()) / start.elapsed().as_secs_f64());
        }
        let (rate, limit) = (median(rates), median(limits));
        println!(
            "  {clients:>4} clients register {rate:>6.0}/s, durable; bare transactions {limit:>6.0}/s: {:.0} %",
            100.0 * rate / limit
        );
    }
    fill(&disco, instances).await;
    let before = etcd_counters(&etcd.address).await;
    let start = Instant::now();
    renewals(&disco, instances).await;
    let (after, took) = (etcd_counters(&etcd.address).await, start.elapsed().as_secs_f64());
    println!(
        "  etcd meanwhile: {:.1} transactions and {:.1} lease renewals a second",
        (after.0 - before.0) / took,
        (after.1 - before.1) / took,
    );
}

/// Proposals (all that is written) and keep-alives of leases, so far.
async fn etcd_counters(address: &str) -> (f64, f64) {
    let http = disco::client::Http::new(address, None).unwrap();
    let (_, text) = http.raw(Method::GET, "/metrics", None, Duration::from_secs(5)).await.unwrap();
    let text = String::from_utf8_lossy(&text);
    let value = |start: &str| -> f64 {
        let lines = text.lines().filter(|line| line.starts_with(start));
        lines.filter_map(|line| line.rsplit(' ').next()?.parse::<f64>().ok()).sum()
    };
    (
        value("etcd_server_proposals_applied_total "),
        value("grpc_server_msg_received_total{grpc_method=\"LeaseKeepAlive\""),
    )
}

fn median(mut values: Vec<f64>) -> f64 {
    values.sort_by(f64::total_cmp);
    values[values.len() / 2]
}
