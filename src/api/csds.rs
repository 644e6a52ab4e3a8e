//! The client status discovery service (rule C5): the delivery ledger for tools that speak xDS.

use std::pin::Pin;

use envoy_types::pb::envoy::{
    admin::v3::UpdateFailureState,
    config::core::v3 as core,
    service::status::v3::{
        ClientConfig, ClientStatusRequest, ClientStatusResponse, ConfigStatus,
        client_config::GenericXdsConfig,
        client_status_discovery_service_server::ClientStatusDiscoveryService,
    },
    r#type::matcher::v3::{NodeMatcher, StringMatcher, string_matcher::MatchPattern},
};
use futures_util::{Stream, StreamExt as _};
use tonic::{Request, Response, Status, Streaming};

use super::{
    Api,
    ledger::{any, aside},
};
use crate::xds::{Delivery, Held, ProxyStatus, ResourceType, TypeStatus, unreadable};

/// The gRPC service.
#[derive(Debug, Clone)]
pub(super) struct ClientStatus(Api);

impl ClientStatus {
    pub(super) fn new(api: Api) -> Self {
        Self(api)
    }

    async fn answer(&self, request: ClientStatusRequest) -> Result<ClientStatusResponse, Status> {
        let proxies = self.0.proxies.list();
        aside(move || answer(&proxies, &request)).await?
    }
}

fn answer(proxies: &[ProxyStatus], request: &ClientStatusRequest) -> Result<ClientStatusResponse, Status> {
    let matchers = request.node_matchers.iter().map(matcher).collect::<Result<Vec<_>, _>>()?;
    let wanted = |status: &&ProxyStatus| {
        // The matchers are OR-ed; without any, everybody is meant.
        matchers.is_empty() || matchers.iter().any(|matches| matches(&status.node.id))
    };
    let config = proxies.iter().filter(wanted);
    Ok(ClientStatusResponse {
        config: config.map(|status| client(status, !request.exclude_resource_contents)).collect(),
    })
}

#[tonic::async_trait]
impl ClientStatusDiscoveryService for ClientStatus {
    type StreamClientStatusStream =
        Pin<Box<dyn Stream<Item = Result<ClientStatusResponse, Status>> + Send + 'static>>;

    async fn stream_client_status(
        &self,
        request: Request<Streaming<ClientStatusRequest>>,
    ) -> Result<Response<Self::StreamClientStatusStream>, Status> {
        let service = self.clone();
        let shutdown = self.0.tasks.shutdown().clone();
        let answers = request.into_inner().then(move |request| {
            let service = service.clone();
            async move { service.answer(request.map_err(unreadable)?).await }
        });
        let answers = answers.take_until(Box::pin(async move { shutdown.wait().await }));
        Ok(Response::new(Box::pin(answers)))
    }

    async fn fetch_client_status(
        &self,
        request: Request<ClientStatusRequest>,
    ) -> Result<Response<ClientStatusResponse>, Status> {
        self.answer(request.into_inner()).await.map(Response::new)
    }
}

type Matches<'a> = Box<dyn Fn(&str) -> bool + Send + 'a>;

fn matcher(of: &NodeMatcher) -> Result<Matches<'_>, Status> {
    if !of.node_metadatas.is_empty() {
        return Err(Status::invalid_argument(
            "node_matchers.node_metadatas is not supported: match by node_id",
        ));
    }
    let Some(StringMatcher { ignore_case, match_pattern }) = &of.node_id else {
        return Ok(Box::new(|_| true));
    };
    let fold = |text: &str| if *ignore_case { text.to_lowercase() } else { text.to_owned() };
    Ok(match match_pattern {
        Some(MatchPattern::Exact(want)) => {
            let want = fold(want);
            Box::new(move |id| fold(id) == want)
        }
        Some(MatchPattern::Prefix(want)) => {
            let want = fold(want);
            Box::new(move |id| fold(id).starts_with(&want))
        }
        Some(MatchPattern::Suffix(want)) => {
            let want = fold(want);
            Box::new(move |id| fold(id).ends_with(&want))
        }
        Some(MatchPattern::Contains(want)) => {
            let want = fold(want);
            Box::new(move |id| fold(id).contains(&want))
        }
        Some(_) | None => {
            return Err(Status::invalid_argument(
                "node_matchers.node_id: want exact, prefix, suffix or contains",
            ));
        }
    })
}

