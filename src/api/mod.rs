//! The edges that people, scripts and instances use: gRPC (`disco.v1`) and HTTP/JSON over the same handlers of
//! `registry`, the state of the proxies from `xds` (also as CSDS) and the load that they report, metrics and readiness.
//!
//! Whatever comes in is checked whole before anything is done, and every refusal names the fields at fault.

mod csds;
mod dto;
mod error;
mod grpc;
mod health;
mod history;
mod http;
mod ledger;
mod limit;
mod live;
mod load;
mod locks;
mod peers;
mod proxies;
mod request;
mod snapshot;
mod time;

use std::{pin::Pin, sync::Arc};

use envoy_types::pb::envoy::service::status::v3::client_status_discovery_service_server::{
    ClientStatusDiscoveryService, ClientStatusDiscoveryServiceServer,
};

use futures_util::Stream;
use tonic::Status;

use error::{ApiError, Kind};

use crate::{
    catalog::Reader,
    health::Monitor,
    peers::Peers,
    proto::v1::{
        locks_server::LocksServer, peers_server::PeersServer, proxies_server::ProxiesServer,
        registry_server::RegistryServer,
    },
    registry::{Locks, Membership, Registry},
    rt::{Readiness, Tasks},
    telemetry::{LogFilter, Metrics},
    xds::{Loads, Proxies},
};

/// The condition of readiness that what is registered has been read back.
pub const SYNCED: &str = "registry";

/// Answers of a gRPC stream that wait for a slow reader.
const QUEUE: usize = 16;

/// The answers of a gRPC stream.
type Answers<T> = Pin<Box<dyn Stream<Item = Result<T, Status>> + Send>>;

/// Settings of the edges.
#[derive(Debug, Clone)]
pub struct Config {
    /// Largest request body in bytes, on both edges.
    pub body_limit: usize,
    /// HTTP requests at the same time.
    pub requests: usize,
    /// The configuration in force, as YAML, for `/debug/config`.
    pub effective: String,
}

/// What the handlers work on. Cheap to clone.
#[derive(Debug, Clone)]
pub struct Api {
    /// Settings.
    pub config: Arc<Config>,
    /// What is registered.
    pub catalog: Reader,
    /// The processes that share its store, if it is shared.
    pub nodes: Option<Membership>,
    /// Takes the writes, in a process that does.
    pub registry: Option<Registry>,
    /// Keeps the locks, in a process that takes writes.
    pub locks: Option<Locks>,
    /// Keeps the peer sets, in a process that takes writes.
    pub peers: Option<Peers>,
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

    /// `disco.v1.Registry`, in a process that takes writes.
    pub fn registry_service(
        &self,
    ) -> Option<RegistryServer<impl crate::proto::v1::registry_server::Registry + use<>>> {
        let service = grpc::RegistryService::new(self.registry.clone()?, self.tasks.clone());
        Some(RegistryServer::new(service).max_decoding_message_size(self.config.body_limit))
    }

    /// `disco.v1.Locks`, in a process that takes writes.
    pub fn locks_service(&self) -> Option<LocksServer<impl crate::proto::v1::locks_server::Locks + use<>>> {
        let service = locks::LocksService::new(self.locks.clone()?, self.tasks.clone());
        Some(LocksServer::new(service).max_decoding_message_size(self.config.body_limit))
    }

    /// `disco.v1.Peers`, in a process that takes writes.
    pub fn peers_service(&self) -> Option<PeersServer<impl crate::proto::v1::peers_server::Peers + use<>>> {
        let service = peers::PeersService::new(self.peers.clone()?, self.tasks.clone());
        Some(PeersServer::new(service).max_decoding_message_size(self.config.body_limit))
    }

    fn registry(&self) -> Result<&Registry, ApiError> {
        self.registry.as_ref().ok_or_else(|| {
            let message =
                "this node takes no writes: it does not have the role `registry`; send them to one that has";
            ApiError::new(Kind::Misdirected, message)
        })
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
