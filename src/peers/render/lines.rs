//! Formats that are lines of text.

use std::fmt::Write as _;

use super::{
    Format, RenderError,
    list::{Line, List},
    push_line,
};
use crate::{
    model::InstanceId,
    peers::set::{Founding, NodeId, Peer, PeerSet, Suffrage},
};

/// Greatest server id of ZooKeeper and greatest `_id` of MongoDB.
const BYTE: u64 = 255;

/// Greatest `node.id` of Kafka.
const INT32: u64 = i32::MAX as u64;

/// Contact points that ScyllaDB is given: a few, and the same for all.
const SEEDS: usize = 3;

pub(super) fn joined(lines: &[Line<'_>]) -> String {
    each(lines, ",", |line| line.at.raft.to_string())
}

fn each(lines: &[Line<'_>], between: &str, text: impl Fn(&Line<'_>) -> String) -> String {
    lines.iter().map(text).collect::<Vec<_>>().join(between)
}

fn scheme(tls: bool) -> &'static str {
    if tls { "https" } else { "http" }
}

pub(super) fn etcd(list: &List<'_>, tls: bool) -> String {
    each(&list.lines, ",", |line| format!("{}={}://{}", line.key, scheme(tls), line.at.raft))
}

/// What `etcdctl member add` prints for a joiner, and a founder's likewise. Where it listens is for its own flags to say: etcd
/// refuses a setting that it is given twice.
pub(super) fn etcd_env(set: &PeerSet, own: &Peer, list: &List<'_>, tls: bool) -> String {
    let scheme = scheme(tls);
    let state = if own.birth.joins() { "existing" } else { "new" };
    format!(
        "ETCD_NAME={}\nETCD_INITIAL_CLUSTER={}\nETCD_INITIAL_CLUSTER_STATE={state}\nETCD_INITIAL_CLUSTER_TOKEN={}\n\
         ETCD_INITIAL_ADVERTISE_PEER_URLS={scheme}://{}\nETCD_ADVERTISE_CLIENT_URLS={scheme}://{}",
        own.key,
        etcd(list, tls),
        set.cluster,
        own.at.raft,
        own.at.client
    )
}

pub(super) fn flamed(list: &List<'_>) -> String {
    each(&list.lines, "", |line| format!("{},{};", line.node, line.at.raft))
}

/// A joiner has no list at all: with one, dragonboat would take it for a founder.
pub(super) fn flamed_env(own: &Peer, list: &List<'_>) -> String {
    let joins = own.birth.joins();
    let mut text =
        format!("FLAMED_NODEID={}\nFLAMED_RAFTADDRESS={}\nFLAMED_JOIN={joins}", own.node, own.at.raft);
    if !joins {
        push_line(&mut text, format_args!("FLAMED_INITIALMEMBERS={}", flamed(list)));
    }
    text
}

pub(super) fn nats(list: &List<'_>, tls: bool) -> String {
    let scheme = if tls { "tls" } else { "nats-route" };
    let routes = each(&list.lines, "", |line| format!("  \"{scheme}://{}\"\n", line.at.raft));
    format!("routes: [\n{routes}]")
}

/// The name is for people and may have fewer characters than a set's.
pub(super) fn fdb(set: &PeerSet, list: &List<'_>) -> String {
    let name = set.spec.name.as_str().replace(|c: char| !c.is_ascii_alphanumeric(), "_");
    format!("{name}:{:032x}@{}", set.cluster.0, joined(&list.lines))
}

pub(super) fn zookeeper(list: &List<'_>) -> Result<String, RenderError> {
    let mut text = String::new();
    for line in &list.lines {
        let id = id(line, BYTE, Format::ZooKeeper)?;
        let election = line
            .at
            .extra
            .get("election")
            .ok_or_else(|| RenderError::NoPort { key: line.key.clone(), port: "election" })?;
        let role = if line.suffrage.votes() { "participant" } else { "observer" };
        let (raft, client) = (line.at.raft, line.at.client);
        push_line(&mut text, format_args!("server.{id}={raft}:{}:{role};{client}", election.port()));
    }
    Ok(text)
}

