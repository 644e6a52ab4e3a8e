//! What was answered stays, whatever happens to the process or the disk.

use std::{
    collections::BTreeMap,
    io::{BufRead as _, BufReader},
    process::{Command, Stdio},
};

use proptest::prelude::*;

use super::*;

/// Names the directory to a child process of [`accepted_commits_survive_a_kill`].
const CHILD: &str = "DISCO_TEST_STORE_CHILD";

#[tokio::test(flavor = "multi_thread")]
async fn accepted_commits_survive_a_kill() {
    if let Some(dir) = std::env::var_os(CHILD) {
        return commit_for_ever(Path::new(&dir)).await;
    }
    let dir = Dir::new(2048);
    for round in 0..3 {
        let name = "store::file::tests::durability::accepted_commits_survive_a_kill";
        let mut child = Command::new(std::env::current_exe().unwrap())
            .args(["--exact", name, "--nocapture", "--test-threads=1"])
            .env(CHILD, dir.path())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let mut lines = BufReader::new(child.stdout.take().unwrap()).lines();
        let mut accepted = BTreeMap::new();
        let mut take = |line: &str| {
            if let Some((key, revision)) =
                line.strip_prefix("accepted ").and_then(|line| line.split_once(' '))
            {
                accepted.insert(key.to_owned(), revision.parse().unwrap());
            }
        };
        for _ in 0..300 * (round + 1) {
            take(&lines.next().expect("the child ended").unwrap());
        }
        child.kill().unwrap();
        child.wait().unwrap();
        // What it had answered and this side had not yet read. The last line may be half of one.
        let rest: Vec<_> = lines.map_while(Result::ok).collect();
        rest.iter().rev().skip(1).for_each(|line| take(line));

        let (store, _) = dir.try_open().unwrap();
        for (key, revision) in &accepted {
            let entry = store.get(key).await.unwrap().unwrap_or_else(|| panic!("{key} was lost"));
            assert!(entry.revision >= Revision(*revision), "{key}: {} < {revision}", entry.revision);
        }
        store.close().await.unwrap();
    }
}

async fn commit_for_ever(dir: &Path) {
    use std::io::Write as _;
    let (store, _) = FileStore::open(dir, Config { compact_after: 2048, ..Config::default() }).unwrap();
    let committer = |who: usize| {
        let store = &store;
        async move {
            for n in 0.. {
                let key = format!("k/{who}/{}", n % 50);
                let revision = store.commit(vec![put(&key, "value")]).await.unwrap();
                // One write a line, whole or not at all: several committers share the output.
                let line = format!("\naccepted {key} {revision}\n");
                std::io::stdout().write_all(line.as_bytes()).unwrap();
            }
        }
    };
    join_all((0..8).map(committer)).await;
}

#[tokio::test]
async fn a_full_disk_fails_the_commit_and_then_recovers() {
    for (faults, heals_at_once) in [
        (Faults::WRITE, true),
        (Faults::SYNC, true),
        (Faults::WRITE | Faults::REPAIR, false),
        (Faults::SYNC | Faults::REPAIR, false),
    ] {
        let dir = Dir::new(1 << 20);
        let (store, _) = dir.try_open().unwrap();
        let mut watch = store.watch("", Revision(0)).await.unwrap();
        let first = store.commit(vec![put("a", "1")]).await.unwrap();
        dir.config.faults.set(faults);
        for _ in 0..3 {
            let failed = store.commit(vec![put("a", "2"), put("b", "2")]).await.unwrap_err();
            let StoreError::Failed(message) = &failed else { panic!("{failed:?}") };
            assert!(message.contains(&log_name(0)), "{message}");
        }
        assert_eq!(listed(&store, "").await, [("a".into(), "1".into(), first)]);
        if !heals_at_once {
            dir.config.faults.set(Faults::REPAIR);
            assert!(store.commit(vec![put("a", "3")]).await.is_err(), "acknowledged behind an unknown tail");
        }
        dir.config.faults.set(0);
        let second = store.commit(vec![put("c", "1")]).await.unwrap();
        assert_eq!(watch.next().await.unwrap().revision, first);
        assert_eq!(watch.next().await.unwrap().revision, second);
        store.close().await.unwrap();

        let (store, recovery) = dir.try_open().unwrap();
        assert_eq!(recovery.cut, None);
        let wanted = [("a".into(), "1".into(), first), ("c".into(), "1".into(), second)];
        assert_eq!(listed(&store, "").await, wanted, "faults {faults}");
        store.close().await.unwrap();
    }
}

