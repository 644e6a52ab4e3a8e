//! The edges that people, scripts and instances use: gRPC (`disco.v1`) and HTTP/JSON over the same handlers of
//! `registry`, the state of the proxies from `xds` (also as CSDS) and the load that they report, metrics and readiness.
//!
//! Whatever comes in is checked whole before anything is done, and every refusal names the fields at fault.

mod csds;
mod dto;
mod error;
mod grpc;
mod health;
mod http;
mod ledger;
mod load;
mod proxies;

use std::sync::Arc;

use envoy_types::pb::envoy::service::status::v3::client_status_discovery_service_server::{
    ClientStatusDiscoveryService, ClientStatusDiscoveryServiceServer,
};

use crate::{
    health::Monitor,
    proto::v1::{proxies_server::ProxiesServer, registry_server::RegistryServer},
    registry::Registry,
    rt::{Readiness, Tasks},
    telemetry::{LogFilter, Metrics},
    xds::{Loads, Proxies},
};

/// Settings of the edges.
#[derive(Debug, Clone)]
pub struct Config {
    /// Largest request body in bytes, on both edges.
    pub body_limit: usize,
    /// The configuration in force, as YAML, for `/debug/config`.
    pub effective: String,
}

/// What the handlers work on. Cheap to clone.
#[derive(Debug, Clone)]
pub struct Api {
    /// Settings.
    pub config: Arc<Config>,
    /// Takes the writes, and has the catalog.
    pub registry: Registry,
    /// What the health checks of this node are doing.
    pub checks: Monitor,
    /// Who is connected and has acknowledged what.
    pub proxies: Proxies,
    /// The calls that clients report.
    pub loads: Loads,
    /// Whether the process is ready.
    pub readiness: Readiness,
    /// All metrics.
    pub metrics: Metrics,
    /// What is logged.
    pub log: LogFilter,
    /// Owns what outlives a request.
    pub tasks: Tasks,
}

impl Api {
    /// The HTTP edge.
    pub fn http(&self) -> axum::Router {
        http::router(self.clone())
    }

    /// `disco.v1.Registry`.
    pub fn registry_service(
        &self,
    ) -> RegistryServer<impl crate::proto::v1::registry_server::Registry + use<>> {
        RegistryServer::new(grpc::RegistryService::new(self.registry.clone(), self.tasks.clone()))
            .max_decoding_message_size(self.config.body_limit)
    }

    /// The client status discovery service, which tells of the proxies in the words of xDS.
    pub fn client_status_service(
        &self,
    ) -> ClientStatusDiscoveryServiceServer<impl ClientStatusDiscoveryService + use<>> {
        ClientStatusDiscoveryServiceServer::new(csds::ClientStatus::new(self.clone()))
            .max_decoding_message_size(self.config.body_limit)
    }

    /// `disco.v1.Proxies`.
    pub fn proxies_service(&self) -> ProxiesServer<impl crate::proto::v1::proxies_server::Proxies + use<>> {
        ProxiesServer::new(proxies::ProxiesService::new(self.clone()))
            .max_decoding_message_size(self.config.body_limit)
    }
}
