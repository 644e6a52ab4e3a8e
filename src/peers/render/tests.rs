use std::{collections::BTreeMap, time::SystemTime};

use serde_json::{Value, json};

use super::*;
use crate::peers::{
    Addresses, Change, Class, ClusterId, Founding, Liveness, Newcomer, Pending, Spec, Suffrage,
};

/// A set with `founders` of three that were expected.
fn collecting(kind: Kind, founders: usize) -> PeerSet {
    let spec = Spec { name: "db".parse().unwrap(), kind, expect: 3, spread: None, observe: None };
    let mut set = PeerSet::new(spec, ClusterId(0xab));
    for n in 1..=founders {
        come(&mut set, n);
    }
    set.revision = Revision(42);
    set
}

/// Replica `n` comes, from 10.0.0.n.
fn come(set: &mut PeerSet, n: usize) {
    let at = |port: u16| format!("10.0.0.{n}:{port}").parse().unwrap();
    let extra = [("election", 3888), ("http-api", 9000)].map(|(name, port)| (name.to_owned(), at(port)));
    let new = Newcomer {
        key: format!("n{n}").parse().unwrap(),
        disk: format!("disk {n}"),
        at: Addresses { raft: at(7000), client: at(8000), extra: BTreeMap::from(extra) },
        zone: format!("zone {n}"),
        version: String::new(),
    };
    set.register(new, SystemTime::UNIX_EPOCH).unwrap();
}

fn founded(kind: Kind) -> PeerSet {
    collecting(kind, 3)
}

/// Founded by three; then n4 was added, and n2 removed.
fn grown(kind: Kind) -> PeerSet {
    let mut set = founded(kind);
    come(&mut set, 4);
    change(&mut set, Change::AddLearner, 4);
    change(&mut set, Change::Remove, 2);
    set
}

fn change(set: &mut PeerSet, change: Change, node: u64) {
    set.pending = Some(Pending { change, node: NodeId(node), since: SystemTime::UNIX_EPOCH });
    set.confirm(set.revision).unwrap();
}

fn digest(set: &PeerSet) -> String {
    set.founding.as_ref().map(|Founding { digest, .. }| digest.clone()).unwrap()
}

/// What replica `n` is given, or nobody in particular for 0.
fn given(set: &PeerSet, n: u64, format: Format) -> Result<String, RenderError> {
    let options = Options { recovering: true, ..Options::default() };
    render(set, set.peers.get(&NodeId(n)), format, &options).map(|rendered| rendered.text)
}

/// The same without its comment, if it has one.
fn plain(set: &PeerSet, n: u64, format: Format) -> String {
    let text = given(set, n, format).unwrap();
    match format.comment() {
        Some(mark) => {
            let (first, rest) = text.split_once('\n').unwrap();
            assert_eq!(
                first,
                format!("{mark} disco: set db, generation 1, revision 42, digest {}", digest(set)),
                "{format}"
            );
            rest.to_owned()
        }
        None => text,
    }
}

