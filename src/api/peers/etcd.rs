//! etcd's v2 discovery protocol, for an unmodified etcd up to 3.5: `--discovery http://DISCO/v1/etcd/SET --discovery-fallback exit`.
//!
//! A key of that protocol is the path itself. etcd asks for the size, for who has come, puts itself there under its member id, and waits
//! until as many have come as the size says; it takes the first ones by their index. The index here is the node id, so the list that
//! etcd ends up with is the founding list, in its order. That it sees who has come before all have is the protocol's way: it waits
//! by itself, by the size (rule N1).

use std::{collections::BTreeMap, net::SocketAddr};

use axum::{
    Json,
    extract::{RawQuery, State},
    http::StatusCode,
    response::{IntoResponse, Response},
};
use serde_json::{Value, json};

use crate::{
    api::{
        Api,
        error::{self, ApiError},
        request::{Body, Path, Query, percent_decode},
    },
    model::{InstanceId, Revision, ServiceId, excerpt},
    peers::{Addresses, Kind, Newcomer, Peer, PeerSet, Peers, View, parse_address},
};

/// Errors of etcd's v2 API.
mod code {
    pub(super) const KEY_NOT_FOUND: u16 = 100;
    pub(super) const NODE_EXISTS: u16 = 105;
    pub(super) const INVALID_FIELD: u16 = 209;
    pub(super) const INTERNAL: u16 = 300;
}

/// The further address that says that replicas talk over TLS: the one that they have anyway.
const TLS: &str = "https";

/// A refusal in etcd's words.
struct Refused {
    status: StatusCode,
    code: u16,
    message: String,
    index: u64,
}

impl IntoResponse for Refused {
    fn into_response(self) -> Response {
        let Self { status, code, message, index } = self;
        let what = match code {
            code::KEY_NOT_FOUND => "Key not found",
            code::NODE_EXISTS => "Key already exists",
            code::INVALID_FIELD => "Invalid field",
            _ => "Internal server error",
        };
        let body = json!({"errorCode": code, "message": what, "cause": message, "index": index});
        (status, [("X-Etcd-Index", index.to_string())], Json(body)).into_response()
    }
}

impl From<ApiError> for Refused {
    fn from(error: ApiError) -> Self {
        let (status, message) = error.http();
        let code = match status {
            StatusCode::NOT_FOUND => code::KEY_NOT_FOUND,
            StatusCode::CONFLICT => code::NODE_EXISTS,
            StatusCode::BAD_REQUEST => code::INVALID_FIELD,
            _ => code::INTERNAL,
        };
        // What etcd takes for "exists" is a failed precondition there.
        let status = if code == code::NODE_EXISTS { StatusCode::PRECONDITION_FAILED } else { status };
        Self { status, code, message: message.to_owned(), index: 0 }
    }
}

fn invalid(message: String) -> Refused {
    Refused { status: StatusCode::BAD_REQUEST, code: code::INVALID_FIELD, message, index: 0 }
}

fn view(api: &Api, set: &str) -> Result<(Peers, ServiceId, View), Refused> {
    let name: ServiceId = set.parse().map_err(invalid)?;
    let peers = api.peers()?.clone();
    let view = peers.view(&name).map_err(ApiError::from)?;
    if view.set.spec.kind != Kind::Etcd {
        let kind = view.set.spec.kind;
        return Err(invalid(format!("peer set {name} is of {kind}, not of etcd: make one with --kind etcd")));
    }
    Ok((peers, name, view))
}

/// The newest index there is: 0 before the first replica.
fn index(set: &PeerSet) -> u64 {
    set.next_node - 1
}

fn answer(status: StatusCode, action: &str, node: &Value, set: &PeerSet) -> Response {
    let headers = [("X-Etcd-Index", index(set).to_string()), ("X-Etcd-Cluster-Id", set.cluster.to_string())];
    (status, headers, Json(json!({"action": action, "node": node}))).into_response()
}

