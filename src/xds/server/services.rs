//! Which gRPC services and methods there are (rules G1, G2). What is not here is answered with UNIMPLEMENTED: SRDS, RTDS and
//! ECDS are types that Disco does not generate, and the `Fetch…` methods belong to REST. Nor does it generate secrets yet; those
//! that are asked for do not exist (rules K3, C1).

use std::marker::PhantomData;

use tonic::{server::NamedService, service::RoutesBuilder};

use super::{AdsServer, Incoming};
use crate::xds::{Protocol, ResourceType};

/// A method: its path, its protocol, and the URL of the one type that it serves, `None` for the aggregated ones.
type Method = (&'static str, Protocol, Option<&'static str>);

macro_rules! services {
    ($($marker:ident $name:literal $url:expr, $($protocol:ident $method:literal),+;)+) => {
        const METHODS: &[Method] = &[
            $($((concat!("/", $name, "/", $method), Protocol::$protocol, $url),)+)+
        ];

        $(
            #[derive(Debug, Clone, Copy)]
            struct $marker;

            impl NamedService for Service<$marker> {
                const NAME: &'static str = $name;
            }
        )+

        pub(super) const NAMES: &[&str] = &[$($name),+];

        pub(super) fn add(server: &AdsServer, routes: &mut RoutesBuilder) {
            $(routes.add_service(Service::<$marker> { server: server.clone(), name: PhantomData });)+
        }
    };
}

services! {
    Aggregated "envoy.service.discovery.v3.AggregatedDiscoveryService" None,
        Sotw "StreamAggregatedResources", Delta "DeltaAggregatedResources";
    Clusters "envoy.service.cluster.v3.ClusterDiscoveryService" Some(ResourceType::Cluster.url()),
        Sotw "StreamClusters", Delta "DeltaClusters";
    Endpoints "envoy.service.endpoint.v3.EndpointDiscoveryService" Some(ResourceType::Endpoints.url()),
        Sotw "StreamEndpoints", Delta "DeltaEndpoints";
    LbEndpoints "envoy.service.endpoint.v3.LocalityEndpointDiscoveryService" Some(ResourceType::LbEndpoint.url()),
        Delta "DeltaLocalityEndpoints";
    Listeners "envoy.service.listener.v3.ListenerDiscoveryService" Some(ResourceType::Listener.url()),
        Sotw "StreamListeners", Delta "DeltaListeners";
    Routes "envoy.service.route.v3.RouteDiscoveryService" Some(ResourceType::Route.url()),
        Sotw "StreamRoutes", Delta "DeltaRoutes";
    VirtualHosts "envoy.service.route.v3.VirtualHostDiscoveryService" Some(ResourceType::VirtualHost.url()),
        Delta "DeltaVirtualHosts";
    Secrets "envoy.service.secret.v3.SecretDiscoveryService" Some(SECRET),
        Sotw "StreamSecrets", Delta "DeltaSecrets";
}

const SECRET: &str = "type.googleapis.com/envoy.extensions.transport_sockets.tls.v3.Secret";

/// The protocol of a method, and the URL of its type if it serves only one.
pub(super) fn method(path: &str) -> Option<(Protocol, Option<&'static str>)> {
    METHODS.iter().find(|(known, ..)| *known == path).map(|&(_, protocol, only)| (protocol, only))
}

/// The server under the name of one of its services.
#[derive(Debug, Clone)]
struct Service<S> {
    server: AdsServer,
    name: PhantomData<fn() -> S>,
}

impl<S, B: Incoming> tower::Service<http::Request<B>> for Service<S> {
    type Response = <AdsServer as tower::Service<http::Request<B>>>::Response;
    type Error = <AdsServer as tower::Service<http::Request<B>>>::Error;
    type Future = <AdsServer as tower::Service<http::Request<B>>>::Future;

    fn poll_ready(
        &mut self,
        context: &mut std::task::Context<'_>,
    ) -> std::task::Poll<Result<(), Self::Error>> {
        tower::Service::<http::Request<B>>::poll_ready(&mut self.server, context)
    }

    fn call(&mut self, request: http::Request<B>) -> Self::Future {
        self.server.call(request)
    }
}
