use std::{pin::Pin, time::Duration};

use futures_util::Stream;
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Request, Response, Status};

use super::{Wanted, until};
use crate::{
    api::error::ApiError,
    model::{InstanceId, Problems, Revision, ServiceId, format_duration},
    peers::{
        Addresses, Newcomer, Peers, Spec, Spread, Step, Until, View, birth_to_proto, hint, liveness_to_proto,
        observation_from_proto, observation_to_proto, observe_from_proto, parse_address, pending_to_proto,
        role_to_proto, set_to_proto, spec_to_proto,
    },
    proto::v1::{self, peers_server},
    rt::Tasks,
};

/// Longest that one request may wait, where pings tell of who went away.
const WAIT_MAX: Duration = Duration::from_secs(24 * 60 * 60);

/// The gRPC service.
#[derive(Debug)]
pub(in crate::api) struct PeersService {
    peers: Peers,
    tasks: Tasks,
}

impl PeersService {
    pub(in crate::api) fn new(peers: Peers, tasks: Tasks) -> Self {
        Self { peers, tasks }
    }
}

/// What is read from a request, all problems at once.
fn read<T>(read: impl FnOnce(&mut Problems) -> Option<T>) -> Result<T, ApiError> {
    let mut problems = Problems::default();
    let value = read(&mut problems);
    value.filter(|_| problems.is_empty()).ok_or_else(|| problems.into())
}

fn set_name(text: &str) -> Result<ServiceId, ApiError> {
    read(|problems| problems.take("set", text.parse()))
}

fn set_and_key(set: &str, key: &str) -> Result<(ServiceId, InstanceId), ApiError> {
    read(|problems| {
        let (set, key) = (problems.take("set", set.parse()), problems.take("key", key.parse()));
        set.zip(key)
    })
}

fn read_spec(spec: Option<v1::PeerSetSpec>, problems: &mut Problems) -> Option<Spec> {
    let Some(spec) = spec else {
        problems.add("spec", "is missing: want what the set is to be");
        return None;
    };
    let kind = if spec.kind.is_empty() { "generic" } else { &spec.kind };
    let (name, kind) =
        (problems.take("spec.name", spec.name.parse()), problems.take("spec.kind", kind.parse()));
    let spread =
        spec.spread.map(|v1::PeerSpread { most_per_zone, required }| Spread { most_per_zone, required });
    let observe = spec.observe.and_then(|observe| problems.take("spec.observe", observe_from_proto(observe)));
    Some(Spec { name: name?, kind: kind?, expect: spec.expect, spread, observe })
}

fn read_newcomer(request: v1::RegisterPeerRequest, problems: &mut Problems) -> Option<(ServiceId, Newcomer)> {
    let v1::RegisterPeerRequest { set, key, disk, at, zone, version } = request;
    let (set, key) = (problems.take("set", set.parse()), problems.take("key", key.parse()));
    let at = at.unwrap_or_default();
    let mut address = |field: &str, text: &str| problems.take(field, parse_address(text));
    let (raft, client) = (address("at.raft", &at.raft), address("at.client", &at.client));
    let extra = at.extra.into_iter().filter_map(|(name, at)| {
        let at = address(&format!("at.extra.{name}"), &at)?;
        Some((name, at))
    });
    let extra = extra.collect();
    let at = Addresses { raft: raft?, client: client?, extra };
    Some((set?, Newcomer { key: key?, disk, at, zone, version }))
}

fn read_wait(wait: Option<prost_types::Duration>, problems: &mut Problems) -> Duration {
    let wait = wait.map_or(Ok(Duration::ZERO), Duration::try_from);
    let wait = problems.take("wait", wait.map_err(|_| "is negative".to_owned())).unwrap_or_default();
    if wait > WAIT_MAX {
        let [wait, most] = [wait, WAIT_MAX].map(format_duration);
        problems.add("wait", format!("{wait} is too long: want at most {most}"));
    }
    wait
}

