//! Thousands of ADS clients on one thread: one TCP connection and one stream each, HTTP/2 framed by hand, so that the load
//! costs the machine as little as it can. They acknowledge as Envoy does, at once and in the order of arrival.

use std::{
    cell::RefCell,
    collections::HashMap,
    io,
    net::SocketAddr,
    pin::{Pin, pin},
    sync::{Arc, Condvar, Mutex, MutexGuard},
    task::{Poll, ready},
    thread::JoinHandle,
    time::{Duration, Instant},
};

use envoy_types::pb::envoy::{
    config::core::v3::Node,
    service::discovery::v3::{DeltaDiscoveryRequest, DiscoveryRequest},
};
use futures_util::future::poll_fn;
use prost::{
    Message as _,
    encoding::{WireType, decode_key, decode_varint, encode_key, encode_varint},
};
use tokio::{
    io::{AsyncRead as _, AsyncWriteExt as _, ReadBuf},
    net::TcpSocket,
    sync::oneshot,
};
use xxhash_rust::xxh3::xxh3_64;

pub(crate) const CLUSTER: &str = "type.googleapis.com/envoy.config.cluster.v3.Cluster";
pub(crate) const ENDPOINTS: &str = "type.googleapis.com/envoy.config.endpoint.v3.ClusterLoadAssignment";
pub(crate) const LB_ENDPOINT: &str = "type.googleapis.com/envoy.config.endpoint.v3.LbEndpoint";
pub(crate) const LISTENER: &str = "type.googleapis.com/envoy.config.listener.v3.Listener";
pub(crate) const ROUTE: &str = "type.googleapis.com/envoy.config.route.v3.RouteConfiguration";

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Protocol {
    Delta,
    Sotw,
}

impl Protocol {
    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::Delta => "delta streams",
            Self::Sotw => "SotW streams",
        }
    }
}

/// The first request of a type.
#[derive(Debug, Clone, Default)]
pub(crate) struct Ask {
    pub(crate) url: &'static str,
    pub(crate) names: Vec<String>,
    /// Versions by name that the client says it holds; delta only.
    pub(crate) held: HashMap<String, String>,
}

