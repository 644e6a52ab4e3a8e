use super::set::{Change, Kind, PeerSet, Pending};

/// How to make a change in the database, for people: the command where there is one.
pub fn hint(set: &PeerSet, Pending { change, node, .. }: &Pending) -> String {
    let Some(peer) = set.peers.get(node) else { return String::new() };
    let (key, raft) = (&peer.key, peer.at.raft);
    match (set.spec.kind, change) {
        (Kind::Etcd, Change::AddLearner) => {
            format!("etcdctl member add {key} --learner --peer-urls=http://{raft}, then start {key}")
        }
        (Kind::Etcd, Change::AddVoter) => format!("etcdctl member add {key} --peer-urls=http://{raft}"),
        (Kind::Etcd, Change::Promote) => {
            format!("etcdctl member promote ID; `etcdctl member list` tells the ID of {key}")
        }
        (Kind::Etcd, Change::Remove) => {
            format!("etcdctl member remove ID; `etcdctl member list` tells the ID of {key}")
        }
        (Kind::Nats, Change::AddVoter) => format!("start {key} with the present routes; it joins by itself"),
        (Kind::Nats, Change::Remove) => format!("stop {key}, then: nats server raft peer-remove {key}"),
        (Kind::Flamed, Change::AddLearner) => {
            format!(
                "flamed mutation: nodeAdminMutator{{addObserver(nodeID:\"{node}\",address:\"{raft}\")}}, then start {key}"
            )
        }
        (Kind::Flamed, Change::Promote | Change::AddVoter) => {
            format!("flamed mutation: nodeAdminMutator{{addNode(nodeID:\"{node}\",address:\"{raft}\")}}")
        }
        (Kind::Flamed, Change::Remove) => {
            format!("flamed mutation: nodeAdminMutator{{deleteNode(nodeID:\"{node}\")}}, then stop {key}")
        }
        (Kind::OpenRaft, Change::AddLearner) => format!("add_learner({node}, {raft}) on the leader"),
        (Kind::OpenRaft, Change::Promote | Change::Demote | Change::Remove) => {
            format!("change_membership on the leader, {} {node}", change.as_str())
        }
        (Kind::HashicorpRaft, Change::AddLearner) => format!("AddNonvoter({key}, {raft}) on the leader"),
        (Kind::HashicorpRaft, Change::Promote | Change::AddVoter) => {
            format!("AddVoter({key}, {raft}) on the leader")
        }
        (Kind::HashicorpRaft, Change::Demote) => format!("DemoteVoter({key}) on the leader"),
        (Kind::HashicorpRaft, Change::Remove) => format!("RemoveServer({key}) on the leader"),
        (Kind::Rqlite, Change::AddLearner) => format!("start {key} with -raft-non-voter and -join"),
        (Kind::Rqlite, Change::Remove) => format!("rqlite: .remove {key}"),
        (Kind::MongoDb, Change::AddVoter) => format!("rs.add({{_id: {node}, host: \"{}\"}})", peer.at.client),
        (Kind::MongoDb, Change::Remove) => format!("rs.remove(\"{}\")", peer.at.client),
        (kind, change) => format!(
            "{} {key} (node {node}, {raft}) in {kind}; when that is done and Disco is not told by the database: disco peers \
             finish {}",
            change.as_str(),
            set.spec.name
        ),
    }
}
