//! Random scripts of what may happen to a set, a database and their store, against a memory of everything that was ever given out.

use std::collections::{BTreeMap, BTreeSet};

use proptest::prelude::*;

use super::{backup, *};
use crate::model::{Revision, Roles};

/// What happens next. Numbers are taken modulo what there is.
#[derive(Debug, Clone, Copy)]
enum Event {
    /// A replica comes, or comes again: its name, whose disk it has and which of these, its host, its zone.
    Comes {
        name: u64,
        disk: (u64, u8),
        host: u64,
        zone: u8,
    },
    Withdraw(u64),
    /// An operator looks at the set, and acts on what it saw.
    Looks(usize),
    Proposes {
        who: usize,
        looks: bool,
        add: Option<u64>,
        remove: Option<u64>,
        demote: bool,
    },
    Finishes {
        who: usize,
        cancel: bool,
    },
    Refounds {
        who: usize,
        expect: u32,
    },
    RequiresSpread(bool),
    /// The database is told a change that somebody was once told to make.
    Makes(usize),
    /// A change to the database that nobody asked Disco for: a member comes, as that replica or as a stranger, or goes.
    ByHand {
        node: u64,
        stranger: bool,
        voter: bool,
    },
    Elects(u64),
    /// A replica tells what it knew some changes ago.
    Says {
        node: u64,
        age: usize,
        blur: Blur,
    },
    /// All tell what they know, each a part of the list.
    AllSay(Blur),
    /// A replica claims to lead.
    Lies {
        node: u64,
        term: u64,
    },
    Silent(u64),
    Runs(u64, u8),
    BacksUp,
    Restores(usize),
}

/// What is not told of the list of members.
#[derive(Debug, Clone, Copy)]
enum Blur {
    Nothing,
    /// The address of one.
    Address(usize),
    /// Who one is.
    One(usize),
    /// All but these.
    Part(usize),
    All,
}

fn event() -> impl Strategy<Value = Event> {
    let name = || 1..7u64;
    let who = || 0..2usize;
    let blur = || {
        prop_oneof![
            4 => Just(Blur::Nothing),
            1 => (0..8usize).prop_map(Blur::Address),
            1 => (0..8usize).prop_map(Blur::One),
            1 => (0..8usize).prop_map(Blur::Part),
            1 => Just(Blur::All),
        ]
    };
    let own = (name(), 0..2u8).prop_map(|(name, nth)| (name, (name, nth), name, name as u8 % 3));
    let mixed = (name(), (name(), 0..2u8), 1..9u64, 0..3u8);
    prop_oneof![
        8 => own.prop_map(|(name, disk, host, zone)| Event::Comes { name, disk, host, zone }),
        3 => mixed.prop_map(|(name, disk, host, zone)| Event::Comes { name, disk, host, zone }),
        2 => name().prop_map(Event::Withdraw),
        6 => who().prop_map(Event::Looks),
        8 => (who(), any_bool(4), proptest::option::of(name()), proptest::option::of(name()), any_bool(5))
            .prop_map(|(who, late, add, remove, demote)| {
                Event::Proposes { who, looks: !late, add, remove, demote }
            }),
        2 => (who(), any::<bool>()).prop_map(|(who, cancel)| Event::Finishes { who, cancel }),
        1 => (who(), 0..4u32).prop_map(|(who, expect)| Event::Refounds { who, expect }),
        1 => any::<bool>().prop_map(Event::RequiresSpread),
        6 => (0..4usize).prop_map(Event::Makes),
        1 => (1..12u64, any::<bool>(), any::<bool>())
            .prop_map(|(node, stranger, voter)| Event::ByHand { node, stranger, voter }),
        4 => (0..8u64).prop_map(Event::Elects),
        8 => (0..8u64, 0..4usize, blur()).prop_map(|(node, age, blur)| Event::Says { node, age: age / 2, blur }),
        10 => blur().prop_map(Event::AllSay),
        1 => (0..8u64, 0..9u64).prop_map(|(node, term)| Event::Lies { node, term }),
        1 => (0..8u64).prop_map(Event::Silent),
        8 => (0..8u64, 0..5u8).prop_map(|(node, how)| Event::Runs(node, how)),
        1 => Just(Event::BacksUp),
        1 => (0..3usize).prop_map(Event::Restores),
    ]
}