impl Ask {
    pub(crate) fn new(url: &'static str, names: &[&str]) -> Self {
        Self { url, names: names.iter().map(|name| (*name).to_owned()).collect(), held: HashMap::new() }
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Behaviour {
    Healthy,
    /// Reads nothing after it was opened.
    StopsReading,
    /// Reads a byte a second after it was opened.
    ByteASecond,
    NeverAcknowledges,
    /// Is gone as soon as it is opened, and comes back 10 ms later.
    Reconnects,
}

/// What a client does.
#[derive(Debug, Clone)]
pub(crate) struct Plan {
    protocol: Protocol,
    behaviour: Behaviour,
    opening: Vec<u8>,
    /// Names of each type as SotW repeats them in each ACK.
    names: Arc<HashMap<&'static str, Vec<u8>>>,
    /// Responses after which it counts as opened.
    answers: usize,
    /// Only responses of this type count.
    opened_by: Option<&'static str>,
}

impl Plan {
    /// A client that asks for `asks` when it connects and is open after so many answers.
    pub(crate) fn new(protocol: Protocol, node: &str, asks: &[Ask], answers: usize) -> Self {
        let path = match protocol {
            Protocol::Delta => "DeltaAggregatedResources",
            Protocol::Sotw => "StreamAggregatedResources",
        };
        let mut opening = preface(path);
        let mut node = Some(Node { id: node.to_owned(), user_agent_name: "envoy".into(), ..Node::default() });
        for ask in asks {
            let request = match protocol {
                Protocol::Delta => DeltaDiscoveryRequest {
                    node: node.take(),
                    type_url: ask.url.to_owned(),
                    resource_names_subscribe: ask.names.clone(),
                    initial_resource_versions: ask.held.clone(),
                    ..DeltaDiscoveryRequest::default()
                }
                .encode_to_vec(),
                Protocol::Sotw => DiscoveryRequest {
                    node: node.take(),
                    type_url: ask.url.to_owned(),
                    resource_names: ask.names.clone(),
                    ..DiscoveryRequest::default()
                }
                .encode_to_vec(),
            };
            put_message(&mut opening, &request);
        }
        let mut names = HashMap::new();
        if protocol == Protocol::Sotw {
            for ask in asks {
                let fields: &mut Vec<u8> = names.entry(ask.url).or_default();
                ask.names.iter().for_each(|name| put_field(fields, 3, name.as_bytes()));
            }
        }
        Self {
            protocol,
            behaviour: Behaviour::Healthy,
            opening,
            names: Arc::new(names),
            answers,
            opened_by: None,
        }
    }

    /// Only responses of this type count for it to be open.
    pub(crate) fn opened_by(mut self, url: &'static str) -> Self {
        self.opened_by = Some(url);
        self
    }

    pub(crate) fn behaves(mut self, behaviour: Behaviour) -> Self {
        self.behaviour = behaviour;
        self
    }
}

/// Clients that are connected until this is dropped.
pub(crate) struct Fleet {
    shared: Arc<Shared>,
    clients: usize,
    started: Instant,
    stop: Option<oneshot::Sender<()>>,
    thread: Option<JoinHandle<()>>,
}

#[derive(Default)]
struct Shared {
    state: Mutex<State>,
    changed: Condvar,
}

#[derive(Default)]
struct State {
    opened: usize,
    arrivals: Vec<Instant>,
    target: usize,
    totals: Totals,
    /// What each client holds of its endpoints, as a hash of the last response, and since when.
    latest: Vec<Option<(u64, Instant)>>,
    /// Responses to the first client, as they came.
    captured: Vec<Vec<u8>>,
    /// Clients whose SYN is on its way.
    called: Count,
    /// Clients that have had a response.
    answered: Count,
}

/// How many did something, and when the last did.
#[derive(Debug, Clone, Copy, Default)]
struct Count {
    clients: usize,
    last: Option<Instant>,
}

impl Count {
    fn add(&mut self, now: Instant) {
        self.clients += 1;
        self.last = Some(now);
    }
}

/// What has come in so far.
#[derive(Debug, Clone, Copy, Default)]
pub(crate) struct Totals {
    pub(crate) responses: u64,
    /// Of resources in them.
    pub(crate) resource_bytes: u64,
    /// Streams that ended before they were to.
    pub(crate) ended: u64,
}

/// Responses that are kept of the first client: a large catalog comes in many.
const CAPTURED: usize = 256;

impl Shared {
    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().expect("no client panics")
    }
}

impl Fleet {
    /// Connects all at once.
    pub(crate) fn start(address: SocketAddr, plans: Vec<Plan>) -> Self {
        let shared = Arc::new(Shared::default());
        let clients = plans.len();
        shared.state().latest = vec![None; clients];
        let (stop, stopped) = oneshot::channel();
        let started = Instant::now();
        let inside = Arc::clone(&shared);
        let thread = std::thread::spawn(move || {
            let runtime =
                tokio::runtime::Builder::new_current_thread().enable_all().build().expect("a runtime");
            let local = tokio::task::LocalSet::new();
            for (n, plan) in plans.into_iter().enumerate() {
                local.spawn_local(client(n, address, plan, Arc::clone(&inside)));
            }
            let _ = local.block_on(&runtime, stopped);
        });
        Self { shared, clients, started, stop: Some(stop), thread: Some(thread) }
    }

    /// Waits until every client is open; since the start.
    pub(crate) fn opened(&self) -> Duration {
        self.wait("the streams did not open", |state| state.opened >= self.clients);
        self.started.elapsed()
    }

    /// When the last client sent its SYN, and when the last had its first response; since the start.
    pub(crate) fn called_and_answered(&self) -> (Duration, Duration) {
        let state = self.shared.state();
        let [called, answered] = [state.called, state.answered].map(|count| {
            assert_eq!(count.clients, self.clients, "all have called and were answered");
            count.last.map_or(Duration::ZERO, |last| last.duration_since(self.started))
        });
        (called, answered)
    }

