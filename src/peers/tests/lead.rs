use super::*;
use crate::model::Roles;

/// What was published, step by step: `n1/5`, or `-/5` when nobody leads.
fn published(set: &PeerSet, steps: &[&str]) -> String {
    let (mut roles, mut led) = (Roles::default(), None);
    let mut told = Vec::new();
    for step in steps {
        (roles, led) = set.roles_after(&says(step), &roles, led);
        told.push(format!("{}/{}", roles.leader.as_ref().map_or("-", InstanceId::as_str), roles.term));
        let leads = |key: &&InstanceId| roles.of(key) == Role::Leader;
        assert!(set.peers.values().map(|peer| &peer.key).filter(leads).count() <= 1);
    }
    told.join(" ")
}

#[test]
fn n7_one_leader_with_a_majority_and_never_of_a_smaller_term() {
    let follow = |node: u64, term: u64, others: &[u64]| {
        let others: String =
            others.iter().map(|other| format!("; {other} follower {term} >{node}")).collect();
        format!("{node} leader {term} >{node}{others}")
    };
    let (one, two) = (follow(1, 5, &[2]), follow(2, 6, &[3]));
    let (etcd, redis, nats) = (Kind::Etcd, Kind::Redis, Kind::Nats);
    for (kind, steps, outcome) in [
        (etcd, vec![&*one], "n1/5"),
        // A majority is one of the voters, whether they say something or not.
        (etcd, vec!["1 leader 5 >1"], "-/0"),
        (etcd, vec!["1 leader 5 >1; 2 follower 5"], "-/0"),
        (etcd, vec!["1 leader 5 >1; 2 follower 4 >1; 3 follower 5 >2"], "-/0"),
        (etcd, vec!["1 follower 5 >1; 2 follower 5 >1; 3 follower 5 >1"], "-/0"),
        // It is named so whether it says whom it follows itself.
        (etcd, vec!["1 leader 5; 3 follower 5 >1"], "n1/5"),
        (etcd, vec![&one, &two], "n1/5 n2/6"),
        (etcd, vec![&one, &two, &one], "n1/5 n2/6 -/6"),
        (etcd, vec![&one, "", &one], "n1/5 -/5 n1/5"),
        (etcd, vec![&one, "2 leader 6 >2", &two], "n1/5 -/5 n2/6"),
        // The one that is out of date says so for long.
        (etcd, vec!["1 leader 5 >1; 2 leader 6 >2; 3 follower 6 >2"], "n2/6"),
        (etcd, vec!["1 leader 5 >1; 2 follower 5 >1; 3 leader 6 >3"], "-/0"),
        (etcd, vec!["1 leader 5 >1; 2 leader 5 >2; 3 follower 5 >2"], "-/0"),
        // A database elects one for a term: another one with the same term is none.
        (etcd, vec![&one, &follow(2, 5, &[3])], "n1/5 -/5"),
        (etcd, vec![&one, "", &follow(2, 5, &[3]), &follow(2, 6, &[3])], "n1/5 -/5 -/5 n2/6"),
        // Without terms the old one has to cease first.
        (nats, vec![&follow(1, 0, &[2]), &follow(2, 0, &[3])], "n1/0 n2/0"),
        (nats, vec!["1 leader 0 >1; 2 leader 0 >2; 3 follower 0 >2"], "-/0"),
        (redis, vec!["1 leader 0", "1 leader 0; 2 leader 0", "2 leader 0"], "n1/0 -/0 n2/0"),
        (redis, vec!["1 leader 1", "2 leader 2; 1 leader 1", "1 leader 1"], "n1/1 n2/2 -/2"),
        (redis, vec!["1 leader 1; 2 leader 1", "1 leader 1"], "-/0 n1/1"),
        (redis, vec!["1 leader 1", "2 leader 1", "1 leader 1"], "n1/1 -/1 n1/1"),
        (redis, vec!["1 leader 1 #3; 2 leader 1 #4"], "n2/1"),
        (redis, vec!["4 leader 9; 1 leader 1"], "n1/1"),
        (redis, vec!["77 leader 9; 1 leader 1"], "n1/1"),
    ] {
        let mut set = founded(kind, 3);
        come(&mut set, newcomer(4)).unwrap();
        assert_eq!(published(&set, &steps), outcome, "{kind} {steps:?}");
    }
}

#[test]
fn n7_who_votes_is_counted_and_nobody_else() {
    for (suffrages, says_, outcome) in [
        ("vvvv", "1 leader 5; 2 follower 5 >1", "-/0"),
        ("vvvv", "1 leader 5; 2 follower 5 >1; 3 follower 5 >1", "n1/5"),
        ("vvvl", "1 leader 5; 4 learner 5 >1", "-/0"),
        ("vvvl", "1 leader 5; 2 follower 5 >1", "n1/5"),
        ("vwvl", "1 leader 5; 2 follower 5 >1", "n1/5"),
        ("vvvs", "1 leader 5; 4 follower 5 >1", "-/0"),
        // Its promotion has not been seen.
        ("vvvl", "4 leader 5; 1 follower 5 >4; 2 follower 5 >4", "n4/5"),
        ("vvvs", "4 leader 5; 1 follower 5 >4; 2 follower 5 >4", "-/0"),
        ("vlll", "1 leader 5", "n1/5"),
    ] {
        let mut set = founded(Kind::Etcd, 4);
        for (peer, suffrage) in set.peers.values_mut().zip(suffrages.chars()) {
            peer.suffrage = match suffrage {
                'v' => Suffrage::Voter,
                'w' => Suffrage::Witness,
                'l' => Suffrage::Learner,
                _ => Suffrage::Staging,
            };
        }
        assert_eq!(published(&set, &[says_]), outcome, "{suffrages} {says_}");
    }
}

#[test]
fn n7_a_leader_that_is_removed_leads_no_more() {
    let mut set = founded(Kind::Redis, 3);
    let (roles, led) = set.roles_after(&says("1 leader 5"), &Roles::default(), None);
    assert_eq!(roles.leader, Some(key(1)));
    set.remove(NodeId(1));
    let (roles, led) = set.roles_after(&says("1 leader 5; 2 leader 5"), &roles, led);
    assert_eq!((roles.leader.clone(), roles.others.contains_key(&key(1))), (None, false));
    let (roles, _) = set.roles_after(&says("1 leader 9; 2 leader 6"), &roles, led);
    assert_eq!(roles.leader, Some(key(2)));
}

#[test]
fn what_the_others_do() {
    let mut set = founded(Kind::Etcd, 5);
    come(&mut set, newcomer(6)).unwrap();
    let told =
        "1 leader 5 >1; 2 follower 5 >1; 3 candidate 6; 4 leader 4 >4; 5 follower 5 >1; 6 follower 5 >1";
    let roles = set.roles(&says(told), &Roles::default());
    let of: Vec<_> = (1..=6).map(|n| roles.of(&key(n)).as_str()).collect();
    // The last one is not in the database, whatever it says.
    assert_eq!(of, ["leader", "follower", "candidate", "unknown", "follower", "unknown"]);
    // Who is silent is nobody to read from.
    let roles = set.roles(&says("1 follower 5"), &roles);
    assert_eq!([1, 2].map(|n| roles.of(&key(n))), [Role::Follower, Role::Unknown]);
}
