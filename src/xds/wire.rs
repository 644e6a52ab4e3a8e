use std::{
    marker::PhantomData,
    mem,
    pin::Pin,
    task::{Context, Poll, ready},
    vec,
};

use bytes::{Buf as _, BufMut as _, Bytes, BytesMut};
use futures_util::Stream;
use http_body::{Body, Frame};
use http_body_util::BodyExt as _;
use tonic::{Code, Status};

use super::{
    Response,
    asked::{Asked, Decode, Malformed},
    server::code,
};

/// Flag and length before each message.
const FRAME: usize = 5;

/// Small parts are copied together up to this size, an HTTP/2 frame's by default.
const CHUNK: usize = 16 << 10;

/// Parts from this size on are sent as they are, from the memory that all streams share.
const LARGE: usize = 4 << 10;

/// The responses of a stream as an HTTP body: tonic's own encoder would copy each response whole, and keep the memory of
/// the largest one for as long as the stream lives.
#[derive(Debug)]
pub(super) struct Responses<S> {
    source: S,
    /// What is left of the response that is being sent.
    parts: Parts,
    ended: bool,
}

#[derive(Debug, Default)]
struct Parts {
    /// What is put together already.
    first: Option<Bytes>,
    next: Option<Bytes>,
    rest: vec::IntoIter<Bytes>,
}

impl<S> Responses<S> {
    pub(super) fn new(source: S) -> Self {
        Self { source, parts: Parts::default(), ended: false }
    }
}

impl Parts {
    fn of(response: Response) -> Result<Self, Status> {
        let len = u32::try_from(response.len())
            .map_err(|_| Status::resource_exhausted("a response is larger than 4 GiB"))?;
        // With room for the small parts that go with it.
        let small = response.body.iter().map(Bytes::len).take_while(|len| *len < LARGE);
        let fits = small.scan(FRAME + response.head.len(), |size, len| {
            *size += len;
            (*size <= CHUNK).then_some(*size)
        });
        let size = fits.last().unwrap_or(FRAME + response.head.len());
        let mut chunk = BytesMut::with_capacity(size);
        chunk.put_u8(0);
        chunk.put_u32(len);
        chunk.put_slice(&response.head);
        let mut rest = response.body.into_iter();
        while chunk.len() < size
            && let Some(part) = rest.next()
        {
            chunk.put_slice(&part);
        }
        Ok(Self { first: Some(chunk.freeze()), next: None, rest })
    }

    /// The next piece to send.
    fn chunk(&mut self) -> Option<Bytes> {
        if let Some(first) = self.first.take() {
            return Some(first);
        }
        let first = self.next.take().or_else(|| self.rest.next())?;
        if first.len() >= LARGE {
            return Some(first);
        }
        self.next = self.rest.next();
        let mut chunk = BytesMut::new();
        while let Some(part) = self.next.take_if(|part| part.len() < LARGE) {
            if chunk.is_empty() {
                let mut size = first.len() + part.len();
                let mut rest = self.rest.as_slice().iter();
                while size < CHUNK
                    && let Some(part) = rest.next()
                {
                    size += part.len();
                }
                chunk.reserve(size.min(CHUNK));
                chunk.put_slice(&first);
            }
            if chunk.len() + part.len() > CHUNK {
                self.next = Some(part);
                break;
            }
            chunk.put_slice(&part);
            self.next = self.rest.next();
        }
        Some(if chunk.is_empty() { first } else { chunk.freeze() })
    }
}

impl<S: Stream<Item = Result<Response, Status>> + Unpin> Body for Responses<S> {
    type Data = Bytes;
    type Error = Status;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, Status>>> {
        loop {
            if let Some(chunk) = self.parts.chunk() {
                return Poll::Ready(Some(Ok(Frame::data(chunk))));
            }
            if self.ended {
                return Poll::Ready(None);
            }
            let status = match ready!(Pin::new(&mut self.source).poll_next(context)) {
                Some(Ok(response)) => match Parts::of(response) {
                    Ok(parts) => {
                        self.parts = parts;
                        continue;
                    }
                    Err(status) => status,
                },
                Some(Err(status)) => status,
                None => Status::new(Code::Ok, ""),
            };
            self.ended = true;
            let mut trailers = http::HeaderMap::new();
            status.add_header(&mut trailers)?;
            return Poll::Ready(Some(Ok(Frame::trailers(trailers))));
        }
    }
}