/// Founders only: who comes later joins by `etcdctl member add`.
fn founders(set: &PeerSet) -> Vec<&Peer> {
    let founds = |node| match &set.founding {
        Some(founding) => founding.list.iter().any(|founder| founder.node == node),
        None => true,
    };
    set.peers.values().filter(|peer| founds(peer.node)).collect()
}

fn node(set: &ServiceId, peer: &Peer) -> Value {
    let Peer { node, key, disk, at, .. } = peer;
    let scheme = if at.extra.contains_key(TLS) { "https" } else { "http" };
    json!({
        "key": format!("/v1/etcd/{set}/{disk}"),
        "value": format!("{key}={scheme}://{}", at.raft),
        "modifiedIndex": node.0,
        "createdIndex": node.0,
    })
}

/// How many are to come.
pub(in crate::api) async fn size(
    State(api): State<Api>,
    Path(set): Path<String>,
) -> Result<Response, impl IntoResponse> {
    view(&api, &set).map(|(_, name, View { set, .. })| {
        let key = format!("/v1/etcd/{name}/_config/size");
        let node =
            json!({"key": key, "value": set.spec.expect.to_string(), "modifiedIndex": 1, "createdIndex": 1});
        answer(StatusCode::OK, "get", &node, &set)
    })
}

/// Who has come; with `wait=true` the next one at or after `waitIndex`.
pub(in crate::api) async fn list(
    State(api): State<Api>,
    Path(set): Path<String>,
    RawQuery(query): RawQuery,
) -> Result<Response, impl IntoResponse> {
    let (peers, name, view) = view(&api, &set)?;
    if let Some(from) = awaited(query.as_deref())? {
        return next(&api, &peers, &name, from, |_| true).await;
    }
    let nodes: Vec<_> = founders(&view.set).into_iter().map(|peer| node(&name, peer)).collect();
    let dir = json!({"key": format!("/v1/etcd/{name}"), "dir": true, "nodes": nodes, "modifiedIndex": 1, "createdIndex": 1});
    Ok::<_, Refused>(answer(StatusCode::OK, "get", &dir, &view.set))
}

/// One by its member id; with `wait=true` as soon as it is there.
pub(in crate::api) async fn show(
    State(api): State<Api>,
    Path((set, id)): Path<(String, String)>,
    RawQuery(query): RawQuery,
) -> Result<Response, impl IntoResponse> {
    let (peers, name, view) = view(&api, &set)?;
    if let Some(from) = awaited(query.as_deref())? {
        return next(&api, &peers, &name, from, |peer| peer.disk == id).await;
    }
    let found = founders(&view.set).into_iter().find(|peer| peer.disk == id);
    let peer = found.ok_or_else(|| Refused {
        status: StatusCode::NOT_FOUND,
        code: code::KEY_NOT_FOUND,
        message: format!("/v1/etcd/{name}/{}", excerpt(&id)),
        index: index(&view.set),
    })?;
    Ok::<_, Refused>(answer(StatusCode::OK, "get", &node(&name, peer), &view.set))
}

/// An etcd comes. Its member id marks its disk: it is made of its URLs, and who comes with the same again has lost its data.
pub(in crate::api) async fn put(
    State(api): State<Api>,
    Path((set, id)): Path<(String, String)>,
    Body(body): Body,
) -> Result<Response, impl IntoResponse> {
    let (peers, name, view) = view(&api, &set)?;
    let body = String::from_utf8_lossy(&body).into_owned();
    let value = body.split('&').find_map(|pair| pair.strip_prefix("value=")).map(percent_decode);
    let value = value.ok_or_else(|| invalid("value: is missing: want NAME=URL".to_owned()))?;
    if view.set.peers.values().any(|peer| peer.disk == id) {
        return Err(Refused {
            status: StatusCode::PRECONDITION_FAILED,
            code: code::NODE_EXISTS,
            message: format!("/v1/etcd/{name}/{}", excerpt(&id)),
            index: index(&view.set),
        });
    }
    if view.set.founding.is_some() {
        let message = format!("{name} is founded: who joins is added with `etcdctl member add`");
        return Err(Refused::from(ApiError::new(error::Kind::Conflict, message)));
    }
    let (key, at) = read_member(&value).map_err(invalid)?;
    let new = Newcomer { key, disk: id, at, zone: String::new(), version: String::new() };
    let (set, peer) = peers.register(&name, new).await.map_err(ApiError::from)?;
    Ok(answer(StatusCode::CREATED, "create", &node(&name, &peer), &set))
}

