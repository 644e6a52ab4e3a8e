use std::{future::Future, time::Duration};

use tokio::{net::TcpListener, sync::mpsc};
use tokio_stream::wrappers::{ReceiverStream, TcpListenerStream};
use tonic::{Code, Request, Response, Status, Streaming, transport::Server};

use super::*;
use crate::{
    model::{Limits, RawRegistration},
    proto::v1::{
        DeregisterRequest, DeregisterResponse, DrainRequest, DrainResponse, ListInstancesRequest,
        ListInstancesResponse, ListServicesRequest, ListServicesResponse, RegisterRequest, RegisterResponse,
        RenewRequest, RenewResponse, SessionError as WireError, SessionRequest, SessionResponse,
        UpdateRequest, UpdateResponse, WatchRequest, WatchResponse,
        registry_server::{Registry, RegistryServer},
        session_request::Request as Asked,
        session_response::Response as Answer,
    },
};

/// Far longer than anything here takes; reached only by a failing test.
async fn soon<T>(future: impl Future<Output = T>) -> T {
    tokio::time::timeout(Duration::from_secs(20), future).await.expect("took too long")
}

/// A server that leaves every answer to the test.
struct Mock {
    address: std::net::SocketAddr,
    opened: mpsc::Receiver<Peer>,
    tasks: Tasks,
}

/// One stream of a client, seen from the server.
struct Peer {
    token: Option<String>,
    requests: Streaming<SessionRequest>,
    answers: mpsc::Sender<Result<SessionResponse, Status>>,
}

impl Mock {
    async fn start() -> Self {
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

    async fn peer(&mut self) -> Peer {
        soon(self.opened.recv()).await.unwrap()
    }

    fn servers(&self) -> Servers {
        Servers::parse(&self.address.to_string(), None).unwrap()
    }

    fn session(&self) -> Session {
        Session::open(self.servers(), &registration(), &self.tasks)
    }
}

impl Peer {
    async fn asked(&mut self) -> Asked {
        soon(self.requests.message()).await.unwrap().unwrap().request.unwrap()
    }

    async fn registers(&mut self) -> RegisterRequest {
        match self.asked().await {
            Asked::Register(register) => register,
            other => panic!("not a register: {other:?}"),
        }
    }

    async fn answer(&self, answer: Answer) {
        self.answers.send(Ok(SessionResponse { response: Some(answer) })).await.unwrap();
    }

    async fn registered(&self, revision: u64) {
        self.answer(Answer::Register(RegisterResponse { revision, instance: None })).await;
    }

    async fn drained(&self, revision: u64) {
        self.answer(Answer::Drain(DrainResponse { revision, instance: None })).await;
    }

