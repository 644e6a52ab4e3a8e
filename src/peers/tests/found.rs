use super::*;

/// What was refused, by the variant.
fn refused<T: std::fmt::Debug>(result: Result<T, Refusal>) -> String {
    let text = format!("{:?}", result.unwrap_err());
    text.split([' ', '(']).next().unwrap().to_owned()
}

#[test]
fn n1_there_is_no_list_before_the_last_founder_and_the_whole_one_with_it() {
    let mut set = collecting(Kind::Etcd, 3);
    for n in 1..=2 {
        come(&mut set, newcomer(n)).unwrap();
        assert!(set.founding.is_none());
        assert_eq!(set.members().count(), 0, "a part of the list is not the list");
        assert_eq!(
            refused(set.propose(&Want::Add(key(1)), set.revision, &Facts::default(), SystemTime::UNIX_EPOCH)),
            "NotYet"
        );
    }
    assert_eq!(set.roles(&says("1 leader 1 >1; 2 follower 1 >1"), &Default::default()).leader, None);
    come(&mut set, newcomer(3)).unwrap();
    assert_eq!(set.founding.as_ref().unwrap().list.len(), 3);
    assert_eq!(set.members().count(), 3);
}

#[test]
fn n2_each_founding_has_a_digest_of_its_own() {
    let list = |change: &dyn Fn(&mut PeerSet)| {
        let mut set = collecting(Kind::Etcd, 2);
        change(&mut set);
        for n in set.peers.len() as u64 + 1..=2 {
            come(&mut set, newcomer(n)).unwrap();
        }
        set.founding.unwrap().digest
    };
    let plain = list(&|_| {});
    assert_eq!(
        plain, "da05ddedc19cd0d1d58607f732cda530a75d19572b69ede2390f8ca4757631e5",
        "the text that is digested is part of the format"
    );
    assert_eq!(plain, list(&|_| {}));
    let other: [&dyn Fn(&mut PeerSet); 5] = [
        &|set| set.cluster = ClusterId(2),
        &|set| set.generation = 2,
        &|set| set.spec.name = "other".parse().unwrap(),
        &|set| set.next_node = 7,
        &|set| {
            let at = Addresses { raft: "10.0.0.1:7001".parse().unwrap(), ..newcomer(1).at };
            come(set, Newcomer { at, ..newcomer(1) }).unwrap();
        },
    ];
    for (n, change) in other.iter().enumerate() {
        assert_ne!(plain, list(change), "{n}");
    }
}

#[test]
fn n2_what_a_replica_of_another_founding_says_is_not_said_of_this_one() {
    let set = founded(Kind::Etcd, 3);
    let digest = &set.founding.as_ref().unwrap().digest;
    let facts = |own: &str| says(&format!("1 leader 5 >1; 2 follower 5 >1 ={own}"));
    assert_eq!(set.roles(&facts(digest), &Default::default()).leader, Some(key(1)));
    assert_eq!(set.drift(&facts(digest)), Vec::<String>::new());
    let roles = set.roles(&facts("other"), &Default::default());
    assert_eq!((roles.leader.clone(), roles.of(&key(2))), (None, Role::Unknown));
    assert!(set.drift(&facts("other"))[0].starts_with("n2 was started with another founding list: stop it"));
    let claims = says("1 leader 5 =other; 2 leader 4");
    assert_eq!(founded(Kind::Redis, 3).roles(&claims, &Default::default()).leader, Some(key(2)));
}

#[test]
fn n2_another_founding_takes_the_name_of_the_one_that_is_given_up() {
    let mut set = founded(Kind::Etcd, 3);
    let before = set.clone();
    for (given_up, expect, cluster, what) in
        [(2, 3, 3, "OtherCluster"), (1, 3, 1, "OtherCluster"), (1, 0, 2, "Expect"), (1, 65, 2, "Expect")]
    {
        assert_eq!(refused(set.refound(ClusterId(given_up), expect, ClusterId(cluster))), what);
        assert_eq!(set, before);
    }
    set.refound(ClusterId(1), 1, ClusterId(2)).unwrap();
    assert_eq!((set.generation, set.founding.is_none(), set.peers.len(), set.removed.len()), (2, true, 0, 3));
    // With a disk that is not empty it would bring the other database along.
    assert_eq!(refused(come(&mut set, newcomer(1))), "Removed");
    assert_eq!(come(&mut set, Newcomer { disk: "empty".into(), ..newcomer(1) }), Ok(4));
    assert_eq!(set.founding.as_ref().unwrap().list[0].ordinal, 0);

    // After a backup was restored, numbers of foundings that it does not know of may have been used.
    set.last_generation = 1002;
    set.refound(ClusterId(2), 1, ClusterId(3)).unwrap();
    assert_eq!((set.generation, set.last_generation), (1003, 1003));
}

