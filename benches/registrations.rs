//! Durable commits and registrations a second beside the disk's own append and `fdatasync`, and how long a restart takes.
//!
//! `cargo bench --profile fast --bench registrations`. Each row is measured in turns with its floor, in the same directory:
//! a plain loop that appends as many bytes at once as the store's batches had. A ratio of 100 % is the disk itself. It needs
//! an idle machine: a busy one measures its scheduler.

#![allow(
    clippy::expect_used,
    clippy::indexing_slicing,
    clippy::print_stdout,
    clippy::unwrap_used,
    reason = "a benchmark prints, and stops when anything fails"
)]

use std::{
    fs::{self, File},
    io::Write as _,
    sync::Arc,
    time::Duration,
};

#[path = "common/mod.rs"]
mod common;

use bytes::Bytes;
use disco::{
    proto::v1::{RegisterRequest, registry_client::RegistryClient},
    store::{Condition, Config, FileStore, Op, Stats, Store as _},
};
use tempfile::TempDir;
use tokio::{runtime::Runtime, task::JoinSet, time::Instant};

/// Short, so that what else the machine does meets the store and its floor alike.
const ROUND: Duration = Duration::from_millis(100);
const ROUNDS: usize = 60;
const RESTARTS: usize = 9;
const RECORDS: usize = 200_000;
/// With its key of 40 bytes a record is 220 bytes.
const VALUE: usize = 180;

fn main() {
    common::guard::start(Duration::from_secs(240));
    let runtime = Runtime::new().unwrap();
    runtime.block_on(async {
        println!("{ROUNDS} rounds of {ROUND:?} each, in turns with the floor; medians\n");
        println!("committers  commits/s  floor/s  of the floor  commits a sync  ms a sync, store  and floor");
        for committers in [1, 16, 256] {
            rate(committers).await;
        }
        println!();
        println!(
            "  clients  history  registrations/s over gRPC  floor/s  of the floor  commits a sync  bytes each  KiB more"
        );
        for clients in [1, 16, 256] {
            for history in [0, 100_000] {
                registrations(clients, history).await;
            }
        }
        println!();
        println!("restart with {RECORDS} records, median    MiB  open ms  reading the bytes ms");
        restart("  each written once: a log", RECORDS).await;
        restart("  and again: a snapshot and a log", RECORDS * 5 / 2).await;
    });
}

/// A directory on the disk that the build is on; `/tmp` may be memory.
fn directory() -> TempDir {
    TempDir::new_in(env!("CARGO_TARGET_TMPDIR")).unwrap()
}

fn record(n: usize) -> Op {
    Op::Put {
        key: format!("instances/service-{:06}/instance-{:06}", n / 20, n).into(),
        value: Bytes::from(vec![b'v'; VALUE]),
        when: Condition::Always,
    }
}

/// What was measured in one round: the store, then the disk alone with batches of the same size.
struct Round {
    commits: f64,
    batches: f64,
    seconds: f64,
    floor_batches: f64,
    floor_seconds: f64,
}

async fn rate(committers: usize) {
    let dir = directory();
    let store = Arc::new(FileStore::open(&dir.path().join("store"), Config::default()).unwrap().0);
    let mut file = File::create(dir.path().join("floor")).unwrap();
    // Not counted: the first commits find cold caches and an empty map.
    round(&store, committers).await;
    let mut rounds = vec![];
    for _ in 0..ROUNDS {
        let before = store.stats();
        let took = round(&store, committers).await;
        let Stats { commits, batches, bytes, .. } = store.stats();
        let (commits, batches, bytes) =
            (commits - before.commits, batches - before.batches, bytes - before.bytes);
        if batches == 0 {
            // The disk stood still for all of it.
            continue;
        }
        let (appends, floor_took) = appends(&mut file, bytes / batches);
        rounds.push(Round {
            commits: commits as f64,
            batches: batches as f64,
            seconds: took.as_secs_f64(),
            floor_batches: appends as f64,
            floor_seconds: floor_took.as_secs_f64(),
        });
    }
    // Medians: one long stall of a disk that others use too would outweigh all the rest of a sum.
    let median = |of: fn(&Round) -> f64| {
        let mut values: Vec<f64> = rounds.iter().map(of).collect();
        values.sort_by(f64::total_cmp);
        values.get(values.len() / 2).copied().unwrap()
    };
    let commits = median(|r| r.commits / r.seconds);
    let floor = median(|r| r.floor_batches / r.floor_seconds * r.commits / r.batches);
    println!(
        "{committers:>10}  {commits:>9.0}  {floor:>7.0}  {:>10.0} %  {:>14.1}  {:>16.3}  {:>9.3}",
        100.0 * commits / floor,
        median(|r| r.commits / r.batches),
        median(|r| 1000.0 * r.seconds / r.batches),
        median(|r| 1000.0 * r.floor_seconds / r.floor_batches),
    );
    store.close().await.unwrap();
}

