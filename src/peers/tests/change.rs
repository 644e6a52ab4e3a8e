use super::*;
use crate::model::Revision;

const NOW: SystemTime = SystemTime::UNIX_EPOCH;

/// `add 4`, `remove 4`, `replace 1 4`, `demote 1`.
fn want(text: &str) -> Want {
    let mut words = text.split(' ');
    let what = words.next().unwrap();
    let mut node = || key(words.next().unwrap().parse().unwrap());
    match what {
        "add" => Want::Add(node()),
        "remove" => Want::Remove(node()),
        "demote" => Want::Demote(node()),
        "replace" => Want::Replace(node(), node()),
        other => panic!("{other}"),
    }
}

fn told(result: Result<Step, Refusal>) -> String {
    match result {
        Ok(Step::Do(Pending { change, node, .. })) => format!("{} {node}", change.as_str()),
        Ok(Step::Wait(reason)) => format!("wait: {reason}"),
        Ok(Step::Done) => "done".into(),
        Err(error) => format!("{error:?}").split([' ', '(']).next().unwrap().to_owned(),
    }
}

/// Founders 1 to `founders`, learner 7, staging 8, witness 9 where named in `also`.
fn with(kind: Kind, founders: u32, also: &str) -> PeerSet {
    let mut set = founded(kind, founders);
    // Their numbers are what their names are.
    for n in also.split_whitespace().map(|word| word.parse().unwrap()) {
        set.next_node = n;
        come(&mut set, newcomer(n)).unwrap();
        let suffrage = match n {
            7 => Suffrage::Learner,
            9 => Suffrage::Witness,
            _ => Suffrage::Staging,
        };
        set.peers.get_mut(&NodeId(n)).unwrap().suffrage = suffrage;
    }
    set
}