#[test]
fn n3_a_founding_list_stays_as_it_is() {
    let mut set = founded(Kind::Nats, 3);
    let before = set.founding.clone();
    come(&mut set, newcomer(4)).unwrap();
    come(&mut set, Newcomer { at: newcomer(9).at, ..newcomer(1) }).unwrap();
    assert_eq!(set.peer(&key(1)).unwrap().at, newcomer(9).at);
    let facts = runs(says(""), "1 2 3 4");
    for want in [Want::Add(key(4)), Want::Remove(key(1))] {
        set.propose(&want, set.revision, &facts, SystemTime::UNIX_EPOCH).unwrap();
        set.confirm(set.revision).unwrap();
    }
    assert_eq!(set.members().count(), 3);
    assert_eq!(set.founding, before);
}

#[test]
fn n4_a_number_is_one_name_and_one_disk_for_ever() {
    // After the founding by 1 to 3, and then: 4 joined, 4 was withdrawn. Each is a name and a disk, and which number it is given.
    for (name, disk, outcome) in [
        (1, "disk-1", Ok(1)),
        (1, "other", Err("OtherDisk")),
        // A copied disk, and one that was given another name.
        (5, "disk-1", Err("DiskTaken")),
        (5, "disk-4", Err("DiskTaken")),
        (4, "disk-4", Err("Removed")),
        (4, "other", Ok(5)),
        (5, "other", Ok(5)),
    ] {
        let mut set = founded(Kind::Etcd, 3);
        come(&mut set, newcomer(4)).unwrap();
        set.withdraw(&key(4), &Facts::default()).unwrap();
        let before = set.clone();
        let at = if name == 1 { newcomer(1).at } else { newcomer(9).at };
        let got = come(&mut set, Newcomer { disk: disk.into(), at, ..newcomer(name) });
        match outcome {
            Ok(node) => assert_eq!(got, Ok(node), "{name} {disk}"),
            Err(what) => {
                assert_eq!(refused(got), what, "{name} {disk}");
                assert_eq!(set, before);
            }
        }
    }
}

#[test]
fn n4_an_address_is_one_replica_and_where_it_is_identity_for_ever() {
    for (kind, own_disk) in [(Kind::Etcd, "AddressUsed"), (Kind::Nats, "")] {
        let mut set = founded(kind, 3);
        for text in ["10.0.0.2:7000", "[::ffff:10.0.0.2]:7000"] {
            let at = Addresses { raft: text.parse().unwrap(), ..newcomer(4).at };
            assert_eq!(refused(come(&mut set, Newcomer { at, ..newcomer(4) })), "AddressTaken");
        }
        let facts = runs(says(""), "1 2");
        set.propose(&Want::Remove(key(3)), set.revision, &facts, SystemTime::UNIX_EPOCH).unwrap();
        set.confirm(set.revision).unwrap();
        let again = Newcomer { at: newcomer(3).at, ..newcomer(4) };
        match own_disk {
            "" => assert_eq!(come(&mut set, again), Ok(4)),
            what => assert_eq!(refused(come(&mut set, again)), what),
        }
        // Of one that never was in the database it can be used, and in another database.
        come(&mut set, newcomer(5)).unwrap();
        set.withdraw(&key(5), &Facts::default()).unwrap();
        come(&mut set, Newcomer { disk: "new".into(), ..newcomer(5) }).unwrap();
        set.refound(ClusterId(1), 3, ClusterId(2)).unwrap();
        for n in 1..=3 {
            come(&mut set, Newcomer { disk: format!("new-{n}"), ..newcomer(n) }).unwrap();
        }
        assert!(set.founding.is_some());
    }
}