/// All committers commit, each its next when the last is answered.
async fn round(store: &Arc<FileStore>, committers: usize) -> Duration {
    let start = Instant::now();
    let mut tasks = JoinSet::new();
    for _ in 0..committers {
        let store = Arc::clone(store);
        tasks.spawn(async move {
            while start.elapsed() < ROUND {
                store.commit(vec![record(fastrand::usize(..RECORDS))]).await.unwrap();
            }
        });
    }
    tasks.join_all().await;
    start.elapsed()
}

/// Clients of a real server register, each its next when the last is answered; every one is an accepted change. The server
/// keeps a history of so many entries.
async fn registrations(clients: usize, history: usize) {
    let dir = directory();
    let file = dir.path().join("disco.yaml");
    let store = dir.path().join("store");
    let text = format!(
        "roles: [registry, xds, admin]\nstore: {{file: {{dir: {}}}}}\nhistory: {{entries: {history}}}\n",
        store.display()
    );
    fs::write(&file, text).unwrap();
    let disco = common::Disco::serve(&file);
    let memory = disco.memory();
    let before = disco.metrics().await;
    let start = Instant::now();
    let mut tasks = JoinSet::new();
    for _ in 0..clients {
        let mut registry = RegistryClient::new(common::connect(&disco.grpc).await);
        tasks.spawn(async move {
            let mut count = 0_u32;
            while start.elapsed() < ROUND * 30 {
                let n = fastrand::usize(..RECORDS / 10);
                let request = RegisterRequest {
                    service: format!("service-{:06}", n / 20),
                    id: format!("instance-{n:06}"),
                    address: "127.0.0.1".into(),
                    port: 50_051,
                    weight: fastrand::u32(1..60_000),
                    ..RegisterRequest::default()
                };
                registry.register(request).await.unwrap();
                count += 1;
            }
            count
        });
    }
    let count: u32 = tasks.join_all().await.iter().sum();
    let rate = f64::from(count) / start.elapsed().as_secs_f64();
    let after = disco.metrics().await;
    let grown = |name: &str| after.get(name).unwrap() - before.get(name).copied().unwrap_or_default();
    let (commits, syncs, bytes) = (
        grown("disco_store_commits_total"),
        grown("disco_store_syncs_total"),
        grown("disco_store_written_bytes_total"),
    );
    let mut file = File::create(dir.path().join("floor")).unwrap();
    let (appends, took) = (0..10)
        .map(|_| appends(&mut file, (bytes / syncs) as u64))
        .fold((0, Duration::ZERO), |(count, time), (more, took)| (count + more, time + took));
    let floor = appends as f64 / took.as_secs_f64() * commits / syncs;
    println!(
        "{clients:>9}  {history:>7}  {rate:>25.0}  {floor:>7.0}  {:>10.0} %  {:>14.1}  {:>10.0}  {:>8}",
        100.0 * rate / floor,
        commits / syncs,
        bytes / commits,
        disco.memory() - memory
    );
}

/// The floor: appends of `bytes` each, synced one by one, for one round.
fn appends(file: &mut File, bytes: u64) -> (u64, Duration) {
    let buffer = vec![b'v'; bytes as usize];
    let start = Instant::now();
    let mut count = 0;
    while start.elapsed() < ROUND {
        file.write_all(&buffer).unwrap();
        file.sync_data().unwrap();
        count += 1;
    }
    (count, start.elapsed())
}

async fn restart(what: &str, writes: usize) {
    let dir = directory();
    let (store, _) = FileStore::open(dir.path(), Config::default()).unwrap();
    for first in (0..writes).step_by(500) {
        store.commit((first..first + 500).map(|n| record(n % RECORDS)).collect()).await.unwrap();
    }
    store.close().await.unwrap();
    let mut opens = vec![];
    let mut reads = vec![];
    let mut bytes = 0;
    for _ in 0..RESTARTS {
        let start = Instant::now();
        for entry in fs::read_dir(dir.path()).unwrap() {
            fs::read(entry.unwrap().path()).unwrap();
        }
        reads.push(start.elapsed());
        let start = Instant::now();
        let (store, recovery) = FileStore::open(dir.path(), Config::default()).unwrap();
        opens.push(start.elapsed());
        assert_eq!(recovery.keys, RECORDS);
        bytes = recovery.bytes;
        store.close().await.unwrap();
    }
    opens.sort_unstable();
    reads.sort_unstable();
    let ms = |times: &[Duration]| times.get(RESTARTS / 2).unwrap().as_secs_f64() * 1000.0;
    println!("{what:<36} {:>5.0}  {:>7.0}  {:>20.0}", bytes as f64 / 1_048_576.0, ms(&opens), ms(&reads));
}