#[test]
fn n6_the_one_next_safe_step() {
    let majority = "1 leader 5 >1 @9000; 2 follower 5 >1 @9000; 3 follower 5 >1 @9000";
    let near = format!("{majority}; 7 learner 5 >1 @8000");
    let far = format!("{majority}; 7 learner 5 >1 @7999");
    let unknown = format!("{majority}; 7 learner 5 >1");
    let leader_unknown = "1 leader 5 >1; 2 follower 5 >1; 7 learner 5 >1";
    let no_leader = "1 leader 5 >1 @9000; 7 learner 5 @9000";
    let two = "1 leader 5 >1 @9000; 2 leader 5 >2 @9000; 7 learner 5 @9000";
    let behind = "wait: n7 is 1001 behind the leader: it has to catch up first";
    let silent = "wait: n7 has not told how far it has come, or the leader has not: start it, and see that it is observed";
    let (etcd, raft, nats, redis) = (Kind::Etcd, Kind::OpenRaft, Kind::Nats, Kind::Redis);
    for (kind, founders, also, says_, runs_, wanted, outcome) in [
        // In.
        (etcd, 3, "8", "", "1 2 3", "add 8", "add-learner 8"),
        (etcd, 3, "8", "", "1 2 3", "add 1", "done"),
        (etcd, 3, "", "", "1 2 3", "add 8", "NoPeer"),
        (etcd, 3, "7", &*near, "1 2 3 7", "add 7", "promote 7"),
        (etcd, 3, "7", &far, "1 2 3 7", "add 7", behind),
        (etcd, 3, "7", &unknown, "1 2 3 7", "add 7", silent),
        (etcd, 3, "7", leader_unknown, "1 2 3 7", "add 7", silent),
        (etcd, 3, "7", majority, "1 2 3 7", "add 7", silent),
        (etcd, 3, "7", no_leader, "1 2 3 7", "add 7", silent),
        (etcd, 3, "7", two, "1 2 3 7", "add 7", silent),
        (etcd, 3, "7", &near, "1 2 3", "add 7", "NotUp"),
        (etcd, 3, "7", &near, "1 2 3 ?7", "add 7", "NotUp"),
        (etcd, 3, "7", &near, "1 ?2 3 7", "add 7", "promote 7"),
        (etcd, 3, "7", &near, "1 ?2 ?3 7", "add 7", "NoQuorum"),
        // Where there are no learners it has a vote before it is started.
        (nats, 3, "8", "", "1 2 3", "add 8", "add-voter 8"),
        (nats, 3, "8", "", "1 2", "add 8", "NoQuorum"),
        (nats, 3, "8", "", "1 2 8", "add 8", "add-voter 8"),
        (nats, 1, "8", "", "1", "add 8", "NoQuorum"),
        (nats, 1, "8", "", "1 8", "add 8", "add-voter 8"),
        // Out.
        (etcd, 3, "", "", "1 2", "remove 3", "remove 3"),
        (etcd, 3, "", "", "1 2 3", "remove 3", "remove 3"),
        (etcd, 3, "", "", "1 2", "remove 2", "DeadFirst"),
        (etcd, 5, "", "", "1 2 3 ?4", "remove 4", "DeadFirst"),
        (etcd, 5, "", "", "1 2 3 ?4", "remove 5", "remove 5"),
        (etcd, 3, "", "", "1 2 ?3", "remove 3", "remove 3"),
        (etcd, 3, "", "", "1 2 ?3", "remove 2", "NoQuorum"),
        (etcd, 3, "", "", "1", "remove 2", "NoQuorum"),
        (etcd, 3, "", "", "", "remove 2", "NoQuorum"),
        (etcd, 4, "", "", "1 2", "remove 4", "NoQuorum"),
        // Two would be left of which one is the quorum, but it takes two of the two to make the change.
        (etcd, 2, "", "", "1", "remove 2", "NoQuorum"),
        (redis, 2, "", "", "1", "remove 2", "remove 2"),
        (etcd, 1, "", "", "1", "remove 1", "LastVoter"),
        (etcd, 1, "9", "", "1 9", "remove 1", "LastVoter"),
        (etcd, 3, "9", "", "1 2 3", "remove 9", "remove 9"),
        (etcd, 3, "7", "", "1 2 3", "remove 7", "remove 7"),
        (etcd, 3, "7", "", "1", "remove 7", "NoQuorum"),
        (etcd, 3, "8", "", "1 2 3", "remove 8", "NotMember"),
        (etcd, 3, "", "", "1 2 3", "remove 8", "NoPeer"),
        (etcd, 3, "", "", "1 2 3", "demote 3", "demote 3"),
        (etcd, 3, "", "", "1 2", "demote 2", "DeadFirst"),
        (etcd, 1, "", "", "1", "demote 1", "LastVoter"),
        (etcd, 3, "7", "", "1 2 3 7", "demote 7", "done"),
        (etcd, 3, "8", "", "1 2 3", "demote 8", "wait: n8 is not in the database"),
        // In the place of another.
        (raft, 3, "8", "", "1 2", "replace 3 8", "add-learner 8"),
        (raft, 3, "7", &near, "1 2 7", "replace 3 7", "promote 7"),
        (etcd, 3, "8", "", "1 2 3", "replace 3 8", "add-learner 8"),
        (etcd, 3, "8", "", "1 2 ?3", "replace 3 8", "add-learner 8"),
        // etcd takes nobody in while a member is dead.
        (etcd, 3, "8", "", "1 2", "replace 3 8", "remove 3"),
        (etcd, 3, "7", &near, "1 2 7", "replace 3 7", "remove 3"),
        (etcd, 3, "", "", "1 2", "replace 3 8", "NoPeer"),
        (etcd, 3, "", "", "1 2", "replace 3 1", "remove 3"),
        (etcd, 3, "", "", "1 2 3", "replace 3 3", "Itself"),
        (etcd, 3, "8", "", "1 2", "replace 6 8", "NoPeer"),
        (etcd, 3, "8", "", "1 2", "replace 8 1", "NotMember"),
    ] {
        let case = format!("{kind} {founders}+{also:?}, {says_:?}, up {runs_:?}: {wanted}");
        let mut set = with(kind, founders, also);
        let before = set.clone();
        let facts = runs(says(says_), runs_);
        let got = told(set.propose(&want(wanted), set.revision, &facts, NOW));
        assert_eq!(got, outcome, "{case}");
        let changes = set.pending.is_some();
        assert_eq!(changes, Change::ALL.iter().any(|change| got.starts_with(change.as_str())), "{case}");
        if !changes {
            assert_eq!(set, before, "{case}");
        }
        assert_eq!(set.members().count(), before.members().count(), "{case}: nothing has been made yet");
    }
}

