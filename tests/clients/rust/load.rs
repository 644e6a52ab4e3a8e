//! Calls the greeter without a pause and counts what comes back. The demo uses it too.

use std::{
    collections::BTreeMap,
    error::Error,
    net::SocketAddr,
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};

use tokio::{task::JoinSet, time::Instant};
use tokio_util::sync::CancellationToken;
use tonic::{Status, body::Body, transport::Endpoint};
use tower::{Service, ServiceExt as _, util::BoxCloneSyncService};

use super::pb::{CountRequest, HelloRequest, SlowRequest, greeter_client::GreeterClient};

/// A client over any channel.
pub(crate) type Greeter =
    GreeterClient<BoxCloneSyncService<http::Request<Body>, http::Response<Body>, Status>>;

const DEADLINE: Duration = Duration::from_secs(5);

/// What to call, and how often.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Plan {
    /// Callers, each with one call at a time.
    pub(crate) concurrency: u32,
    /// Calls a second, of all callers together.
    pub(crate) rate: f64,
    /// Callers, of `concurrency`, whose calls take 300 ms, and as many that read a server stream of 300 ms.
    pub(crate) long_calls: u32,
}

/// Calls `service` through the Envoy at `proxy`.
pub(crate) fn through_envoy(proxy: SocketAddr, service: &str) -> Result<Greeter, Box<dyn Error>> {
    let channel = Endpoint::from_shared(format!("http://{proxy}"))?
        .origin(format!("http://{service}").parse()?)
        .connect_lazy();
    Ok(boxed(channel))
}

/// Hides which kind of channel it is.
pub(crate) fn boxed<S>(channel: S) -> Greeter
where
    S: Service<http::Request<Body>, Response = http::Response<Body>> + Clone + Send + Sync + 'static,
    S::Error: Into<tower::BoxError>,
    S::Future: Send,
{
    GreeterClient::new(BoxCloneSyncService::new(channel.map_err(|error| Status::from_error(error.into()))))
}

/// What came back since the start.
#[derive(Debug, Clone, Default, serde::Serialize)]
pub(crate) struct Counts {
    pub(crate) ok: u64,
    pub(crate) failed: u64,
    /// Calls answered, by instance.
    pub(crate) by: BTreeMap<String, u64>,
    /// Calls failed, by reason.
    pub(crate) errors: BTreeMap<String, u64>,
    /// When each instance answered first.
    #[serde(skip)]
    pub(crate) first: BTreeMap<String, Instant>,
}

/// Calls under way. They go on until [`Load::stop`].
#[derive(Debug)]
pub(crate) struct Load {
    counts: Arc<Mutex<Counts>>,
    stop: CancellationToken,
    callers: JoinSet<()>,
}

impl Load {
    pub(crate) fn start(greeter: Greeter, plan: Plan) -> Self {
        let (counts, stop) = (Arc::new(Mutex::new(Counts::default())), CancellationToken::new());
        let pause = Duration::from_secs_f64(f64::from(plan.concurrency) / plan.rate);
        let start = Instant::now();
        let mut callers = JoinSet::new();
        for caller in 0..plan.concurrency {
            let (counts, stop, mut greeter) = (Arc::clone(&counts), stop.clone(), greeter.clone());
            let mut due = start + pause * caller / plan.concurrency;
            callers.spawn(async move {
                loop {
                    tokio::select! {
                        biased;
                        () = stop.cancelled() => return,
                        () = tokio::time::sleep_until(due) => {}
                    }
                    due = (due + pause).max(Instant::now());
                    let call = call(&mut greeter, caller, plan.long_calls);
                    let late = |_| Err(Status::deadline_exceeded("no answer in 5 s"));
                    let answer = tokio::time::timeout(DEADLINE, call).await.unwrap_or_else(late);
                    counts.lock().unwrap_or_else(PoisonError::into_inner).add(answer);
                }
            });
        }
        Self { counts, stop, callers }
    }

    pub(crate) fn counts(&self) -> Counts {
        self.counts.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Finishes the calls under way.
    pub(crate) async fn stop(mut self) -> Counts {
        self.stop.cancel();
        while self.callers.join_next().await.is_some() {}
        self.counts()
    }
}

impl Counts {
    fn add(&mut self, answer: Result<String, Status>) {
        match answer {
            Ok(instance) => {
                self.ok += 1;
                self.first.entry(instance.clone()).or_insert_with(Instant::now);
                *self.by.entry(instance).or_default() += 1;
            }
            Err(status) => {
                self.failed += 1;
                *self.errors.entry(format!("{:?}: {}", status.code(), status.message())).or_default() += 1;
            }
        }
    }
}

/// One call of `caller`. Returns the instance that answered.
async fn call(greeter: &mut Greeter, caller: u32, long_calls: u32) -> Result<String, Status> {
    let name = "rust".to_owned();
    if caller < long_calls {
        let reply = greeter.slow(SlowRequest { name, delay_ms: 300 }).await?;
        return Ok(reply.into_inner().instance);
    }
    if caller < 2 * long_calls {
        let mut replies = greeter.count(CountRequest { count: 3, interval_ms: 100 }).await?.into_inner();
        let mut instance = String::new();
        let mut received = 0;
        while let Some(reply) = replies.message().await? {
            instance = reply.instance;
            received += 1;
        }
        return if received == 3 { Ok(instance) } else { Err(Status::data_loss("the stream was cut short")) };
    }
    Ok(greeter.hello(HelloRequest { name }).await?.into_inner().instance)
}