#[tokio::test]
async fn a_process_that_ends_with_a_failed_write_leaves_a_tail_that_is_cut() {
    let dir = Dir::new(1 << 20);
    let (store, _) = dir.try_open().unwrap();
    let first = store.commit(vec![put("a", "1")]).await.unwrap();
    dir.config.faults.set(Faults::WRITE | Faults::REPAIR);
    assert!(store.commit(vec![put("a", "2")]).await.is_err());
    store.close().await.unwrap();
    dir.config.faults.set(0);
    let (store, recovery) = dir.try_open().unwrap();
    assert!(recovery.cut.is_some_and(|cut| cut.bytes > 0));
    assert_eq!(listed(&store, "").await, [("a".into(), "1".into(), first)]);
    store.close().await.unwrap();
}

#[derive(Debug, Clone)]
enum Step {
    Commit(Vec<(u8, Option<String>)>),
    Refused(u8),
    Reopen,
}

fn step() -> impl Strategy<Value = Step> {
    let op = (0..20u8, proptest::option::weighted(0.7, "[a-z]{0,40}"));
    prop_oneof![
        8 => proptest::collection::vec(op, 0..5).prop_map(Step::Commit),
        1 => (0..20u8).prop_map(Step::Refused),
        1 => Just(Step::Reopen),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 32, ..ProptestConfig::default() })]

    #[test]
    fn a_store_is_a_map_through_reopening_and_compaction(
        steps in proptest::collection::vec(step(), 1..60),
        compact_after in prop_oneof![Just(0u64), Just(700), Just(1 << 20)],
    ) {
        let runtime = tokio::runtime::Builder::new_current_thread().build().unwrap();
        runtime.block_on(async {
            let dir = Dir::new(compact_after);
            let mut model = BTreeMap::new();
            let mut last = Revision(0);
            let mut store = dir.try_open().unwrap().0;
            for step in steps {
                match step {
                    Step::Commit(ops) => {
                        let op = |(key, value): &(u8, Option<String>)| match value {
                            Some(value) => put(&format!("k{key:02}"), value),
                            None => delete(&format!("k{key:02}")),
                        };
                        let revision = store.commit(ops.iter().map(op).collect()).await.unwrap();
                        assert!(revision > last);
                        last = revision;
                        for (key, value) in ops {
                            let key = format!("k{key:02}");
                            match value {
                                Some(value) => model.insert(key, (value, revision)),
                                None => model.remove(&key),
                            };
                        }
                    }
                    Step::Refused(key) => {
                        let key: Arc<str> = format!("k{key:02}").into();
                        let when = crate::store::Condition::Unchanged(Revision(last.0 + 1));
                        let outcome = store.commit(vec![put("never", ""), Op::Delete { key, when }]).await;
                        let conflicted = matches!(outcome, Err(StoreError::Conflict { .. }));
                        assert!(conflicted, "{outcome:?}");
                    }
                    Step::Reopen => {
                        store.close().await.unwrap();
                        let (reopened, recovery) = dir.try_open().unwrap();
                        assert_eq!((recovery.revision, recovery.cut), (last, None));
                        store = reopened;
                    }
                }
                let model: Vec<_> =
                    model.iter().map(|(key, (value, revision))| (key.clone(), value.clone(), *revision)).collect();
                assert_eq!(listed(&store, "").await, model);
            }
            store.close().await.unwrap();
        });
    }
}
