//! `disco.v1.Registry` over the registry's handlers.

use std::time::Duration;

use futures_util::{StreamExt as _, stream};
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Code, Request, Response, Status, Streaming};

use super::{Answers, QUEUE, dto, error::ApiError, live, request::service_id};
use crate::{
    catalog::Changes,
    model::{
        HealthReport, Incarnation, InstanceId, InstanceKey, Problems, RawRegistration, Registration,
        Revision, ServiceId, Update, Verdict,
    },
    proto::v1::{self, registry_server, session_request, session_response},
    registry::{
        Accepted, Ended, FORWARDED, Registry, Released, Session, instance_to_proto, raw_check,
        verdict_from_proto,
    },
    rt::{Fate, Hangup, Tasks},
};

/// Most instances that one request renews.
const RENEWALS: usize = 1000;

/// Renewals of one request under way at once: they wait only where another process counted the lease so far, for a write.
const TAKEN_OVER: usize = 64;

/// The gRPC service.
#[derive(Debug, Clone)]
pub(super) struct RegistryService {
    registry: Registry,
    tasks: Tasks,
}

type Answer<T> = Result<Response<T>, Status>;

impl RegistryService {
    pub(super) fn new(registry: Registry, tasks: Tasks) -> Self {
        Self { registry, tasks }
    }

    fn read_registration(&self, request: v1::RegisterRequest) -> Result<Registration, ApiError> {
        let v1::RegisterRequest {
            service,
            id,
            incarnation,
            address,
            port,
            locality,
            weight,
            metadata,
            ttl,
            check,
            new_run,
        } = request;
        let mut problems = Problems::default();
        let ttl = ttl.and_then(|ttl| {
            problems.take("ttl", Duration::try_from(ttl).map_err(|_| "is negative: want 1s to 1h".to_owned()))
        });
        let check = raw_check(check, &mut problems);
        let locality = locality.unwrap_or_default();
        let raw = RawRegistration {
            service,
            id,
            incarnation: (incarnation != 0).then_some(incarnation),
            new_run,
            address: Some(address),
            port: Some(port.into()),
            locality: [locality.region, locality.zone, locality.sub_zone],
            weight: (weight != 0).then_some(weight.into()),
            metadata,
            ttl,
            check,
        };
        match Registration::check_into(raw, self.registry.limits(), &mut problems) {
            Some(registration) if problems.is_empty() => Ok(registration),
            _ => Err(problems.into()),
        }
    }

    fn read_update(
        &self,
        request: v1::UpdateRequest,
    ) -> Result<(InstanceKey, Option<Incarnation>, Update), ApiError> {
        let mut problems = Problems::default();
        let reference = read_ref(request.instance, &mut problems);
        let update = Update::check_into(
            request.weight.map(i128::from),
            request.metadata.map(|metadata| metadata.entries),
            self.registry.limits(),
            &mut problems,
        );
        match reference {
            Some((key, incarnation)) if problems.is_empty() => Ok((key, incarnation, update)),
            _ => Err(problems.into()),
        }
    }

    /// The same for the one who asks, whom the history names.
    fn called_by<T>(&self, request: &Request<T>) -> Self {
        match request.remote_addr() {
            Some(peer) => {
                Self { registry: self.registry.called_by(peer.to_string()), tasks: self.tasks.clone() }
            }
            None => self.clone(),
        }
    }

    async fn serve_session(&self, session: &Session, request: v1::SessionRequest) -> v1::SessionResponse {
        use session_request::Request as In;
        use session_response::Response as Out;
        let result = match request.request {
            Some(In::Register(request)) => match self.read_registration(request) {
                Ok(registration) => session
                    .register(registration)
                    .await
                    .map_err(ApiError::from)
                    .map(registered)
                    .map(Out::Register),
                Err(error) => Err(error),
            },
            Some(In::Update(request)) => self.do_update(request).await.map(Out::Update),
            Some(In::Drain(request)) => self.do_drain(request).await.map(Out::Drain),
            Some(In::Deregister(request)) => self.do_deregister(request).await.map(Out::Deregister),
            Some(In::Health(request)) => self.do_health(request).await.map(Out::Health),
            None => {
                let mut problems = Problems::default();
                problems.add("request", "is missing: want register, update, drain, deregister or health");
                Err(problems.into())
            }
        };
        let response = result.unwrap_or_else(|error| {
            let (code, message) = error.grpc();
            Out::Error(v1::SessionError { code: code.into(), message: message.to_owned() })
        });
        v1::SessionResponse { response: Some(response) }
    }