fn any_bool(one_in: u8) -> impl Strategy<Value = bool> {
    (0..one_in).prop_map(|n| n == 0)
}

/// A member of the database, by what nobody can see: which replica it really is.
#[derive(Debug, Clone, PartialEq)]
struct Member {
    is: Option<NodeId>,
    name: String,
    raft: std::net::SocketAddr,
    voter: bool,
}

#[derive(Debug, Clone, Default)]
struct Database {
    members: Vec<Member>,
    term: u64,
    leader: Option<NodeId>,
}

/// What the store holds.
#[derive(Debug, Clone)]
struct Stored {
    set: PeerSet,
    observed: BTreeMap<NodeId, Observation>,
    roles: Roles,
    led: Option<NodeId>,
}

/// Everything that was ever given out.
#[derive(Debug, Default)]
struct Given {
    nodes: BTreeMap<NodeId, (InstanceId, String)>,
    foundings: BTreeMap<u64, Founding>,
    clusters: BTreeMap<u128, u64>,
    places: BTreeMap<(u64, NodeId), u32>,
    started: BTreeSet<NodeId>,
    /// Since the last restore.
    led: BTreeMap<(u64, u64), InstanceId>,
    term: (u64, u64),
}

struct World {
    stored: Stored,
    clock: u64,
    liveness: BTreeMap<NodeId, Liveness>,
    /// What each operator saw.
    saw: [PeerSet; 2],
    told: Vec<(u64, Pending, std::net::SocketAddr)>,
    databases: BTreeMap<u64, Vec<Database>>,
    backups: Vec<Stored>,
    given: Given,
}

impl World {
    fn new(kind: Kind, expect: u32) -> Self {
        let set = collecting(kind, expect);
        let stored = Stored { set: set.clone(), observed: [].into(), roles: Roles::default(), led: None };
        Self {
            stored,
            clock: 0,
            liveness: [].into(),
            saw: [set.clone(), set],
            told: vec![],
            databases: [].into(),
            backups: vec![],
            given: Given::default(),
        }
    }

    fn facts(&self) -> Facts {
        Facts { liveness: self.liveness.clone(), observed: self.stored.observed.clone() }
    }

    /// As the store does: what changed has a new revision, and what follows is judged with it.
    fn write(&mut self, set: PeerSet) {
        let stored = &mut self.stored;
        if set == stored.set {
            return;
        }
        if set.generation != stored.set.generation {
            *stored = Stored { set: set.clone(), observed: [].into(), roles: Roles::default(), led: None };
        }
        self.clock += 1;
        stored.set = PeerSet { revision: Revision(self.clock), ..set };
        self.judge();
    }

    fn judge(&mut self) {
        self.stored.observed.retain(|node, _| self.stored.set.peers.contains_key(node));
        let facts = self.facts();
        let Stored { set, roles, led, .. } = &mut self.stored;
        (*roles, *led) = set.roles_after(&facts, roles, *led);
    }

    fn nth(&self, n: u64) -> Option<NodeId> {
        let nodes: Vec<_> = self.stored.set.peers.keys().copied().collect();
        nodes.get(n as usize % nodes.len().max(1)).copied()
    }

    /// The database of this founding, as it is since its last change.
    fn database(&self) -> Option<Database> {
        self.databases.get(&self.stored.set.generation)?.last().cloned()
    }

    fn becomes(&mut self, database: Database) {
        self.databases.entry(self.stored.set.generation).or_default().push(database);
    }

