use std::collections::BTreeMap;

use axum::{
    Json,
    extract::{RawQuery, State},
    response::IntoResponse as _,
};
use serde_json::{Value, json};

use super::{Wanted, until};
use crate::{
    api::{
        Api, dto,
        error::ApiError,
        request::{Body, Path, Query, Reply, instance_key, read_poll, read_wait, service_id, wait_at_most},
        time::timestamp,
    },
    model::{Fields, InstanceId, Node, Problems, Revision, Role, ServiceId, format_duration, parse_duration},
    peers::{
        Addresses, ClusterId, Founder, Kind, Newcomer, NodeId, Observation, Observe, Peer, PeerSet, Pending,
        SeenMember, Spec, Spread, Step, Until, View, hint, parse_address,
    },
};

pub(in crate::api) async fn list(State(api): State<Api>, RawQuery(query): RawQuery) -> Reply {
    let (index, wait) = read_poll(query.as_deref())?;
    let peers = api.peers()?;
    wait_at_most(&api, wait, peers.changed(index)).await;
    let (revision, sets) = peers.views()?;
    let sets: Vec<_> = sets.iter().map(summary).collect();
    Ok(Json(json!({"revision": revision.0, "sets": sets})).into_response())
}

pub(in crate::api) async fn create(
    State(api): State<Api>,
    Path(set): Path<String>,
    Body(body): Body,
) -> Reply {
    let node = dto::parse_json(&body)?;
    let mut problems = Problems::default();
    let mut fields = Fields::of(&node, "", &mut problems);
    let name = problems.take("name", set.parse());
    let kind = fields.parse("kind", &mut problems, str::parse::<Kind>);
    let expect = fields.integer("expect", 1..=u32::MAX.into(), &mut problems);
    if expect.is_none() && !problems.0.iter().any(|problem| problem.field == "expect") {
        problems.add("expect", "is missing: want the number of founders, such as 3");
    }
    let spread = fields.fields("spread", &mut problems).map(|mut fields| {
        let most = fields.integer("most_per_zone", 1..=u32::MAX.into(), &mut problems);
        let required = fields.boolean("required", &mut problems).unwrap_or_default();
        fields.finish(&mut problems);
        Spread { most_per_zone: most.and_then(|most| most.try_into().ok()).unwrap_or(1), required }
    });
    let observe = fields.fields("observe", &mut problems).map(|mut fields| {
        let mut text = |name| fields.text(name, &mut problems).unwrap_or_default().to_owned();
        let (adapter, port) = (text("adapter"), text("port"));
        let options = fields.texts("options", &mut problems).unwrap_or_default();
        let every = fields.parse("every", &mut problems, parse_duration).unwrap_or(Observe::EVERY);
        fields.finish(&mut problems);
        let options = options.into_iter().map(|(name, value)| (name.to_owned(), value.to_owned()));
        Observe { adapter, port, options: options.collect(), every }
    });
    fields.finish(&mut problems);
    let (Some(name), Some(expect), true) = (name, expect, problems.is_empty()) else {
        return Err(problems.into());
    };
    let expect = u32::try_from(expect).unwrap_or(u32::MAX);
    let spec = Spec { name, kind: kind.unwrap_or(Kind::Generic), expect, spread, observe };
    let (revision, cluster) = api.peers()?.create(spec).await?;
    Ok(Json(json!({"revision": revision.0, "cluster_id": cluster.to_string()})).into_response())
}

pub(in crate::api) async fn show(
    State(api): State<Api>,
    Path(set): Path<String>,
    RawQuery(query): RawQuery,
) -> Reply {
    let (wanted, wait) = Query::of(query.as_deref()).read(|fields, problems| {
        let mut number = |name| fields.integer(name, 0..=u64::MAX.into(), problems).unwrap_or_default();
        let (after, up) = (number("index"), number("up"));
        let leader = fields.parse("leader", problems, |text| match text {
            "" | "true" => Ok(true),
            "false" => Ok(false),
            _ => Err("want true or false"),
        });
        let added = fields.parse("added", problems, str::parse::<InstanceId>);
        let until = Until {
            up: usize::try_from(up).unwrap_or(usize::MAX),
            leader: leader.unwrap_or_default(),
            added,
            after: Revision(u64::try_from(after).unwrap_or_default()),
        };
        (until, read_wait(fields, problems))
    })?;
    let view = until(api.peers()?, &api.tasks, &service_id(&set)?, wanted, wait).await?;
    Ok(Json(view_json(&view)).into_response())
}

