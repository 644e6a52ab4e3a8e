//! The async part of the discovery services: what runs between a connection and a state machine, for each stream. It runs in the task
//! that writes the response, so that a change and an acknowledgement wake one task each, not two.

mod services;
#[cfg(test)]
mod tests;

use std::{
    convert::Infallible,
    future::poll_fn,
    net::SocketAddr,
    pin::Pin,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    task::{Context, Poll},
    time::Duration,
};

use envoy_types::pb::envoy::{
    config::core::v3 as core,
    service::discovery::v3::{DeltaDiscoveryRequest, DiscoveryRequest},
};
use futures_util::{
    FutureExt as _, Stream,
    future::{Ready, ready},
};
use tokio::{
    sync::{OwnedSemaphorePermit, Semaphore, SemaphorePermit},
    time::Instant,
};
use tonic::{Status, body::Body, service::RoutesBuilder};

use super::{
    Admit, Admitted, Code, Config, Heard, Node, Observer, Protocol, ProtocolError, Proxies, Refusal,
    ResourceType, Response, Unobserved,
    asked::Asked,
    delta::Delta,
    engine::{Engine, Variant},
    served::Served,
    sotw::Sotw,
    status::Seat,
    wire::{Incoming, Requests, Responses},
};
use crate::rt::{Leave, Shutdown, Tasks};

/// The discovery services, aggregated and per type, in both forms (rules G1, G2). A clone serves the same.
#[derive(Debug, Clone)]
pub struct AdsServer {
    shared: Arc<Shared>,
}

#[derive(Debug)]
struct Shared {
    admit: Arc<dyn Admit>,
    proxies: Proxies,
    config: Arc<Config>,
    observer: Arc<dyn Observer>,
    shutdown: Shutdown,
    /// A place for each stream.
    streams: Arc<Semaphore>,
    /// A place for each first request that is worked on.
    arrivals: Semaphore,
}

impl AdsServer {
    /// Serves whom `admit` lets in and keeps `proxies`. Streams end when `tasks` are to end.
    pub fn new(admit: Arc<dyn Admit>, proxies: Proxies, config: Config, tasks: Tasks) -> Self {
        Self::observed(admit, proxies, config, tasks, Arc::new(Unobserved))
    }

    /// Likewise, and tells `observer` what happens.
    pub fn observed(
        admit: Arc<dyn Admit>,
        proxies: Proxies,
        config: Config,
        tasks: Tasks,
        observer: Arc<dyn Observer>,
    ) -> Self {
        let streams = Arc::new(Semaphore::new(config.streams.min(Semaphore::MAX_PERMITS)));
        let arrivals = Semaphore::new(config.arrivals.clamp(1, Semaphore::MAX_PERMITS));
        let (config, shutdown) = (Arc::new(config), tasks.shutdown().clone());
        Self { shared: Arc::new(Shared { admit, proxies, config, observer, shutdown, streams, arrivals }) }
    }

    /// The names of all services.
    pub fn services() -> impl Iterator<Item = &'static str> {
        services::NAMES.iter().copied()
    }

    /// Adds all services to those of a gRPC server.
    pub fn add_to(&self, routes: &mut RoutesBuilder) {
        services::add(self, routes);
    }

    fn serve<V: Serve, B: Incoming>(
        &self,
        request: http::Request<B>,
        only: Option<&'static str>,
    ) -> http::Response<Body> {
        let shared = Arc::clone(&self.shared);
        let Ok(permit) = Arc::clone(&shared.streams).try_acquire_owned() else {
            let limit = shared.config.streams;
            return Status::resource_exhausted(format!(
                "this server has {limit} streams, as many as it may (xds.streams); connect to another one, or later"
            ))
            .into_http();
        };
        let request = tonic::Request::from_http(request);
        let peer = request.remote_addr();
        let leave =
            request.extensions().get().map_or_else(|| shared.shutdown.clone(), |Leave(it)| it.clone());
        let requests = Requests::<V::Request, B>::new(
            request.into_inner(),
            shared.config.request_bytes,
            shared.config.names_per_stream,
        );
        let place = Place::default();
        let session = {
            let place = place.clone();
            async move {
                let _permit: OwnedSemaphorePermit = permit;
                serve_stream::<V, B>(requests, place, (peer, leave), only, &shared).await
            }
        };
        let serving = Serving { session: Some(Box::pin(session)), place, end: None };
        let mut response = http::Response::new(Body::new(Responses::new(serving)));
        let grpc = http::HeaderValue::from_static("application/grpc");
        response.headers_mut().insert(http::header::CONTENT_TYPE, grpc);
        response
    }
}