    /// Waits until nothing has come for `quiet`.
    pub(crate) fn settled(&self, quiet: Duration) {
        let end = Instant::now() + PATIENCE;
        let mut responses = 0;
        while responses != self.totals().responses {
            assert!(Instant::now() < end, "responses go on and on");
            responses = self.totals().responses;
            std::thread::sleep(quiet);
        }
    }

    /// From now on arrivals are counted anew, for [`Fleet::arrived`].
    pub(crate) fn expect(&self, responses: usize) {
        let mut state = self.shared.state();
        state.arrivals.clear();
        state.target = responses;
    }

    /// Waits for as many responses with endpoints as were expected; when each came.
    pub(crate) fn arrived(&self) -> Vec<Instant> {
        self.wait("a change did not reach every stream", |state| state.arrivals.len() >= state.target);
        std::mem::take(&mut self.shared.state().arrivals)
    }

    /// Waits until all clients hold the same endpoints and nothing has come for `quiet`; when the last came.
    pub(crate) fn converged(&self, quiet: Duration) -> Instant {
        let end = Instant::now() + PATIENCE;
        loop {
            std::thread::sleep(Duration::from_millis(10));
            let state = self.shared.state();
            let last = state.latest.iter().flatten().map(|(_, at)| *at).max().expect("endpoints came");
            let mut held = state.latest.iter().map(|latest| latest.map(|(hash, _)| hash));
            let first = held.next().expect("there are clients");
            let same = first.is_some() && held.all(|hash| hash == first);
            if last.elapsed() > quiet {
                assert!(same, "the streams did not converge");
                return last;
            }
            assert!(Instant::now() < end, "the streams did not come to rest");
        }
    }

    pub(crate) fn totals(&self) -> Totals {
        self.shared.state().totals
    }

    /// The first responses to the first client.
    pub(crate) fn captured(&self) -> Vec<Vec<u8>> {
        self.shared.state().captured.clone()
    }

    fn wait(&self, what: &str, mut done: impl FnMut(&State) -> bool) {
        let (state, timeout) = self
            .shared
            .changed
            .wait_timeout_while(self.shared.state(), PATIENCE, |state| !done(state))
            .expect("no client panics");
        let (opened, arrived, totals) = (state.opened, state.arrivals.len(), state.totals);
        assert!(!timeout.timed_out(), "{what}: {opened} open, {arrived} arrived, {totals:?}");
    }
}

/// How long anything may take.
pub(crate) const PATIENCE: Duration = Duration::from_secs(30);

impl Drop for Fleet {
    fn drop(&mut self) {
        drop(self.stop.take());
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

async fn client(n: usize, address: SocketAddr, plan: Plan, shared: Arc<Shared>) {
    loop {
        let mut client = Client {
            n,
            plan: &plan,
            shared: &shared,
            answers: 0,
            opened: false,
            heard: false,
            input: Vec::new(),
        };
        let result = client.run(address).await;
        if plan.behaviour == Behaviour::Reconnects && result.is_ok() {
            tokio::time::sleep(Duration::from_millis(10)).await;
            continue;
        }
        shared.state().totals.ended += 1;
        return;
    }
}

struct Client<'a> {
    n: usize,
    plan: &'a Plan,
    shared: &'a Shared,
    answers: usize,
    opened: bool,
    /// It has had a response.
    heard: bool,
    /// What has come and is not whole yet: an HTTP/2 frame, then the message.
    input: Vec<u8>,
}

thread_local! {
    static SCRATCH: RefCell<Vec<u8>> = RefCell::new(vec![0; 256 << 10]);
}

impl Client<'_> {
    /// Until the connection ends, or the client leaves (Ok).
    async fn run(&mut self, address: SocketAddr) -> io::Result<()> {
        let socket = TcpSocket::new_v4()?;
        if matches!(self.plan.behaviour, Behaviour::StopsReading | Behaviour::ByteASecond) {
            socket.set_recv_buffer_size(4096)?;
        }
        let mut connecting = pin!(socket.connect(address));
        let called = futures_util::poll!(&mut connecting);
        self.shared.state().called.add(Instant::now());
        let mut tcp = match called {
            Poll::Ready(tcp) => tcp?,
            Poll::Pending => connecting.await?,
        };
        tcp.set_nodelay(true)?;
        tcp.write_all(&self.plan.opening).await?;
        let mut message = Vec::new();
        let mut out = Vec::new();
        loop {
            let opened = self.opened;
            let mut room = usize::MAX;
            match self.plan.behaviour {
                Behaviour::Reconnects if opened => return Ok(()),
                Behaviour::StopsReading if opened => std::future::pending().await,
                Behaviour::ByteASecond if opened => {
                    tokio::time::sleep(Duration::from_secs(1)).await;
                    room = 1;
                }
                _ => {}
            }
            let read = poll_fn(|context| {
                SCRATCH.with_borrow_mut(|scratch| {
                    let room = room.min(scratch.len());
                    let mut buffer = ReadBuf::new(&mut scratch[..room]);
                    ready!(Pin::new(&mut tcp).poll_read(context, &mut buffer))?;
                    self.take(buffer.filled(), &mut message, &mut out);
                    Poll::Ready(io::Result::Ok(buffer.filled().len()))
                })
            });
            if read.await? == 0 {
                return Err(io::ErrorKind::UnexpectedEof.into());
            }
            if !out.is_empty() {
                tcp.write_all(&out).await?;
                out.clear();
            }
        }
    }