    async fn do_renew_many(&self, request: v1::RenewManyRequest) -> Result<v1::RenewManyResponse, ApiError> {
        let count = request.instances.len();
        if count > RENEWALS {
            let mut problems = Problems::default();
            problems
                .add("instances", format!("{count} are too many: want at most {RENEWALS} in one request"));
            return Err(problems.into());
        }
        let renew = async |instance| {
            let (key, incarnation) = require_ref(Some(instance))?;
            Ok::<_, ApiError>(self.registry.renew(key, incarnation).await?)
        };
        let mut renewals = stream::iter(request.instances).map(renew).buffered(TAKEN_OVER);
        let mut response = v1::RenewManyResponse::default();
        let mut shortest: Option<Duration> = None;
        let mut index = 0;
        while let Some(renewed) = renewals.next().await {
            match renewed {
                Ok((ttl, revision)) => {
                    shortest = Some(shortest.map_or(ttl, |shortest| shortest.min(ttl)));
                    response.revision = response.revision.max(revision.0);
                }
                Err(error) => {
                    let (code, message) = error.grpc();
                    let message = message.to_owned();
                    response.failures.push(v1::RenewFailure { index, code: code.into(), message });
                }
            }
            index += 1;
        }
        if shortest.is_none() {
            response.revision = self.registry.catalog().latest().revision().0;
        }
        response.ttl = shortest.and_then(|ttl| ttl.try_into().ok());
        Ok(response)
    }

    async fn do_update(&self, request: v1::UpdateRequest) -> Result<v1::UpdateResponse, ApiError> {
        let (key, incarnation, update) = self.read_update(request)?;
        let Accepted { revision, instance } = self.registry.update(key, incarnation, update).await?;
        Ok(v1::UpdateResponse { revision: revision.0, instance: Some(instance_to_proto(&instance)) })
    }

    async fn do_drain(&self, request: v1::DrainRequest) -> Result<v1::DrainResponse, ApiError> {
        let (key, incarnation) = require_ref(request.instance)?;
        let Accepted { revision, instance } = self.registry.drain(key, incarnation).await?;
        Ok(v1::DrainResponse { revision: revision.0, instance: Some(instance_to_proto(&instance)) })
    }

    async fn do_deregister(
        &self,
        request: v1::DeregisterRequest,
    ) -> Result<v1::DeregisterResponse, ApiError> {
        let (key, incarnation) = require_ref(request.instance)?;
        let revision = self.registry.deregister(key, incarnation).await?;
        Ok(v1::DeregisterResponse { revision: revision.0 })
    }

    async fn do_health(&self, request: v1::HealthRequest) -> Result<v1::HealthResponse, ApiError> {
        let verdict = verdict_from_proto(request.verdict());
        let mut problems = Problems::default();
        let reference = read_ref(request.instance, &mut problems);
        if verdict == Verdict::Unknown {
            problems.add("verdict", "is missing: want healthy, degraded or unhealthy");
        }
        if let Some((_, None)) = &reference {
            problems.add("instance.incarnation", "is missing: want the run that the verdict is on");
        }
        let Some((key, Some(incarnation))) = reference.filter(|_| problems.is_empty()) else {
            return Err(problems.into());
        };
        let report = HealthReport { key, incarnation, verdict, reason: request.reason };
        let revision = self.registry.report_health(report).await?;
        Ok(v1::HealthResponse { revision: revision.0 })
    }
}

fn registered(Accepted { revision, instance }: Accepted) -> v1::RegisterResponse {
    v1::RegisterResponse { revision: revision.0, instance: Some(instance_to_proto(&instance)) }
}

fn read_ref(
    reference: Option<v1::InstanceRef>,
    problems: &mut Problems,
) -> Option<(InstanceKey, Option<Incarnation>)> {
    let Some(v1::InstanceRef { service, id, incarnation }) = reference else {
        problems.add("instance", "is missing: want service and id");
        return None;
    };
    let service = problems.take("instance.service", service.parse::<ServiceId>());
    let id = problems.take("instance.id", id.parse::<InstanceId>());
    Some((InstanceKey { service: service?, id: id? }, (incarnation != 0).then_some(Incarnation(incarnation))))
}

fn require_ref(reference: Option<v1::InstanceRef>) -> Result<(InstanceKey, Option<Incarnation>), ApiError> {
    let mut problems = Problems::default();
    read_ref(reference, &mut problems).ok_or_else(|| problems.into())
}

#[tonic::async_trait]
impl registry_server::Registry for RegistryService {
    type WatchStream = Answers<v1::WatchResponse>;
    type WatchLiveStream = Answers<v1::WatchLiveResponse>;
    type SessionStream = Answers<v1::SessionResponse>;