/// Only of a set that is founded.
fn answer(view: &View) -> v1::GetPeerSetResponse {
    let View { set, facts, roles, revision, stale } = view;
    let mut shown = set_to_proto(set);
    for (shown, peer) in shown.peers.iter_mut().zip(set.peers.values()) {
        shown.liveness = liveness_to_proto(facts.liveness(peer.node)).into();
        if let Some(seen) = facts.observed.get(&peer.node) {
            shown.role = role_to_proto(roles.of(&peer.key)).into();
            shown.observed = Some(observation_to_proto(seen));
        }
    }
    v1::GetPeerSetResponse {
        set: Some(shown),
        leader: roles.leader.as_ref().map(ToString::to_string).unwrap_or_default(),
        term: roles.term,
        drift: view.drift(),
        revision: revision.0,
        stale_since: stale.map(Into::into),
    }
}

fn summary(view: &View) -> v1::PeerSetSummary {
    let View { set, roles, revision, .. } = view;
    let count = |number: usize| u32::try_from(number).unwrap_or(u32::MAX);
    v1::PeerSetSummary {
        spec: Some(spec_to_proto(&set.spec)),
        cluster_id: set.cluster.to_string(),
        generation: set.generation,
        founded: set.founding.is_some(),
        peers: count(set.peers.len()),
        up: count(view.up()),
        leader: roles.leader.as_ref().map(ToString::to_string).unwrap_or_default(),
        term: roles.term,
        pending: set.pending.as_ref().map(pending_to_proto),
        drift: count(view.drift().len()),
        revision: revision.0,
    }
}

type Answer<T> = Result<Response<T>, Status>;

#[tonic::async_trait]
impl peers_server::Peers for PeersService {
    type WatchStream = Pin<Box<dyn Stream<Item = Result<v1::GetPeerSetResponse, Status>> + Send>>;

    async fn create(&self, request: Request<v1::CreatePeerSetRequest>) -> Answer<v1::CreatePeerSetResponse> {
        let spec = read(|problems| read_spec(request.into_inner().spec, problems))?;
        let (revision, cluster) = self.peers.create(spec).await.map_err(ApiError::from)?;
        let (revision, cluster_id) = (revision.0, cluster.to_string());
        Ok(Response::new(v1::CreatePeerSetResponse { revision, cluster_id }))
    }

    async fn register(&self, request: Request<v1::RegisterPeerRequest>) -> Answer<v1::RegisterPeerResponse> {
        let (set, new) = read(|problems| read_newcomer(request.into_inner(), problems))?;
        let (set, peer) = self.peers.register(&set, new).await.map_err(ApiError::from)?;
        Ok(Response::new(v1::RegisterPeerResponse {
            revision: set.revision.0,
            node_id: peer.node.0,
            birth: birth_to_proto(peer.birth).into(),
            ordinal: peer.ordinal,
            cluster_id: set.cluster.to_string(),
            founded: set.founding.is_some(),
        }))
    }

    async fn withdraw(&self, request: Request<v1::WithdrawPeerRequest>) -> Answer<v1::WithdrawPeerResponse> {
        let v1::WithdrawPeerRequest { set, key } = request.into_inner();
        let (set, key) = set_and_key(&set, &key)?;
        let revision = self.peers.withdraw(&set, &key).await.map_err(ApiError::from)?.0;
        Ok(Response::new(v1::WithdrawPeerResponse { revision }))
    }

    async fn get(&self, request: Request<v1::GetPeerSetRequest>) -> Answer<v1::GetPeerSetResponse> {
        let v1::GetPeerSetRequest { set, until: wanted, wait, after } = request.into_inner();
        let v1::PeerSetUntil { up, leader, added } = wanted.unwrap_or_default();
        let (set, wanted, wait) = read(|problems| {
            let added = (!added.is_empty()).then(|| problems.take("until.added", added.parse()));
            let up = usize::try_from(up).unwrap_or(usize::MAX);
            let wanted = Until { up, leader, added: added.flatten(), after: Revision(after) };
            Some((problems.take("set", set.parse())?, wanted, read_wait(wait, problems)))
        })?;
        let view = until(&self.peers, &self.tasks, &set, wanted, wait).await?;
        Ok(Response::new(answer(&view)))
    }

