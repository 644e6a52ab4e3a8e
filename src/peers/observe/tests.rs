use std::{collections::BTreeMap, net::SocketAddr, sync::Arc, time::Duration};

use proptest::prelude::*;
use tokio::time::Instant;

use super::{
    adapter::{Adapter, FAST},
    etcd, generic, nats, patroni, redis,
    redis::Word,
    resp::{self, Value},
    said::{Fault, Said},
    sight::{Heard, Hearing, Sight, Target},
};
use crate::{
    model::{Role, Roles},
    peers::{Addresses, ClusterId, Facts, Kind, Newcomer, NodeId, Observe, PeerSet, Spec},
    rt,
};

const N1: NodeId = NodeId(1);
const N2: NodeId = NodeId(2);
const N3: NodeId = NodeId(3);

fn at(port: u16) -> SocketAddr {
    ([127, 0, 0, 1], port).into()
}

/// Replicas n1 to n3 at 127.0.0.1: peers at 2381 to 2383, clients at 2371 to 2373.
fn set(kind: Kind) -> PeerSet {
    let spec = Spec { name: "db".parse().unwrap(), kind, expect: 3, spread: None, observe: None };
    let mut set = PeerSet::new(spec, ClusterId(7));
    for n in 1..=3 {
        let new = Newcomer {
            key: format!("n{n}").parse().unwrap(),
            disk: format!("disk-{n}"),
            at: Addresses { raft: at(2380 + n), client: at(2370 + n), extra: BTreeMap::new() },
            zone: String::new(),
            version: String::new(),
        };
        set.register(new, rt::now()).unwrap();
    }
    set
}

fn observe(adapter: &str, options: &[(&str, &str)]) -> Observe {
    let options = options.iter().map(|(name, value)| ((*name).to_owned(), (*value).to_owned()));
    Observe {
        adapter: adapter.into(),
        port: String::new(),
        options: options.collect(),
        every: Duration::from_millis(100),
    }
}

#[test]
fn what_is_wrong_with_a_way_to_observe_is_said_by_field() {
    for (adapter, options, want) in [
        ("etcd", &[][..], ""),
        ("grpc", &[("service", "db.Leader")], ""),
        ("redis", &[("master", "m"), ("sentinels", "10.0.0.1:26379, 10.0.0.2:26379")], ""),
        ("redis", &[], "observe.options.master"),
        ("redis", &[("master", "m"), ("sentinels", "localhost:26379")], "observe.options.sentinels"),
        ("redis", &[("master", "m"), ("sentinels", "10.0.0.1:1,10.0.0.1:1")], "observe.options.sentinels"),
        ("http", &[("path", "leader")], "observe.options.path"),
        ("http", &[("path", "/a b")], "observe.options.path"),
        ("etcd", &[("path", "/x")], "observe.options"),
        ("mysql", &[], "observe.adapter"),
    ] {
        let mut problems = crate::model::Problems::default();
        observe(adapter, options).check(&mut problems);
        let fields: std::collections::BTreeSet<_> = problems.0.iter().map(|one| one.field.as_str()).collect();
        let want: std::collections::BTreeSet<_> =
            Some(want).filter(|want| !want.is_empty()).into_iter().collect();
        assert_eq!(fields, want, "{adapter} {options:?}: {problems}");
    }
    let mut often = observe("etcd", &[]);
    often.every = Duration::from_millis(1);
    assert!(Adapter::of(&often).unwrap_err().to_string().contains("20ms"));
}

/// What it means for the set: role, term, leader, how many members are known, how many of them vote.
fn meaning(said: &Said, own: NodeId, set: &PeerSet) -> (Role, u64, Option<u64>, usize, usize) {
    let seen = said.observation(own, set);
    let members = seen.members.unwrap_or_default();
    let known = members.iter().filter(|member| set.find(member).is_some()).count();
    let voters = members.iter().filter(|member| member.voter).count();
    (seen.role, seen.term, seen.leader.map(|node| node.0), known, voters)
}