    /// Takes in what has come; what is to be answered goes to `out`.
    fn take(&mut self, bytes: &[u8], message: &mut Vec<u8>, out: &mut Vec<u8>) {
        let mut left = std::mem::take(&mut self.input);
        let mut rest = bytes;
        if !left.is_empty() {
            left.extend_from_slice(bytes);
            rest = &left;
        }
        while let Some((head, body)) = rest.split_first_chunk::<9>() {
            let len = usize::from(head[0]) << 16 | usize::from(head[1]) << 8 | usize::from(head[2]);
            if body.len() < len {
                break;
            }
            let (payload, next) = body.split_at(len);
            rest = next;
            let (kind, flags) = (head[3], head[4]);
            match kind {
                DATA => self.take_data(payload, message, out),
                SETTINGS if flags & ACK == 0 => put_frame(out, SETTINGS, ACK, 0, &[]),
                PING if flags & ACK == 0 => put_frame(out, PING, ACK, 0, payload),
                RST_STREAM | GOAWAY => self.shared.state().totals.ended += 1,
                _ => {}
            }
        }
        self.input = rest.to_vec();
    }

    fn take_data(&mut self, data: &[u8], message: &mut Vec<u8>, out: &mut Vec<u8>) {
        let mut rest = data;
        if !message.is_empty() {
            message.extend_from_slice(data);
            rest = message;
        }
        while let Some((head, body)) = rest.split_first_chunk::<5>() {
            let len = u32::from_be_bytes([head[1], head[2], head[3], head[4]]) as usize;
            if body.len() < len {
                break;
            }
            let (response, next) = body.split_at(len);
            rest = next;
            self.hear(response, out);
        }
        *message = rest.to_vec();
    }

