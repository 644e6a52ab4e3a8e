//! Commits a second of the store in etcd beside etcd's own limit, and a listing of 200,000 entries beside etcd's own answer.
//!
//! `make tools`, then `cargo bench --profile fast --bench etcd`. One etcd with its data on the disk of the build; each row is
//! measured in turns with its limit: a bare client that sends transactions with the same puts, as many at once. It needs an
//! idle machine.

#![allow(
    clippy::expect_used,
    clippy::print_stdout,
    clippy::unwrap_used,
    reason = "a benchmark prints, and stops when anything fails"
)]

use std::{sync::Arc, time::Duration};

#[path = "common/mod.rs"]
mod common;

use bytes::Bytes;
use disco::{
    proto::etcd::{RangeRequest, kv_client::KvClient},
    store::{Condition, EtcdConfig, EtcdStore, Op, Store as _},
};
use tokio::{runtime::Runtime, task::JoinSet, time::Instant};
use tonic::transport::Channel;

const ROUND: Duration = Duration::from_millis(500);
const ROUNDS: usize = 7;
const RECORDS: usize = 200_000;
/// With its key of 40 bytes a record is 220 bytes.
const VALUE: usize = 180;

fn main() {
    common::guard::start(Duration::from_secs(240));
    Runtime::new().unwrap().block_on(async {
        let etcd = common::etcd::Etcd::start();
        let config = EtcdConfig { endpoints: vec![etcd.address.clone()], ..EtcdConfig::default() };
        let store = Arc::new(EtcdStore::open(&config).unwrap());
        store.status().wait_for(|status| status.session.is_some()).await.unwrap();
        let raw = KvClient::connect(etcd.address.clone()).await.unwrap();
        println!("{ROUNDS} rounds of {ROUND:?} each, in turns with the limit; medians\n");
        println!("committers  commits/s  limit/s  of the limit");
        for committers in [1, 16, 256] {
            rate(&store, &raw, committers).await;
        }
        listing(&store, &raw).await;
        store.close().await.unwrap();
    });
}

fn key(n: usize) -> String {
    format!("instances/service-{:06}/instance-{n:06}", n / 20)
}

fn record(n: usize) -> Op {
    Op::Put { key: key(n).into(), value: vec![b'v'; VALUE].into(), when: Condition::Always }
}

async fn rate(store: &Arc<EtcdStore>, raw: &KvClient<Channel>, committers: usize) {
    let (mut rates, mut limits) = (vec![], vec![]);
    for _ in 0..ROUNDS {
        let store = Arc::clone(store);
        let commit = move || {
            let store = Arc::clone(&store);
            async move {
                store.commit(vec![record(fastrand::usize(..RECORDS))]).await.unwrap();
            }
        };
        rates.push(round(committers, commit).await);
        let raw = raw.clone();
        let transaction = move || {
            let mut raw = raw.clone();
            async move {
                let value = vec![b'v'; VALUE].into();
                common::etcd::put(&mut raw, &key(fastrand::usize(..RECORDS)), value).await;
            }
        };
        limits.push(round(committers, transaction).await);
    }
    let (rate, limit) = (median(rates), median(limits));
    println!("{committers:>10}  {rate:>9.0}  {limit:>7.0}  {:>10.0} %", 100.0 * rate / limit);
}

/// How many a second, by that many workers, each its next when the last is done.
async fn round<F>(workers: usize, work: impl Fn() -> F + Clone + Send + 'static) -> f64
where
    F: Future<Output = ()> + Send,
{
    let start = Instant::now();
    let mut tasks = JoinSet::new();
    for _ in 0..workers {
        let work = work.clone();
        tasks.spawn(async move {
            let mut count = 0_u32;
            while start.elapsed() < ROUND {
                work().await;
                count += 1;
            }
            count
        });
    }
    let count: u32 = tasks.join_all().await.iter().sum();
    f64::from(count) / start.elapsed().as_secs_f64()
}

async fn listing(store: &EtcdStore, raw: &KvClient<Channel>) {
    for first in (0..RECORDS).step_by(100) {
        store.commit((first..first + 100).map(record).collect()).await.unwrap();
    }
    let (mut times, mut limits) = (vec![], vec![]);
    for _ in 0..ROUNDS {
        let start = Instant::now();
        assert_eq!(store.list("instances/").await.unwrap().entries.len(), RECORDS);
        times.push(start.elapsed().as_secs_f64() * 1000.0);
        let request = RangeRequest {
            key: Bytes::from_static(b"/disco/data/instances/"),
            range_end: Bytes::from_static(b"/disco/data/instances0"),
            ..RangeRequest::default()
        };
        let start = Instant::now();
        let all = raw.clone().max_decoding_message_size(1 << 30).range(request).await.unwrap();
        assert_eq!(all.into_inner().kvs.len(), RECORDS);
        limits.push(start.elapsed().as_secs_f64() * 1000.0);
    }
    println!(
        "\nlisting {RECORDS} entries: {:.0} ms, one bare Range: {:.0} ms",
        median(times),
        median(limits)
    );
}

fn median(mut values: Vec<f64>) -> f64 {
    values.sort_by(f64::total_cmp);
    values.get(values.len() / 2).copied().unwrap()
}