/// `NAME=URL`.
fn read_member(value: &str) -> Result<(InstanceId, Addresses), String> {
    let want = "want NAME=URL with one URL, such as n1=http://10.0.0.7:2380";
    let wrong = || format!("{} is not: {want}", excerpt(value));
    let (name, url) = value.split_once('=').ok_or_else(wrong)?;
    let (scheme, rest) = url.split_once("://").ok_or_else(wrong)?;
    let raft: SocketAddr = parse_address(rest.trim_end_matches('/'))
        .map_err(|problem| format!("{problem}; the member is {}: {want}", excerpt(value)))?;
    let extra = match scheme {
        "http" => BTreeMap::new(),
        "https" => BTreeMap::from([(TLS.to_owned(), raft)]),
        _ => return Err(wrong()),
    };
    // Where clients go is told when the replica registers as an instance; etcd does not say it here.
    Ok((name.parse()?, Addresses { raft, client: raft, extra }))
}

/// `?wait=true&waitIndex=N`.
fn awaited(query: Option<&str>) -> Result<Option<u64>, Refused> {
    let read = Query::of(query).read(|fields, problems| {
        let wait = fields.parse("wait", problems, |text| Ok::<_, String>(text == "true")).unwrap_or_default();
        let from = fields.integer("waitIndex", 0..=u64::MAX.into(), problems).unwrap_or_default();
        // Of no meaning here: there is one level, in order, and every answer is from the store.
        for name in ["recursive", "sorted", "quorum", "stream"] {
            fields.node(name);
        }
        wait.then(|| u64::try_from(from).unwrap_or_default())
    });
    Ok(read?)
}

/// The first one that matches, at or after an index, as soon as there is one.
async fn next(
    api: &Api,
    peers: &Peers,
    name: &ServiceId,
    from: u64,
    matches: impl Fn(&Peer) -> bool,
) -> Result<Response, Refused> {
    let mut seen = Revision::default();
    loop {
        let view = peers.view(name).map_err(ApiError::from)?;
        let found = founders(&view.set).into_iter().find(|peer| peer.node.0 >= from && matches(peer));
        if let Some(peer) = found {
            return Ok(answer(StatusCode::OK, "create", &node(name, peer), &view.set));
        }
        tokio::select! {
            revision = peers.changed(seen) => seen = revision,
            () = api.tasks.shutdown().wait() => {
                let status = StatusCode::SERVICE_UNAVAILABLE;
                let message = "this server is shutting down".to_owned();
                return Err(Refused { status, code: code::INTERNAL, message, index: index(&view.set) });
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_member_says_its_name_and_its_one_url() {
        let read = |text: &str| {
            let (key, at) = read_member(text)?;
            Ok::<_, String>(format!("{key} {} {}", at.raft, at.extra.contains_key(TLS)))
        };
        assert_eq!(read("n1=http://10.0.0.7:2380").unwrap(), "n1 10.0.0.7:2380 false");
        assert_eq!(read("n1=https://[::1]:2380/").unwrap(), "n1 [::1]:2380 true");
        // Rule N9.
        for bad in [
            "n1",
            "n1=10.0.0.7:2380",
            "n1=http://etcd-1:2380",
            "n1=ftp://10.0.0.7:1",
            "=http://10.0.0.7:1",
            "",
        ] {
            assert!(read(bad).is_err(), "{bad}");
        }
    }
}