impl<B: Incoming> tower::Service<http::Request<B>> for AdsServer {
    type Response = http::Response<Body>;
    type Error = Infallible;
    type Future = Ready<Result<Self::Response, Infallible>>;

    fn poll_ready(&mut self, _: &mut Context<'_>) -> Poll<Result<(), Infallible>> {
        Poll::Ready(Ok(()))
    }

    fn call(&mut self, request: http::Request<B>) -> Self::Future {
        ready(Ok(match services::method(request.uri().path()) {
            Some((Protocol::Delta, only)) => self.serve::<Delta, B>(request, only),
            Some((Protocol::Sotw, only)) => self.serve::<Sotw, B>(request, only),
            None => Status::unimplemented("no such method").into_http(),
        }))
    }
}

/// What the server needs to know of a variant's requests.
trait Serve: Variant + Sync {
    fn node(request: &mut Self::Request) -> Option<core::Node>;
}

impl Serve for Delta {
    fn node(request: &mut DeltaDiscoveryRequest) -> Option<core::Node> {
        request.node.take()
    }
}

impl Serve for Sotw {
    fn node(request: &mut DiscoveryRequest) -> Option<core::Node> {
        request.node.take()
    }
}

/// Where the next response waits for the connection. There is room for one: the next is built when the connection has taken
/// the last.
#[derive(Debug, Clone, Default)]
struct Place(Arc<Mutex<Option<Response>>>);

impl Place {
    fn response(&self) -> MutexGuard<'_, Option<Response>> {
        // Put and taken whole; a panic leaves nothing half done.
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Ready when the place is free. Nobody is woken: the session is polled again after a response was taken.
    async fn free(&self) {
        poll_fn(|_| if self.response().is_none() { Poll::Ready(()) } else { Poll::Pending }).await;
    }
}

/// The responses of a stream, made when they are asked for.
struct Serving<F> {
    /// `None` once it has ended.
    session: Option<Pin<Box<F>>>,
    place: Place,
    /// What is left to say after the last response.
    end: Option<Status>,
}

impl<F: Future<Output = Result<(), Status>>> Stream for Serving<F> {
    type Item = Result<Response, Status>;