    async fn refuses(&self, code: Code, message: &str) {
        self.answer(Answer::Error(WireError { code: code.into(), message: message.into() })).await;
    }
}

fn registration() -> Registration {
    let raw = RawRegistration {
        service: "greeter".into(),
        id: "a".into(),
        incarnation: Some(7),
        address: Some("127.0.0.1".into()),
        port: Some(50051),
        ..RawRegistration::default()
    };
    Registration::check(raw, &Limits::default()).unwrap()
}

fn connected(revision: u64) -> SessionState {
    SessionState::Connected { revision: Revision(revision) }
}

async fn until(session: &Session, wanted: impl FnMut(&SessionState) -> bool) -> SessionState {
    soon(session.state().wait_for(wanted)).await.unwrap().clone()
}

async fn until_connected(session: &Session, revision: u64) {
    until(session, |state| *state == connected(revision)).await;
}

#[tokio::test]
async fn registers_and_reports_each_change() {
    let mut mock = Mock::start().await;
    let session = mock.session();
    let mut peer = mock.peer().await;
    let register = peer.registers().await;
    assert_eq!((register.service.as_str(), register.id.as_str(), register.incarnation), ("greeter", "a", 7));
    assert_eq!((register.address.as_str(), register.port, register.ttl), ("127.0.0.1", 50051, None));
    peer.registered(3).await;
    until_connected(&session, 3).await;

    let (drained, ()) = tokio::join!(soon(session.drain()), async {
        let Asked::Drain(drain) = peer.asked().await else { panic!("not a drain") };
        assert_eq!(drain.instance.unwrap().incarnation, 7);
        peer.drained(4).await;
    });
    assert_eq!(drained, Ok(Revision(4)));
    until_connected(&session, 4).await;

    let (gone, ()) = tokio::join!(soon(session.deregister()), async {
        assert!(matches!(peer.asked().await, Asked::Deregister(_)));
        peer.answer(Answer::Deregister(DeregisterResponse { revision: 5 })).await;
    });
    assert_eq!(gone, Ok(Revision(5)));
    assert!(soon(peer.requests.message()).await.is_ok_and(|request| request.is_none()));
}

#[tokio::test]
async fn a_broken_stream_comes_back_with_the_same_incarnation_and_state() {
    let mut mock = Mock::start().await;
    let session = mock.session();
    let mut peer = mock.peer().await;
    peer.registers().await;
    peer.registered(1).await;
    until_connected(&session, 1).await;
    peer.answers.send(Err(Status::unavailable("restarting"))).await.unwrap();

    let mut peer = mock.peer().await;
    until(
        &session,
        |state| matches!(state, SessionState::Reconnecting { error } if error.contains("restarting")),
    )
    .await;
    assert_eq!(peer.registers().await.incarnation, 7);
    peer.registered(2).await;
    until_connected(&session, 2).await;

    // A drain whose answer is lost with the stream is answered by the next one.
    let drain = session.drain();
    let script = async {
        assert!(matches!(peer.asked().await, Asked::Drain(_)));
        drop(peer);
        let mut peer = mock.peer().await;
        assert_eq!(peer.registers().await.incarnation, 7);
        assert!(matches!(peer.asked().await, Asked::Drain(_)));
        peer.registered(3).await;
        // Registered, not yet drained: not as wanted.
        assert!(!matches!(*session.state().borrow(), SessionState::Connected { revision: Revision(3) }));
        peer.drained(4).await;
        assert!(matches!(peer.asked().await, Asked::Drain(_)));
        peer.drained(4).await;
        peer
    };
    let (drained, peer) = tokio::join!(soon(drain), script);
    assert_eq!(drained, Ok(Revision(4)));

    // From now on every stream opens with it.
    drop(peer);
    let mut peer = mock.peer().await;
    peer.registers().await;
    assert!(matches!(peer.asked().await, Asked::Drain(_)));
}

#[tokio::test]
async fn an_update_lasts_over_a_reconnection_and_a_refused_one_does_not() {
    let mut mock = Mock::start().await;
    let session = mock.session();
    let mut peer = mock.peer().await;
    peer.registers().await;
    peer.registered(1).await;
    let weight = |weight: u32| Update { weight: weight.try_into().ok(), metadata: None };

    let (accepted, ()) = tokio::join!(soon(session.update(weight(5))), async {
        assert!(matches!(peer.asked().await, Asked::Update(UpdateRequest { weight: Some(5), .. })));
        peer.answer(Answer::Update(UpdateResponse { revision: 2, instance: None })).await;
    });
    assert_eq!(accepted, Ok(Revision(2)));
    let (refused, ()) = tokio::join!(soon(session.update(weight(9))), async {
        peer.asked().await;
        peer.refuses(Code::InvalidArgument, "weight: too much").await;
    });
    assert_eq!(refused, Err(SessionError::Refused("weight: too much".into())));

    drop(peer);
    assert_eq!(mock.peer().await.registers().await.weight, 5);
}

#[tokio::test]
async fn refusals() {
    // Code, whether it came after a first registration, whether it ends the session.
    let cases = [
        (Code::InvalidArgument, false, true),
        (Code::InvalidArgument, true, true),
        (Code::AlreadyExists, false, true),
        (Code::AlreadyExists, true, false),
        (Code::Aborted, true, false),
        (Code::Unauthenticated, false, true),
        (Code::Unavailable, false, false),
        (Code::ResourceExhausted, false, false),
    ];
    for (code, registered, fatal) in cases {
        let mut mock = Mock::start().await;
        let session = mock.session();
        let mut peer = mock.peer().await;
        peer.registers().await;
        if registered {
            peer.registered(1).await;
            until_connected(&session, 1).await;
            drop(peer);
            peer = mock.peer().await;
            peer.registers().await;
        }
        peer.refuses(code, "because").await;
        let state = until(&session, |state| match state {
            SessionState::Refused { .. } => true,
            SessionState::Reconnecting { error } => error.ends_with("because"),
            _ => false,
        })
        .await;
        let ended = state == SessionState::Refused { message: "because".into() };
        assert_eq!(ended, fatal, "{code:?}, registered before: {registered}: {state:?}");
        if fatal {
            assert_eq!(soon(session.drain()).await, Err(SessionError::Ended));
        }
    }
}

#[tokio::test]
async fn takes_the_next_server_when_one_is_away_and_shows_the_token() {
    let away = TcpListener::bind("127.0.0.1:0").await.unwrap().local_addr().unwrap();
    let mut mock = Mock::start().await;
    let servers = Servers::parse(&format!("{away},{}", mock.address), Some("secret")).unwrap();
    let session = Session::open(servers, &registration(), &mock.tasks);
    let mut peer = mock.peer().await;
    assert_eq!(peer.token.as_deref(), Some("Bearer secret"));
    peer.registers().await;
    peer.registered(1).await;
    until_connected(&session, 1).await;
}

#[tokio::test]
async fn what_is_to_be_removed_is_not_registered_again() {
    let mut mock = Mock::start().await;
    let session = mock.session();
    let mut peer = mock.peer().await;
    peer.registers().await;
    peer.registered(1).await;
    until_connected(&session, 1).await;

    let script = async {
        assert!(matches!(peer.asked().await, Asked::Deregister(_)));
        drop(peer);
        let mut peer = mock.peer().await;
        assert!(matches!(peer.asked().await, Asked::Deregister(_)));
        peer.answer(Answer::Deregister(DeregisterResponse { revision: 2 })).await;
    };
    let (gone, ()) = tokio::join!(soon(session.deregister()), script);
    assert_eq!(gone, Ok(Revision(2)));
}

#[tokio::test]
async fn dropping_a_session_ends_its_stream() {
    let mut mock = Mock::start().await;
    let session = mock.session();
    let mut peer = mock.peer().await;
    peer.registers().await;
    drop(session);
    assert!(!matches!(soon(peer.requests.message()).await, Ok(Some(_))));
    mock.tasks.shutdown().start();
    assert_eq!(mock.tasks.join(Duration::from_secs(20)).await, 0);
}

struct Scripted(mpsc::Sender<Peer>);

fn unused<T>() -> Result<T, Status> {
    Err(Status::unimplemented("not part of this test"))
}

#[tonic::async_trait]
impl Registry for Scripted {
    type SessionStream = ReceiverStream<Result<SessionResponse, Status>>;
    type WatchStream = ReceiverStream<Result<WatchResponse, Status>>;

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
}