#[test]
fn every_format_for_a_founder() {
    for (format, wanted) in [
        (
            Format::EtcdInitialCluster,
            "n1=http://10.0.0.1:7000,n2=http://10.0.0.2:7000,n3=http://10.0.0.3:7000\n",
        ),
        (
            Format::EtcdEnv,
            "ETCD_NAME=n1\n\
             ETCD_INITIAL_CLUSTER=n1=http://10.0.0.1:7000,n2=http://10.0.0.2:7000,n3=http://10.0.0.3:7000\n\
             ETCD_INITIAL_CLUSTER_STATE=new\n\
             ETCD_INITIAL_CLUSTER_TOKEN=00000000-0000-0000-0000-0000000000ab\n\
             ETCD_INITIAL_ADVERTISE_PEER_URLS=http://10.0.0.1:7000\n\
             ETCD_ADVERTISE_CLIENT_URLS=http://10.0.0.1:8000\n",
        ),
        (Format::Flamed, "1,10.0.0.1:7000;2,10.0.0.2:7000;3,10.0.0.3:7000;\n"),
        (
            Format::FlamedEnv,
            "FLAMED_NODEID=1\nFLAMED_RAFTADDRESS=10.0.0.1:7000\nFLAMED_JOIN=false\n\
             FLAMED_INITIALMEMBERS=1,10.0.0.1:7000;2,10.0.0.2:7000;3,10.0.0.3:7000;\n",
        ),
        (Format::Rqlite, "10.0.0.1:7000,10.0.0.2:7000,10.0.0.3:7000\n"),
        (
            Format::NatsRoutes,
            "routes: [\n  \"nats-route://10.0.0.1:7000\"\n  \"nats-route://10.0.0.2:7000\"\n  \
             \"nats-route://10.0.0.3:7000\"\n]\n",
        ),
        (Format::Cockroach, "10.0.0.1:7000,10.0.0.2:7000,10.0.0.3:7000\n"),
        (Format::TigerBeetle, "10.0.0.1:7000,10.0.0.2:7000,10.0.0.3:7000\n"),
        (
            Format::FdbCluster,
            "db:000000000000000000000000000000ab@10.0.0.1:7000,10.0.0.2:7000,10.0.0.3:7000\n",
        ),
        (Format::Galera, "gcomm://10.0.0.1:7000,10.0.0.2:7000,10.0.0.3:7000\n"),
        (
            Format::ZooKeeper,
            "server.1=10.0.0.1:7000:3888:participant;10.0.0.1:8000\n\
             server.2=10.0.0.2:7000:3888:participant;10.0.0.2:8000\n\
             server.3=10.0.0.3:7000:3888:participant;10.0.0.3:8000\n",
        ),
        (
            Format::KafkaQuorumVoters,
            "controller.quorum.voters=1@10.0.0.1:7000,2@10.0.0.2:7000,3@10.0.0.3:7000\n",
        ),
        (
            Format::KafkaBootstrapServers,
            "controller.quorum.bootstrap.servers=10.0.0.1:7000,10.0.0.2:7000,10.0.0.3:7000\n",
        ),
        (Format::ScyllaSeeds, "10.0.0.1,10.0.0.2,10.0.0.3\n"),
        (Format::SentinelMonitor, "sentinel monitor db 10.0.0.1 8000 2\n"),
        (Format::Nebula, "10.0.0.1:7000,10.0.0.2:7000,10.0.0.3:7000\n"),
    ] {
        assert_eq!(plain(&founded(Kind::Generic), 1, format), wanted, "{format}");
    }
}

#[test]
fn every_document_for_a_founder() {
    let set = founded(Kind::Generic);
    for (format, wanted) in [
        (
            Format::Dragonboat,
            json!({
                "replica_id": 1, "raft_address": "10.0.0.1:7000", "join": false,
                "initial_members": {"1": "10.0.0.1:7000", "2": "10.0.0.2:7000", "3": "10.0.0.3:7000"},
                "members": {"1": "10.0.0.1:7000", "2": "10.0.0.2:7000", "3": "10.0.0.3:7000"},
                "revision": 42, "digest": digest(&set),
            }),
        ),
        (
            Format::HashicorpConfiguration,
            json!({"Servers": [
                {"Suffrage": 0, "ID": "n1", "Address": "10.0.0.1:7000"},
                {"Suffrage": 0, "ID": "n2", "Address": "10.0.0.2:7000"},
                {"Suffrage": 0, "ID": "n3", "Address": "10.0.0.3:7000"},
            ]}),
        ),
        (
            Format::HashicorpPeersJson,
            json!([
                {"id": "n1", "address": "10.0.0.1:7000", "non_voter": false},
                {"id": "n2", "address": "10.0.0.2:7000", "non_voter": false},
                {"id": "n3", "address": "10.0.0.3:7000", "non_voter": false},
            ]),
        ),
        (
            Format::MongoDb,
            json!({"_id": "db", "members": [
                {"_id": 1, "host": "10.0.0.1:7000"},
                {"_id": 2, "host": "10.0.0.2:7000"},
                {"_id": 3, "host": "10.0.0.3:7000"},
            ]}),
        ),
    ] {
        let text = plain(&set, 1, format);
        assert_eq!(serde_json::from_str::<Value>(&text).unwrap(), wanted, "{format}");
    }
    let text = plain(&set, 2, Format::Json);
    let view: Value = serde_json::from_str(&text).unwrap();
    let line = |n: u32| {
        json!({
            "node_id": n, "key": format!("n{n}"), "ordinal": n - 1, "raft": format!("10.0.0.{n}:7000"),
            "client": format!("10.0.0.{n}:8000"), "zone": format!("zone {n}"), "suffrage": "voter",
            "ports": {"election": format!("10.0.0.{n}:3888"), "http-api": format!("10.0.0.{n}:9000")},
        })
    };
    let mut own = line(2);
    own["birth"] = "founder".into();
    own["join"] = false.into();
    let all = json!([line(1), line(2), line(3)]);
    assert_eq!(
        view,
        json!({
            "name": "db", "kind": "generic", "class": "identity", "generation": 1, "revision": 42,
            "cluster_id": "00000000-0000-0000-0000-0000000000ab", "cluster_number": "171",
            "digest": digest(&set), "self": own, "peers": all, "founders": all, "members": all,
        })
    );
}