pub(super) fn kafka_voters(list: &List<'_>) -> Result<String, RenderError> {
    let voters: Vec<_> = list
        .lines
        .iter()
        .filter(|line| line.suffrage.votes())
        .map(|line| Ok(format!("{}@{}", id(line, INT32, Format::KafkaQuorumVoters)?, line.at.raft)))
        .collect::<Result<_, RenderError>>()?;
    Ok(format!("controller.quorum.voters={}", voters.join(",")))
}

/// IP addresses without ports, of the first few by ordinal whoever lives: all replicas are to name the same.
pub(super) fn scylla(list: &List<'_>) -> String {
    each(list.lines.get(..SEEDS).unwrap_or(&list.lines), ",", |line| line.at.raft.ip().to_string())
}

/// Before anybody ever led the first founder is the one that the others are replicas of. The quorum is that of one sentinel
/// beside each replica.
pub(super) fn sentinel(set: &PeerSet, list: &List<'_>, leader: Option<&InstanceId>) -> String {
    let leads = |line: &&Line<'_>| leader.is_some_and(|leader| leader == line.key);
    let master = list.lines.iter().find(leads).or(list.lines.first());
    let quorum = list.lines.len() / 2 + 1;
    master.map_or_else(String::new, |master| {
        let at = master.at.client;
        format!("sentinel monitor {} {} {} {quorum}", set.spec.name, at.ip(), at.port())
    })
}

/// Values have no spaces or quotes, so that shells, systemd and containers read the same. Zones and versions may have and are
/// left out.
pub(super) fn env(set: &PeerSet, founding: &Founding, own: Option<&Peer>, list: &List<'_>) -> String {
    let mut text = format!(
        "DISCO_PEER_SET={}\nDISCO_CLUSTER_ID={}\nDISCO_CLUSTER_NUMBER={}\nDISCO_PEERS_DIGEST={}",
        set.spec.name,
        set.cluster,
        set.cluster.short(),
        founding.digest
    );
    if let Some(own) = own {
        let Peer { node, key, birth, ordinal, at, .. } = own;
        push_line(
            &mut text,
            format_args!(
                "DISCO_NODE_ID={node}\nDISCO_PEER_KEY={key}\nDISCO_PEER_BIRTH={}\nDISCO_PEER_ORDINAL={ordinal}\n\
                 DISCO_PEER_ADDR={}\nDISCO_PEER_CLIENT_ADDR={}",
                birth.as_str(),
                at.raft,
                at.client
            ),
        );
    }
    let ordinals = each(&list.lines, ",", |line| line.ordinal.to_string());
    push_line(
        &mut text,
        format_args!(
            "DISCO_PEERS={}\nPEERS_COUNT={}\nPEERS_ORDINALS={ordinals}",
            joined(&list.lines),
            list.lines.len()
        ),
    );
    for line in &list.lines {
        let Line { node, key, ordinal, at, .. } = line;
        push_line(
            &mut text,
            format_args!(
                "PEERS_{ordinal}_NODE={node}\nPEERS_{ordinal}_KEY={key}\nPEERS_{ordinal}_ADDR={}\n\
                 PEERS_{ordinal}_CLIENT_ADDR={}",
                at.raft, at.client
            ),
        );
        for (name, at) in &at.extra {
            let name = name.to_ascii_uppercase().replace('-', "_");
            let _ = write!(text, "\nPEERS_{ordinal}_{name}_ADDR={at}");
        }
    }
    text
}

/// A replica's number, where the database has less room for it.
pub(super) fn id(line: &Line<'_>, most: u64, format: Format) -> Result<u64, RenderError> {
    let NodeId(node) = line.node;
    if node > most {
        return Err(RenderError::IdRange { key: line.key.clone(), node: line.node, most, format });
    }
    Ok(node)
}

/// Likewise, for MongoDB.
pub(super) fn byte(line: &Line<'_>, format: Format) -> Result<u64, RenderError> {
    id(line, BYTE, format)
}

impl Suffrage {
    /// Whether it copies without a vote.
    pub(super) fn copies(self) -> bool {
        self == Self::Learner
    }
}