#[test]
fn n6_one_change_at_a_time_and_from_the_newest_state() {
    let mut set = with(Kind::Etcd, 3, "8");
    let facts = runs(says(""), "1 2 3");
    assert_eq!(told(set.propose(&want("add 8"), Revision(7), &facts, NOW)), "Stale");
    let first = told(set.propose(&want("add 8"), set.revision, &facts, NOW));
    assert_eq!(first, "add-learner 8");
    let before = set.clone();
    assert_eq!(told(set.propose(&want("remove 3"), set.revision, &facts, NOW)), "Pending");
    assert_eq!(
        told(set.propose(&want("add 8"), set.revision, &facts, NOW + std::time::Duration::from_secs(1))),
        first
    );
    assert_eq!(set, before);
    for finish in [PeerSet::confirm, PeerSet::cancel] {
        assert!(matches!(finish(&mut set, Revision(7)), Err(Refusal::Stale { .. })));
    }
    set.cancel(set.revision).unwrap();
    assert_eq!(set.confirm(set.revision), Err(Refusal::NothingPending));
    assert_eq!(set.cancel(set.revision), Err(Refusal::NothingPending));
}

#[test]
fn n6_a_change_that_is_no_longer_safe_is_not_told_again() {
    let mut set = founded(Kind::Etcd, 3);
    let all = runs(says(""), "1 2 3");
    assert_eq!(told(set.propose(&want("remove 3"), set.revision, &all, NOW)), "remove 3");
    assert!(set.peer(&key(3)).unwrap().leaving);
    let less = runs(says(""), "1 3");
    assert_eq!(told(set.propose(&want("remove 3"), set.revision, &less, NOW)), "DeadFirst");
    set.cancel(set.revision).unwrap();
    assert!(!set.peer(&key(3)).unwrap().leaving);
    assert_eq!(told(set.propose(&want("remove 2"), set.revision, &less, NOW)), "remove 2");
}

#[test]
fn n5_nobody_is_taken_out_because_it_does_not_run() {
    for kind in Kind::ALL {
        let mut set = founded(*kind, 3);
        let before = set.clone();
        let roles = set.roles(&Facts::default(), &Default::default());
        assert_eq!(roles.leader, None);
        assert!(!set.settle(NodeId(1), &members("1")));
        assert_eq!(set, before);
    }
}

#[test]
fn a_pending_change_is_over_when_the_leaders_own_list_says_so() {
    let named = |name: &str, raft: Option<&str>| SeenMember {
        id: "beef".into(),
        name: name.into(),
        raft: raft.map(|at| at.parse().unwrap()),
        voter: true,
    };
    let (etcd, nats) = (Kind::Etcd, Kind::Nats);
    // The list is that of 1, with further members.
    for (kind, wanted, list, also, over) in [
        (etcd, "add 8", "1 2 3", None, false),
        (etcd, "add 8", "1 2 3 8-", None, true),
        (etcd, "add 8", "1 8-", None, true),
        // It would be started before it was added (rule N11): the list is another database's, or old, or of one that had the name.
        (etcd, "add 8", "2 3 8", None, false),
        (etcd, "add 8", "8", None, false),
        (etcd, "add 8", "", None, false),
        (etcd, "add 8", "1 2 3", Some(named("n8", Some("10.9.9.9:7000"))), false),
        (etcd, "add 8", "1 2 3", Some(named("n8", None)), true),
        (etcd, "add 8", "1 2 3 8", Some(named("n8", None)), false),
        (nats, "add 8", "1 2 3", Some(named("n8", Some("10.9.9.9:7000"))), true),
        (nats, "add 8", "1 2 3 8-", None, false),
        (nats, "add 8", "1 2 3 8", None, true),
        (etcd, "remove 3", "1 2 3", None, false),
        (etcd, "remove 3", "1 2 3-", None, false),
        (etcd, "remove 3", "1 2", None, true),
        // It may be the one that cannot be told, or in the part that is missing.
        (etcd, "remove 3", "", None, false),
        (etcd, "remove 3", "1", None, false),
        (etcd, "remove 3", "2", None, false),
        (etcd, "remove 3", "1 2", Some(named("", None)), false),
        (etcd, "remove 3", "1 2", Some(named("db-3.example", Some("192.168.0.3:7000"))), false),
        (etcd, "demote 3", "1 2 3", None, false),
        (etcd, "demote 3", "1 2", None, false),
        (etcd, "demote 3", "1 2 3-", None, true),
    ] {
        let mut set = with(kind, 3, "8");
        let facts = runs(says(""), "1 2 3 8");
        set.propose(&want(wanted), set.revision, &facts, NOW).unwrap();
        let before = set.clone();
        let mut seen = members(list);
        seen.extend(also.clone());
        assert_eq!(set.settle(NodeId(1), &seen), over, "{kind} {wanted}: {list} {also:?}");
        if over {
            assert_eq!(set.pending, None);
            assert_eq!(set.peers.len(), if wanted == "remove 3" { 3 } else { 4 });
        } else {
            assert_eq!(set, before);
        }
    }
}

