//! The file store against crashes, damage and a failing disk.

mod damage;
mod durability;

use std::{fs, path::Path, sync::Arc};

use futures_util::future::{BoxFuture, join_all};
use tempfile::TempDir;

use super::*;
use crate::store::{
    conformance::{Place, conforms, delete, listed, put},
    state::State,
};

#[derive(Debug)]
struct Dir {
    dir: TempDir,
    config: Config,
}

impl Dir {
    fn new(compact_after: u64) -> Self {
        let dir = TempDir::new().unwrap();
        Self { dir, config: Config { compact_after, history: 64, ..Config::default() } }
    }

    fn path(&self) -> &Path {
        self.dir.path()
    }

    fn try_open(&self) -> Result<(FileStore, Recovery), OpenError> {
        FileStore::open(self.path(), self.config.clone())
    }

    fn files(&self) -> Vec<String> {
        let name = |entry: std::io::Result<fs::DirEntry>| entry.unwrap().file_name().into_string().unwrap();
        let mut names: Vec<_> = fs::read_dir(self.path()).unwrap().map(name).collect();
        names.sort();
        names
    }
}

impl Place for Dir {
    fn open(&self) -> BoxFuture<'_, Arc<dyn Store>> {
        Box::pin(async { Arc::new(self.try_open().unwrap().0) as Arc<dyn Store> })
    }

    fn history(&self) -> usize {
        self.config.history
    }
}

fn log_name(base: u64) -> String {
    format!("log-{base:020}")
}

/// What a start makes of a directory, without the threads and the lock.
fn recovered(dir: &Path, accept_loss: bool) -> Result<(State, Recovery), OpenError> {
    recover::recover(dir, true, accept_loss).map(|recovered| (recovered.state, recovered.recovery))
}

/// Commits of puts and deletes, each a frame by itself, and the state after each: the state before the first is first.
async fn filled(dir: &Dir, commits: usize) -> Vec<State> {
    let (store, _) = dir.try_open().unwrap();
    let mut states = vec![store.readable.state().clone()];
    for n in 0..commits {
        let value = "v".repeat(n % 7);
        let ops = vec![put(&format!("k/{}", n % 5), &value), delete(&format!("k/{}", (n + 2) % 5))];
        store.commit(ops).await.unwrap();
        states.push(store.readable.state().clone());
    }
    store.close().await.unwrap();
    states
}

#[tokio::test]
async fn a_file_store_conforms() {
    conforms(|| Dir::new(16 << 20)).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_file_store_that_compacts_all_the_time_conforms() {
    conforms(|| Dir::new(0)).await;
}

#[tokio::test]
async fn two_stores_never_share_a_directory() {
    let dir = Dir::new(1 << 20);
    let (store, _) = dir.try_open().unwrap();
    let refused = dir.try_open().unwrap_err();
    assert!(matches!(&refused, OpenError::Locked(path) if path == dir.path()), "{refused}");
    assert!(refused.to_string().contains(&dir.path().display().to_string()), "{refused}");
    store.close().await.unwrap();
    dir.try_open().unwrap().0.close().await.unwrap();
}

#[tokio::test]
async fn only_the_owner_reads_the_files() {
    use std::os::unix::fs::PermissionsExt as _;
    let dir = Dir::new(0);
    let inner = dir.path().join("a/b");
    let (store, _) = FileStore::open(&inner, dir.config.clone()).unwrap();
    store.commit(vec![put("k", "secret")]).await.unwrap();
    store.close().await.unwrap();
    let mode = |path: &Path| fs::metadata(path).unwrap().permissions().mode() & 0o777;
    assert_eq!(mode(&inner), 0o700);
    for entry in fs::read_dir(&inner).unwrap() {
        let path = entry.unwrap().path();
        assert_eq!(mode(&path), 0o600, "{}", path.display());
    }
}

#[tokio::test]
async fn commits_that_wait_share_one_sync() {
    let dir = Dir::new(1 << 20);
    let (store, _) = dir.try_open().unwrap();
    let outcomes = join_all((0..500).map(|n| store.commit(vec![put(&n.to_string(), "")]))).await;
    assert!(outcomes.iter().all(Result::is_ok));
    let stats = store.stats();
    assert_eq!(stats.commits, 500);
    assert!(stats.batches < 100, "{stats:?}");
    store.close().await.unwrap();
}

#[tokio::test]
async fn a_snapshot_replaces_the_log() {
    let dir = Dir::new(4096);
    let (store, _) = dir.try_open().unwrap();
    let value = "v".repeat(100);
    for n in 0..500 {
        store.commit(vec![put(&format!("k/{}", n % 3), &value)]).await.unwrap();
    }
    store.close().await.unwrap();
    assert!(store.stats().snapshots > 2, "{:?}", store.stats());
    let files = dir.files();
    assert_eq!(files.len(), 3, "a lock, a snapshot, a log: {files:?}");
    let size: u64 = files.iter().map(|file| fs::metadata(dir.path().join(file)).unwrap().len()).sum();
    assert!(size < 3 * 4096, "{size} bytes in {files:?}");
    let (store, recovery) = dir.try_open().unwrap();
    assert_eq!((recovery.revision, recovery.keys, recovery.cut), (Revision(500), 3, None));
    let revisions: Vec<_> =
        listed(&store, "k/").await.into_iter().map(|(_, _, revision)| revision.0).collect();
    assert_eq!(revisions, [499, 500, 498]);
    store.close().await.unwrap();
}

#[test]
fn commits_are_answered_also_when_the_runtime_is_gone_that_the_store_was_opened_in() {
    let dir = Dir::new(1 << 20);
    let runtime = || tokio::runtime::Builder::new_current_thread().enable_time().build().unwrap();
    let opened_in = runtime();
    let (store, _) = opened_in.block_on(async { dir.try_open().unwrap() });
    drop(opened_in);
    runtime().block_on(async {
        let commits = join_all((0..50).map(|n| store.commit(vec![put(&format!("k{n}"), "v")])));
        let answers = tokio::time::timeout(Duration::from_secs(10), commits).await.unwrap();
        assert!(answers.iter().all(Result::is_ok), "{answers:?}");
        store.close().await.unwrap();
    });
}
