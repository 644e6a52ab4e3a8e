//! Formats that are JSON documents.

use serde_json::{Map, Value, json};

use super::{
    Format, RenderError,
    lines::byte,
    list::{Line, List},
};
use crate::peers::set::{Founding, Peer, PeerSet};

fn pretty(document: &Value) -> String {
    format!("{document:#}")
}

/// All that a program or a template may want. The cluster's number is text, since many readers of JSON round large ones.
pub(super) fn json(set: &PeerSet, founding: &Founding, own: Option<&Peer>, list: &List<'_>) -> String {
    let PeerSet { spec, cluster, generation, revision, .. } = set;
    let lines = |lines: &[Line<'_>]| lines.iter().map(line).collect::<Vec<_>>();
    let founders: Vec<_> = founding.list.iter().map(Line::founder).collect();
    let own = own.map(|own| {
        let mut value = line(&Line::member(own));
        if let Value::Object(fields) = &mut value {
            fields.insert("birth".into(), own.birth.as_str().into());
            fields.insert("join".into(), own.birth.joins().into());
        }
        value
    });
    pretty(&json!({
        "name": spec.name.as_str(),
        "kind": spec.kind.as_str(),
        "class": spec.kind.class().as_str(),
        "cluster_id": cluster.to_string(),
        "cluster_number": cluster.short().to_string(),
        "generation": generation,
        "revision": revision.0,
        "digest": founding.digest,
        "self": own,
        "peers": lines(&list.lines),
        "founders": lines(&founders),
        "members": lines(&List::members(set)),
    }))
}

fn line(line: &Line<'_>) -> Value {
    let ports: Map<_, _> =
        line.at.extra.iter().map(|(name, at)| (name.clone(), at.to_string().into())).collect();
    json!({
        "node_id": line.node.0,
        "key": line.key.as_str(),
        "ordinal": line.ordinal,
        "raft": line.at.raft.to_string(),
        "client": line.at.client.to_string(),
        "ports": ports,
        "zone": line.zone,
        "suffrage": line.suffrage.as_str(),
    })
}

/// The arguments of StartReplica. Dragonboat refuses a list together with `join`, so a joiner has an empty map and is told to join.
pub(super) fn dragonboat(set: &PeerSet, founding: &Founding, own: Option<&Peer>, list: &List<'_>) -> String {
    let map = |lines: &[Line<'_>]| {
        let entries = lines.iter().map(|line| (line.node.to_string(), line.at.raft.to_string().into()));
        Value::Object(entries.collect())
    };
    let joins = own.is_some_and(|own| own.birth.joins());
    let mut document = json!({
        "initial_members": if joins { map(&[]) } else { map(&list.lines) },
        "members": map(&List::members(set)),
        "revision": set.revision.0,
        "digest": founding.digest,
    });
    if let (Some(own), Value::Object(fields)) = (own, &mut document) {
        fields.insert("replica_id".into(), own.node.0.into());
        fields.insert("raft_address".into(), own.at.raft.to_string().into());
        fields.insert("join".into(), joins.into());
    }
    pretty(&document)
}

/// As `encoding/json` reads a `raft.Configuration`, where suffrage 0 is a voter and 1 is none.
pub(super) fn hashicorp_configuration(list: &List<'_>) -> String {
    let server = |line: &Line<'_>| {
        json!({
            "Suffrage": u8::from(line.suffrage.copies()),
            "ID": line.key.as_str(),
            "Address": line.at.raft.to_string(),
        })
    };
    pretty(&json!({"Servers": list.lines.iter().map(server).collect::<Vec<_>>()}))
}

pub(super) fn hashicorp_peers(list: &List<'_>) -> String {
    let server = |line: &Line<'_>| {
        json!({
            "id": line.key.as_str(),
            "address": line.at.raft.to_string(),
            "non_voter": line.suffrage.copies(),
        })
    };
    pretty(&Value::Array(list.lines.iter().map(server).collect()))
}

pub(super) fn mongodb(set: &PeerSet, list: &List<'_>) -> Result<String, RenderError> {
    let member =
        |line: &Line<'_>| Ok(json!({"_id": byte(line, Format::MongoDb)?, "host": line.at.raft.to_string()}));
    let members = list.lines.iter().map(member).collect::<Result<Vec<_>, RenderError>>()?;
    Ok(pretty(&json!({"_id": set.spec.name.as_str(), "members": members})))
}
