use std::net::SocketAddr;

use axum::middleware;
use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
use tokio::sync::watch;
use tonic_health::ServingStatus;

use super::{Error, incoming::Incoming};
use crate::{
    api::SYNCED,
    model::Members,
    proto,
    rt::{Readiness, Tasks},
};

/// The condition of readiness that the other nodes know of this one.
const MEMBER: &str = "membership";

/// Listens, if it is wanted.
pub(super) fn bind(
    field: &'static str,
    address: SocketAddr,
    wanted: bool,
) -> Result<Option<Incoming>, Error> {
    if !wanted {
        return Ok(None);
    }
    Incoming::bind(address).map(Some).map_err(|source| Error::Listen { field, address, source })
}

/// Takes as many descriptors as the system allows this process: every proxy holds one, and the usual 1,024 are too few.
pub(super) fn raise_descriptor_limit() {
    let Rlimit { maximum, .. } = getrlimit(Resource::Nofile);
    if let Err(error) = setrlimit(Resource::Nofile, Rlimit { current: maximum, maximum }) {
        tracing::warn!(%error, "the limit on open files stays as it is");
    }
}

/// Says over `grpc.health.v1` what `/readyz` says over HTTP.
pub(super) fn follow_readiness(
    health: tonic_health::server::HealthReporter,
    readiness: Readiness,
    tasks: &Tasks,
) {
    let shutdown = tasks.shutdown().clone();
    tasks.spawn("grpc-health", async move {
        let mut ready = false;
        loop {
            let status = if ready { ServingStatus::Serving } else { ServingStatus::NotServing };
            health.set_service_status("", status).await;
            ready = !ready;
            tokio::select! {
                () = readiness.becomes(ready) => {}
                () = shutdown.wait() => break,
            }
        }
        health.set_service_status("", ServingStatus::NotServing).await;
    });
}

/// Not ready while the other nodes count this one as dead: whoever wants to write should go to one of them.
pub(super) fn follow_membership(mut members: watch::Receiver<Members>, readiness: Readiness, tasks: &Tasks) {
    readiness.close(MEMBER);
    tasks.spawn_until_shutdown("readiness", async move {
        while members.wait_for(Members::is_member).await.is_ok() {
            readiness.open(MEMBER);
            if members.wait_for(|members| !members.is_member()).await.is_err() {
                return;
            }
            readiness.close(MEMBER);
        }
    });
}

/// Tells what there is, so that tools such as grpcurl need no files: of `services`, which are those that are served.
pub(super) fn reflection(
    services: &[&str],
) -> tonic_reflection::server::v1::ServerReflectionServer<impl tonic_reflection::server::v1::ServerReflection>
{
    let own = "grpc.reflection.v1.ServerReflection";
    let mut builder = tonic_reflection::server::Builder::configure().with_service_name(own);
    for set in proto::DESCRIPTORS.into_iter().chain([tonic_health::pb::FILE_DESCRIPTOR_SET]) {
        builder = builder.register_encoded_file_descriptor_set(set);
    }
    services
        .iter()
        .fold(builder, |builder, service| builder.with_service_name(*service))
        .build_v1()
        .unwrap_or_else(|error| unreachable!("our own descriptors were compiled by the build: {error}"))
}

/// Turns away who asks for what is registered before that has been read back: nothing would be a wrong answer (never 2).
/// Health and reflection answer at any time.
pub(super) fn when_synced(routes: tonic::service::Routes, readiness: Readiness) -> tonic::service::Routes {
    let check = move |request: axum::extract::Request, next: middleware::Next| {
        let readiness = readiness.clone();
        async move {
            let about_us = request.uri().path().starts_with("/grpc.");
            if !about_us && readiness.waits_for(SYNCED) {
                let message =
                    "what is registered has not been read back from the store yet: try another node or again";
                return tonic::Status::unavailable(message).into_http();
            }
            next.run(request).await
        }
    };
    routes.into_axum_router().layer(middleware::from_fn(check)).into()
}

#[cfg(test)]
mod tests {
    use prost_reflect::DescriptorPool;
    use tonic_reflection::pb::v1::{
        ServerReflectionRequest, server_reflection_client::ServerReflectionClient,
        server_reflection_request::MessageRequest, server_reflection_response::MessageResponse,
    };

    use super::*;
    use crate::xds::AdsServer;

    #[tokio::test]
    async fn reflection_tells_of_what_is_served_and_of_all_that_it_takes_to_call_it() {
        let services: Vec<_> = ["disco.v1.Registry", "grpc.health.v1.Health"]
            .into_iter()
            .chain(AdsServer::services())
            .chain(["envoy.service.status.v3.ClientStatusDiscoveryService"])
            .chain(["envoy.service.load_stats.v3.LoadReportingService"])
            .collect();
        let mut client = ServerReflectionClient::new(reflection(&services));
        let mut ask = async |message: MessageRequest| {
            let request = ServerReflectionRequest { host: String::new(), message_request: Some(message) };
            let mut answers =
                client.server_reflection_info(tokio_stream::iter([request])).await.unwrap().into_inner();
            answers.message().await.unwrap().unwrap().message_response.unwrap()
        };
        let MessageResponse::ListServicesResponse(list) = ask(MessageRequest::ListServices("*".into())).await
        else {
            panic!("no list")
        };
        let listed: Vec<_> = list.service.into_iter().map(|service| service.name).collect();
        assert_eq!(listed[1..], services);
        for service in listed {
            let answer = ask(MessageRequest::FileContainingSymbol(service.clone())).await;
            assert!(matches!(answer, MessageResponse::FileDescriptorResponse(_)), "{service}: {answer:?}");
        }
        // Whole: no type is left out.
        for set in proto::DESCRIPTORS {
            let pool = DescriptorPool::decode(set).unwrap();
            for file in pool.files() {
                let name = file.name().to_owned();
                let answer = ask(MessageRequest::FileByFilename(name.clone())).await;
                assert!(matches!(answer, MessageResponse::FileDescriptorResponse(_)), "{name}: {answer:?}");
            }
        }
    }
}