#[test]
fn environment_for_a_joiner_with_a_hole_in_the_list() {
    let set = grown(Kind::Generic);
    let lines = |n: u32| {
        let at = n - 1;
        format!(
            "PEERS_{at}_NODE={n}\nPEERS_{at}_KEY=n{n}\nPEERS_{at}_ADDR=10.0.0.{n}:7000\n\
             PEERS_{at}_CLIENT_ADDR=10.0.0.{n}:8000\nPEERS_{at}_ELECTION_ADDR=10.0.0.{n}:3888\n\
             PEERS_{at}_HTTP_API_ADDR=10.0.0.{n}:9000\n"
        )
    };
    let wanted = format!(
        "DISCO_PEER_SET=db\nDISCO_CLUSTER_ID=00000000-0000-0000-0000-0000000000ab\nDISCO_CLUSTER_NUMBER=171\n\
         DISCO_PEERS_DIGEST={}\nDISCO_NODE_ID=4\nDISCO_PEER_KEY=n4\nDISCO_PEER_BIRTH=joiner\n\
         DISCO_PEER_ORDINAL=3\nDISCO_PEER_ADDR=10.0.0.4:7000\nDISCO_PEER_CLIENT_ADDR=10.0.0.4:8000\n\
         DISCO_PEERS=10.0.0.1:7000,10.0.0.3:7000,10.0.0.4:7000\nPEERS_COUNT=3\nPEERS_ORDINALS=0,2,3\n{}{}{}",
        digest(&set),
        lines(1),
        lines(3),
        lines(4)
    );
    assert_eq!(plain(&set, 4, Format::Env), wanted);
}

/// N1.
#[test]
fn while_founders_are_collected_there_is_no_list_in_any_format() {
    for founders in 0..3 {
        let set = collecting(Kind::Generic, founders);
        for format in Format::ALL {
            for n in 0..=3 {
                let error = given(&set, n, *format).unwrap_err();
                assert!(error.is_not_yet(), "{format}: {error}");
                assert!(error.to_string().contains(&format!("{founders} of 3")), "{format}: {error}");
            }
        }
    }
}

/// N3, N8, finding 3.
#[test]
fn a_founder_is_given_the_founding_list_for_ever() {
    for format in Format::ALL.iter().filter(|format| format.class() == Some(Class::Identity)) {
        let (first, later) = (founded(Kind::Generic), grown(Kind::Generic));
        if *format == Format::Dragonboat {
            let members = |set| {
                let document: Value = serde_json::from_str(&plain(set, 1, *format)).unwrap();
                document["initial_members"].clone()
            };
            assert_eq!(members(&first), members(&later));
        } else {
            assert_eq!(plain(&first, 1, *format), plain(&later, 1, *format), "{format}");
        }
    }
}

/// N11.
#[test]
fn a_joiner_is_told_nothing_before_its_add_is_seen() {
    let mut set = founded(Kind::Generic);
    come(&mut set, 4);
    for format in Format::ALL {
        let text = given(&set, 4, *format);
        if format.class().unwrap_or(Class::Identity) == Class::Identity {
            let error = text.unwrap_err();
            assert!(error.is_not_yet() && error.to_string().contains("n4"), "{format}: {error}");
        } else {
            // It is no member yet, and finds the others by them.
            assert!(!text.unwrap().contains("10.0.0.4"), "{format}");
        }
    }
}