#[test]
fn n2_an_address_that_is_identity_does_not_move_once_it_was_told() {
    // Who moves: 1 is a founder, 4 has come, 5 has come and is about to be added.
    for (kind, founding, expect) in [
        (Kind::Etcd, false, [true, true, true]),
        (Kind::Etcd, true, [false, true, false]),
        (Kind::Nats, true, [true, true, true]),
        (Kind::OpenRaft, true, [true, true, true]),
    ] {
        for (n, may) in [1, 4, 5].into_iter().zip(expect) {
            let mut set = if founding { founded(kind, 3) } else { collecting(kind, 9) };
            if founding {
                come(&mut set, newcomer(4)).unwrap();
                come(&mut set, newcomer(5)).unwrap();
                let facts = runs(says(""), "1 2 3");
                set.propose(&Want::Add(key(5)), set.revision, &facts, SystemTime::UNIX_EPOCH).unwrap();
            } else {
                come(&mut set, newcomer(n)).unwrap();
            }
            let moved = come(&mut set, Newcomer { at: newcomer(9).at, ..newcomer(n) });
            if may {
                assert!(moved.is_ok(), "{kind} {n}");
                assert_eq!(set.peer(&key(n)).unwrap().at, newcomer(9).at);
            } else {
                assert_eq!(refused(moved), "Moved", "{kind} {n}");
            }
        }
    }
}

#[test]
fn n8_nobodys_place_changes_and_founders_have_them_without_holes() {
    let mut set = collecting(Kind::TigerBeetle, 4);
    let place = |set: &PeerSet, n| set.peer(&key(n)).unwrap().ordinal;
    for n in 1..=3 {
        come(&mut set, newcomer(n)).unwrap();
    }
    set.withdraw(&key(1), &Facts::default()).unwrap();
    assert_eq!([place(&set, 2), place(&set, 3)], [1, 2]);
    come(&mut set, Newcomer { disk: "new".into(), ..newcomer(1) }).unwrap();
    come(&mut set, newcomer(4)).unwrap();
    let list = set.founding.as_ref().unwrap().list.iter().map(|founder| (founder.ordinal, founder.node.0));
    assert_eq!(list.collect::<Vec<_>>(), [(0, 4), (1, 2), (2, 3), (3, 5)]);
    // Later there are holes.
    come(&mut set, newcomer(5)).unwrap();
    set.withdraw(&key(5), &Facts::default()).unwrap();
    come(&mut set, newcomer(6)).unwrap();
    assert_eq!(place(&set, 6), 5);
}

#[test]
fn n9_addresses_that_nobody_can_reach_are_refused() {
    for (raft, good) in [
        ("10.0.0.1:7000", true),
        ("[fd00::1]:7000", true),
        ("0.0.0.0:7000", false),
        ("[::]:7000", false),
        ("224.0.0.1:7000", false),
        ("10.0.0.1:0", false),
    ] {
        let mut problems = crate::model::Problems::default();
        let at = Addresses { raft: raft.parse().unwrap(), ..newcomer(1).at };
        Newcomer { at, ..newcomer(1) }.check(&mut problems);
        assert_eq!(problems.is_empty(), good, "{raft}");
    }
}

#[test]
fn n11_who_comes_after_the_founding_joins_and_is_no_member_before_it_is_added() {
    for kind in Kind::ALL {
        let mut set = founded(*kind, 3);
        come(&mut set, newcomer(4)).unwrap();
        let (founder, joiner) = (set.peer(&key(3)).unwrap(), set.peer(&key(4)).unwrap());
        assert_eq!((founder.birth, founder.suffrage), (Birth::Founder, Suffrage::Voter));
        assert_eq!((joiner.birth, joiner.suffrage), (Birth::Joiner, Suffrage::Staging));
        assert_eq!(set.members().count(), 3);
        // Restarted, it is what it was born as.
        come(&mut set, newcomer(3)).unwrap();
        assert_eq!(set.peer(&key(3)).unwrap().birth, Birth::Founder);
    }
}

