use envoy_types::pb::{
    envoy::{
        config::core::v3::Node,
        service::discovery::v3::{
            DeltaDiscoveryRequest, DeltaDiscoveryResponse, DiscoveryRequest, DiscoveryResponse, Resource,
            aggregated_discovery_service_client::AggregatedDiscoveryServiceClient,
        },
    },
    google::protobuf::Any,
};
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;
use tonic::Streaming;

use super::servers::{Servers, describe};

/// Largest response that is read, in bytes.
const RESPONSE: usize = 256 << 20;

/// What to ask an xDS server for.
#[derive(Debug, Clone)]
pub struct Ask {
    /// The type of the resources.
    pub type_url: String,
    /// Their names. None: none are named, which some types take for all.
    pub names: Vec<String>,
    /// `node.id`.
    pub node_id: String,
    /// State of the world instead of delta.
    pub sotw: bool,
}

/// A response of an xDS server.
#[derive(Debug, Clone, PartialEq)]
pub struct Answer {
    /// The type of the resources.
    pub type_url: String,
    /// The version of the whole.
    pub version: String,
    /// What an answer has to name.
    pub nonce: String,
    /// The resources; name and version are empty where the form of the protocol does not tell them.
    pub resources: Vec<(String, String, Any)>,
    /// Names of resources that are gone; delta only.
    pub removed: Vec<String>,
}

/// One subscription at any xDS server, over ADS. Every response is acknowledged.
#[derive(Debug)]
pub struct Ads {
    ask: Ask,
    stream: Stream,
}

#[derive(Debug)]
enum Stream {
    Delta(mpsc::Sender<DeltaDiscoveryRequest>, Streaming<DeltaDiscoveryResponse>),
    Sotw(mpsc::Sender<DiscoveryRequest>, Streaming<DiscoveryResponse>),
}

impl Ads {
    /// Subscribes at the first server that answers.
    ///
    /// # Errors
    /// None does; says what was seen.
    pub async fn open(servers: &Servers, ask: Ask) -> Result<Self, String> {
        let mut reasons = Vec::new();
        for address in servers.addresses() {
            let link = match servers.connect(*address).await {
                Ok(link) => link,
                Err(reason) => {
                    reasons.push(reason);
                    continue;
                }
            };
            let mut client = AggregatedDiscoveryServiceClient::new(link).max_decoding_message_size(RESPONSE);
            let node = Some(Node {
                id: ask.node_id.clone(),
                user_agent_name: "disco xds watch".to_owned(),
                ..Node::default()
            });
            // Some servers send nothing, not even headers, before the first request: it must be on its way.
            let opened = if ask.sotw {
                let (requests, outgoing) = mpsc::channel(4);
                let first = DiscoveryRequest { node, ..ask.sotw_request() };
                let _ = requests.try_send(first);
                let stream = client.stream_aggregated_resources(ReceiverStream::new(outgoing)).await;
                stream.map(|stream| Stream::Sotw(requests, stream.into_inner()))
            } else {
                let (requests, outgoing) = mpsc::channel(4);
                let first = DeltaDiscoveryRequest {
                    node,
                    type_url: ask.type_url.clone(),
                    resource_names_subscribe: ask.names.clone(),
                    ..DeltaDiscoveryRequest::default()
                };
                let _ = requests.try_send(first);
                let stream = client.delta_aggregated_resources(ReceiverStream::new(outgoing)).await;
                stream.map(|stream| Stream::Delta(requests, stream.into_inner()))
            };
            match opened {
                Ok(stream) => return Ok(Self { ask, stream }),
                Err(status) => reasons.push(format!("{address}: {}", describe(&status))),
            }
        }
        Err(reasons.join("; "))
    }

    /// The next response, which is acknowledged; `None` when the server ended the stream well.
    ///
    /// # Errors
    /// The server or the connection ended the stream; says what was seen.
    pub async fn next(&mut self) -> Result<Option<Answer>, String> {
        match &mut self.stream {
            Stream::Delta(requests, responses) => {
                let response = responses.message().await.map_err(|status| describe(&status))?;
                let Some(response) = response else { return Ok(None) };
                let ack = DeltaDiscoveryRequest {
                    type_url: response.type_url.clone(),
                    response_nonce: response.nonce.clone(),
                    ..DeltaDiscoveryRequest::default()
                };
                // A stream that has ended says so at the next turn.
                let _ = requests.send(ack).await;
                Ok(Some(delta(response)))
            }
            Stream::Sotw(requests, responses) => {
                let response = responses.message().await.map_err(|status| describe(&status))?;
                let Some(response) = response else { return Ok(None) };
                let ack = DiscoveryRequest {
                    version_info: response.version_info.clone(),
                    response_nonce: response.nonce.clone(),
                    ..self.ask.sotw_request()
                };
                let _ = requests.send(ack).await;
                Ok(Some(Answer {
                    type_url: response.type_url,
                    version: response.version_info,
                    nonce: response.nonce,
                    resources: response.resources.into_iter().map(whole).collect(),
                    removed: Vec::new(),
                }))
            }
        }
    }
}

impl Ask {
    fn sotw_request(&self) -> DiscoveryRequest {
        DiscoveryRequest {
            type_url: self.type_url.clone(),
            resource_names: self.names.clone(),
            ..DiscoveryRequest::default()
        }
    }
}

fn delta(response: DeltaDiscoveryResponse) -> Answer {
    let resources = response.resources.into_iter();
    Answer {
        type_url: response.type_url,
        version: response.system_version_info,
        nonce: response.nonce,
        resources: resources.map(|it| (it.name, it.version, it.resource.unwrap_or_default())).collect(),
        removed: response.removed_resources,
    }
}

/// A resource of SotW, unwrapped if it was wrapped (rule G7).
fn whole(any: Any) -> (String, String, Any) {
    const WRAPPER: &str = "type.googleapis.com/envoy.service.discovery.v3.Resource";
    match <Resource as prost::Message>::decode(any.value.as_slice()) {
        Ok(inner) if any.type_url == WRAPPER => {
            (inner.name, inner.version, inner.resource.unwrap_or_default())
        }
        _ => (String::new(), String::new(), any),
    }
}