    fn happens(&mut self, event: Event) {
        let before = self.stored.set.clone();
        let facts = self.facts();
        let mut set = before.clone();
        match event {
            Event::Comes { name, disk: (owner, nth), host, zone } => {
                let new = Newcomer {
                    disk: format!("{owner}-{nth}"),
                    at: newcomer(host).at,
                    zone: ["", "a", "b"][zone as usize].into(),
                    ..newcomer(name)
                };
                match come(&mut set, new) {
                    Ok(node) => {
                        self.liveness.entry(NodeId(node)).or_insert(Liveness::Up);
                    }
                    Err(_) => assert_eq!(set, before),
                }
                self.write(set);
            }
            Event::Withdraw(name) => {
                let _ = set.withdraw(&key(name), &facts);
                self.write(set);
            }
            Event::Looks(who) => self.saw[who] = before.clone(),
            Event::Proposes { who, looks, add, remove, demote } => {
                if looks {
                    self.saw[who] = before.clone();
                }
                let want = match (add, remove) {
                    (Some(new), Some(old)) => Want::Replace(key(old), key(new)),
                    (Some(new), None) => Want::Add(key(new)),
                    (None, Some(old)) if demote => Want::Demote(key(old)),
                    (None, Some(old)) => Want::Remove(key(old)),
                    (None, None) => return,
                };
                let from = self.saw[who].revision;
                let step = set.propose(&want, from, &facts, SystemTime::UNIX_EPOCH);
                assert!(step.is_err() || from == before.revision, "decided on what is no more");
                if let Ok(Step::Do(pending)) = &step {
                    self.is_safe(&before, pending, &facts);
                    let raft = set.peers[&pending.node].at.raft;
                    self.told.push((before.generation, pending.clone(), raft));
                } else {
                    assert_eq!(set, before);
                }
                self.write(set);
            }
            Event::Finishes { who, cancel } => {
                let from = self.saw[who].revision;
                let done = if cancel { set.cancel(from) } else { set.confirm(from) };
                assert!(done.is_err() || (from == before.revision && before.pending.is_some()));
                self.write(set);
            }
            Event::Refounds { who, expect } => {
                let _ = set.refound(self.saw[who].cluster, expect, ClusterId(1000 + u128::from(self.clock)));
                self.write(set);
            }
            Event::RequiresSpread(required) => {
                set.spec.spread = required.then_some(Spread { most_per_zone: 1, required });
                self.write(set);
            }
            Event::Makes(n) => {
                let told: Vec<_> = self
                    .told
                    .iter()
                    .rev()
                    .filter(|(generation, ..)| *generation == before.generation)
                    .collect();
                let Some((_, Pending { change, node, .. }, raft)) = told.get(n).copied().cloned() else {
                    return;
                };
                let Some(mut database) = self.database() else { return };
                let voter = matches!(change, Change::AddVoter | Change::Promote);
                database.members.retain(|member| member.is != Some(node));
                if change != Change::Remove {
                    let Some((name, _)) = self.given.nodes.get(&node) else { return };
                    let name = name.to_string();
                    database.members.push(Member { is: Some(node), name, raft, voter });
                }
                self.becomes(database);
            }
            Event::ByHand { node, stranger, voter } => {
                let Some(mut database) = self.database() else { return };
                let is = NodeId(node);
                match self.stored.set.peers.get(&is) {
                    _ if stranger => {
                        let raft = format!("10.9.0.{node}:7000").parse().unwrap();
                        database.members.push(Member { is: None, name: format!("x{node}"), raft, voter });
                    }
                    Some(peer) if !database.members.iter().any(|member| member.is == Some(is)) => {
                        let (name, raft) = (peer.key.to_string(), peer.at.raft);
                        database.members.push(Member { is: Some(is), name, raft, voter });
                    }
                    _ => database.members.retain(|member| member.is != Some(is)),
                }
                self.becomes(database);
            }
            Event::Elects(n) => {
                let Some(mut database) = self.database() else { return };
                let voters: Vec<_> = database
                    .members
                    .iter()
                    .filter(|member| member.voter)
                    .filter_map(|member| member.is)
                    .collect();
                database.term += 1;
                database.leader = voters.get(n as usize % voters.len().max(1)).copied();
                self.becomes(database);
            }
            Event::Says { node, age, blur } => {
                let Some(node) = self.nth(node) else { return };
                return self.tells(node, age, blur);
            }
            Event::AllSay(blur) => {
                for node in before.peers.keys() {
                    self.tells(*node, 0, blur);
                }
                return;
            }
            Event::Lies { node, term } => {
                let Some(node) = self.nth(node) else { return };
                let seen = Observation { role: Role::Leader, term, ..Observation::default() };
                self.says(node, seen);
            }
            Event::Silent(node) => {
                if let Some(node) = self.nth(node) {
                    self.stored.observed.remove(&node);
                    self.judge();
                }
                assert_eq!(self.stored.set, before, "rule N5");
            }
            Event::Runs(node, how) => {
                if let Some(node) = self.nth(node) {
                    // Most do.
                    let how = [Liveness::Down, Liveness::Suspect, Liveness::Up][usize::from(how).min(2)];
                    self.liveness.insert(node, how);
                    self.judge();
                }
                assert_eq!(self.stored.set, before, "rule N5");
            }
            Event::BacksUp => self.backups.push(self.stored.clone()),
            Event::Restores(n) => {
                let Some(mut stored) = self.backups.iter().rev().nth(n).cloned() else { return };
                self.clock += 1_000_000;
                stored.set = backup::restored(&stored.set, &self.stored.set);
                stored.set.revision = Revision(self.clock);
                self.stored = stored;
                self.given.led.clear();
                self.given.term = (0, 0);
            }
        }
        self.holds(&before, None);
    }

