use tokio::net::TcpListener;
use tonic::{Code, Status};

use super::*;
use crate::{
    client::mock::{Mock, soon},
    model::{Limits, RawRegistration},
    proto::v1::{
        UpdateRequest, UpdateResponse, session_request::Request as Asked,
        session_response::Response as Answer,
    },
};

fn open(mock: &Mock) -> Session {
    Session::open(mock.servers(), &registration(), &mock.tasks)
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
    let session = open(&mock);
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
        peer.deregistered(5).await;
    });
    assert_eq!(gone, Ok(Revision(5)));
    assert!(soon(peer.requests.message()).await.is_ok_and(|request| request.is_none()));
}

#[tokio::test]
async fn a_broken_stream_comes_back_with_the_same_incarnation_and_state() {
    let mut mock = Mock::start().await;
    let session = open(&mock);
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
async fn the_newest_verdict_is_told_to_each_server() {
    let mut mock = Mock::start().await;
    let session = open(&mock);
    let mut peer = mock.peer().await;
    peer.registers().await;
    peer.registered(1).await;
    until_connected(&session, 1).await;
    let verdict = |asked| {
        let Asked::Health(health) = asked else { panic!("no verdict: {asked:?}") };
        assert_eq!(health.instance.clone().unwrap().incarnation, 7);
        (health.verdict(), health.reason)
    };
    session.report(Verdict::Unhealthy, "no disk".into());
    assert_eq!(verdict(peer.asked().await), (crate::proto::v1::Verdict::Unhealthy, "no disk".to_owned()));
    peer.answer(Answer::Health(crate::proto::v1::HealthResponse { revision: 2 })).await;
    drop(peer);
    let mut peer = mock.peer().await;
    session.report(Verdict::Degraded, "slow".into());
    session.report(Verdict::Healthy, "fine".into());
    peer.registers().await;
    peer.registered(3).await;
    // What was so when the stream opened comes first, if it was told at all.
    loop {
        let (seen, _) = verdict(peer.asked().await);
        peer.answer(Answer::Health(crate::proto::v1::HealthResponse { revision: 4 })).await;
        if seen == crate::proto::v1::Verdict::Healthy {
            break;
        }
    }
}

#[tokio::test]
async fn an_update_lasts_over_a_reconnection_and_a_refused_one_does_not() {
    let mut mock = Mock::start().await;
    let session = open(&mock);
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
        let session = open(&mock);
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
async fn a_server_for_proxies_alone_is_passed_by() {
    let mut mock = Mock::start().await;
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let other = listener.local_addr().unwrap();
    let (_, health) = tonic_health::server::health_reporter();
    let server = tonic::transport::Server::builder().add_service(health);
    let end = mock.tasks.shutdown().clone();
    mock.tasks.spawn("other", async move {
        let incoming = tokio_stream::wrappers::TcpListenerStream::new(listener);
        server.serve_with_incoming_shutdown(incoming, end.wait()).await.unwrap();
    });
    let servers = Servers::parse(&format!("{other},{}", mock.address), None).unwrap();
    let session = Session::open(servers, &registration(), &mock.tasks);
    let mut peer = mock.peer().await;
    peer.registers().await;
    peer.registered(1).await;
    until_connected(&session, 1).await;
}

#[tokio::test]
async fn what_is_to_be_removed_is_not_registered_again() {
    let mut mock = Mock::start().await;
    let session = open(&mock);
    let mut peer = mock.peer().await;
    peer.registers().await;
    peer.registered(1).await;
    until_connected(&session, 1).await;

    let script = async {
        assert!(matches!(peer.asked().await, Asked::Deregister(_)));
        drop(peer);
        let mut peer = mock.peer().await;
        assert!(matches!(peer.asked().await, Asked::Deregister(_)));
        peer.deregistered(2).await;
    };
    let (gone, ()) = tokio::join!(soon(session.deregister()), script);
    assert_eq!(gone, Ok(Revision(2)));
}

#[tokio::test]
async fn dropping_a_session_ends_its_stream() {
    let mut mock = Mock::start().await;
    let session = open(&mock);
    let mut peer = mock.peer().await;
    peer.registers().await;
    drop(session);
    assert!(!matches!(soon(peer.requests.message()).await, Ok(Some(_))));
    mock.tasks.shutdown().start();
    assert_eq!(mock.tasks.join(std::time::Duration::from_secs(20)).await, 0);
}

#[tokio::test(start_paused = true)]
async fn a_server_that_never_answers_is_given_up() {
    // The kernel accepts the connection, nobody reads from it.
    let silent = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let servers = Servers::parse(&silent.local_addr().unwrap().to_string(), None).unwrap();
    let tasks = Tasks::default();
    let session = Session::open(servers, &registration(), &tasks);
    until(&session, |state| matches!(state, SessionState::Reconnecting { .. })).await;
}