    fn poll_next(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Option<Self::Item>> {
        if let Some(session) = &mut self.session
            && let Poll::Ready(result) = session.as_mut().poll(context)
        {
            self.session = None;
            if let Err(status) = result {
                tracing::debug!(code = ?status.code(), message = status.message(), "stream ended");
                self.end = Some(status);
            }
        }
        let response = self.place.response().take();
        match response {
            Some(response) => Poll::Ready(Some(Ok(response))),
            None if self.session.is_some() => Poll::Pending,
            None => Poll::Ready(self.end.take().map(Err)),
        }
    }
}

/// See [`Node::collections`]. An Envoy that has its clusters by another stream asks this one for endpoints or routes first.
fn carries_collections<V: Variant>(only: Option<&str>, first: &V::Request) -> bool {
    let first = ResourceType::from_url(V::ask(first).type_url);
    V::serves(ResourceType::LbEndpoint)
        && match only {
            Some(only) => only == ResourceType::LbEndpoint.url(),
            None => matches!(first, Some(ResourceType::Cluster | ResourceType::Listener)),
        }
}

/// Serves a stream until the client leaves (Ok) or it must end with a status.
async fn serve_stream<V: Serve, B: Incoming>(
    mut requests: Requests<V::Request, B>,
    place: Place,
    (peer, leave): (Option<SocketAddr>, Shutdown),
    only: Option<&'static str>,
    shared: &Shared,
) -> Result<(), Status> {
    let shutdown = &shared.shutdown;
    let patience = shared.config.first_request_timeout;
    let there = tokio::select! {
        there = tokio::time::timeout(patience, requests.fill()) => there,
        () = shutdown.wait() => return Err(leaving()),
    };
    let Ok(there) = there else {
        return Err(Status::deadline_exceeded(format!("no request within {} s", patience.as_secs_f32())));
    };
    if !there? {
        return Ok(());
    }
    // When all proxies come at once, few are worked on at the same time and the others wait as bytes, in order.
    let arrival = tokio::select! {
        arrival = tokio::time::timeout(patience, shared.arrivals.acquire()) => arrival,
        () = shutdown.wait() => return Err(leaving()),
    };
    let Ok(Ok(arrival)) = arrival else {
        return Err(Status::unavailable("too many clients connect at the same time; connect again later"));
    };
    let Some(mut first) = requests.next().await? else { return Ok(()) };
    let node = Node::of(V::node(&mut first.message), peer, &shared.config).map_err(status)?;
    let collections = carries_collections::<V>(only, &first.message);
    let node = Node { only, collections, ..node };
    let Admitted { feed, policy } = shared.admit.admit(&node).map_err(refused)?;

    let engine = Engine::<V>::new(node.id.clone(), policy, only, Arc::clone(&shared.config));
    tracing::debug!(node = node.id, agent = node.user_agent(), protocol = %V::PROTOCOL, ?peer, "connected");
    shared.observer.connected(V::PROTOCOL);
    let seat = shared.proxies.join(node, V::PROTOCOL);
    let follower = feed.follow();
    seat.serve(follower.standing());
    let served = Served::new(engine, follower);
    let mut session = Session { served, seat, observer: shared.observer.as_ref(), unanswered: 0 };
    session.run((first, arrival), requests, place, (shutdown, &leave)).await
}

/// Requests that are taken in before any of them is answered, beside the first: who floods gets its responses all the same.
const TOGETHER: usize = 8;

/// A stream that was let in.
struct Session<'a, V: Serve> {
    served: Served<V>,
    seat: Seat,
    observer: &'a dyn Observer,
    unanswered: u64,
}

