use std::{collections::BTreeSet, net::SocketAddr, time::Duration};

use futures_util::future::join_all;

use super::servers::{Servers, describe};
use crate::{
    model::{Revision, ServiceId},
    proto::v1::{WaitAcknowledgedRequest, WaitAcknowledgedResponse, proxies_client::ProxiesClient},
};

/// What a server gets on top of the time it was told to wait for the proxies.
const ANSWER: Duration = Duration::from_secs(1);

/// Which proxies have a revision.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Acknowledged {
    /// How many have it.
    pub proxies: u32,
    /// Node ids of those that do not, in order. Empty: all have it.
    pub pending: Vec<String>,
    /// Servers that did not answer, and why: what their proxies know is unknown.
    pub unknown: Vec<String>,
}

/// Returns when every proxy that is sent `service` has acknowledged `revision`, or when `limit` is over. A server
/// knows its own proxies only, so all are asked.
pub async fn wait_acknowledged(
    servers: &Servers,
    revision: Revision,
    service: &ServiceId,
    limit: Duration,
) -> Acknowledged {
    let answers = servers
        .addresses()
        .iter()
        .map(|address| ask(servers, *address, revision, service, limit))
        .collect::<Vec<_>>();
    let (mut proxies, mut pending, mut unknown) = (0, BTreeSet::new(), Vec::new());
    for answer in join_all(answers).await {
        match answer {
            Ok(answer) if !answer.complete && answer.pending.is_empty() => {
                unknown.push(format!("a server is at revision {} itself", answer.revision));
            }
            Ok(answer) => {
                proxies += answer.acknowledged;
                pending.extend(answer.pending);
            }
            Err(reason) => unknown.push(reason),
        }
    }
    Acknowledged { proxies, pending: pending.into_iter().collect(), unknown }
}

async fn ask(
    servers: &Servers,
    address: SocketAddr,
    revision: Revision,
    service: &ServiceId,
    limit: Duration,
) -> Result<WaitAcknowledgedResponse, String> {
    let request = WaitAcknowledgedRequest {
        revision: revision.0,
        service: service.to_string(),
        timeout: prost_types::Duration::try_from(limit).ok(),
    };
    let answer = async {
        let mut client = ProxiesClient::new(servers.connect(address).await?);
        let answer = client.wait_acknowledged(request).await;
        answer.map_err(|status| format!("{address}: {}", describe(&status)))
    };
    match tokio::time::timeout(limit.saturating_add(ANSWER), answer).await {
        Ok(answer) => Ok(answer?.into_inner()),
        Err(_) => Err(format!("{address}: no answer in time")),
    }
}

#[cfg(test)]
mod tests {
    use tokio::net::TcpListener;
    use tokio_stream::wrappers::TcpListenerStream;
    use tonic::{Request, Response, Status, transport::Server};

    use super::*;
    use crate::{
        proto::v1::{
            ListProxiesRequest, ListProxiesResponse,
            proxies_server::{Proxies, ProxiesServer},
        },
        rt::Tasks,
    };

    struct Fixed(WaitAcknowledgedResponse);

    #[tonic::async_trait]
    impl Proxies for Fixed {
        async fn list(
            &self,
            _: Request<ListProxiesRequest>,
        ) -> Result<Response<ListProxiesResponse>, Status> {
            Err(Status::unimplemented("not part of this test"))
        }

        async fn wait_acknowledged(
            &self,
            request: Request<WaitAcknowledgedRequest>,
        ) -> Result<Response<WaitAcknowledgedResponse>, Status> {
            let WaitAcknowledgedRequest { revision, service, timeout } = request.into_inner();
            assert_eq!((revision, service.as_str(), timeout.unwrap().seconds), (9, "greeter", 5));
            Ok(Response::new(self.0.clone()))
        }
    }

    async fn serve(tasks: &Tasks, complete: bool, acknowledged: u32, pending: &[&str]) -> String {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let pending = pending.iter().map(|id| (*id).to_owned()).collect();
        let answer = WaitAcknowledgedResponse { revision: 9, complete, acknowledged, pending };
        let server = Server::builder().add_service(ProxiesServer::new(Fixed(answer)));
        tasks.spawn("mock", async move {
            server.serve_with_incoming(TcpListenerStream::new(listener)).await.unwrap();
        });
        address.to_string()
    }

    #[tokio::test]
    async fn all_servers_are_asked_and_their_answers_added() {
        let tasks = Tasks::default();
        let away = TcpListener::bind("127.0.0.1:0").await.unwrap().local_addr().unwrap();
        let all = [
            serve(&tasks, true, 2, &[]).await,
            serve(&tasks, false, 1, &["z", "b"]).await,
            serve(&tasks, false, 0, &[]).await,
            away.to_string(),
        ];
        let servers = Servers::parse(&all.join(","), None).unwrap();
        let service = "greeter".parse().unwrap();
        let got = wait_acknowledged(&servers, Revision(9), &service, Duration::from_secs(5)).await;
        assert_eq!((got.proxies, got.pending), (3, vec!["b".to_owned(), "z".to_owned()]));
        let [behind, lost] = got.unknown.as_slice() else { panic!("{:?}", got.unknown) };
        assert!(behind.contains("revision 9"), "{behind}");
        assert!(lost.starts_with(&away.to_string()) && lost.contains("refused"), "{lost}");
    }
}
