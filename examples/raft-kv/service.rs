//! What clients call, and whoever runs the database.

use std::{fmt, future::Future, time::Duration};

use axum::{
    http::{StatusCode, header},
    response::{IntoResponse, Response as HttpResponse},
};
use openraft::{
    ChangeMembers,
    error::{CheckIsLeaderError, ClientWriteError, ForwardToLeader, RaftError},
    raft::ClientWriteResponse,
};
use tonic::{Request, Response, Result, Status};

use super::{
    Node, NodeId, Types, Write,
    pb::{
        AddLearnerRequest, ChangeReply, GetReply, GetRequest, NodeRequest, PutReply, PutRequest,
        key_value_server::KeyValue, membership_server::Membership,
    },
    store::Machine,
};

/// Longest key and value together, in bytes.
const LONGEST: usize = 16 << 10;

/// How long a call waits for a majority.
const PATIENCE: Duration = Duration::from_secs(5);

/// A node, for those who call it.
#[derive(Clone)]
pub(super) struct Service {
    pub(super) node: NodeId,
    pub(super) raft: openraft::Raft<Types>,
    pub(super) machine: Machine,
}

impl Service {
    /// openraft's metrics, in which Disco sees the role, the term, the leader and the members.
    pub(super) fn metrics(&self) -> HttpResponse {
        let metrics = self.raft.metrics();
        let text = serde_json::to_string(&*metrics.borrow());
        match text {
            Ok(text) => ([(header::CONTENT_TYPE, "application/json")], text).into_response(),
            Err(error) => (StatusCode::INTERNAL_SERVER_ERROR, error.to_string()).into_response(),
        }
    }

    /// UNAVAILABLE, with which a client tries again: by then it may reach the leader.
    fn elsewhere(&self, leader: &ForwardToLeader<NodeId, Node>) -> Status {
        let Self { node, .. } = self;
        Status::unavailable(match leader {
            ForwardToLeader { leader_id: Some(leader), leader_node: Some(at) } => {
                format!("node {node} does not lead: node {leader} at {} does", at.addr)
            }
            _ => format!("node {node} does not lead, and knows of nobody who does"),
        })
    }

    fn refused(&self, error: RaftError<NodeId, ClientWriteError<NodeId, Node>>) -> Status {
        match error {
            RaftError::APIError(ClientWriteError::ForwardToLeader(leader)) => self.elsewhere(&leader),
            RaftError::APIError(ClientWriteError::ChangeMembershipError(error)) => {
                Status::failed_precondition(error.to_string())
            }
            RaftError::Fatal(error) => internal(error),
        }
    }

    async fn change(&self, change: ChangeMembers<NodeId, Node>, keep: bool) -> Result<Response<ChangeReply>> {
        let changed = in_time(self.raft.change_membership(change, keep)).await?;
        let ClientWriteResponse { log_id, .. } = changed.map_err(|error| self.refused(error))?;
        Ok(Response::new(ChangeReply { index: log_id.index }))
    }
}

/// What it amounts to is unknown when the time is over.
async fn in_time<T>(work: impl Future<Output = T>) -> Result<T> {
    let late = |_| Status::deadline_exceeded("no majority took it in time; it may still be done");
    tokio::time::timeout(PATIENCE, work).await.map_err(late)
}

fn internal(error: impl fmt::Display) -> Status {
    Status::internal(error.to_string())
}

#[tonic::async_trait]
impl KeyValue for Service {
    async fn put(&self, request: Request<PutRequest>) -> Result<Response<PutReply>> {
        let PutRequest { key, value } = request.into_inner();
        if key.is_empty() || key.len() + value.len() > LONGEST {
            return Err(Status::invalid_argument(format!(
                "want a key, and at most {LONGEST} bytes of key and value"
            )));
        }
        let written = in_time(self.raft.client_write(Write { key, value })).await?;
        let written = written.map_err(|error| self.refused(error))?;
        Ok(Response::new(PutReply { index: written.log_id.index, node: self.node }))
    }

    async fn get(&self, request: Request<GetRequest>) -> Result<Response<GetReply>> {
        match in_time(self.raft.ensure_linearizable()).await? {
            Ok(_) => {
                let value = self.machine.get(&request.get_ref().key);
                Ok(Response::new(GetReply { value, node: self.node }))
            }
            Err(RaftError::APIError(CheckIsLeaderError::ForwardToLeader(leader))) => {
                Err(self.elsewhere(&leader))
            }
            Err(RaftError::APIError(CheckIsLeaderError::QuorumNotEnough(error))) => {
                Err(Status::unavailable(error.to_string()))
            }
            Err(RaftError::Fatal(error)) => Err(internal(error)),
        }
    }
}

#[tonic::async_trait]
impl Membership for Service {
    async fn add_learner(&self, request: Request<AddLearnerRequest>) -> Result<Response<ChangeReply>> {
        let AddLearnerRequest { node, address } = request.into_inner();
        if node == 0 || address.parse::<std::net::SocketAddr>().is_err() {
            return Err(Status::invalid_argument(format!(
                "want a node number and its Raft address as IP:PORT, not {node} at {address:?}"
            )));
        }
        self.change(ChangeMembers::AddNodes([(node, Node::new(address))].into()), true).await
    }

    async fn promote(&self, request: Request<NodeRequest>) -> Result<Response<ChangeReply>> {
        self.change(ChangeMembers::AddVoterIds([request.get_ref().node].into()), true).await
    }

    async fn demote(&self, request: Request<NodeRequest>) -> Result<Response<ChangeReply>> {
        self.change(ChangeMembers::RemoveVoters([request.get_ref().node].into()), true).await
    }

    async fn remove(&self, request: Request<NodeRequest>) -> Result<Response<ChangeReply>> {
        let node = request.get_ref().node;
        let votes = {
            let metrics = self.raft.metrics();
            metrics.borrow().membership_config.voter_ids().any(|voter| voter == node)
        };
        let nodes = [node].into();
        let change =
            if votes { ChangeMembers::RemoveVoters(nodes) } else { ChangeMembers::RemoveNodes(nodes) };
        self.change(change, false).await
    }
}