const ETCD_MEMBERS: &str = r#"{"header":{"cluster_id":"14841639068965178418"},"members":[
    {"ID":"11","name":"n1","peerURLs":["http://127.0.0.1:2381"],"clientURLs":["http://127.0.0.1:2371"]},
    {"ID":"12","name":"n2","peerURLs":["http://127.0.0.1:2382"],"clientURLs":[]},
    {"ID":"13","name":"n3","peerURLs":["http://127.0.0.1:2383"],"isLearner":true}]}"#;

#[test]
fn etcd_says_its_role() {
    let set = set(Kind::Etcd);
    let members = etcd::members(ETCD_MEMBERS.as_bytes()).unwrap();
    let check = |own: NodeId, fields: &str, want| {
        let body =
            format!(r#"{{"header":{{"member_id":"1{own}"}},"version":"3.5.1","raftTerm":"3",{fields}}}"#);
        let status = etcd::status(body.as_bytes()).unwrap();
        let raft = set.peers[&own].at.raft;
        assert_eq!(meaning(&status.said(&members, raft).unwrap(), own, &set), want, "{fields}");
    };
    check(N1, r#""leader":"11","raftAppliedIndex":"8""#, (Role::Leader, 3, Some(1), 3, 2));
    check(N2, r#""leader":"11""#, (Role::Follower, 3, Some(1), 3, 2));
    check(N2, r#""raftIndex":"8""#, (Role::Candidate, 3, None, 3, 2));
    let learner =
        etcd::status(br#"{"header":{"member_id":"13"},"leader":"11","raftTerm":"3","isLearner":true}"#);
    let said = learner.unwrap().alone().expect("it would not tell its members");
    assert_eq!(meaning(&said, N3, &set), (Role::Learner, 3, None, 0, 0));
    check(N2, r#""leader":"99""#, (Role::Follower, 3, None, 3, 2));

    // Another etcd that came to listen at an address that was free.
    let other = etcd::status(br#"{"header":{"member_id":"12"},"leader":"12"}"#).unwrap();
    assert!(other.said(&members, at(2381)).unwrap_err().contains("another member"));
    let unknown = etcd::status(br#"{"header":{"member_id":"12"},"leader":"14"}"#).unwrap();
    assert!(!unknown.is_explained_by(&members), "a list without the leader is asked for again");
}

#[test]
fn nats_says_its_role() {
    let set = set(Kind::Nats);
    let check = |own: NodeId, state: &str, leader: &str, want| {
        let body = format!(
            r#"{{"$SYS":{{"_meta_":{{"id":"id{own}","state":"{state}","size":3,"applied":9,"leader":"{leader}","term":4,
            "peers":{{"idA":{{"name":"n1","known":true}},"idB":{{"name":"n3","known":true,"last_seen":"1s"}},
            "idC":{{"name":"","known":false}}}}}}}}}}"#
        );
        let said = nats::read(body.as_bytes(), &format!("n{own}")).unwrap();
        assert_eq!(meaning(&said, own, &set), want, "{state}");
    };
    check(N2, "LEADER", "id2", (Role::Leader, 4, Some(2), 3, 3));
    check(N2, "FOLLOWER", "idB", (Role::Follower, 4, Some(3), 3, 3));
    check(N2, "CANDIDATE", "", (Role::Candidate, 4, None, 3, 3));
    check(N2, "CLOSED", "", (Role::Unknown, 4, None, 3, 3));
    assert!(nats::read(b"{}", "n1").unwrap_err().contains("JetStream"));
}

#[test]
fn patroni_says_its_role() {
    let set = set(Kind::Postgres);
    let check = |own: NodeId, members: &str, want| {
        let said =
            patroni::read(format!(r#"{{"members":[{members}],"scope":"x"}}"#).as_bytes(), &set.peers[&own]);
        assert_eq!(meaning(&said.unwrap(), own, &set), want, "{members}");
    };
    let leader =
        r#"{"name":"n1","role":"leader","state":"running","host":"127.0.0.1","port":2371,"timeline":5}"#;
    let replica = r#"{"name":"pg-b","role":"replica","state":"streaming","host":"127.0.0.1","port":2372,"timeline":5,"lag":0}"#;
    let starting =
        r#"{"name":"n2","role":"replica","state":"starting","timeline":"unknown","lag":"unknown"}"#;
    let standby = r#"{"name":"n1","role":"standby_leader","state":"running","timeline":5}"#;
    check(N1, leader, (Role::Leader, 5, Some(1), 1, 1));
    check(N2, &format!("{leader},{replica}"), (Role::Follower, 5, Some(1), 2, 2));
    check(N2, &format!("{leader},{starting}"), (Role::Unknown, 5, Some(1), 2, 2));
    check(N1, standby, (Role::Follower, 5, None, 1, 1));
    let absent = patroni::read(br#"{"members":[]}"#, &set.peers[&N1]);
    assert!(absent.unwrap_err().contains("no member n1"));
}

#[test]
fn openraft_says_its_role() {
    let set = set(Kind::OpenRaft);
    let metrics = r#"{"running_state":{"Ok":null},"id":2,"current_term":6,"last_log_index":9,
        "last_applied":{"leader_id":{"term":6,"node_id":1},"index":8},"current_leader":1,"state":"Follower",
        "membership_config":{"log_id":{"leader_id":{"term":1,"node_id":1},"index":4},
        "membership":{"configs":[[1,2]],"nodes":{"1":{"addr":"x"},"2":{},"3":{}}}}}"#;
    for body in [metrics.to_owned(), format!(r#"{{"Ok":{metrics}}}"#)] {
        let said = generic::openraft(body.as_bytes(), N2).unwrap();
        assert_eq!(meaning(&said, N2, &set), (Role::Follower, 6, Some(1), 3, 2));
        assert_eq!((said.applied, said.config_index), (8, 4));
    }
    let leads = metrics.replace("Follower", "Leader");
    let said = generic::openraft(leads.as_bytes(), N2).unwrap();
    assert_eq!(meaning(&said, N2, &set), (Role::Leader, 6, Some(2), 3, 2));
    assert!(generic::openraft(metrics.as_bytes(), N1).unwrap_err().contains("this is node 2"));
}

#[test]
fn a_generic_probe_reads_the_status_or_a_role() {
    let set = set(Kind::Generic);
    for (status, body, want) in [
        (200, "", Ok((Role::Leader, 0, Some(1)))),
        (200, "OK", Ok((Role::Leader, 0, Some(1)))),
        (200, r#"{"status":"UP"}"#, Ok((Role::Leader, 0, Some(1)))),
        (503, "", Ok((Role::Follower, 0, None))),
        (404, "<html>", Ok((Role::Follower, 0, None))),
        (200, r#" {"role":"follower","term":3,"leader":2}"#, Ok((Role::Follower, 3, Some(2)))),
        (503, r#"{"role":"leader","term":3}"#, Ok((Role::Leader, 3, Some(1)))),
        (200, r#"{"role":"boss"}"#, Err("is not a role")),
        (200, r#"{"role":"leader","term":-1}"#, Err("not the JSON")),
        (200, r#"{"role":7}"#, Err("not the JSON")),
    ] {
        let got = generic::probe(status, body.as_bytes());
        match (got, want) {
            (Ok(said), Ok(want)) => {
                let seen = said.observation(N1, &set);
                assert_eq!((seen.role, seen.term, seen.leader.map(|node| node.0)), want, "{status} {body}");
            }
            (Err(error), Err(want)) => assert!(error.contains(want), "{error}"),
            other => panic!("{status} {body}: {other:?}"),
        }
    }
}

fn text(text: &str) -> Value {
    Value::Text(text.to_owned())
}

fn word(port: u16, epoch: u64) -> Word {
    Word { master: at(port), epoch }
}

#[test]
fn a_sentinel_says_who_is_master() {
    let address = Value::List(vec![text("127.0.0.1"), text("2371")]);
    let details =
        |epoch: &str| Value::List([text("name"), text("m"), text("config-epoch"), text(epoch)].into());
    assert_eq!(redis::word(&address, &details("3")), Ok(word(2371, 3)));
    for (address, details, want) in [
        (Value::Null, details("3"), "known by that name"),
        (address.clone(), Value::Error("ERR No such master".into()), "No such master"),
        (address.clone(), details("x"), "unknown form"),
        (address.clone(), Value::List(vec![text("name")]), "unknown form"),
        (Value::List(vec![text("redis-1"), text("2371")]), details("3"), "unknown form"),
        (text("127.0.0.1"), details("3"), "unknown form"),
    ] {
        let error = redis::word(&address, &details).unwrap_err();
        assert!(error.contains(want), "{error}");
    }
}

#[test]
fn a_master_is_one_that_most_sentinels_name() {
    let master =
        redis::role(&Value::List(vec![text("master"), Value::Number(9), Value::List(vec![])])).unwrap();
    let copies = |port: i64, state: &str| {
        let fields = [text("slave"), text("127.0.0.1"), Value::Number(port), text(state), Value::Number(7)];
        redis::role(&Value::List(fields.into())).unwrap()
    };
    let own = [at(2371), at(2381)];
    for (words, said, want) in [
        (&[Some(word(2371, 3)), Some(word(2371, 3)), None][..], &master, (Role::Leader, 3)),
        // The old master is back, and the sentinels have not caught it yet.
        (&[Some(word(2372, 4)), Some(word(2372, 4)), Some(word(2371, 3))], &master, (Role::Unknown, 4)),
        // Half of them is not most of them.
        (&[Some(word(2371, 3)), Some(word(2372, 4))], &master, (Role::Unknown, 0)),
        (&[Some(word(2371, 3)), None], &master, (Role::Unknown, 0)),
        // They are about to agree.
        (&[Some(word(2371, 3)), Some(word(2371, 4)), None], &master, (Role::Unknown, 0)),
        (&[], &master, (Role::Unknown, 0)),
        (&[Some(word(2372, 4))], &copies(2372, "connected"), (Role::Follower, 4)),
        (&[Some(word(2372, 4))], &copies(2372, "sync"), (Role::Unknown, 4)),
        (&[Some(word(2372, 4))], &copies(2373, "connected"), (Role::Unknown, 4)),
        (&[None], &copies(2372, "connect"), (Role::Follower, 0)),
        // Named by them, but it does not think so.
        (&[Some(word(2371, 4))], &copies(2372, "connected"), (Role::Unknown, 4)),
    ] {
        let judged = redis::judge(said, &own, redis::majority(words));
        assert_eq!((judged.role, judged.term), want, "{words:?} {said:?}");
    }
    assert!(redis::role(&Value::List(vec![text("sentinel")])).is_err());
    assert!(redis::role(&Value::List(vec![])).is_err());
    assert!(
        redis::role(&Value::Error("NOAUTH Authentication required.".into())).unwrap_err().contains("NOAUTH")
    );
}

#[test]
fn redis_answers_are_read_when_they_are_whole() {
    let answer = b"*3\r\n$6\r\nmaster\r\n:150\r\n*1\r\n*2\r\n+a\r\n$-1\r\n-ERR no\r\n";
    for cut in 0..answer.len() - 9 {
        assert_eq!(resp::take(&mut &answer[..cut]), Ok(None), "{cut}");
    }
    let mut rest = answer.as_slice();
    let list = Value::List(vec![Value::List(vec![text("a"), Value::Null])]);
    let want = Value::List(vec![text("master"), Value::Number(150), list]);
    assert_eq!(resp::take(&mut rest), Ok(Some(want)));
    assert_eq!(resp::take(&mut rest), Ok(Some(Value::Error("ERR no".into()))));
    assert!(rest.is_empty());
    for bad in [
        "HTTP/1.1 400\r\n",
        "*99999\r\n",
        "$99999999\r\n",
        ":x\r\n",
        "\r\n",
        "$1\r\nabc\r\n",
        "*1\r\n*1\r\n*1\r\n*1\r\n*1\r\n",
    ] {
        assert!(resp::take(&mut bad.as_bytes()).is_err(), "{bad:?}");
    }
}

proptest! {
    #[test]
    fn no_answer_makes_a_parser_panic(bytes in prop::collection::vec(any::<u8>(), 0..300), cut in 0..400_usize) {
        let whole = ETCD_MEMBERS.as_bytes();
        let peer = set(Kind::Etcd).peers[&N1].clone();
        for body in [bytes.as_slice(), &whole[..cut.min(whole.len())]] {
            let _ = etcd::status(body);
            let _ = etcd::members(body);
            let _ = nats::read(body, "n1");
            let _ = patroni::read(body, &peer);
            let _ = generic::probe(200, body);
            let _ = generic::openraft(body, N1);
            let _ = resp::take(&mut &*body);
        }
    }

    #[test]
    fn no_json_of_another_form_makes_a_parser_panic(
        field in prop::sample::select(vec![
            "members", "header", "leader", "raftTerm", "$SYS", "_meta_", "peers", "term", "id", "role", "state", "configs",
        ]),
        value in prop::sample::select(vec![
            "null", "-1", "1e400", "\"\"", "[]", "{}", "[[]]", "[null]", "{\"\":{}}", "18446744073709551616", "true",
        ]),
    ) {
        let peer = set(Kind::Etcd).peers[&N1].clone();
        for body in [format!("{{\"{field}\":{value}}}"), value.to_owned(), format!("{{\"a\":{{\"{field}\":{value}}}}}")] {
            let body = body.as_bytes();
            let _ = etcd::status(body);
            let _ = etcd::members(body);
            let _ = nats::read(body, "n1");
            let _ = patroni::read(body, &peer);
            let _ = generic::probe(200, body);
            let _ = generic::openraft(body, N1);
        }
    }
}

#[test]
fn more_members_than_a_set_can_have_are_refused() {
    let members: Vec<_> = (1..=300).map(|id| format!(r#"{{"ID":"{id}","name":"n{id}"}}"#)).collect();
    let body = format!(r#"{{"members":[{}]}}"#, members.join(","));
    assert!(etcd::members(body.as_bytes()).unwrap_err().contains("300 members"));
}

/// A set that is observed in a test: what comes back is told by hand, and time is moved by hand.
struct Scene {
    set: Arc<PeerSet>,
    hearing: Hearing,
    now: Instant,
}

fn leads(term: u64) -> Result<Heard, Fault> {
    let leader = Some(super::said::Whom::Own);
    Ok(Heard::Said(Said { role: Role::Leader, term, leader, ..Said::default() }))
}

fn follows() -> Result<Heard, Fault> {
    Ok(Heard::Said(Said { role: Role::Follower, ..Said::default() }))
}

fn silent() -> Result<Heard, Fault> {
    Err(Fault::Silent("no answer".into()))
}

fn refused() -> Result<Heard, Fault> {
    Err(Fault::Refused)
}

fn wrong() -> Result<Heard, Fault> {
    Err(Fault::Wrong("500".into()))
}

impl Scene {
    fn new() -> Self {
        let now = Instant::now();
        let mut hearing = Hearing::new(Duration::from_millis(100), false, now);
        for node in [N1, N2, N3] {
            hearing.add(Target::Replica(node), now);
        }
        Self { set: Arc::new(set(Kind::Postgres)), hearing, now }
    }

    /// Every 100 ms for so long each replica answers as it is told.
    fn pass(&mut self, millis: u64, answers: [fn() -> Result<Heard, Fault>; 3]) {
        for _ in 0..millis / 100 {
            self.now += Duration::from_millis(100);
            for (node, answer) in [N1, N2, N3].into_iter().zip(answers) {
                self.hearing.note(Target::Replica(node), answer(), self.now);
            }
            self.hearing.forget(self.now);
        }
    }

    fn sight(&self) -> Option<Sight> {
        self.hearing.sight(&self.set, self.now)
    }

    /// Who leads, and whether that is stale.
    fn leader(&self) -> Option<(Option<u64>, bool)> {
        let sight = self.sight()?;
        let facts = Facts { observed: sight.observed, ..Facts::default() };
        let leader = self.set.roles(&facts, &Roles::default()).leader;
        let node = leader.and_then(|key| self.set.peer(&key)).map(|peer| peer.node.0);
        Some((node, sight.stale))
    }
}

fn leads_now() -> Result<Heard, Fault> {
    leads(1)
}

#[tokio::test(start_paused = true)]
async fn a_frozen_leader_leads_no_more_after_a_second() {
    let mut scene = Scene::new();
    scene.pass(500, [leads_now, follows, follows]);
    assert_eq!(scene.leader(), Some((Some(1), false)));
    for answer in [silent, wrong] {
        let mut scene = Scene::new();
        scene.pass(500, [leads_now, follows, follows]);
        scene.pass(900, [answer, follows, follows]);
        assert_eq!(scene.leader(), Some((Some(1), false)));
        scene.pass(100, [answer, follows, follows]);
        assert_eq!(scene.leader(), Some((None, false)));
        assert_eq!(scene.sight().unwrap().unheard.keys().collect::<Vec<_>>(), [&N1]);
        scene.pass(100, [leads_now, follows, follows]);
        assert_eq!(scene.leader(), Some((Some(1), false)));
    }
}

#[tokio::test(start_paused = true)]
async fn one_that_refuses_leads_no_more_at_once() {
    let mut scene = Scene::new();
    scene.pass(500, [leads_now, follows, follows]);
    scene.pass(100, [refused, follows, follows]);
    assert_eq!(scene.leader(), Some((None, false)));
    // Also when all do: somebody says so.
    scene.pass(100, [refused, refused, refused]);
    assert_eq!(scene.sight().unwrap().observed, BTreeMap::new());
}

#[tokio::test(start_paused = true)]
async fn when_all_are_silent_what_was_known_stays_and_is_stale() {
    let mut scene = Scene::new();
    scene.pass(500, [leads_now, follows, follows]);
    scene.pass(60_000, [silent, silent, silent]);
    assert_eq!(scene.leader(), Some((Some(1), true)));
    // The network is back: everybody has a second to answer.
    scene.pass(900, [silent, follows, silent]);
    assert_eq!(scene.leader(), Some((Some(1), false)));
    scene.pass(200, [silent, follows, silent]);
    assert_eq!(scene.leader(), Some((None, false)));
}

#[tokio::test(start_paused = true)]
async fn nothing_is_said_before_everybody_was_asked() {
    let mut scene = Scene::new();
    scene.hearing.note(Target::Replica(N2), follows(), scene.now);
    assert_eq!(scene.sight(), None, "a leader that another node knows would be taken away");
    scene.hearing.note(Target::Replica(N1), leads(1), scene.now);
    scene.hearing.note(Target::Replica(N3), refused(), scene.now);
    assert_eq!(scene.leader(), Some((Some(1), false)));

    let mut scene = Scene::new();
    scene.hearing.note(Target::Replica(N2), follows(), scene.now);
    scene.now += Duration::from_secs(1);
    assert_eq!(scene.leader(), Some((None, false)), "one that never answers holds nobody up for longer");

    let mut scene = Scene::new();
    scene.pass(5000, [silent, silent, silent]);
    assert_eq!(scene.sight(), None, "nobody is known, and this node may be cut off");
}

#[tokio::test(start_paused = true)]
async fn a_pause_of_this_process_condemns_nobody() {
    let mut scene = Scene::new();
    scene.pass(500, [leads_now, follows, follows]);
    scene.now += Duration::from_secs(60);
    scene.hearing.forget(scene.now);
    scene.hearing.note(Target::Replica(N1), silent(), scene.now);
    assert_eq!(scene.leader(), Some((Some(1), false)));
}

#[tokio::test(start_paused = true)]
async fn haste_begins_without_a_leader_and_ends() {
    let mut scene = Scene::new();
    let period = |scene: &mut Scene| {
        let sight = scene.sight().unwrap();
        scene.hearing.period(&scene.set, &sight, scene.now)
    };
    let steady = Duration::from_millis(100);
    scene.pass(500, [leads_now, follows, follows]);
    assert_eq!(period(&mut scene), steady);
    scene.pass(100, [silent, follows, follows]);
    assert_eq!(period(&mut scene), FAST, "the leader still counts, but does not answer");
    scene.pass(29_000, [silent, follows, follows]);
    assert_eq!(period(&mut scene), FAST);
    scene.pass(2000, [silent, follows, follows]);
    assert_eq!(period(&mut scene), steady);
    scene.pass(100, [leads_now, follows, follows]);
    assert_eq!(period(&mut scene), steady);
    scene.pass(100, [refused, follows, follows]);
    assert_eq!(period(&mut scene), FAST, "it begins anew");
}
