//! Rule N12: what a backup does not know of is not given out again.

use futures_util::FutureExt as _;

use super::{super::record, *};
use crate::{
    model::Revision,
    registry,
    store::{Backup, Condition, Entry, Listing, MemoryStore, Op, Store as _},
};

fn entry(set: &PeerSet) -> Entry {
    let key = record::set_key(&set.spec.name);
    Entry { key, value: record::encode_set(set), revision: set.revision }
}

/// As it is read after it was written.
pub(super) fn kept(set: &PeerSet) -> PeerSet {
    record::decode_set(&entry(set)).unwrap()
}

/// As it is when a backup of `set` was restored over `present`.
pub(super) fn restored(set: &PeerSet, present: &PeerSet) -> PeerSet {
    let store = MemoryStore::default();
    let Entry { key, value, .. } = entry(present);
    let put = Op::Put { key: key.clone(), value, when: Condition::Absent };
    store.commit(vec![put]).now_or_never().unwrap().unwrap();
    let listing = Listing { revision: Revision(9), entries: vec![entry(set)] };
    let backup = Backup { taken_at: SystemTime::UNIX_EPOCH, listing };
    registry::restore(&store, backup, true).now_or_never().unwrap().unwrap();
    let entry = store.get(&key).now_or_never().unwrap().unwrap().unwrap();
    record::decode_set(&entry).unwrap()
}

#[test]
fn n12_numbers_jump_beyond_what_came_after_the_backup() {
    let backup = founded(Kind::Etcd, 3);
    let mut present = backup.clone();
    for n in 4..9 {
        come(&mut present, newcomer(n)).unwrap();
    }
    let mut set = restored(&backup, &present);
    assert_eq!(set.founding, backup.founding);
    assert_eq!((set.cluster, set.generation), (backup.cluster, backup.generation));
    let node = come(&mut set, newcomer(4)).unwrap();
    assert_eq!(node, 9 + 1000);
    assert!(!present.peers.contains_key(&NodeId(node)));
    assert_eq!(come(&mut set, newcomer(3)), Ok(3), "those that it knows of are who they were");
    set.refound(set.cluster, 1, ClusterId(2)).unwrap();
    assert_eq!(set.generation, 1002);
}

#[test]
fn n12_who_was_removed_before_the_backup_stays_so() {
    let mut set = founded(Kind::Etcd, 3);
    let facts = runs(says(""), "1 2");
    set.propose(&Want::Remove(key(3)), set.revision, &facts, SystemTime::UNIX_EPOCH).unwrap();
    set.confirm(set.revision).unwrap();
    let mut set = restored(&set, &collecting(Kind::Etcd, 3));
    assert!(matches!(come(&mut set, newcomer(3)), Err(Refusal::Removed { .. })));
    assert!(matches!(
        come(&mut set, Newcomer { at: newcomer(3).at, ..newcomer(4) }),
        Err(Refusal::AddressUsed { .. })
    ));
}

#[test]
fn n2_a_list_that_may_have_been_frozen_after_the_backup_is_not_frozen_differently() {
    let mut backup = collecting(Kind::Etcd, 3);
    for n in 1..=2 {
        come(&mut backup, newcomer(n)).unwrap();
    }
    let mut present = backup.clone();
    come(&mut present, newcomer(3)).unwrap();
    let (one, two) = (restored(&backup, &present), restored(&backup, &present));
    assert!(one.founding.is_none());
    assert_eq!(one.peers.len(), 2);
    assert!(one.generation > present.generation + 100);
    assert!(one.cluster != present.cluster && one.cluster != two.cluster);
    let mut set = one;
    come(&mut set, newcomer(4)).unwrap();
    let (first, second) = (present.founding.unwrap(), set.founding.unwrap());
    assert_ne!(first.digest, second.digest);
}
