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
    /// Streams that broke off and were asked for again.
    pub(crate) resumed: u64,
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
    fn add(&mut self, answer: Result<Answer, Status>) {
        match answer {
            Ok(Answer { instance, resumed }) => {
                self.ok += 1;
                self.resumed += resumed;
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

/// Who answered, and how often a stream broke off on the way.
struct Answer {
    instance: String,
    resumed: u64,
}

async fn call(greeter: &mut Greeter, caller: u32, long_calls: u32) -> Result<Answer, Status> {
    let name = "rust".to_owned();
    let reply = match caller {
        n if n < long_calls => greeter.slow(SlowRequest { name, delay_ms: 300 }).await?,
        n if n < 2 * long_calls => return stream(greeter).await,
        _ => greeter.hello(HelloRequest { name }).await?,
    };
    Ok(Answer { instance: reply.into_inner().instance, resumed: 0 })
}

/// Reads three replies. A stream that has begun dies with its server, and no proxy can repeat it: only its reader knows
/// what is still to come. So it asks for the rest, as readers of streams do.
async fn stream(greeter: &mut Greeter) -> Result<Answer, Status> {
    let mut answer = Answer { instance: String::new(), resumed: 0 };
    let mut left = 3;
    loop {
        let mut replies = greeter.count(CountRequest { count: left, interval_ms: 100 }).await?.into_inner();
        loop {
            match replies.message().await {
                Ok(Some(reply)) => {
                    left -= 1;
                    answer.instance = reply.instance;
                }
                Ok(None) if left == 0 => return Ok(answer),
                Ok(None) => return Err(Status::data_loss("the stream ended too early")),
                Err(_) => break,
            }
        }
        answer.resumed += 1;
    }
}
