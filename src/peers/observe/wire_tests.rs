use std::{net::SocketAddr, sync::Arc, time::Duration};

use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::TcpListener,
};
use tokio_stream::wrappers::TcpListenerStream;
use tonic_health::ServingStatus;

use super::{
    adapter::Adapter,
    ask::Asker,
    said::{Fault, Said},
    sight::Heard,
};
use crate::{
    model::Role,
    peers::{Addresses, Birth, NodeId, Peer, Suffrage},
    rt::Tasks,
};

async fn listener() -> (TcpListener, SocketAddr) {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    (listener, address)
}

fn asker(adapter: &Adapter, at: SocketAddr, limit: Duration, tasks: &Tasks) -> Asker {
    let peer = Peer {
        node: NodeId(1),
        key: "n1".parse().unwrap(),
        disk: "disk".into(),
        ordinal: 0,
        at: Addresses { raft: at, client: at, extra: [].into() },
        zone: String::new(),
        version: String::new(),
        suffrage: Suffrage::Voter,
        birth: Birth::Founder,
        leaving: false,
    };
    Asker::replica(adapter, Arc::new(peer), at, limit, tasks)
}

const LONG: Duration = Duration::from_secs(10);

async fn role(asker: &mut Asker) -> Result<Role, Fault> {
    match asker.ask().await? {
        Heard::Said(Said { role, .. }) => Ok(role),
        Heard::Word(word) => panic!("{word:?}"),
    }
}

#[tokio::test]
async fn a_grpc_service_that_serves_leads() {
    let tasks = Tasks::default();
    let (listening, address) = listener().await;
    let (reporter, health) = tonic_health::server::health_reporter();
    let (stop, stopped) = tokio::sync::oneshot::channel::<()>();
    let server = tonic::transport::Server::builder().add_service(health);
    let server = server.serve_with_incoming_shutdown(TcpListenerStream::new(listening), async {
        let _ = stopped.await;
    });
    let (ended, end) = tokio::sync::oneshot::channel();
    tasks.spawn("server", async move {
        server.await.unwrap();
        let _ = ended.send(());
    });
    let mut asker = asker(&Adapter::Grpc { service: "leader".into() }, address, LONG, &tasks);
    assert_eq!(role(&mut asker).await, Ok(Role::Follower), "it does not have the service");
    for (status, want) in
        [(ServingStatus::Serving, Role::Leader), (ServingStatus::NotServing, Role::Follower)]
    {
        reporter.set_service_status("leader", status).await;
        assert_eq!(role(&mut asker).await, Ok(want));
    }
    stop.send(()).unwrap();
    drop(asker);
    end.await.unwrap();
    let mut asker = self::asker(&Adapter::Grpc { service: "leader".into() }, address, LONG, &tasks);
    assert_eq!(role(&mut asker).await, Err(Fault::Refused));
}

/// What comes of an answer in these bytes, to an HTTP and to a Redis question.
async fn outcome(adapter: &Adapter, answer: Option<Vec<u8>>) -> Result<Role, Fault> {
    let tasks = Tasks::default();
    let (listening, address) = listener().await;
    let limit = if answer.is_some() { LONG } else { Duration::from_millis(50) };
    tasks.spawn("server", async move {
        loop {
            let (mut stream, _) = listening.accept().await.unwrap();
            let _ = stream.read(&mut [0; 1024]).await;
            match &answer {
                // It may be refused before its end.
                Some(bytes) => drop(stream.write_all(bytes).await),
                None => std::future::pending().await,
            }
        }
    });
    role(&mut asker(adapter, address, limit, &tasks)).await
}

#[tokio::test]
async fn hostile_answers_are_faults() {
    let http = Adapter::Http { path: "/leader".into() };
    let redis = Adapter::Redis { master: "m".into(), sentinels: Vec::new() };
    let long = |head: &str, length: usize| [head.as_bytes(), &vec![b'x'; length]].concat();
    let ok = "HTTP/1.1 200 OK\r\ncontent-length: 0\r\n\r\n".as_bytes().to_vec();
    assert_eq!(outcome(&http, Some(ok)).await, Ok(Role::Leader));
    for (adapter, answer) in [
        (&http, b"".to_vec()),
        (&http, b"+PONG\r\n".to_vec()),
        (&http, long("HTTP/1.1 200 OK\r\n\r\n", 1 << 20)),
        (&http, long("HTTP/1.1 200 OK\r\nx: ", 1 << 20)),
        (&http, b"HTTP/1.1 200 OK\r\ncontent-length: 9\r\n\r\nx".to_vec()),
        (&redis, b"".to_vec()),
        (&redis, b"HTTP/1.1 200 OK\r\n\r\n".to_vec()),
        (&redis, b"+OK\r\n+OK\r\n".to_vec()),
        (&redis, long("$99999999\r\n", 1 << 10)),
        (&redis, long("+", 1 << 20)),
    ] {
        let begin = String::from_utf8_lossy(&answer[..answer.len().min(40)]).into_owned();
        let got = outcome(adapter, Some(answer)).await;
        assert!(matches!(got, Err(Fault::Wrong(_))), "{begin:?}: {got:?}");
    }
    for adapter in [&http, &redis] {
        assert!(matches!(outcome(adapter, None).await, Err(Fault::Silent(_))));
    }
}
