//! Durable commits a second beside the disk's own append and `fdatasync`, and how long a restart takes.
//!
//! `cargo bench --profile fast --bench registrations`. Each row is measured in turns with its floor, in the same directory:
//! a plain loop that appends as many bytes, as often, as the store's batches had. A ratio of 100 % is the disk itself.

#![allow(
    clippy::print_stdout,
    clippy::unwrap_used,
    reason = "a benchmark prints, and stops when anything fails"
)]

use std::{
    fs::{self, File},
    io::Write as _,
    path::Path,
    sync::Arc,
    time::Duration,
};

use bytes::Bytes;
use disco::store::{Condition, Config, FileStore, Op, Stats, Store as _};
use tempfile::TempDir;
use tokio::{runtime::Runtime, task::JoinSet, time::Instant};

const ROUNDS: usize = 5;
const ROUND: Duration = Duration::from_secs(1);
const RECORDS: usize = 200_000;
/// With its key of 40 bytes a record is 220 bytes.
const VALUE: usize = 180;

fn main() {
    let runtime = Runtime::new().unwrap();
    runtime.block_on(async {
        println!("{ROUNDS} rounds of {ROUND:?} each, in turns with the floor; medians\n");
        println!("committers  commits/s  floor/s  of the floor  commits a sync  ms a sync, store  and floor");
        for committers in [1, 16, 256] {
            rate(committers).await;
        }
        println!();
        println!("restart with {RECORDS} records   MiB    open ms  reading the bytes ms");
        restart("  all in the log", Config { compact_after: u64::MAX, ..Config::default() }).await;
        restart("  snapshot and log", Config::default()).await;
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

async fn rate(committers: usize) {
    let dir = directory();
    let store = Arc::new(FileStore::open(&dir.path().join("store"), Config::default()).unwrap().0);
    // Not counted: the first commits find cold caches and an empty map.
    round(&store, committers).await;
    let mut rows = vec![];
    for _ in 0..ROUNDS {
        let before = store.stats();
        let took = round(&store, committers).await;
        let Stats { commits, batches, bytes, .. } = store.stats();
        let (commits, batches) = (commits - before.commits, batches - before.batches);
        let floor = appends(dir.path(), batches, (bytes - before.bytes) / batches);
        rows.push(Row { commits, batches, took, floor });
    }
    let median = |of: fn(&Row) -> f64| {
        let mut values: Vec<f64> = rows.iter().map(of).collect();
        values.sort_by(f64::total_cmp);
        values.get(values.len() / 2).copied().unwrap()
    };
    println!(
        "{committers:>10}  {:>9.0}  {:>7.0}  {:>10.0} %  {:>14.1}  {:>16.3}  {:>9.3}",
        median(|row| row.commits as f64 / row.took.as_secs_f64()),
        median(|row| row.commits as f64 / row.floor.as_secs_f64()),
        median(|row| 100.0 * row.floor.as_secs_f64() / row.took.as_secs_f64()),
        median(|row| row.commits as f64 / row.batches as f64),
        median(|row| 1000.0 * row.took.as_secs_f64() / row.batches as f64),
        median(|row| 1000.0 * row.floor.as_secs_f64() / row.batches as f64),
    );
    store.close().await.unwrap();
}

struct Row {
    commits: u64,
    batches: u64,
    took: Duration,
    /// What the disk alone took for the same batches.
    floor: Duration,
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

/// The floor: `count` appends of `bytes` each, synced one by one.
fn appends(dir: &Path, count: u64, bytes: u64) -> Duration {
    let path = dir.join("floor");
    let mut file = File::create(&path).unwrap();
    let buffer = vec![b'v'; bytes as usize];
    let start = Instant::now();
    for _ in 0..count {
        file.write_all(&buffer).unwrap();
        file.sync_data().unwrap();
    }
    let took = start.elapsed();
    fs::remove_file(path).unwrap();
    took
}

async fn restart(what: &str, config: Config) {
    let dir = directory();
    let (store, _) = FileStore::open(dir.path(), config.clone()).unwrap();
    for first in (0..RECORDS).step_by(500) {
        store.commit((first..first + 500).map(record).collect()).await.unwrap();
    }
    store.close().await.unwrap();
    let mut opens = vec![];
    let mut reads = vec![];
    let mut bytes = 0;
    for _ in 0..ROUNDS {
        let start = Instant::now();
        for entry in fs::read_dir(dir.path()).unwrap() {
            fs::read(entry.unwrap().path()).unwrap();
        }
        reads.push(start.elapsed());
        let start = Instant::now();
        let (store, recovery) = FileStore::open(dir.path(), config.clone()).unwrap();
        opens.push(start.elapsed());
        assert_eq!(recovery.keys, RECORDS);
        bytes = recovery.bytes;
        store.close().await.unwrap();
    }
    opens.sort_unstable();
    reads.sort_unstable();
    let ms = |times: &[Duration]| times.get(ROUNDS / 2).unwrap().as_secs_f64() * 1000.0;
    println!("{what:<32} {:>5.0}  {:>9.0}  {:>20.0}", bytes as f64 / 1_048_576.0, ms(&opens), ms(&reads));
}
