//! Services and methods: what each serves, and what it says to the rest.

use super::*;

pub(super) const CLUSTERS: [&str; 2] = [
    "/envoy.service.cluster.v3.ClusterDiscoveryService/StreamClusters",
    "/envoy.service.cluster.v3.ClusterDiscoveryService/DeltaClusters",
];
const ENDPOINTS: [&str; 2] = [
    "/envoy.service.endpoint.v3.EndpointDiscoveryService/StreamEndpoints",
    "/envoy.service.endpoint.v3.EndpointDiscoveryService/DeltaEndpoints",
];
const LISTENERS: [&str; 2] = [
    "/envoy.service.listener.v3.ListenerDiscoveryService/StreamListeners",
    "/envoy.service.listener.v3.ListenerDiscoveryService/DeltaListeners",
];
const ROUTES: [&str; 2] = [
    "/envoy.service.route.v3.RouteDiscoveryService/StreamRoutes",
    "/envoy.service.route.v3.RouteDiscoveryService/DeltaRoutes",
];

#[tokio::test]
async fn g2_g3_a_service_per_type_and_its_type_url_may_be_empty() {
    let server = start(Some(one_of_each())).await;
    for (paths, kind) in [
        (CLUSTERS, CDS),
        (ENDPOINTS, EDS),
        (LISTENERS, ResourceType::Listener),
        (ROUTES, ResourceType::Route),
    ] {
        for url in ["", kind.url()] {
            let (requests, responses) = server.stream::<_, DiscoveryResponse>(paths[0]).await;
            let request = DiscoveryRequest {
                node: Some(node("sotw")),
                resource_names: vec!["a".into()],
                type_url: url.into(),
                ..Default::default()
            };
            requests.send(request).await.unwrap();
            let response = within(responses.unwrap()).await.unwrap();
            assert_eq!((response.type_url.as_str(), response.resources.len()), (kind.url(), 1), "{paths:?}");

            let (requests, responses) = server.stream::<_, DeltaDiscoveryResponse>(paths[1]).await;
            let request = DeltaDiscoveryRequest {
                node: Some(node("delta")),
                type_url: url.into(),
                ..delta(kind, &["a", "b"], &[])
            };
            requests.send(request).await.unwrap();
            let response = within(responses.unwrap()).await.unwrap();
            assert_eq!((response.type_url.as_str(), response.resources.len()), (kind.url(), 1), "{paths:?}");
            assert_eq!(response.removed_resources, ["b"]);
        }
    }
}

/// Delta only: a collection needs it (rule L4).
#[tokio::test]
async fn g2_l4_members_of_collections_by_a_service_of_their_own() {
    let glob = "xdstp:///envoy.config.endpoint.v3.LbEndpoint/a/*";
    let member = put(ResourceType::LbEndpoint, &glob.replace('*', "1"), "x");
    let server = start(Some(one_of_each().apply(Revision(2), [member]))).await;
    let path = "/envoy.service.endpoint.v3.LocalityEndpointDiscoveryService/DeltaLocalityEndpoints";
    let (requests, responses) = server.stream::<_, DeltaDiscoveryResponse>(path).await;
    let request =
        DeltaDiscoveryRequest { node: Some(node("n")), ..delta(ResourceType::LbEndpoint, &[glob], &[]) };
    requests.send(request).await.unwrap();
    let response = within(responses.unwrap()).await.unwrap();
    let names: Vec<_> = response.resources.iter().map(|resource| resource.name.as_str()).collect();
    assert_eq!(names, [glob.replace('*', "1")]);
}

/// An Envoy that has its clusters by another stream could not be sent members anew after a change of a cluster.
#[test]
fn l4_a_stream_carries_collections_if_all_that_refers_to_them_comes_by_it() {
    let first = |kind| delta(kind, &[], &[]);
    for (only, kind, want) in [
        (None, CDS, true),
        (None, ResourceType::Listener, true),
        (None, EDS, false),
        (None, ResourceType::Route, false),
        (None, ResourceType::LbEndpoint, false),
        (Some(ResourceType::LbEndpoint), ResourceType::LbEndpoint, true),
        (Some(EDS), EDS, false),
    ] {
        assert_eq!(
            carries_collections::<Delta>(only.map(ResourceType::url), &first(kind)),
            want,
            "{only:?} {kind:?}"
        );
        let sotw = DiscoveryRequest { type_url: kind.url().into(), ..Default::default() };
        assert!(!carries_collections::<Sotw>(only.map(ResourceType::url), &sotw), "SotW {only:?} {kind:?}");
    }
}