#[test]
fn n13_and_n14_what_may_be_regretted_is_said_at_the_founding_and_refused_where_required() {
    // The zones of those that come; the warnings, or who is refused.
    let share = |most_per_zone| Spread { most_per_zone, required: false };
    let must = |most_per_zone| Spread { most_per_zone, required: true };
    for (zones, spread, outcome) in [
        ("a b c", None, Ok(vec![])),
        ("a", None, Ok(vec![])),
        ("- - -", None, Ok(vec![])),
        ("a a a", None, Ok(vec!["all voters are in zone a"])),
        ("a b", None, Ok(vec!["2 voters bear no more"])),
        ("a a", None, Ok(vec!["2 voters bear no more", "all voters are in zone a"])),
        ("a a b", Some(share(1)), Ok(vec!["2 voters are in zone a, more than the 1"])),
        ("a a b", Some(must(1)), Err(2)),
        ("a b -", Some(must(1)), Err(3)),
        ("a b c", Some(must(1)), Ok(vec![])),
        ("a a b", Some(must(2)), Ok(vec![])),
    ] {
        let zones: Vec<_> = zones.split(' ').map(|zone| zone.trim_matches('-').to_owned()).collect();
        let mut set = collecting(Kind::Etcd, zones.len() as u32);
        set.spec.spread = spread;
        let mut refused_at = None;
        for (n, zone) in (1..).zip(&zones) {
            if let Err(error) = come(&mut set, Newcomer { zone: zone.clone(), ..newcomer(n) }) {
                assert!(matches!(error, Refusal::Spread { .. }));
                refused_at = Some(n);
                break;
            }
        }
        match outcome {
            Err(n) => assert_eq!(refused_at, Some(n), "{zones:?}"),
            Ok(wanted) => {
                let warnings = set.founding.unwrap().warnings;
                assert_eq!(warnings.len(), wanted.len(), "{zones:?}: {warnings:?}");
                for (warning, start) in warnings.iter().zip(wanted) {
                    assert!(warning.starts_with(start), "{warning}");
                }
            }
        }
    }
}

#[test]
fn n13_a_required_spread_is_not_got_round_by_coming_again_or_by_requiring_it_late() {
    let at = |n, zone: &str| Newcomer { zone: zone.into(), ..newcomer(n) };
    let must = Some(Spread { most_per_zone: 1, required: true });
    let mut set = collecting(Kind::Etcd, 3);
    set.spec.spread = must;
    come(&mut set, at(1, "a")).unwrap();
    come(&mut set, at(2, "b")).unwrap();
    assert_eq!(refused(come(&mut set, at(2, "a"))), "Spread");
    assert_eq!(come(&mut set, at(2, "d")), Ok(2));

    let mut set = collecting(Kind::Etcd, 3);
    come(&mut set, at(1, "a")).unwrap();
    come(&mut set, at(2, "a")).unwrap();
    set.spec.spread = must;
    assert_eq!(refused(come(&mut set, at(3, "c"))), "Spread");
    assert!(set.founding.is_none());
    assert_eq!(come(&mut set, at(2, "b")), Ok(2));
    come(&mut set, at(3, "c")).unwrap();
    assert!(set.founding.is_some());
}

#[test]
fn who_may_be_withdrawn() {
    // In a set with 1 to 3 in it and 4 that has come: what is pending, what the leader lists, who goes.
    for (pending, listed, n, outcome) in [
        (false, "", 4, ""),
        (false, "1 2 3", 4, ""),
        (false, "", 1, "IsMember"),
        (true, "", 4, "IsMember"),
        // It was added by hand, and has a vote: forgotten, its address would be given to an empty disk.
        (false, "1 2 3 4", 4, "IsMember"),
        (false, "", 5, "NoPeer"),
    ] {
        let mut set = founded(Kind::Etcd, 3);
        come(&mut set, newcomer(4)).unwrap();
        let mut facts = runs(says("1 leader 5 >1"), "1 2 3");
        facts.observed.get_mut(&NodeId(1)).unwrap().members = Some(members(listed));
        if pending {
            set.propose(&Want::Add(key(4)), set.revision, &facts, SystemTime::UNIX_EPOCH).unwrap();
        }
        match set.withdraw(&key(n), &facts) {
            Ok(node) => assert_eq!((node.0, outcome), (n, "")),
            Err(error) => assert_eq!(refused(Err::<(), _>(error)), outcome, "{n} {listed}"),
        }
    }
}