pub(in crate::api) async fn register(
    State(api): State<Api>,
    Path((set, key)): Path<(String, String)>,
    Body(body): Body,
) -> Reply {
    let node = dto::parse_json(&body)?;
    let mut problems = Problems::default();
    let mut fields = Fields::of(&node, "", &mut problems);
    let name = problems.take("name", set.parse());
    let key = problems.take("key", key.parse());
    let mut text = |name| fields.text(name, &mut problems).unwrap_or_default().to_owned();
    let (disk, zone, version) = (text("disk"), text("zone"), text("version"));
    let mut address = |name| {
        let at = fields.parse(name, &mut problems, parse_address);
        if at.is_none() && !problems.0.iter().any(|problem| problem.field == name) {
            problems.add(name, "is missing: want an IP address and a port, such as 10.0.0.7:2380");
        }
        at
    };
    let (raft, client) = (address("raft"), address("client"));
    let ports = fields.texts("ports", &mut problems).unwrap_or_default();
    let extra: BTreeMap<_, _> = ports
        .into_iter()
        .filter_map(|(name, at)| {
            Some((name.to_owned(), problems.take(&format!("ports.{name}"), parse_address(at))?))
        })
        .collect();
    fields.finish(&mut problems);
    let (Some(name), Some(key), Some(raft), Some(client), true) =
        (name, key, raft, client, problems.is_empty())
    else {
        return Err(problems.into());
    };
    let new = Newcomer { key, disk, at: Addresses { raft, client, extra }, zone, version };
    let (set, peer) = api.peers()?.register(&name, new).await?;
    Ok(Json(json!({
        "revision": set.revision.0,
        "cluster_id": set.cluster.to_string(),
        "node_id": peer.node.0,
        "birth": peer.birth.as_str(),
        "ordinal": peer.ordinal,
        "founded": set.founding.is_some(),
    }))
    .into_response())
}

pub(in crate::api) async fn withdraw(
    State(api): State<Api>,
    Path((set, key)): Path<(String, String)>,
) -> Reply {
    let (set, key) = set_and_key(&set, &key)?;
    let revision = api.peers()?.withdraw(&set, &key).await?;
    Ok(Json(json!({"revision": revision.0})).into_response())
}

pub(in crate::api) async fn report(
    State(api): State<Api>,
    Path((set, key)): Path<(String, String)>,
    Body(body): Body,
) -> Reply {
    let (set, key) = set_and_key(&set, &key)?;
    let node = dto::parse_json(&body)?;
    let mut problems = Problems::default();
    let mut fields = Fields::of(&node, "", &mut problems);
    let role = fields.parse("role", &mut problems, str::parse::<Role>);
    if role.is_none() && problems.is_empty() {
        problems.add("role", "is missing: want leader, follower, candidate, learner or unknown");
    }
    let mut number = |name| {
        let number = fields.integer(name, 0..=u64::MAX.into(), &mut problems);
        number.and_then(|number| u64::try_from(number).ok()).unwrap_or_default()
    };
    let (term, leader) = (number("term"), number("leader"));
    let (config_index, applied) = (number("config_index"), number("applied"));
    let members = fields.list("members", &mut problems).map(|members| {
        members.iter().enumerate().map(|(n, node)| seen_member(n, node, &mut problems)).collect()
    });
    let digest = fields.text("digest", &mut problems).map(str::to_owned);
    fields.finish(&mut problems);
    if !problems.is_empty() {
        return Err(problems.into());
    }
    let leader = (leader != 0).then_some(NodeId(leader));
    let role = role.unwrap_or_default();
    let seen = Observation { role, term, leader, config_index, applied, members, digest };
    let peers = api.peers()?;
    peers.report(&set, &key, seen).await?;
    Ok(Json(json!({"within": format_duration(peers.believed() / 3)})).into_response())
}

fn seen_member(n: usize, node: &Node, problems: &mut Problems) -> SeenMember {
    let mut fields = Fields::of(node, &format!("members.{n}"), problems);
    let id = fields.parse("id", problems, |id| Ok::<_, String>(id.to_owned())).unwrap_or_default();
    let name = fields.text("name", problems).unwrap_or_default().to_owned();
    let raft = fields.parse("raft", problems, parse_address);
    let voter = fields.boolean("voter", problems).unwrap_or(true);
    fields.finish(problems);
    SeenMember { id, name, raft, voter }
}