/// The requests of a stream, off an HTTP body. The memory of a large one is given back once it is decoded; tonic's own
/// decoder would keep it for as long as the stream lives.
#[derive(Debug)]
pub(super) struct Requests<T, B> {
    body: Pin<Box<B>>,
    /// A frame that has a whole message, as mostly they do: it is not copied. Empty while `buffer` is not.
    frame: Bytes,
    /// What came of a message that comes in more than one.
    buffer: BytesMut,
    limit: usize,
    names: usize,
    message: PhantomData<fn() -> T>,
}

/// A body that requests come in.
pub trait Incoming: Body<Error: Into<Box<dyn std::error::Error + Send + Sync>>> + Send + 'static {}

impl<B> Incoming for B where B: Body<Error: Into<Box<dyn std::error::Error + Send + Sync>>> + Send + 'static {}

impl<T: Decode, B: Incoming> Requests<T, B> {
    /// Accepts messages of up to `limit` bytes that subscribe to up to so many `names`.
    pub(super) fn new(body: B, limit: usize, names: usize) -> Self {
        let (frame, buffer) = (Bytes::new(), BytesMut::new());
        Self { body: Box::pin(body), frame, buffer, limit, names, message: PhantomData }
    }

    /// The next request, `None` when the client is done. Cancel-safe.
    pub(super) async fn next(&mut self) -> Result<Option<Asked<T>>, Status> {
        if self.fill().await? { self.decode() } else { Ok(None) }
    }

    /// Waits until a request is there, which is not decoded yet. False when the client is done. Cancel-safe.
    pub(super) async fn fill(&mut self) -> Result<bool, Status> {
        loop {
            if self.complete()?.is_some() {
                return Ok(true);
            }
            // What may take long to be whole does not hold the connection's memory.
            self.buffer.put(mem::take(&mut self.frame));
            match self.body.frame().await {
                Some(Ok(frame)) => match frame.into_data() {
                    Ok(mut data) if self.buffer.is_empty() => {
                        self.frame = data.copy_to_bytes(data.remaining())
                    }
                    Ok(data) => self.buffer.put(data),
                    Err(_) => {}
                },
                Some(Err(error)) => return Err(Status::from_error(error.into())),
                None if self.buffer.is_empty() => return Ok(false),
                None => return Err(Status::invalid_argument("the stream ended within a message")),
            }
        }
    }

    /// The length of the message that is there, if it is all there.
    fn complete(&self) -> Result<Option<usize>, Status> {
        let there: &[u8] = if self.buffer.is_empty() { &self.frame } else { &self.buffer };
        let Some([compressed, len @ ..]) = there.first_chunk::<FRAME>().copied() else {
            return Ok(None);
        };
        if compressed != 0 {
            return Err(Status::unimplemented("requests must not be compressed"));
        }
        let len = usize::try_from(u32::from_be_bytes(len)).unwrap_or(usize::MAX);
        if len > self.limit {
            let limit = self.limit;
            return Err(Status::resource_exhausted(format!(
                "a request has {len} bytes; at most {limit} are allowed (request_bytes)"
            )));
        }
        Ok((there.len() - FRAME >= len).then_some(len))
    }

    fn decode(&mut self) -> Result<Option<Asked<T>>, Status> {
        let Some(len) = self.complete()? else { return Ok(None) };
        let message = if self.buffer.is_empty() {
            self.frame.advance(FRAME);
            self.frame.split_to(len)
        } else {
            self.buffer.advance(FRAME);
            self.buffer.split_to(len).freeze()
        };
        if self.frame.is_empty() && self.buffer.is_empty() {
            (self.frame, self.buffer) = (Bytes::new(), BytesMut::new());
        }
        let message = Decode::decode(message, self.names);
        message.map(Some).map_err(|error| match error {
            Malformed::ManyNames(error) => Status::new(code(error.code()), error.to_string()),
            error => Status::invalid_argument(format!("not a discovery request: {error}")),
        })
    }
}

#[cfg(test)]
mod tests {
    use envoy_types::pb::envoy::service::discovery::v3::{DeltaDiscoveryRequest, DiscoveryResponse};
    use http_body_util::{Full, StreamBody};
    use prost::Message as _;

