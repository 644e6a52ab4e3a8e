//! What the nodes say to each other. openraft's messages go as JSON, each with the id of the cluster and of the node that it is for: an
//! address may be another database's by now.

use std::time::Duration;

use openraft::{
    RaftNetwork, RaftNetworkFactory,
    error::{InstallSnapshotError, NetworkError, RPCError, RaftError, RemoteError, Unreachable},
    network::RPCOption,
    raft::{
        AppendEntriesRequest, AppendEntriesResponse, InstallSnapshotRequest, InstallSnapshotResponse,
        VoteRequest, VoteResponse,
    },
};
use serde::{Serialize, de::DeserializeOwned};
use tonic::{
    Request, Response, Status,
    transport::{Channel, Endpoint},
};

use super::{
    Node, NodeId, Types,
    pb::{Payload, raft_client::RaftClient, raft_server},
};

/// Longest message, in bytes: 64 of the longest entries when JSON makes six bytes of each of theirs, or a part of a snapshot.
pub(super) const LONGEST: usize = 8 << 20;

/// How long it takes at most to connect.
const CONNECT: Duration = Duration::from_secs(1);

/// Makes the connections.
pub(super) struct Network {
    pub(super) cluster: String,
}

/// The way to one other node.
pub(super) struct Peer {
    cluster: String,
    node: NodeId,
    client: RaftClient<Channel>,
}

impl RaftNetworkFactory<Types> for Network {
    type Network = Peer;

    async fn new_client(&mut self, node: NodeId, at: &Node) -> Peer {
        // It connects when it is needed, and again when that connection breaks.
        let endpoint = Endpoint::from_shared(format!("http://{}", at.addr));
        let endpoint = endpoint.unwrap_or_else(|_| Endpoint::from_static("http://0.0.0.0:0"));
        let channel = endpoint.connect_timeout(CONNECT).connect_lazy();
        let client = RaftClient::new(channel).max_decoding_message_size(LONGEST);
        Peer { cluster: self.cluster.clone(), node, client: client.max_encoding_message_size(LONGEST) }
    }
}

type Failed<E> = RPCError<NodeId, Node, RaftError<NodeId, E>>;

impl Peer {
    /// openraft itself ends calls that take too long.
    fn request<T: Serialize>(&self, message: &T) -> Result<Payload, NetworkError> {
        let json = serde_json::to_vec(message).map_err(|error| NetworkError::new(&error))?;
        Ok(Payload { cluster: self.cluster.clone(), node: self.node, json })
    }

    #[allow(clippy::result_large_err, reason = "openraft's")]
    fn answer<T, E>(&self, answer: Result<Response<Payload>, Status>) -> Result<T, Failed<E>>
    where
        T: DeserializeOwned,
        E: std::error::Error + DeserializeOwned,
    {
        let answer = answer.map_err(|status| Unreachable::new(&status))?;
        let answer: Result<T, RaftError<NodeId, E>> =
            serde_json::from_slice(&answer.get_ref().json).map_err(|error| NetworkError::new(&error))?;
        answer.map_err(|error| RemoteError::new(self.node, error).into())
    }
}

impl RaftNetwork<Types> for Peer {
    async fn append_entries(
        &mut self,
        message: AppendEntriesRequest<Types>,
        _option: RPCOption,
    ) -> Result<AppendEntriesResponse<NodeId>, Failed<openraft::error::Infallible>> {
        let request = self.request(&message)?;
        let answer = self.client.append_entries(request).await;
        self.answer(answer)
    }

    async fn install_snapshot(
        &mut self,
        message: InstallSnapshotRequest<Types>,
        _option: RPCOption,
    ) -> Result<InstallSnapshotResponse<NodeId>, Failed<InstallSnapshotError>> {
        let request = self.request(&message)?;
        let answer = self.client.install_snapshot(request).await;
        self.answer(answer)
    }

    async fn vote(
        &mut self,
        message: VoteRequest<NodeId>,
        _option: RPCOption,
    ) -> Result<VoteResponse<NodeId>, Failed<openraft::error::Infallible>> {
        let request = self.request(&message)?;
        let answer = self.client.vote(request).await;
        self.answer(answer)
    }
}

/// Takes what the others say.
pub(super) struct Ear {
    pub(super) cluster: String,
    pub(super) node: NodeId,
    pub(super) raft: openraft::Raft<Types>,
}

impl Ear {
    fn message<T: DeserializeOwned>(&self, request: Request<Payload>) -> Result<T, Status> {
        let Payload { cluster, node, json } = request.into_inner();
        if (cluster.as_str(), node) != (self.cluster.as_str(), self.node) {
            let Self { cluster: own, node: me, .. } = self;
            return Err(Status::failed_precondition(format!(
                "this is node {me} of cluster {own}, not node {node} of cluster {cluster}"
            )));
        }
        serde_json::from_slice(&json).map_err(|error| Status::invalid_argument(error.to_string()))
    }

    fn answer<T: Serialize>(&self, answer: &T) -> tonic::Result<Response<Payload>> {
        let json = serde_json::to_vec(answer).map_err(|error| Status::internal(error.to_string()))?;
        Ok(Response::new(Payload { cluster: self.cluster.clone(), node: self.node, json }))
    }
}

#[tonic::async_trait]
impl raft_server::Raft for Ear {
    async fn append_entries(&self, request: Request<Payload>) -> tonic::Result<Response<Payload>> {
        self.answer(&self.raft.append_entries(self.message(request)?).await)
    }

    async fn vote(&self, request: Request<Payload>) -> tonic::Result<Response<Payload>> {
        self.answer(&self.raft.vote(self.message(request)?).await)
    }

    async fn install_snapshot(&self, request: Request<Payload>) -> tonic::Result<Response<Payload>> {
        self.answer(&self.raft.install_snapshot(self.message(request)?).await)
    }
}