pub(in crate::api) async fn propose(
    State(api): State<Api>,
    Path(set): Path<String>,
    Body(body): Body,
) -> Reply {
    let node = dto::parse_json(&body)?;
    let mut problems = Problems::default();
    let mut fields = Fields::of(&node, "", &mut problems);
    let name = problems.take("name", set.parse());
    let replace = fields.fields("replace", &mut problems).map(|mut fields| {
        let mut text = |name| fields.text(name, &mut problems).unwrap_or_default();
        let both = (text("old"), text("new"));
        fields.finish(&mut problems);
        both
    });
    let mut text = |name| fields.text(name, &mut problems);
    let wanted = Wanted { add: text("add"), remove: text("remove"), demote: text("demote"), replace };
    let from = read_from(&mut fields, &mut problems);
    fields.finish(&mut problems);
    let want = wanted.check(&mut problems);
    let (Some(name), Some(want), true) = (name, want, problems.is_empty()) else {
        return Err(problems.into());
    };
    let (step, set) = api.peers()?.propose(&name, &want, from).await?;
    let (pending, wait) = match &step {
        Step::Do(pending) => (Some(pending), Value::Null),
        Step::Wait(reason) => (None, json!(reason)),
        Step::Done => (None, Value::Null),
    };
    Ok(Json(json!({
        "revision": set.revision.0,
        "step": pending.map(|pending| pending_json(&set, pending)),
        "hint": pending.map(|pending| hint(&set, pending)),
        "wait": wait,
        "done": step == Step::Done,
    }))
    .into_response())
}

fn read_from(fields: &mut Fields<'_>, problems: &mut Problems) -> Revision {
    let from = fields.integer("from_revision", 1..=u64::MAX.into(), problems);
    if from.is_none() && !problems.0.iter().any(|problem| problem.field == "from_revision") {
        problems.add("from_revision", "is missing: want the `set_revision` of the set that you looked at");
    }
    Revision(from.and_then(|from| u64::try_from(from).ok()).unwrap_or_default())
}

pub(in crate::api) async fn finish(
    State(api): State<Api>,
    Path(set): Path<String>,
    Body(body): Body,
) -> Reply {
    let set = service_id(&set)?;
    let node = dto::parse_json(&body)?;
    let mut problems = Problems::default();
    let mut fields = Fields::of(&node, "", &mut problems);
    let cancel = fields.boolean("cancel", &mut problems).unwrap_or_default();
    let from = read_from(&mut fields, &mut problems);
    fields.finish(&mut problems);
    if !problems.is_empty() {
        return Err(problems.into());
    }
    let revision = api.peers()?.finish(&set, from, cancel).await?;
    Ok(Json(json!({"revision": revision.0})).into_response())
}

pub(in crate::api) async fn refound(
    State(api): State<Api>,
    Path(set): Path<String>,
    Body(body): Body,
) -> Reply {
    let set = service_id(&set)?;
    let node = dto::parse_json(&body)?;
    let mut problems = Problems::default();
    let mut fields = Fields::of(&node, "", &mut problems);
    let cluster = fields.parse("cluster_id", &mut problems, str::parse::<ClusterId>);
    let expect = fields.integer("expect", 1..=u32::MAX.into(), &mut problems);
    fields.finish(&mut problems);
    let (Some(cluster), Some(expect), true) = (cluster, expect, problems.is_empty()) else {
        if problems.is_empty() {
            problems.add(
                "",
                "want cluster_id, the cluster that you give up, and expect, the number of new founders",
            );
        }
        return Err(problems.into());
    };
    let expect = u32::try_from(expect).unwrap_or(u32::MAX);
    let (revision, cluster) = api.peers()?.refound(&set, cluster, expect).await?;
    Ok(Json(json!({"revision": revision.0, "cluster_id": cluster.to_string()})).into_response())
}

fn set_and_key(set: &str, key: &str) -> Result<(ServiceId, InstanceId), ApiError> {
    let key = instance_key(set, key)?;
    Ok((key.service, key.id))
}

