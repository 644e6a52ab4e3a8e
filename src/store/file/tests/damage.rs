//! Any prefix of the accepted commits, or a refusal: never anything else.

use super::*;

/// A directory in memory where there is one: thousands of starts need no disk.
fn scratch() -> TempDir {
    TempDir::new_in("/dev/shm").or_else(|_| TempDir::new()).unwrap()
}

/// Opens a copy of `files` with one replaced, and checks that what is found was once the state.
fn check(files: &[(String, Vec<u8>)], states: &[State], what: &str) -> Option<(State, Recovery)> {
    let dir = scratch();
    for (name, bytes) in files {
        fs::write(dir.path().join(name), bytes).unwrap();
    }
    match recovered(dir.path(), false) {
        Ok((state, recovery)) => {
            let accepted = &states[state.revision().0 as usize];
            assert!(state == *accepted, "{what}: {state:?} is not {accepted:?}");
            // What was recovered is found again as it is.
            let (again, second) = recovered(dir.path(), false).unwrap();
            assert!(again == state && second.cut.is_none(), "{what}: the second start differs: {second:?}");
            Some((state, recovery))
        }
        Err(OpenError::Damaged(_)) => None,
        Err(error) => panic!("{what}: {error}"),
    }
}

fn contents(dir: &Dir) -> Vec<(String, Vec<u8>)> {
    let read = |name: String| (name.clone(), fs::read(dir.path().join(name)).unwrap());
    dir.files().into_iter().filter(|name| name != "lock").map(read).collect()
}

/// Where each frame of a log begins, and where the last ends.
fn frames(log: &[u8]) -> Vec<usize> {
    let marker = format::Header::decode(format::Kind::Log, log).unwrap().marker;
    let mut at = vec![format::HEADER];
    while let Some((_, next)) = format::frame_at(log, *at.last().unwrap(), marker) {
        at.push(next);
    }
    at
}

#[tokio::test]
async fn a_log_cut_anywhere_holds_the_whole_commits_before() {
    let dir = Dir::new(1 << 20);
    let states = filled(&dir, 20).await;
    let (name, log) = contents(&dir).remove(0);
    let frames = frames(&log);
    assert_eq!(frames.len(), 21);
    for cut in 0..=log.len() {
        let what = format!("cut at {cut}");
        let (state, recovery) = check(&[(name.clone(), log[..cut].to_vec())], &states, &what).unwrap();
        let whole = frames.iter().filter(|at| **at <= cut).count().saturating_sub(1);
        assert_eq!(state.revision(), Revision(whole as u64), "{what}");
        let good = if cut < format::HEADER { 0 } else { frames[whole] };
        let cut_bytes = recovery.cut.map_or(0, |cut| cut.bytes);
        assert_eq!(cut_bytes, (cut - good) as u64, "{what}");
    }
}

#[tokio::test]
async fn a_log_with_a_flipped_byte_is_refused_or_loses_the_last_record() {
    let dir = Dir::new(1 << 20);
    let states = filled(&dir, 20).await;
    let (name, log) = contents(&dir).remove(0);
    let last = frames(&log)[19];
    for at in 0..log.len() {
        for mask in [0xff, 1 << (at % 8)] {
            let mut flipped = log.clone();
            flipped[at] ^= mask;
            let what = format!("byte {at} ^ {mask}");
            let found =
                check(&[(name.clone(), flipped)], &states, &what).map(|(state, _)| state.revision().0);
            assert_eq!(found, (at >= last).then_some(19), "{what}");
        }
    }
}

#[tokio::test]
async fn whole_records_in_a_wrong_place_are_refused() {
    let dir = Dir::new(1 << 20);
    let states = filled(&dir, 6).await;
    let (name, log) = contents(&dir).remove(0);
    let at = frames(&log);
    let record = |n: usize| &log[at[n]..at[n + 1]];
    for (what, order) in [
        ("one is missing", &[0, 1, 3, 4, 5][..]),
        ("the first is missing", &[1, 2, 3, 4, 5]),
        ("one is there twice", &[0, 1, 1, 2, 3, 4, 5]),
        ("the last is there twice", &[0, 1, 2, 3, 4, 5, 5]),
        ("two are swapped", &[0, 1, 2, 4, 3, 5]),
    ] {
        let mut changed = log[..format::HEADER].to_vec();
        order.iter().for_each(|n| changed.extend_from_slice(record(*n)));
        assert_eq!(check(&[(name.clone(), changed)], &states, what), None, "{what}");
    }
}