    use super::*;
    use crate::{
        model::Revision,
        xds::testing::{CDS, delta, resource},
    };

    fn framed(message: &[u8]) -> Vec<u8> {
        let mut bytes = vec![0];
        bytes.put_u32(u32::try_from(message.len()).unwrap());
        bytes.put_slice(message);
        bytes
    }

    async fn chunks(sizes: &[usize]) -> (Vec<usize>, DiscoveryResponse) {
        let body: Vec<Bytes> =
            sizes.iter().map(|&size| resource(CDS, "a", &"x".repeat(size)).sotw_field()).collect();
        let head = Bytes::from_static(b"\x0a\x01v");
        let response = Response {
            kind: Some(CDS),
            nonce: 1,
            revision: Revision(1),
            resources: sizes.len(),
            removed: 0,
            head,
            body,
        };
        let mut responses = Responses::new(tokio_stream::iter([Ok(response)]));
        let mut lens = Vec::new();
        let mut bytes = Vec::new();
        while let Some(frame) = responses.frame().await {
            match frame.unwrap().into_data() {
                Ok(data) => {
                    lens.push(data.len());
                    bytes.extend_from_slice(&data);
                }
                Err(frame) => {
                    let trailers = frame.into_trailers().unwrap();
                    assert_eq!(trailers["grpc-status"], "0");
                }
            }
        }
        let len = u32::from_be_bytes([bytes[1], bytes[2], bytes[3], bytes[4]]);
        assert_eq!((bytes[0], len as usize), (0, bytes.len() - FRAME));
        (lens, DiscoveryResponse::decode(&bytes[FRAME..]).unwrap())
    }

    #[tokio::test]
    async fn small_parts_go_together_and_large_ones_by_themselves() {
        for (sizes, frames) in [
            (vec![], 1),
            (vec![100], 1),
            (vec![100; 50], 1),
            (vec![1000; 50], 4),
            (vec![100, 100_000, 100, 100], 3),
            (vec![100_000], 2),
        ] {
            let (lens, response) = chunks(&sizes).await;
            assert_eq!(lens.len(), frames, "{sizes:?}: {lens:?}");
            assert_eq!((response.version_info.as_str(), response.resources.len()), ("v", sizes.len()));
        }
    }

    #[tokio::test]
    async fn requests_come_in_pieces_of_any_size() {
        let request = delta(CDS, &["a", "b"], &[]);
        let two = [framed(&request.encode_to_vec()), framed(&request.encode_to_vec())].concat();
        for size in [1, 3, 7, two.len()] {
            let pieces: Vec<_> = two
                .chunks(size)
                .map(|piece| Ok::<_, Status>(Frame::data(Bytes::copy_from_slice(piece))))
                .collect();
            let body = StreamBody::new(tokio_stream::iter(pieces));
            let mut requests = Requests::<DeltaDiscoveryRequest, _>::new(body, 1000, 100);
            for want in [Some(&request), Some(&request), None] {
                let asked = requests.next().await.unwrap().map(|asked| asked.message);
                assert_eq!(asked.as_ref(), want);
            }
        }
    }

    #[tokio::test]
    async fn bad_requests_are_errors_that_say_what_is_wrong() {
        let long = framed(&[0; 2000]);
        let many = delta(CDS, &["a", "b", "c"], &[]).encode_to_vec();
        for (bytes, code, word) in [
            (vec![1, 0, 0, 0, 0], Code::Unimplemented, "compressed"),
            (long, Code::ResourceExhausted, "request_bytes"),
            (vec![0, 255, 255, 255, 255], Code::ResourceExhausted, "request_bytes"),
            (framed(&[255; 10]), Code::InvalidArgument, "discovery request"),
            (vec![0, 0], Code::InvalidArgument, "ended"),
            (framed(&many), Code::ResourceExhausted, "names_per_stream"),
        ] {
            let mut requests =
                Requests::<DeltaDiscoveryRequest, _>::new(Full::new(Bytes::from(bytes)), 1000, 2);
            let error = requests.next().await.unwrap_err();
            assert_eq!(error.code(), code, "{error}");
            assert!(error.message().contains(word), "{error}");
        }
    }
}