/// N11: what a joiner is given says that it joins, or it is given nothing.
#[test]
fn a_joiner_joins() {
    let set = grown(Kind::Generic);
    for (format, mark) in [
        (Format::EtcdEnv, "ETCD_INITIAL_CLUSTER_STATE=existing\n"),
        (Format::FlamedEnv, "FLAMED_JOIN=true\n"),
        (Format::Dragonboat, "\"join\": true"),
        (Format::Json, "\"join\": true"),
        (Format::Env, "DISCO_PEER_BIRTH=joiner\n"),
        (Format::ZooKeeper, "server.4=10.0.0.4:7000:3888:observer;10.0.0.4:8000\n"),
    ] {
        let text = plain(&set, 4, format);
        assert!(text.contains(mark), "{format}: {text}");
        for founder in [1, 3] {
            assert!(!plain(&set, founder, format).contains(mark), "{format}");
        }
    }
    let line = "n1=http://10.0.0.1:7000,n3=http://10.0.0.3:7000,n4=http://10.0.0.4:7000\n";
    assert_eq!(plain(&set, 4, Format::EtcdInitialCluster), line);
    let flamed = plain(&set, 4, Format::FlamedEnv);
    assert!(!flamed.contains("INITIALMEMBERS"), "{flamed}");
    let document: Value = serde_json::from_str(&plain(&set, 4, Format::Dragonboat)).unwrap();
    assert_eq!(document["initial_members"], json!({}));
    for format in [
        Format::Flamed,
        Format::HashicorpConfiguration,
        Format::MongoDb,
        Format::KafkaQuorumVoters,
        Format::TigerBeetle,
    ] {
        let error = given(&set, 4, format).unwrap_err();
        assert!(matches!(error, RenderError::Joiner { .. }), "{format}: {error}");
    }
}

#[test]
fn seeds_are_those_of_today() {
    let set = grown(Kind::Generic);
    for n in [0, 1, 4] {
        for format in [Format::Rqlite, Format::Cockroach] {
            assert_eq!(plain(&set, n, format), "10.0.0.1:7000,10.0.0.3:7000,10.0.0.4:7000\n", "{format}");
        }
    }
}

/// N5.
#[test]
fn who_is_dead_comes_last_where_order_matters_and_is_never_left_out() {
    let set = founded(Kind::Generic);
    let liveness = [(1, Liveness::Down), (2, Liveness::Suspect), (3, Liveness::Up)];
    let liveness = liveness.map(|(node, liveness)| (NodeId(node), liveness));
    let facts = Facts { liveness: liveness.into(), ..Facts::default() };
    for format in Format::ALL {
        let text = |facts| {
            let options = Options { recovering: true, facts, ..Options::default() };
            render(&set, set.peers.get(&NodeId(2)), *format, &options).unwrap().text
        };
        if *format == Format::Rqlite {
            assert_eq!(text(Some(&facts)), "10.0.0.3:7000,10.0.0.2:7000,10.0.0.1:7000\n");
        } else {
            assert_eq!(text(Some(&facts)), text(None), "{format}");
        }
    }
}

/// N10.
#[test]
fn peers_json_is_for_who_recovers() {
    let set = grown(Kind::HashicorpRaft);
    let error = render(&set, None, Format::HashicorpPeersJson, &Options::default()).unwrap_err();
    assert!(error.to_string().contains("--i-am-recovering"), "{error}");
    let text = plain(&set, 0, Format::HashicorpPeersJson);
    let wanted = json!([
        {"id": "n1", "address": "10.0.0.1:7000", "non_voter": false},
        {"id": "n3", "address": "10.0.0.3:7000", "non_voter": false},
        {"id": "n4", "address": "10.0.0.4:7000", "non_voter": true},
    ]);
    assert_eq!(serde_json::from_str::<Value>(&text).unwrap(), wanted);
}

#[test]
fn what_cannot_be_written_is_refused() {
    let set = founded(Kind::Etcd);
    let error = given(&set, 1, Format::NatsRoutes).unwrap_err().to_string();
    assert!(error.contains("set of etcd") && error.contains("etcd-env"), "{error}");
    for format in [Format::EtcdEnv, Format::FlamedEnv] {
        let error = given(&founded(Kind::Generic), 0, format).unwrap_err();
        assert_eq!(error, RenderError::NeedsPeer { format });
    }

    let mut far = founded(Kind::Generic);
    far.next_node = 256;
    come(&mut far, 4);
    change(&mut far, Change::AddVoter, 256);
    let error = given(&far, 256, Format::ZooKeeper).unwrap_err();
    assert!(error.to_string().contains("n4 is node 256"), "{error}");

    let mut bare = founded(Kind::Generic);
    let founding = bare.founding.as_mut().unwrap();
    let mut list = founding.list.to_vec();
    list[1].at.extra.clear();
    founding.list = list.into();
    let error = given(&bare, 1, Format::ZooKeeper).unwrap_err();
    assert!(error.to_string().contains("n2 has no address for election"), "{error}");
}