#[tokio::test]
async fn a_torn_end_of_any_shape_is_cut() {
    let dir = Dir::new(1 << 20);
    let states = filled(&dir, 10).await;
    let (name, log) = contents(&dir).remove(0);
    let last = frames(&log)[9];
    let marker = log[last..last + 8].to_vec();
    let mut huge = marker.clone();
    huge.extend_from_slice(&[0xff; 40]);
    let mut fuller = log[last..].to_vec();
    let end = fuller.len() - 3;
    fuller.truncate(end);
    for (what, tail) in [
        ("zeros", vec![0; 9000]),
        ("ones", vec![0xff; 100]),
        ("a garbage length", huge),
        ("half a record", fuller),
        ("many markers", marker.repeat(500)),
        ("one byte", vec![1]),
    ] {
        let mut torn = log.clone();
        torn.extend_from_slice(&tail);
        let (state, recovery) = check(&[(name.clone(), torn)], &states, what).unwrap();
        assert_eq!(state.revision(), Revision(10), "{what}");
        assert_eq!(recovery.cut.unwrap().bytes, tail.len() as u64, "{what}");
    }
}

#[tokio::test]
async fn a_damaged_middle_is_named_and_refused_until_the_loss_is_accepted() {
    let dir = Dir::new(1 << 20);
    let states = filled(&dir, 10).await;
    let (name, mut log) = contents(&dir).remove(0);
    let at = frames(&log)[4];
    log[at + 30] ^= 0x40;
    fs::write(dir.path().join(&name), &log).unwrap();

    let refused = dir.try_open().unwrap_err();
    let OpenError::Damaged(damage) = &refused else { panic!("{refused}") };
    assert_eq!((&damage.file, damage.offset), (&dir.path().join(&name), at as u64));
    for part in
        [name.as_str(), &format!("byte {at}"), "--accept-loss", "store.file.accept_loss: true", "backup"]
    {
        assert!(refused.to_string().contains(part), "{part:?} is not in: {refused}");
    }
    assert_eq!(fs::read(dir.path().join(&name)).unwrap(), log, "nothing was changed");

    let accepting = Config { accept_loss: true, ..dir.config.clone() };
    let (store, recovery) = FileStore::open(dir.path(), accepting.clone()).unwrap();
    let loss = recovery.loss.unwrap();
    assert_eq!((loss.damage, loss.kept), (damage.clone(), Revision(4)));
    assert_eq!(fs::read(&loss.aside[0]).unwrap(), log);
    assert_eq!(store.list("").await.unwrap().entries, states[4].list("").entries);
    let next = store.commit(vec![put("new", "1")]).await.unwrap();
    assert!(next > Revision(10), "revision {next} was given out before");
    store.close().await.unwrap();

    // From then on it is whole again, with the option or without.
    for config in [accepting, dir.config.clone()] {
        let (store, recovery) = FileStore::open(dir.path(), config).unwrap();
        assert_eq!((recovery.revision, recovery.loss), (next, None));
        assert_eq!(store.get("new").await.unwrap().unwrap().revision, next);
        store.close().await.unwrap();
    }
}

/// A directory in the middle of a compaction: a snapshot, the log since, and the log that follows it.
async fn two_logs() -> (Dir, Vec<State>) {
    let dir = Dir::new(1 << 20);
    let states = filled(&dir, 6).await;
    let (state, _) = recovered(dir.path(), false).unwrap();
    log::Log::create(dir.path(), state.revision()).unwrap();
    compact::compact(dir.path(), &state).unwrap();
    let mut states = states;
    states.extend(filled(&dir, 6).await.into_iter().skip(1));
    log::Log::create(dir.path(), Revision(12)).unwrap();
    states.extend(filled(&dir, 6).await.into_iter().skip(1));
    let snapshot = format!("snapshot-{:020}", 6);
    assert_eq!(dir.files(), ["lock".into(), log_name(6), log_name(12), snapshot]);
    assert_eq!(states.len(), 19);
    (dir, states)
}