impl<V: Serve> Session<'_, V> {
    async fn run<B: Incoming>(
        &mut self,
        (first, arrival): (Asked<V::Request>, SemaphorePermit<'_>),
        mut requests: Requests<V::Request, B>,
        place: Place,
        (shutdown, leave): (&Shutdown, &Shutdown),
    ) -> Result<(), Status> {
        // What is waited for stays registered from one turn to the next: to come and go costs locks that all streams share.
        let leaving_time = leave.wait();
        tokio::pin!(leaving_time);
        // Once the connection is old: when the stream ends at the latest.
        let mut last: Option<Instant> = None;
        let mut served = false;
        self.hear(first)?;
        self.hear_more(&mut requests)?;
        // Until the first response is made, which takes no help of the client; or until there is something to make it of.
        let mut arrival = self.served.is_known().then_some(arrival);
        // From now on the stream counts among those that have not acknowledged.
        self.report();
        let timer = tokio::time::sleep(Duration::ZERO);
        tokio::pin!(timer);
        loop {
            // Only a look, or an end that is set, brings the time to act nearer.
            let mut nearer = false;
            tokio::select! {
                // The first two because they cost little to ask; whoever floods starves no stream but its own.
                biased;
                // A place first, then the response: while the client does not read, newer state replaces older.
                () = place.free(), if self.served.is_due() => {
                    drop(arrival.take());
                    nearer = true;
                    let response = self.served.next(Instant::now()).map_err(status)?;
                    if !self.served.is_due() {
                        self.report();
                    }
                    if let Some(response) = response {
                        self.observer.sent(V::PROTOCOL, &response);
                        *place.response() = Some(response);
                        served = true;
                        // Nothing else needs to be asked before it is taken, which is at once.
                        place.free().await;
                    }
                }
                more = self.served.news(), if !self.served.is_due() => {
                    if !more {
                        return Err(leaving());
                    }
                    self.served.wake();
                }
                request = requests.next() => match request? {
                    Some(request) => {
                        self.hear(request)?;
                        self.hear_more(&mut requests)?;
                    }
                    None => return Ok(()),
                },
                () = &mut timer, if self.served.is_armed() => self.served.time_out(),
                () = &mut leaving_time => {
                    if shutdown.started() {
                        return if served { Ok(()) } else { Err(leaving()) };
                    }
                    last = Some(Instant::now() + self.served.engine.patience());
                    nearer = true;
                    leaving_time.set(shutdown.wait());
                }
            }
            // Rule K7: the client comes back over another connection and says what it holds. That is worth the most when it has
            // acknowledged everything, and nothing to a client that was not served yet (rule K1).
            if let Some(last) = last
                && (served || self.served.is_idle() || Instant::now() >= last)
                && (self.served.engine.is_quiet() || Instant::now() >= last)
            {
                return Ok(());
            }
            if nearer && let Some(deadline) = self.served.timer(last) {
                timer.as_mut().reset(deadline);
            }
        }
    }

    fn hear(&mut self, asked: Asked<V::Request>) -> Result<(), Status> {
        match self.served.hear(asked, Instant::now()).map_err(status)? {
            Heard::Request => {}
            Heard::Acknowledged(kind, latency) => self.observer.acknowledged(V::PROTOCOL, kind, latency),
            Heard::Rejected(kind, reason) => {
                tracing::warn!(node = self.seat.node_id(), ?kind, reason, "the proxy rejected a response");
                self.observer.rejected(V::PROTOCOL, kind, &reason);
            }
        }
        if !self.served.is_due() {
            self.report();
        }
        Ok(())
    }

    /// Takes in what came together with a request that is to be answered, so that it takes one look to answer all.
    fn hear_more<B: Incoming>(&mut self, requests: &mut Requests<V::Request, B>) -> Result<(), Status> {
        for _ in 0..TOGETHER {
            if !self.served.is_due() {
                break;
            }
            // The end shows again when all is answered.
            let Some(Some(asked)) = requests.next().now_or_never().transpose()? else {
                break;
            };
            self.hear(asked)?;
        }
        Ok(())
    }

    fn report(&mut self) {
        let unanswered = self.served.engine.unanswered();
        if unanswered > self.unanswered {
            self.observer.unanswered(V::PROTOCOL, unanswered - self.unanswered);
            self.unanswered = unanswered;
        }
        self.served.report(&self.seat);
    }
}

impl<V: Serve> Drop for Session<'_, V> {
    fn drop(&mut self) {
        self.observer.disconnected(V::PROTOCOL);
    }
}

/// Rule K1: a stream that ends before it was served counts as a failure of the server, one that was served does not.
pub(super) fn leaving() -> Status {
    Status::unavailable("the server is shutting down; connect to another one, or again")
}

/// What a client is told whose message cannot be read: tonic's codec calls it an error of the server. What else ends a stream of
/// requests has another code, or what it came from.
pub fn unreadable(status: Status) -> Status {
    use std::error::Error as _;
    if status.code() == tonic::Code::Internal && status.source().is_none() {
        return Status::invalid_argument(format!("the message cannot be read: {}", status.message()));
    }
    status
}

pub(super) fn status(error: ProtocolError) -> Status {
    Status::new(code(error.code()), error.to_string())
}

fn refused(refusal: Refusal) -> Status {
    Status::new(code(refusal.code), refusal.message)
}

pub(super) fn code(code: Code) -> tonic::Code {
    match code {
        Code::InvalidArgument => tonic::Code::InvalidArgument,
        Code::Unauthenticated => tonic::Code::Unauthenticated,
        Code::PermissionDenied => tonic::Code::PermissionDenied,
        Code::ResourceExhausted => tonic::Code::ResourceExhausted,
        Code::Unavailable => tonic::Code::Unavailable,
    }
}