    /// A replica says what it knew `age` changes ago.
    fn tells(&mut self, node: NodeId, age: usize, blur: Blur) {
        let before = self.stored.set.clone();
        let Some(history) = self.databases.get(&before.generation) else { return };
        let Some(then) = history.iter().rev().nth(age).or(history.first()).cloned() else { return };
        let Some(own) = then.members.iter().find(|member| member.is == Some(node)) else { return };
        let role = match then.leader {
            Some(leader) if leader == node => Role::Leader,
            _ if own.voter => Role::Follower,
            _ => Role::Learner,
        };
        let seen = Observation {
            role,
            term: then.term,
            leader: then.leader,
            applied: 1,
            members: list(&then, blur, before.spec.kind.class()),
            ..Observation::default()
        };
        self.says(node, seen);
        self.holds(&before, Some(&then));
    }

    fn says(&mut self, node: NodeId, seen: Observation) {
        let members = seen.members.clone();
        self.stored.observed.insert(node, seen);
        self.judge();
        let leads = self.stored.roles.leader == self.stored.set.peers.get(&node).map(|peer| peer.key.clone());
        if let (true, Some(members)) = (leads, members) {
            let mut set = self.stored.set.clone();
            set.settle(node, &members);
            self.write(set);
        }
    }

    /// Rule N6, counted in another way.
    fn is_safe(&self, set: &PeerSet, pending: &Pending, facts: &Facts) {
        let Pending { change, node, .. } = pending;
        let is = |node: &NodeId, wanted| facts.liveness(*node) == wanted;
        let mut voters: Vec<NodeId> =
            set.voters().map(|peer| peer.node).filter(|other| other != node).collect();
        let takes = matches!(change, Change::Remove | Change::Demote);
        if takes && set.peers[node].suffrage.votes() && !is(node, Liveness::Down) {
            assert!(
                !voters.iter().any(|other| is(other, Liveness::Down)),
                "a live one goes before a dead one"
            );
        }
        match change {
            Change::AddLearner => return,
            Change::AddVoter | Change::Promote => voters.push(*node),
            Change::Remove | Change::Demote => assert!(!voters.is_empty(), "nobody is left"),
        }
        let up = voters.iter().filter(|node| is(node, Liveness::Up)).count();
        assert!(2 * up > voters.len(), "{up} of {} run", voters.len());
    }