#[test]
fn a_promotion_is_over_when_it_votes() {
    let mut set = with(Kind::Etcd, 3, "7");
    let observed = says("1 leader 5 >1 @9; 2 follower 5 >1; 7 learner 5 @9");
    set.propose(&want("add 7"), set.revision, &runs(observed, "1 2 3 7"), NOW).unwrap();
    assert!(!set.settle(NodeId(1), &members("1 2 3 7-")));
    assert!(set.settle(NodeId(1), &members("1 2 3 7")));
    assert_eq!(set.peer(&key(7)).unwrap().suffrage, Suffrage::Voter);
}

#[test]
fn a_removed_replica_does_not_come_back() {
    let mut set = founded(Kind::Etcd, 3);
    set.propose(&want("remove 3"), set.revision, &runs(says(""), "1 2"), NOW).unwrap();
    // Its process starts again while it is about to go.
    assert_eq!(come(&mut set, newcomer(3)), Ok(3));
    assert!(set.peer(&key(3)).unwrap().leaving);
    assert!(set.settle(NodeId(1), &members("1 2")));
    assert!(matches!(come(&mut set, newcomer(3)), Err(Refusal::Removed { .. })));
    assert_eq!(told(set.propose(&want("remove 3"), set.revision, &runs(says(""), "1 2"), NOW)), "done");
    // Under the same name another replica: it is not taken for the one that is out.
    let again = Newcomer { disk: "new".into(), at: newcomer(4).at, ..newcomer(3) };
    assert_eq!(come(&mut set, again), Ok(4));
    let seen = SeenMember { id: "f003".into(), name: "n3".into(), raft: None, voter: true };
    assert_eq!(set.find(&seen), None);
    assert_eq!(told(set.propose(&want("remove 3"), set.revision, &runs(says(""), "1 2"), NOW)), "NotMember");
}

#[test]
fn which_replica_a_member_of_the_databases_list_is() {
    // 1 to 3, of which 3 moved to the address that 2 had, where addresses may move.
    let (etcd, nats, openraft) = (Kind::Etcd, Kind::Nats, Kind::OpenRaft);
    for (kind, id, name, raft, node) in [
        (etcd, "beef", "", "10.0.0.2:7000", 2),
        (etcd, "1", "n1", "10.0.0.2:7000", 2),
        (etcd, "1", "n1", "10.9.9.9:7000", 0),
        (etcd, "1", "n2", "", 2),
        (etcd, "1", "", "", 1),
        (etcd, "beef", "", "[::ffff:10.0.0.2]:7000", 2),
        (nats, "S1gS5kW9", "n2", "10.0.0.3:7000", 2),
        (nats, "S1gS5kW9", "?", "10.0.0.3:7000", 3),
        (nats, "3", "?", "", 3),
        (nats, "3", "?", "10.9.9.9:7000", 0),
        (openraft, "2", "", "10.0.0.3:7000", 2),
        // It was removed, and another one is where it was.
        (openraft, "6", "", "10.0.0.3:7000", 0),
        (openraft, "", "", "10.0.0.3:7000", 3),
    ] {
        let seen = SeenMember { id: id.into(), name: name.into(), raft: raft.parse().ok(), voter: true };
        let set = founded(kind, 3);
        assert_eq!(set.find(&seen).map_or(0, |peer| peer.node.0), node, "{kind} {seen:?}");
    }
}