    async fn watch(&self, request: Request<v1::WatchPeerSetRequest>) -> Answer<Self::WatchStream> {
        let v1::WatchPeerSetRequest { set, after } = request.into_inner();
        let set = set_name(&set)?;
        let peers = self.peers.clone();
        // One: a slow reader gets the newest state when it is ready, not a backlog.
        let (answers, stream) = mpsc::channel(1);
        self.tasks.spawn_until_shutdown("peers-watch", async move {
            let mut until = Until { after: Revision(after), ..Until::default() };
            loop {
                let Ok(place) = answers.reserve().await else { return };
                let view = tokio::select! {
                    view = peers.wait(&set, &until) => view,
                    () = answers.closed() => return,
                };
                until.after = view.revision;
                place.send(Ok(answer(&view)));
            }
        });
        Ok(Response::new(Box::pin(ReceiverStream::new(stream))))
    }

    async fn list(&self, _: Request<v1::ListPeerSetsRequest>) -> Answer<v1::ListPeerSetsResponse> {
        let (revision, sets) = self.peers.views().map_err(ApiError::from)?;
        let sets = sets.iter().map(summary).collect();
        Ok(Response::new(v1::ListPeerSetsResponse { sets, revision: revision.0 }))
    }

    async fn report(&self, request: Request<v1::ReportPeerRequest>) -> Answer<v1::ReportPeerResponse> {
        let v1::ReportPeerRequest { set, key, observation } = request.into_inner();
        let (set, key) = set_and_key(&set, &key)?;
        let seen = read(|problems| {
            problems.take("observation", observation_from_proto(observation.unwrap_or_default()))
        })?;
        self.peers.report(&set, &key, seen).await.map_err(ApiError::from)?;
        let within = prost_types::Duration::try_from(self.peers.believed() / 3).ok();
        Ok(Response::new(v1::ReportPeerResponse { within }))
    }

    async fn propose(
        &self,
        request: Request<v1::ProposePeerChangeRequest>,
    ) -> Answer<v1::ProposePeerChangeResponse> {
        use v1::propose_peer_change_request::Want as Sent;
        let v1::ProposePeerChangeRequest { set, want, from_revision } = request.into_inner();
        let mut wanted = Wanted::default();
        match &want {
            Some(Sent::Add(key)) => wanted.add = Some(key),
            Some(Sent::Remove(key)) => wanted.remove = Some(key),
            Some(Sent::Demote(key)) => wanted.demote = Some(key),
            Some(Sent::Replace(v1::ReplacePeer { old, new })) => wanted.replace = Some((old, new)),
            None => {}
        }
        let (set, want) = read(|problems| {
            let set = problems.take("set", set.parse::<ServiceId>());
            set.zip(wanted.check(problems))
        })?;
        let proposed = self.peers.propose(&set, &want, Revision(from_revision)).await;
        let (step, set) = proposed.map_err(ApiError::from)?;
        let (pending, wait) = match step {
            Step::Do(pending) => (Some(pending), String::new()),
            Step::Wait(reason) => (None, reason),
            Step::Done => (None, String::new()),
        };
        Ok(Response::new(v1::ProposePeerChangeResponse {
            hint: pending.as_ref().map(|pending| hint(&set, pending)).unwrap_or_default(),
            step: pending.as_ref().map(pending_to_proto),
            wait,
            revision: set.revision.0,
        }))
    }

    async fn finish(
        &self,
        request: Request<v1::FinishPeerChangeRequest>,
    ) -> Answer<v1::FinishPeerChangeResponse> {
        let v1::FinishPeerChangeRequest { set, from_revision, cancel } = request.into_inner();
        let finished = self.peers.finish(&set_name(&set)?, Revision(from_revision), cancel).await;
        let revision = finished.map_err(ApiError::from)?.0;
        Ok(Response::new(v1::FinishPeerChangeResponse { revision }))
    }

    async fn refound(
        &self,
        request: Request<v1::RefoundPeerSetRequest>,
    ) -> Answer<v1::RefoundPeerSetResponse> {
        let v1::RefoundPeerSetRequest { set, cluster_id, expect } = request.into_inner();
        let (set, cluster) = read(|problems| {
            let set = problems.take("set", set.parse::<ServiceId>());
            set.zip(problems.take("cluster_id", cluster_id.parse()))
        })?;
        let (revision, cluster) = self.peers.refound(&set, cluster, expect).await.map_err(ApiError::from)?;
        let (revision, cluster_id) = (revision.0, cluster.to_string());
        Ok(Response::new(v1::RefoundPeerSetResponse { revision, cluster_id }))
    }
}
