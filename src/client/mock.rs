//! A registry whose every answer is left to the test.

use std::{future::Future, net::SocketAddr, time::Duration};

use tokio::{net::TcpListener, sync::mpsc};
use tokio_stream::wrappers::{ReceiverStream, TcpListenerStream};
use tonic::{Code, Request, Response, Status, Streaming, transport::Server};

use super::Servers;
use crate::{
    proto::v1::{
        DeregisterRequest, DeregisterResponse, DrainRequest, DrainResponse, ListInstancesRequest,
        ListInstancesResponse, ListServicesRequest, ListServicesResponse, PublishRequest, PublishResponse,
        RegisterRequest, RegisterResponse, ReleaseRequest, ReleaseResponse, RenewManyRequest,
        RenewManyResponse, RenewRequest, RenewResponse, SessionError, SessionRequest, SessionResponse,
        UpdateRequest, UpdateResponse, WatchLiveRequest, WatchLiveResponse, WatchRequest, WatchResponse,
        registry_server::{Registry, RegistryServer},
        session_request::Request as Asked,
        session_response::Response as Answer,
    },
    rt::Tasks,
};

/// Far longer than anything here takes; reached only by a failing test.
pub(crate) async fn soon<T>(future: impl Future<Output = T>) -> T {
    tokio::time::timeout(Duration::from_secs(20), future).await.expect("took too long")
}

/// A server that leaves every answer to the test.
pub(crate) struct Mock {
    pub(crate) address: SocketAddr,
    opened: mpsc::Receiver<Peer>,
    pub(crate) tasks: Tasks,
}

/// One stream of a client, seen from the server.
pub(crate) struct Peer {
    pub(crate) token: Option<String>,
    pub(crate) requests: Streaming<SessionRequest>,
    pub(crate) answers: mpsc::Sender<Result<SessionResponse, Status>>,
}

impl Mock {
    pub(crate) async fn start() -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let (sender, opened) = mpsc::channel(4);
        let tasks = Tasks::default();
        let end = tasks.shutdown().clone();
        let server = Server::builder().add_service(RegistryServer::new(Scripted(sender)));
        tasks.spawn("mock", async move {
            let incoming = TcpListenerStream::new(listener);
            server.serve_with_incoming_shutdown(incoming, end.wait()).await.unwrap();
        });
        Self { address, opened, tasks }
    }

    pub(crate) async fn peer(&mut self) -> Peer {
        soon(self.opened.recv()).await.unwrap()
    }

    pub(crate) fn servers(&self) -> Servers {
        Servers::parse(&self.address.to_string(), None).unwrap()
    }
}

impl Peer {
    pub(crate) async fn asked(&mut self) -> Asked {
        soon(self.requests.message()).await.unwrap().unwrap().request.unwrap()
    }

    pub(crate) async fn registers(&mut self) -> RegisterRequest {
        match self.asked().await {
            Asked::Register(register) => register,
            other => panic!("not a register: {other:?}"),
        }
    }

    pub(crate) async fn answer(&self, answer: Answer) {
        self.answers.send(Ok(SessionResponse { response: Some(answer) })).await.unwrap();
    }

    pub(crate) async fn registered(&self, revision: u64) {
        self.answer(Answer::Register(RegisterResponse { revision, instance: None })).await;
    }

    pub(crate) async fn deregistered(&self, revision: u64) {
        self.answer(Answer::Deregister(DeregisterResponse { revision })).await;
    }

    pub(crate) async fn drained(&self, revision: u64) {
        self.answer(Answer::Drain(DrainResponse { revision, instance: None })).await;
    }

    pub(crate) async fn refuses(&self, code: Code, message: &str) {
        self.answer(Answer::Error(SessionError { code: code.into(), message: message.into() })).await;
    }
}

struct Scripted(mpsc::Sender<Peer>);

fn unused<T>() -> Result<T, Status> {
    Err(Status::unimplemented("not part of this test"))
}

#[tonic::async_trait]
impl Registry for Scripted {
    type SessionStream = ReceiverStream<Result<SessionResponse, Status>>;
    type WatchStream = ReceiverStream<Result<WatchResponse, Status>>;
    type WatchLiveStream = ReceiverStream<Result<WatchLiveResponse, Status>>;

    async fn session(
        &self,
        request: Request<Streaming<SessionRequest>>,
    ) -> Result<Response<Self::SessionStream>, Status> {
        let (answers, stream) = mpsc::channel(4);
        let token = request.metadata().get("authorization").map(|token| token.to_str().unwrap().to_owned());
        self.0.send(Peer { token, requests: request.into_inner(), answers }).await.unwrap();
        Ok(Response::new(ReceiverStream::new(stream)))
    }

    async fn register(&self, _: Request<RegisterRequest>) -> Result<Response<RegisterResponse>, Status> {
        unused()
    }

    async fn renew(&self, _: Request<RenewRequest>) -> Result<Response<RenewResponse>, Status> {
        unused()
    }

    async fn renew_many(&self, _: Request<RenewManyRequest>) -> Result<Response<RenewManyResponse>, Status> {
        unused()
    }

    async fn update(&self, _: Request<UpdateRequest>) -> Result<Response<UpdateResponse>, Status> {
        unused()
    }

    async fn drain(&self, _: Request<DrainRequest>) -> Result<Response<DrainResponse>, Status> {
        unused()
    }

    async fn deregister(
        &self,
        _: Request<DeregisterRequest>,
    ) -> Result<Response<DeregisterResponse>, Status> {
        unused()
    }

    async fn release(&self, _: Request<ReleaseRequest>) -> Result<Response<ReleaseResponse>, Status> {
        unused()
    }

    async fn list_services(
        &self,
        _: Request<ListServicesRequest>,
    ) -> Result<Response<ListServicesResponse>, Status> {
        unused()
    }

    async fn list_instances(
        &self,
        _: Request<ListInstancesRequest>,
    ) -> Result<Response<ListInstancesResponse>, Status> {
        unused()
    }

    async fn watch(&self, _: Request<WatchRequest>) -> Result<Response<Self::WatchStream>, Status> {
        unused()
    }

    async fn publish(&self, _: Request<PublishRequest>) -> Result<Response<PublishResponse>, Status> {
        unused()
    }

    async fn watch_live(
        &self,
        _: Request<WatchLiveRequest>,
    ) -> Result<Response<Self::WatchLiveStream>, Status> {
        unused()
    }
}
