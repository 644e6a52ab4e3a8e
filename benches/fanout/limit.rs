//! The limit: a bare tonic server that hands the same ready bytes to all its streams. It knows no resources, no
//! subscriptions and no acknowledgements; what comes in is read and dropped.

use std::{
    convert::Infallible,
    future::{Ready, ready},
    io::{Read as _, Write as _},
    net::{SocketAddr, TcpListener as StdTcpListener},
    pin::Pin,
    sync::{Arc, Mutex},
    task::{Context, Poll},
};

use bytes::{Buf as _, BufMut as _, Bytes};
use futures_util::{Stream, StreamExt as _, future::BoxFuture};
use tokio::{net::TcpSocket, sync::watch};
use tokio_stream::wrappers::{TcpListenerStream, WatchStream};
use tonic::{
    Request, Response, Status, Streaming,
    body::Body,
    codec::{BufferSettings, Codec, DecodeBuf, Decoder, EncodeBuf, Encoder},
    server::{Grpc, NamedService, StreamingService},
};

/// Control messages: an operation, how many requests an opening waits for, a length, bytes. Each is answered with a byte.
pub(crate) const OPENING: u8 = 0;
pub(crate) const CHANGE: u8 = 1;

/// What is sent.
#[derive(Debug, Clone)]
struct Shared {
    /// To each stream, when it has sent so many requests.
    opening: Arc<Mutex<(usize, Vec<Bytes>)>>,
    /// To all streams, whenever it changes.
    change: Arc<watch::Sender<Bytes>>,
}

/// Serves until the process is killed; prints the addresses for streams and for control.
pub(crate) fn serve() {
    let shared = Shared { opening: Arc::default(), change: Arc::new(watch::channel(Bytes::new()).0) };
    let runtime = tokio::runtime::Runtime::new().expect("a runtime");
    runtime.block_on(async {
        let socket = TcpSocket::new_v4().expect("a socket");
        socket.bind(SocketAddr::from(([127, 0, 0, 1], 0))).expect("a port");
        let listener = socket.listen(16_384).expect("a listener");
        let control = StdTcpListener::bind("127.0.0.1:0").expect("a port");
        let (streams, steering) =
            (listener.local_addr().expect("bound"), control.local_addr().expect("bound"));
        println!("{streams} {steering}");
        let steered = shared.clone();
        std::thread::spawn(move || steer(&control, &steered));
        let incoming = TcpListenerStream::new(listener).map(|stream| {
            let stream = stream?;
            stream.set_nodelay(true)?;
            std::io::Result::Ok(stream)
        });
        let server = tonic::transport::Server::builder().add_service(Limit(shared));
        server.serve_with_incoming(incoming).await.expect("it serves");
    });
}

fn steer(control: &StdTcpListener, shared: &Shared) {
    let (mut stream, _) = control.accept().expect("the benchmark connects");
    stream.set_nodelay(true).expect("an option");
    let mut head = [0; 6];
    // The benchmark is gone when this ends.
    while stream.read_exact(&mut head).is_ok() {
        let [op, after, len @ ..] = head;
        let mut body = vec![0; u32::from_be_bytes(len) as usize];
        stream.read_exact(&mut body).expect("the rest");
        stream.write_all(&[op]).expect("an answer");
        if op == OPENING {
            let mut opening = shared.opening.lock().expect("no panics");
            opening.0 = usize::from(after);
            opening.1.push(body.into());
        } else {
            shared.change.send_replace(body.into());
        }
    }
    std::process::exit(0);
}

#[derive(Debug, Clone)]
struct Limit(Shared);

impl NamedService for Limit {
    const NAME: &'static str = "envoy.service.discovery.v3.AggregatedDiscoveryService";
}

impl tower::Service<http::Request<Body>> for Limit {
    type Response = http::Response<Body>;
    type Error = Infallible;
    type Future = BoxFuture<'static, Result<Self::Response, Infallible>>;

    fn poll_ready(&mut self, _: &mut Context<'_>) -> Poll<Result<(), Infallible>> {
        Poll::Ready(Ok(()))
    }

    fn call(&mut self, request: http::Request<Body>) -> Self::Future {
        let handler = self.clone();
        Box::pin(async move { Ok(Grpc::new(Raw).streaming(handler, request).await) })
    }
}

impl StreamingService<()> for Limit {
    type Response = Bytes;
    type ResponseStream = Responses;
    type Future = Ready<Result<Response<Responses>, Status>>;

    fn call(&mut self, request: Request<Streaming<()>>) -> Self::Future {
        let changes = WatchStream::from_changes(self.0.change.subscribe());
        let (after, mut opening) = self.0.opening.lock().expect("no panics").clone();
        opening.reverse();
        ready(Ok(Response::new(Responses { requests: request.into_inner(), after, opening, changes })))
    }
}

struct Responses {
    requests: Streaming<()>,
    /// Requests that are waited for.
    after: usize,
    opening: Vec<Bytes>,
    changes: WatchStream<Bytes>,
}

impl Stream for Responses {
    type Item = Result<Bytes, Status>;

    fn poll_next(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Option<Self::Item>> {
        while let Poll::Ready(request) = self.requests.poll_next_unpin(context) {
            match request {
                Some(Ok(())) => self.after = self.after.saturating_sub(1),
                _ => return Poll::Ready(None),
            }
        }
        if self.after == 0
            && let Some(response) = self.opening.pop()
        {
            return Poll::Ready(Some(Ok(response)));
        }
        self.changes.poll_next_unpin(context).map(|change| change.map(Ok))
    }
}

/// Sends bytes as they are, and forgets what comes in.
struct Raw;

impl Codec for Raw {
    type Encode = Bytes;
    type Decode = ();
    type Encoder = Self;
    type Decoder = Self;

    fn encoder(&mut self) -> Self {
        Self
    }

    fn decoder(&mut self) -> Self {
        Self
    }
}

impl Encoder for Raw {
    type Item = Bytes;
    type Error = Status;

    fn encode(&mut self, item: Bytes, buffer: &mut EncodeBuf<'_>) -> Result<(), Status> {
        buffer.put(item);
        Ok(())
    }

    fn buffer_settings(&self) -> BufferSettings {
        // The default takes 8 KiB a stream from the start.
        BufferSettings::new(256, 32 << 10)
    }
}

impl Decoder for Raw {
    type Item = ();
    type Error = Status;

    fn decode(&mut self, buffer: &mut DecodeBuf<'_>) -> Result<Option<()>, Status> {
        buffer.advance(buffer.remaining());
        Ok(Some(()))
    }

    fn buffer_settings(&self) -> BufferSettings {
        BufferSettings::new(256, 32 << 10)
    }
}