fn client(status: &ProxyStatus, contents: bool) -> ClientConfig {
    let node = &status.node;
    let configs = status
        .types
        .iter()
        .flat_map(|of| status.holds(of.kind).into_iter().map(move |held| config(of, &held, contents)));
    let locality = &node.locality;
    ClientConfig {
        node: Some(core::Node {
            id: node.id.clone(),
            cluster: node.cluster.clone(),
            user_agent_name: node.user_agent_name.clone(),
            user_agent_version_type: Some(core::node::UserAgentVersionType::UserAgentVersion(
                node.user_agent_version.clone(),
            )),
            locality: Some(core::Locality {
                region: locality.region.clone(),
                zone: locality.zone.clone(),
                sub_zone: locality.sub_zone.clone(),
            }),
            ..core::Node::default()
        }),
        generic_xds_configs: configs.collect(),
        ..ClientConfig::default()
    }
}

fn config(of: &TypeStatus, held: &Held, contents: bool) -> GenericXdsConfig {
    let status = match held.delivery {
        Delivery::Acknowledged => ConfigStatus::Synced,
        Delivery::Sent => ConfigStatus::Stale,
        Delivery::Pending | Delivery::Absent => ConfigStatus::NotSent,
        Delivery::Rejected => ConfigStatus::Error,
    };
    // What was removed has no content any more.
    let resource = held.resource.as_ref().filter(|_| !held.removed);
    let rejection = of.rejections.last().filter(|_| held.delivery == Delivery::Rejected);
    GenericXdsConfig {
        type_url: ResourceType::url(of.kind).to_owned(),
        name: held.name.to_string(),
        version_info: resource.map(|resource| resource.version.to_string()).unwrap_or_default(),
        xds_config: resource.filter(|_| contents).and_then(|resource| any(resource)),
        config_status: status.into(),
        error_state: rejection.map(|rejection| UpdateFailureState {
            last_update_attempt: Some(prost_types::Timestamp::from(rejection.at)).map(|at| {
                envoy_types::pb::google::protobuf::Timestamp { seconds: at.seconds, nanos: at.nanos }
            }),
            details: rejection.reason.clone(),
            version_info: resource.map(|resource| resource.version.to_string()).unwrap_or_default(),
            ..UpdateFailureState::default()
        }),
        ..GenericXdsConfig::default()
    }
}

#[cfg(test)]
mod tests {
    use envoy_types::pb::envoy::r#type::matcher::v3::{RegexMatcher, StructMatcher};

    use super::*;

    fn matches(pattern: MatchPattern, ignore_case: bool, id: &str) -> bool {
        let node_id = StringMatcher { ignore_case, match_pattern: Some(pattern) };
        let of = NodeMatcher { node_id: Some(node_id), ..NodeMatcher::default() };
        matcher(&of).unwrap()(id)
    }

    #[test]
    fn c5_nodes_are_matched_by_id() {
        use MatchPattern::{Contains, Exact, Prefix, Suffix};
        for (pattern, id, want) in [
            (Exact("edge-1".into()), "edge-1", true),
            (Exact("edge-1".into()), "edge-10", false),
            (Prefix("edge".into()), "edge-10", true),
            (Suffix("-1".into()), "edge-10", false),
            (Contains("ge-1".into()), "edge-10", true),
        ] {
            assert_eq!(matches(pattern.clone(), false, id), want, "{pattern:?} {id}");
            assert_eq!(matches(pattern.clone(), true, &id.to_uppercase()), want, "{pattern:?} {id}");
            assert!(!matches(pattern, false, &id.to_uppercase()));
        }
        assert!(matcher(&NodeMatcher::default()).unwrap()("anybody"));
    }

    #[test]
    fn c5_what_cannot_be_matched_by_is_refused() {
        let regex = MatchPattern::SafeRegex(RegexMatcher::default());
        let node_id = StringMatcher { match_pattern: Some(regex), ..StringMatcher::default() };
        let by_regex = NodeMatcher { node_id: Some(node_id), ..NodeMatcher::default() };
        let metadata = vec![StructMatcher::default()];
        let by_metadata = NodeMatcher { node_metadatas: metadata, ..NodeMatcher::default() };
        for of in [by_regex, by_metadata] {
            let refused = matcher(&of).err().unwrap();
            assert_eq!(refused.code(), tonic::Code::InvalidArgument, "{refused}");
        }
    }
}