#[tokio::test]
async fn a_flipped_byte_in_any_file_is_refused_or_at_the_very_end() {
    let (dir, states) = two_logs().await;
    let files = contents(&dir);
    assert_eq!(check(&files, &states, "whole").unwrap().0.revision(), Revision(18));
    let newest = 1;
    let last = frames(&files[newest].1)[5];
    for index in 0..files.len() {
        for at in 0..files[index].1.len() {
            let mut flipped = files.clone();
            flipped[index].1[at] ^= 0x10;
            let what = format!("{} byte {at}", files[index].0);
            let found = check(&flipped, &states, &what).map(|(state, _)| state.revision().0);
            assert_eq!(found, (index == newest && at >= last).then_some(17), "{what}");
        }
    }
}

#[tokio::test]
async fn only_the_newest_log_may_be_torn() {
    let (dir, states) = two_logs().await;
    let files = contents(&dir);
    for index in [0, 2] {
        for keep in [0, 1, files[index].1.len() - 1] {
            let mut torn = files.clone();
            torn[index].1.truncate(keep);
            assert_eq!(check(&torn, &states, ""), None, "{} cut to {keep}", files[index].0);
        }
    }
}

#[tokio::test]
async fn a_missing_file_is_refused_and_named() {
    let (dir, states) = two_logs().await;
    let files = contents(&dir);
    for (remove, missing) in [
        (vec![log_name(6)], log_name(6)),
        (vec![format!("snapshot-{:020}", 6)], format!("snapshot-{:020}", 6)),
        (vec![log_name(6), log_name(12)], log_name(6)),
        (files.iter().map(|(name, _)| name.clone()).collect(), log_name(0)),
    ] {
        let left: Vec<_> = files.iter().filter(|(name, _)| !remove.contains(name)).cloned().collect();
        assert_eq!(check(&left, &states, ""), None, "without {remove:?}");
        for name in &remove {
            fs::rename(dir.path().join(name), dir.path().join(name).with_extension("away")).unwrap();
        }
        let refused = dir.try_open().unwrap_err().to_string();
        assert!(refused.contains(&missing) && refused.contains("missing"), "without {remove:?}: {refused}");
        for name in &remove {
            fs::rename(dir.path().join(name).with_extension("away"), dir.path().join(name)).unwrap();
        }
    }
    assert!(dir.try_open().is_ok());
}

#[tokio::test]
async fn a_lost_snapshot_can_be_accepted_too() {
    let (dir, states) = two_logs().await;
    fs::write(dir.path().join(format!("snapshot-{:020}", 6)), b"nonsense").unwrap();
    assert!(matches!(dir.try_open(), Err(OpenError::Damaged(_))));
    let accepting = Config { accept_loss: true, ..dir.config.clone() };
    let (store, recovery) = FileStore::open(dir.path(), accepting).unwrap();
    assert_eq!(recovery.keys, 0);
    assert_eq!(recovery.loss.unwrap().aside.len(), 3);
    assert!(store.commit(vec![]).await.unwrap().0 >= states.len() as u64);
    store.close().await.unwrap();
}

/// Every state of the directory that a crash during a compaction can leave.
#[tokio::test]
async fn a_crash_anywhere_in_a_compaction_loses_nothing() {
    let (dir, states) = two_logs().await;
    let old = contents(&dir);
    let state = states.last().unwrap();
    log::Log::create(dir.path(), state.revision()).unwrap();
    compact::compact(dir.path(), state).unwrap();
    let new = contents(&dir);
    let (log, snapshot) = (new[0].clone(), new[1].clone());
    assert_eq!(log.0, log_name(18));

    let with = |more: &[(String, Vec<u8>)]| [old.as_slice(), more].concat();
    let part = |(name, bytes): &(String, Vec<u8>), len: usize| (format!("{name}.tmp"), bytes[..len].to_vec());
    let mut crashes = vec![with(std::slice::from_ref(&log)), with(&new), new.clone()];
    crashes.extend((0..=log.1.len()).map(|len| with(&[part(&log, len)])));
    crashes.extend((0..=snapshot.1.len()).map(|len| with(&[log.clone(), part(&snapshot, len)])));
    for removed in 0..1 << old.len() {
        let left =
            old.iter().enumerate().filter(|(n, _)| removed & (1 << n) == 0).map(|(_, file)| file.clone());
        crashes.push(left.chain(new.clone()).collect());
    }
    for (n, files) in crashes.iter().enumerate() {
        let (found, recovery) = check(files, &states, &format!("crash {n}")).unwrap();
        assert!(found == *state && recovery.cut.is_none(), "crash {n}: {recovery:?}");
    }
}