    async fn register(&self, request: Request<v1::RegisterRequest>) -> Answer<v1::RegisterResponse> {
        let called = self.called_by(&request);
        let registration = self.read_registration(request.into_inner())?;
        let accepted = called.registry.register(registration).await.map_err(ApiError::from)?;
        Ok(Response::new(registered(accepted)))
    }

    async fn renew(&self, request: Request<v1::RenewRequest>) -> Answer<v1::RenewResponse> {
        let called = self.called_by(&request);
        let forwarded = request.metadata().contains_key(FORWARDED);
        let (key, incarnation) = require_ref(request.into_inner().instance)?;
        let renewed = if forwarded {
            called.registry.renew_here(key, incarnation).await
        } else {
            called.registry.renew(key, incarnation).await
        };
        let (ttl, revision) = renewed.map_err(ApiError::from)?;
        Ok(Response::new(v1::RenewResponse { revision: revision.0, ttl: ttl.try_into().ok() }))
    }

    async fn renew_many(&self, request: Request<v1::RenewManyRequest>) -> Answer<v1::RenewManyResponse> {
        Ok(Response::new(self.called_by(&request).do_renew_many(request.into_inner()).await?))
    }

    async fn update(&self, request: Request<v1::UpdateRequest>) -> Answer<v1::UpdateResponse> {
        Ok(Response::new(self.called_by(&request).do_update(request.into_inner()).await?))
    }

    async fn drain(&self, request: Request<v1::DrainRequest>) -> Answer<v1::DrainResponse> {
        Ok(Response::new(self.called_by(&request).do_drain(request.into_inner()).await?))
    }

    async fn deregister(&self, request: Request<v1::DeregisterRequest>) -> Answer<v1::DeregisterResponse> {
        Ok(Response::new(self.called_by(&request).do_deregister(request.into_inner()).await?))
    }

    async fn release(&self, request: Request<v1::ReleaseRequest>) -> Answer<v1::ReleaseResponse> {
        let called = self.called_by(&request);
        let service = service_id(&request.into_inner().service)?;
        let Released { revision, removed, published } =
            called.registry.release(service).await.map_err(ApiError::from)?;
        let count = |count: usize| u32::try_from(count).unwrap_or(u32::MAX);
        Ok(Response::new(v1::ReleaseResponse {
            revision: revision.0,
            removed: count(removed),
            published: count(published),
        }))
    }

    async fn list_services(&self, _: Request<v1::ListServicesRequest>) -> Answer<v1::ListServicesResponse> {
        let snapshot = self.registry.catalog().latest();
        let services = snapshot.services().map(|service| {
            let dto::Counts { serving, draining, unhealthy } = dto::count(service);
            v1::Service {
                name: service.id.to_string(),
                serving: u32::try_from(serving).unwrap_or(u32::MAX),
                draining: u32::try_from(draining).unwrap_or(u32::MAX),
                unhealthy: u32::try_from(unhealthy).unwrap_or(u32::MAX),
                revision: service.revision.0,
                held: u32::try_from(service.stale()).unwrap_or(u32::MAX),
            }
        });
        Ok(Response::new(v1::ListServicesResponse {
            revision: snapshot.revision().0,
            services: services.collect(),
        }))
    }

    async fn list_instances(
        &self,
        request: Request<v1::ListInstancesRequest>,
    ) -> Answer<v1::ListInstancesResponse> {
        let service = service_id(&request.into_inner().service)?;
        let snapshot = self.registry.catalog().latest();
        let found =
            snapshot.service(&service).ok_or_else(|| ApiError::no_service(&snapshot, service.clone()))?;
        Ok(Response::new(v1::ListInstancesResponse {
            revision: snapshot.revision().0,
            instances: found.instances().map(|instance| instance_to_proto(instance)).collect(),
        }))
    }

    async fn watch(&self, request: Request<v1::WatchRequest>) -> Answer<Self::WatchStream> {
        let v1::WatchRequest { service, after } = request.into_inner();
        let only = if service.is_empty() { None } else { Some(service_id(&service)?) };
        let catalog = self.registry.catalog().clone();
        if after > catalog.latest().revision().0 {
            let mut problems = Problems::default();
            problems.add(
                "after",
                format!(
                    "{after} is not a revision yet: want one that this registry gave, or 0 for a snapshot"
                ),
            );
            return Err(ApiError::from(problems).into());
        }
        let (answers, stream) = mpsc::channel(QUEUE);
        self.tasks.spawn_until_shutdown("registry-watch", async move {
            let mut seen = Revision(after);
            let mut first = after == 0;
            loop {
                // A place in the queue comes first: a slow reader gets the newest state when it is ready, not a backlog.
                let Ok(place) = answers.reserve().await else { return };
                let next = if first {
                    Some((catalog.latest(), Changes::Resync))
                } else {
                    tokio::select! {
                        next = catalog.newer_than(seen) => next,
                        () = answers.closed() => return,
                    }
                };
                let Some((snapshot, changes)) = next else { return };
                seen = snapshot.revision();
                let response = watch_response(&snapshot, &changes, only.as_ref());
                if first || response.snapshot || !(response.put.is_empty() && response.removed.is_empty()) {
                    place.send(Ok(response));
                }
                first = false;
            }
        });
        Ok(Response::new(Box::pin(ReceiverStream::new(stream))))
    }