    /// The rules, after each event.
    fn holds(&mut self, before: &PeerSet, told: Option<&Database>) {
        let Stored { set, roles, observed, .. } = &self.stored;
        let generation = set.generation;
        assert_eq!(backup::kept(set), *set);
        match &set.founding {
            None => {
                assert_eq!(
                    (set.members().count(), &roles.leader, &set.pending),
                    (0, &None, &None),
                    "rule N1"
                );
                assert!(set.peers.len() < set.spec.expect as usize, "it should be founded");
            }
            Some(founding) => {
                assert_eq!(founding.list.len(), set.spec.expect as usize, "rule N1");
                let places = founding.list.iter().map(|founder| founder.ordinal);
                assert!(places.eq(0..set.spec.expect), "rule N8");
                let first = self.given.foundings.entry(generation).or_insert_with(|| founding.clone());
                assert_eq!(first, founding, "rules N2 and N3");
                let same = self.given.foundings.values().filter(|other| other.digest == founding.digest);
                assert_eq!(same.count(), 1, "rule N2");
                let froze = before.founding.is_none() && before.generation == generation;
                if froze && set.spec.spread.is_some() && before.spec.spread.is_some() {
                    let zones: BTreeSet<_> = founding.list.iter().map(|founder| &founder.zone).collect();
                    assert_eq!(zones.len(), founding.list.len(), "rule N13");
                }
            }
        }
        assert_eq!(*self.given.clusters.entry(set.cluster.0).or_insert(generation), generation, "rule N2");
        let live = set.peers.values().map(|peer| (peer.node, &peer.key, &peer.disk));
        let gone = set.removed.iter().map(|(node, gone)| (*node, &gone.key, &gone.disk));
        for (node, key, disk) in live.chain(gone) {
            let first = self.given.nodes.entry(node).or_insert_with(|| (key.clone(), disk.clone()));
            assert_eq!((&first.0, &first.1), (key, disk), "rule N4: node {node}");
            assert!(node.0 < set.next_node && node.0 > 0, "rule N4");
        }
        let disks: BTreeSet<_> = set.peers.values().map(|peer| &peer.disk).collect();
        let addresses: BTreeSet<_> = set.peers.values().map(|peer| peer.at.raft).collect();
        assert_eq!((disks.len(), addresses.len()), (set.peers.len(), set.peers.len()), "rule N4");
        for peer in set.peers.values() {
            let first = *self.given.places.entry((generation, peer.node)).or_insert(peer.ordinal);
            assert_eq!(first, peer.ordinal, "rule N8");
        }
        if let Some(pending) = &set.pending {
            assert!(set.peers.contains_key(&pending.node));
        }

        let claims = |node: &NodeId| observed.get(node).filter(|seen| seen.role == Role::Leader);
        if let Some(leader) = &roles.leader {
            let peer = set.peer(leader).expect("it is in the set");
            let said = claims(&peer.node).expect("it says so itself");
            assert_eq!(said.term, roles.term);
            assert!(peer.suffrage != Suffrage::Staging);
            if set.spec.kind.leadership() == Leadership::Majority {
                let names = |voter: &&Peer| {
                    let said = observed.get(&voter.node).filter(|said| said.term == roles.term);
                    said.is_some_and(|said| voter.node == peer.node || said.leader == Some(peer.node))
                };
                assert!(2 * set.voters().filter(names).count() > set.voters().count(), "rule N7");
            }
            if roles.term > 0 {
                let first = self.given.led.entry((generation, roles.term)).or_insert_with(|| leader.clone());
                assert_eq!(first, leader, "rule N7: two in one term");
            }
        }
        assert!((generation, roles.term) >= self.given.term, "rule N7");
        self.given.term = (generation, roles.term);

        // Who was not in the database, and is now.
        let is_in = |set: &PeerSet, node: &NodeId| {
            set.peers.get(node).is_some_and(|peer| peer.suffrage != Suffrage::Staging)
                && set.founding.is_some()
        };
        for peer in set.members().filter(|peer| !is_in(before, &peer.node)) {
            if let Some(told) = told {
                let is_it = |member: &Member| {
                    let unborn = member.is.is_some_and(|is| !self.given.started.contains(&is));
                    let named = set.spec.kind.class() == Class::Seeds && member.name == peer.key.as_str();
                    member.is == Some(peer.node) || (member.raft == peer.at.raft && unborn) || named
                };
                assert!(told.members.iter().any(is_it), "rule N11: {} was not added", peer.key);
            }
        }
        for node in before.peers.keys().filter(|node| is_in(before, node) && !set.peers.contains_key(node)) {
            if let Some(told) = told {
                assert!(
                    !told.members.iter().any(|member| member.is == Some(*node)),
                    "node {node} is in it still"
                );
            }
        }
        self.given.started.extend(set.members().map(|peer| peer.node));
        if before.founding.is_none() && set.founding.is_some() && !self.databases.contains_key(&generation) {
            // The founders start.
            let founder = |peer: &Peer| Member {
                is: Some(peer.node),
                name: peer.key.to_string(),
                raft: peer.at.raft,
                voter: true,
            };
            let members = set.members().map(founder).collect();
            let leader = set.members().next().map(|peer| peer.node);
            self.databases.insert(generation, vec![Database { members, term: 1, leader }]);
        }
    }
}