    fn hear(&mut self, response: &[u8], out: &mut Vec<u8>) {
        let now = Instant::now();
        let (mut version, mut url, mut nonce) = (&[][..], &[][..], &[][..]);
        let (mut resource_bytes, mut hash) = (0, 0);
        let mut rest = response;
        while let Some((tag, value)) = field(&mut rest) {
            match tag {
                1 => version = value,
                2 => {
                    resource_bytes += value.len() as u64;
                    hash ^= xxh3_64(value);
                }
                4 => url = value,
                5 => nonce = value,
                _ => {}
            }
        }
        self.answers += usize::from(self.plan.opened_by.is_none_or(|opened_by| url == opened_by.as_bytes()));
        let opened = !self.opened && self.answers >= self.plan.answers;
        self.opened |= opened;
        let mut state = self.shared.state();
        state.totals.responses += 1;
        state.totals.resource_bytes += resource_bytes;
        if !self.heard {
            self.heard = true;
            state.answered.add(now);
        }
        state.opened += usize::from(opened);
        if url == ENDPOINTS.as_bytes() || url == LB_ENDPOINT.as_bytes() {
            state.latest[self.n] = Some((hash, now));
            state.arrivals.push(now);
        }
        if self.n == 0 && state.captured.len() < CAPTURED {
            state.captured.push(response.to_vec());
        }
        if opened || state.arrivals.len() == state.target {
            self.shared.changed.notify_all();
        }
        drop(state);
        if self.plan.behaviour == Behaviour::NeverAcknowledges {
            return;
        }
        let mut ack = Vec::with_capacity(128);
        match self.plan.protocol {
            Protocol::Delta => {
                put_field(&mut ack, 2, url);
                put_field(&mut ack, 6, nonce);
            }
            Protocol::Sotw => {
                put_field(&mut ack, 1, version);
                let names = std::str::from_utf8(url).ok().and_then(|url| self.plan.names.get(url));
                ack.extend_from_slice(names.map_or(&[], Vec::as_slice));
                put_field(&mut ack, 4, url);
                put_field(&mut ack, 5, nonce);
            }
        }
        put_message(out, &ack);
    }
}

const DATA: u8 = 0;
const HEADERS: u8 = 1;
const RST_STREAM: u8 = 3;
const SETTINGS: u8 = 4;
const PING: u8 = 6;
const GOAWAY: u8 = 7;
const WINDOW_UPDATE: u8 = 8;
const ACK: u8 = 1;
const END_HEADERS: u8 = 4;
/// The largest frame that a server takes without having said so.
const FRAME: usize = 16 << 10;

fn put_frame(out: &mut Vec<u8>, kind: u8, flags: u8, stream: u32, payload: &[u8]) {
    let len = u32::try_from(payload.len()).expect("small").to_be_bytes();
    out.extend_from_slice(&len[1..]);
    out.extend_from_slice(&[kind, flags]);
    out.extend_from_slice(&stream.to_be_bytes());
    out.extend_from_slice(payload);
}

/// What opens the connection and the stream, with windows that need no updates.
fn preface(method: &str) -> Vec<u8> {
    const LARGEST: u32 = i32::MAX as u32;
    let mut out = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n".to_vec();
    let initial_window = [&[0, 4], &LARGEST.to_be_bytes()[..]].concat();
    put_frame(&mut out, SETTINGS, 0, 0, &initial_window);
    put_frame(&mut out, WINDOW_UPDATE, 0, 0, &(LARGEST - 65_535).to_be_bytes());
    // HPACK: indexed fields, and literals that are not to be indexed.
    let mut headers = vec![0x83, 0x86];
    let path = format!("/envoy.service.discovery.v3.AggregatedDiscoveryService/{method}");
    for (name, value) in [
        (&[0x04][..], path.as_str()),
        (&[0x01], "disco"),
        (&[0x0f, 0x10], "application/grpc"),
        (b"\0\x02te", "trailers"),
    ] {
        headers.extend_from_slice(name);
        headers.push(u8::try_from(value.len()).expect("short"));
        headers.extend_from_slice(value.as_bytes());
    }
    put_frame(&mut out, HEADERS, END_HEADERS, 1, &headers);
    out
}

fn put_message(out: &mut Vec<u8>, message: &[u8]) {
    let len = u32::try_from(message.len()).expect("small").to_be_bytes();
    let framed = [&[0], &len[..], message].concat();
    framed.chunks(FRAME).for_each(|chunk| put_frame(out, DATA, 0, 1, chunk));
}

fn put_field(out: &mut Vec<u8>, tag: u32, value: &[u8]) {
    encode_key(tag, WireType::LengthDelimited, out);
    encode_varint(value.len() as u64, out);
    out.extend_from_slice(value);
}

/// The next field of a message that has only fields with a length.
pub(crate) fn field<'a>(rest: &mut &'a [u8]) -> Option<(u32, &'a [u8])> {
    if rest.is_empty() {
        return None;
    }
    let (tag, kind) = decode_key(rest).expect("a field");
    assert_eq!(kind, WireType::LengthDelimited, "field {tag}");
    let len = usize::try_from(decode_varint(rest).expect("a length")).expect("a length");
    let (value, next) = rest.split_at(len);
    *rest = next;
    Some((tag, value))
}