    async fn publish(&self, request: Request<v1::PublishRequest>) -> Answer<v1::PublishResponse> {
        let v1::PublishRequest { instance, entries } = request.into_inner();
        let (key, incarnation) = require_ref(instance)?;
        let entries = live::entries(entries, &self.registry)?;
        self.registry.publish(key, incarnation, entries).map_err(ApiError::from)?;
        Ok(Response::new(v1::PublishResponse {}))
    }

    async fn watch_live(&self, request: Request<v1::WatchLiveRequest>) -> Answer<Self::WatchLiveStream> {
        live::watch(&self.registry, &self.tasks, request)
    }

    async fn session(&self, request: Request<Streaming<v1::SessionRequest>>) -> Answer<Self::SessionStream> {
        let mut hangup = request.extensions().get::<Hangup>().cloned();
        let service = self.called_by(&request);
        let mut requests = request.into_inner();
        let (answers, stream) = mpsc::channel(QUEUE);
        let session = service.registry.session();
        self.tasks.spawn("registry-session", async move {
            let shutdown = service.tasks.shutdown().clone();
            let how = loop {
                let request = tokio::select! {
                    request = requests.next() => request,
                    // The owner is alive; it comes back to the next server, within the grace.
                    () = shutdown.wait() => break Ended::Lost,
                    () = session.displaced() => break Ended::Lost,
                };
                match request {
                    Some(Ok(request)) => {
                        let response = service.serve_session(&session, request).await;
                        if answers.send(Ok(response)).await.is_err() {
                            break how_it_ended(hangup.as_mut()).await;
                        }
                    }
                    // A message that cannot be read is no sign of its owner's end.
                    Some(Err(status)) if status.code() == Code::InvalidArgument => {
                        let _ = answers.try_send(Err(status));
                        break Ended::Lost;
                    }
                    Some(Err(_)) | None => break how_it_ended(hangup.as_mut()).await,
                }
            };
            session.end(how).await;
            if how == Ended::Lost {
                let reason =
                    if shutdown.started() { "is shutting down" } else { "has lost touch with the store" };
                let _ =
                    answers.try_send(Err(Status::unavailable(format!("this server {reason}; use another"))));
            }
        });
        Ok(Response::new(Box::pin(ReceiverStream::new(stream))))
    }
}

/// How long a connection may take to be dropped after its streams were told of it.
const DROP: Duration = Duration::from_millis(20);

/// A stream that ends on a living connection was ended by its owner, and a connection whose other end hung up is evidence of
/// the owner's end. One that was given up, because keep-alive got no answer, is not.
async fn how_it_ended(hangup: Option<&mut Hangup>) -> Ended {
    let Some(hangup) = hangup else { return Ended::Lost };
    match hangup.fate(DROP).await {
        Fate::Open => Ended::Closed,
        Fate::HungUp => Ended::HungUp,
        Fate::GivenUp => Ended::Lost,
    }
}

fn watch_response(
    snapshot: &crate::catalog::Snapshot,
    changes: &Changes,
    only: Option<&ServiceId>,
) -> v1::WatchResponse {
    let mut response = v1::WatchResponse { revision: snapshot.revision().0, ..Default::default() };
    let wanted = |service: &ServiceId| only.is_none_or(|only| only == service);
    match changes {
        Changes::Resync => {
            response.snapshot = true;
            let services = snapshot.services().filter(|service| wanted(&service.id));
            response.put =
                services.flat_map(|service| service.instances()).map(|i| instance_to_proto(i)).collect();
        }
        Changes::Touched(touched) => {
            for (service, id) in touched.iter().filter(|(service, _)| wanted(service)) {
                let Some(id) = id else { continue };
                let key = InstanceKey { service: service.clone(), id: id.clone() };
                match snapshot.instance(&key) {
                    Some(instance) => response.put.push(instance_to_proto(instance)),
                    None => response.removed.push(v1::InstanceRef {
                        service: service.to_string(),
                        id: id.to_string(),
                        incarnation: 0,
                    }),
                }
            }
        }
    }
    response
}