/// A database's own list, as far as it is told.
fn list(database: &Database, blur: Blur, class: Class) -> Option<BTreeSet<SeenMember>> {
    let seen = |member: &Member| SeenMember {
        id: match (class, member.is) {
            (Class::Addresses, Some(is)) => is.to_string(),
            _ => format!("f00{}", member.name),
        },
        name: if class == Class::Addresses { String::new() } else { member.name.clone() },
        raft: Some(member.raft),
        voter: member.voter,
    };
    let mut seen: Vec<_> = database.members.iter().map(seen).collect();
    let all = seen.len().max(1);
    match blur {
        Blur::Nothing => {}
        Blur::Address(n) => seen.iter_mut().skip(n % all).take(1).for_each(|member| member.raft = None),
        Blur::One(n) => seen.iter_mut().skip(n % all).take(1).for_each(|member| {
            *member = SeenMember { id: "?".into(), name: String::new(), raft: None, voter: member.voter };
        }),
        // One that is missing and nothing else cannot be told from one that is gone.
        Blur::Part(n) => {
            let known = database.members.iter().filter(|member| member.is.is_some()).count();
            if known > 2 {
                seen.truncate(n % (known - 1));
            }
        }
        Blur::All => return None,
    }
    Some(seen.into_iter().collect())
}

proptest! {
    #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::with_cases(256) })]

    /// Rules N1 to N14, whatever happens in whatever order.
    #[test]
    fn whatever_happens_no_rule_is_broken(
        kind in prop_oneof![Just(Kind::Etcd), Just(Kind::Nats), Just(Kind::OpenRaft), Just(Kind::Redis)],
        expect in 1..4u32,
        founded in any_bool(2),
        events in proptest::collection::vec(event(), 1..120),
    ) {
        let mut world = World::new(kind, expect);
        let founders = (1..=u64::from(expect)).filter(|_| founded);
        let comes = |name| Event::Comes { name, disk: (name, 0), host: name, zone: 0 };
        for event in founders.map(comes).chain(events) {
            world.happens(event);
        }
    }
}