fn summary(view: &View) -> Value {
    let View { set, roles, .. } = view;
    json!({
        "name": set.spec.name.as_str(),
        "kind": set.spec.kind.as_str(),
        "cluster_id": set.cluster.to_string(),
        "generation": set.generation,
        "expect": set.spec.expect,
        "founded": set.founding.is_some(),
        "peers": set.peers.len(),
        "up": view.up(),
        "leader": roles.leader.as_ref().map(InstanceId::as_str),
        "term": roles.term,
        "pending": set.pending.as_ref().map(|pending| pending_json(set, pending)),
        "drift": view.drift().len(),
        "revision": view.revision.0,
    })
}

/// Only of a set that is founded.
fn view_json(view: &View) -> Value {
    let View { set, facts, roles, revision, stale } = view;
    let founding = set.founding.as_ref().map(|founding| {
        let list = founding.list.iter().map(|Founder { node, key, ordinal, at, zone }| {
            let mut founder =
                json!({"node_id": node.0, "key": key.as_str(), "ordinal": ordinal, "zone": zone});
            put_addresses(&mut founder, at);
            founder
        });
        json!({
            "digest": founding.digest,
            "at": timestamp(founding.at),
            "warnings": founding.warnings,
            "list": list.collect::<Vec<_>>(),
        })
    });
    let furthest = facts.observed.values().map(|seen| seen.applied).max().unwrap_or_default();
    let peers = set.peers.values().map(|peer| {
        let Peer { node, key, disk, ordinal, at, zone, version, suffrage, birth, leaving } = peer;
        let seen = facts.observed.get(node);
        let lag = seen.filter(|seen| seen.applied > 0).map(|seen| furthest.saturating_sub(seen.applied));
        let mut shown = json!({
            "node_id": node.0,
            "key": key.as_str(),
            "disk": disk,
            "ordinal": ordinal,
            "zone": zone,
            "version": version,
            "suffrage": suffrage.as_str(),
            "birth": birth.as_str(),
            "leaving": leaving,
            "liveness": facts.liveness(*node).as_str(),
            "role": if seen.is_some() { roles.of(key) } else { Role::Unknown }.as_str(),
            "term": seen.map(|seen| seen.term),
            "applied": seen.map(|seen| seen.applied),
            "lag": lag,
        });
        put_addresses(&mut shown, at);
        shown
    });
    let removed = set
        .removed
        .iter()
        .map(|(node, gone)| json!({"node_id": node.0, "key": gone.key.as_str(), "disk": gone.disk}));
    let observe = set.spec.observe.as_ref().map(|Observe { adapter, port, options, every }| {
        json!({"adapter": adapter, "port": port, "options": options, "every": format_duration(*every)})
    });
    json!({
        "name": set.spec.name.as_str(),
        "kind": set.spec.kind.as_str(),
        "class": set.spec.kind.class().as_str(),
        "cluster_id": set.cluster.to_string(),
        // As text: it does not fit the numbers of every JSON reader.
        "cluster_number": set.cluster.short().to_string(),
        "generation": set.generation,
        "expect": set.spec.expect,
        "founding": founding,
        "peers": peers.collect::<Vec<_>>(),
        "removed": removed.collect::<Vec<_>>(),
        "pending": set.pending.as_ref().map(|pending| pending_json(set, pending)),
        "leader": roles.leader.as_ref().map(InstanceId::as_str),
        "term": roles.term,
        "drift": view.drift(),
        "observe": observe,
        "revision": revision.0,
        "set_revision": set.revision.0,
        "stale": stale.map(|since| json!({"since": timestamp(since)})),
    })
}

fn put_addresses(shown: &mut Value, Addresses { raft, client, extra }: &Addresses) {
    let ports: BTreeMap<_, _> = extra.iter().map(|(name, at)| (name, at.to_string())).collect();
    if let Value::Object(shown) = shown {
        shown.insert("raft".into(), json!(raft.to_string()));
        shown.insert("client".into(), json!(client.to_string()));
        shown.insert("ports".into(), json!(ports));
    }
}

fn pending_json(set: &PeerSet, Pending { change, node, since }: &Pending) -> Value {
    let key = set.peers.get(node).map(|peer| peer.key.as_str());
    json!({"change": change.as_str(), "node_id": node.0, "key": key, "since": timestamp(*since)})
}