/// N9, and finding 1: whatever is handed out names somebody, by IP address.
#[test]
fn no_text_is_empty_or_has_a_name() {
    for set in [founded(Kind::Generic), grown(Kind::Generic)] {
        for format in Format::ALL {
            for n in [0, 1, 3, 4] {
                let Ok(text) = given(&set, n, *format) else { continue };
                assert!(text.ends_with('\n') && text.contains("10.0.0."), "{format}: {text:?}");
            }
        }
    }
}

#[test]
fn a_voter_that_was_demoted_is_still_a_founder() {
    let mut set = founded(Kind::Etcd);
    change(&mut set, Change::Demote, 1);
    assert_eq!(set.peers[&NodeId(1)].suffrage, Suffrage::Learner);
    assert!(plain(&set, 1, Format::EtcdEnv).contains("STATE=new\n"));
}

#[test]
fn sentinels_watch_who_leads() {
    let set = founded(Kind::Redis);
    let leader = "n3".parse().unwrap();
    let options = Options { leader: Some(&leader), ..Options::default() };
    let text = render(&set, None, Format::SentinelMonitor, &options).unwrap().text;
    assert!(text.ends_with("\nsentinel monitor db 10.0.0.3 8000 2\n"), "{text}");
}

#[test]
fn tls_is_part_of_urls() {
    let set = founded(Kind::Generic);
    let options = Options { tls: true, ..Options::default() };
    for (format, wanted) in [
        (Format::EtcdInitialCluster, "n1=https://10.0.0.1:7000,"),
        (Format::NatsRoutes, "\"tls://10.0.0.1:7000\""),
    ] {
        let text = render(&set, None, format, &options).unwrap().text;
        assert!(text.contains(wanted), "{format}: {text}");
    }
}

#[test]
fn formats_have_names() {
    for format in Format::ALL {
        assert_eq!(format.as_str().parse(), Ok(*format));
    }
    let error = "peers".parse::<Format>().unwrap_err();
    assert!(error.contains("\"peers\" is not a format") && error.contains("fdb-cluster"), "{error}");
    for kind in Kind::ALL {
        assert!(Format::ALL.iter().any(|format| format.fits(*kind)), "{kind}");
    }
}

#[test]
fn templates() {
    let set = founded(Kind::Generic);
    let view: Value = serde_json::from_str(&plain(&set, 2, Format::Json)).unwrap();
    for (template, wanted) in [
        ("{{ self.key }} of {{ name }}\n", Ok("n2 of db\n")),
        (
            "{% for peer in peers %}\n{{ peer.ordinal }}={{ peer.raft }}{{ ',' if not loop.last }}\n{% endfor %}\n",
            Ok("0=10.0.0.1:7000,\n1=10.0.0.2:7000,\n2=10.0.0.3:7000\n"),
        ),
        ("{{ peers | map(attribute='raft') | join(' ') }}", Ok("10.0.0.1:7000 10.0.0.2:7000 10.0.0.3:7000")),
        ("<{{ members | length }}>", Ok("<3>")),
        ("{{ leader }}", Err("undefined")),
        ("{{ self.kye }}", Err("undefined")),
        ("{% for peer in peers %}", Err("syntax error")),
        ("{% for a in range(9999) %}{% for b in range(9999) %}{{ b }}{% endfor %}{% endfor %}", Err("fuel")),
        ("{% if false %}x{% endif %}", Err("empty text")),
    ] {
        match (render_template(template, &view), wanted) {
            (Ok(text), Ok(wanted)) => assert_eq!(text, wanted),
            (Err(error), Err(wanted)) => assert!(error.to_string().contains(wanted), "{template}: {error}"),
            (got, wanted) => panic!("{template}: {got:?}, not {wanted:?}"),
        }
    }
}