#[tokio::test]
async fn g3_k2_another_type_on_a_service_of_one_type_is_an_error() {
    let server = start(Some(one_of_each())).await;
    for path in [ENDPOINTS[1], ROUTES[1]] {
        let (requests, responses) = server.stream::<_, DeltaDiscoveryResponse>(path).await;
        let request = DeltaDiscoveryRequest { node: Some(node("n")), ..delta(CDS, &[], &[]) };
        requests.send(request).await.unwrap();
        let error = within(responses.unwrap()).await.unwrap_err();
        assert_eq!(error.code(), tonic::Code::InvalidArgument);
        assert!(error.message().contains(CDS.url()), "{error}");
    }
}

#[tokio::test]
async fn g2_l3_virtual_hosts_have_an_incremental_service() {
    let server = start(Some(one_of_each())).await;
    let path = "/envoy.service.route.v3.VirtualHostDiscoveryService/DeltaVirtualHosts";
    let (requests, responses) = server.stream::<_, DeltaDiscoveryResponse>(path).await;
    let request = DeltaDiscoveryRequest { node: Some(node("n")), ..DeltaDiscoveryRequest::default() };
    requests.send(request).await.unwrap();
    let response = within(responses.unwrap()).await.unwrap();
    assert_eq!((response.type_url.as_str(), response.resources.len()), (ResourceType::VirtualHost.url(), 1));
}

#[tokio::test]
async fn c1_k3_secrets_have_services_and_do_not_exist() {
    let server = start(Some(one_of_each())).await;
    let url = "type.googleapis.com/envoy.extensions.transport_sockets.tls.v3.Secret";
    for type_url in ["", url] {
        let path = "/envoy.service.secret.v3.SecretDiscoveryService/DeltaSecrets";
        let (requests, responses) = server.stream::<_, DeltaDiscoveryResponse>(path).await;
        let request = DeltaDiscoveryRequest {
            node: Some(node("n")),
            type_url: type_url.into(),
            resource_names_subscribe: vec!["cert".into()],
            ..Default::default()
        };
        requests.send(request).await.unwrap();
        let response = within(responses.unwrap()).await.unwrap();
        assert_eq!((response.type_url.as_str(), response.removed_resources), (url, vec!["cert".to_owned()]));

        // The other form has no words for it: the stream stays, and is silent.
        let path = "/envoy.service.secret.v3.SecretDiscoveryService/StreamSecrets";
        let (requests, responses) = server.stream::<_, DiscoveryResponse>(path).await;
        let request = DiscoveryRequest {
            node: Some(node("silent")),
            type_url: type_url.into(),
            resource_names: vec!["cert".into()],
            ..Default::default()
        };
        requests.send(request).await.unwrap();
        let mut responses = responses.unwrap();
        server.until("there", |server| server.proxies.list().iter().any(|it| it.node.id == "silent")).await;
        let quiet = tokio::time::timeout(Duration::from_millis(50), responses.message()).await;
        assert!(quiet.is_err(), "{quiet:?}");
    }
    let clusters = DeltaDiscoveryRequest { node: Some(node("n")), ..delta(CDS, &[], &[]) };
    let path = "/envoy.service.secret.v3.SecretDiscoveryService/DeltaSecrets";
    let (requests, responses) = server.stream::<_, DeltaDiscoveryResponse>(path).await;
    requests.send(clusters).await.unwrap();
    let error = within(responses.unwrap()).await.unwrap_err();
    assert!(error.message().contains(url), "{error}");
}

#[tokio::test]
async fn g2_k2_services_of_types_that_are_not_generated_are_unimplemented() {
    let server = start(Some(one_of_each())).await;
    for path in [
        "/envoy.service.route.v3.VirtualHostDiscoveryService/StreamVirtualHosts",
        "/envoy.service.secret.v3.SecretDiscoveryService/FetchSecrets",
        "/envoy.service.route.v3.ScopedRoutesDiscoveryService/StreamScopedRoutes",
        "/envoy.service.route.v3.ScopedRoutesDiscoveryService/DeltaScopedRoutes",
        "/envoy.service.endpoint.v3.LocalityEndpointDiscoveryService/StreamLocalityEndpoints",
        "/envoy.service.runtime.v3.RuntimeDiscoveryService/StreamRuntime",
        "/envoy.service.runtime.v3.RuntimeDiscoveryService/DeltaRuntime",
        "/envoy.service.extension.v3.ExtensionConfigDiscoveryService/DeltaExtensionConfigs",
        "/envoy.service.cluster.v3.ClusterDiscoveryService/FetchClusters",
    ] {
        let (_requests, answer) = server.stream::<DeltaDiscoveryRequest, DeltaDiscoveryResponse>(path).await;
        assert_eq!(answer.unwrap_err().code(), tonic::Code::Unimplemented, "{path}");
    }
}
