use std::{
    future::Future as _,
    io,
    pin::Pin,
    task::{Context, Poll},
    time::Duration,
};

use tokio::{
    io::{AsyncRead, AsyncWrite, ReadBuf},
    net::TcpStream,
    sync::watch,
    time::Sleep,
};

/// What became of a connection.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Fate {
    /// It is there.
    Open,
    /// The other end closed or reset it, as its kernel does for a process that ended.
    HungUp,
    /// This end gave it up, because the other fell silent, say: who is behind it may be alive. Above the socket this looks the
    /// same as a hang-up.
    GivenUp,
}

/// Tells what became of a connection. Cheap to clone.
#[derive(Debug, Clone)]
pub struct Hangup(watch::Receiver<Fate>);

impl Hangup {
    /// What became of it, if that is known within `limit`.
    pub async fn fate(&mut self, limit: Duration) -> Fate {
        let known = tokio::time::timeout(limit, self.0.wait_for(|fate| *fate != Fate::Open)).await;
        match known {
            Ok(Ok(fate)) => *fate,
            Ok(Err(_)) => Fate::GivenUp,
            Err(_) => Fate::Open,
        }
    }
}

/// A connection that notes when its other end hangs up, and that fails when the other end does not begin to speak.
#[derive(Debug)]
pub struct Watched {
    stream: TcpStream,
    fate: watch::Sender<Fate>,
    begin: Option<Begin>,
}

/// What the other end has to send before a connection counts as one.
#[derive(Debug)]
struct Begin {
    bytes: usize,
    deadline: Pin<Box<Sleep>>,
}

impl Watched {
    /// Watches an accepted connection, whose other end has to send its first `bytes` within the time.
    pub fn new(stream: TcpStream, bytes: usize, within: Duration) -> Self {
        let begin = Begin { bytes, deadline: Box::pin(tokio::time::sleep(within)) };
        Self { stream, fate: watch::channel(Fate::Open).0, begin: Some(begin) }
    }

    /// The connection itself.
    pub fn stream(&self) -> &TcpStream {
        &self.stream
    }

    /// Tells what becomes of it.
    pub fn hangup(&self) -> Hangup {
        Hangup(self.fate.subscribe())
    }

    fn note(&self, new: Fate) {
        self.fate.send_if_modified(|fate| {
            let first = *fate == Fate::Open;
            if first {
                *fate = new;
            }
            first
        });
    }

    fn note_error<T>(&self, result: Poll<io::Result<T>>) -> Poll<io::Result<T>> {
        use io::ErrorKind::{BrokenPipe, ConnectionAborted, ConnectionReset};
        if let Poll::Ready(Err(error)) = &result
            && matches!(error.kind(), BrokenPipe | ConnectionAborted | ConnectionReset)
        {
            self.note(Fate::HungUp);
        }
        result
    }
}

impl Drop for Watched {
    fn drop(&mut self) {
        self.note(Fate::GivenUp);
    }
}

impl AsyncRead for Watched {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let (before, room) = (buffer.filled().len(), buffer.remaining() > 0);
        let result = Pin::new(&mut self.stream).poll_read(cx, buffer);
        if let Some(begin) = &mut self.begin {
            begin.bytes = begin.bytes.saturating_sub(buffer.filled().len() - before);
            if begin.bytes == 0 {
                self.begin = None;
            } else if result.is_pending() && begin.deadline.as_mut().poll(cx).is_ready() {
                return Poll::Ready(Err(io::ErrorKind::TimedOut.into()));
            }
        }
        if room && matches!(result, Poll::Ready(Ok(()))) && buffer.filled().len() == before {
            self.note(Fate::HungUp);
        }
        self.note_error(result)
    }
}

impl AsyncWrite for Watched {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        let result = Pin::new(&mut self.stream).poll_write(cx, bytes);
        self.note_error(result)
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        slices: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        let result = Pin::new(&mut self.stream).poll_write_vectored(cx, slices);
        self.note_error(result)
    }

    fn is_write_vectored(&self) -> bool {
        self.stream.is_write_vectored()
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_shutdown(cx)
    }
}

#[cfg(test)]
mod tests {
    use tokio::{
        io::{AsyncReadExt as _, AsyncWriteExt as _},
        net::TcpListener,
    };

    use super::*;

    async fn pair() -> (TcpStream, Watched) {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let client = TcpStream::connect(listener.local_addr().unwrap()).await.unwrap();
        (client, Watched::new(listener.accept().await.unwrap().0, 1, Duration::from_secs(60)))
    }

    #[tokio::test]
    async fn who_closes_a_connection_is_told_apart() {
        let (mut client, mut watched) = pair().await;
        let mut hangup = watched.hangup();
        let mut buffer = [0; 5];
        client.write_all(b"hello").await.unwrap();
        watched.read_exact(&mut buffer).await.unwrap();
        assert_eq!(hangup.fate(Duration::ZERO).await, Fate::Open);
        drop(client);
        assert_eq!(watched.read(&mut buffer).await.unwrap(), 0);
        drop(watched);
        assert_eq!(hangup.fate(Duration::ZERO).await, Fate::HungUp);

        let (_client, watched) = pair().await;
        let mut hangup = watched.hangup();
        drop(watched);
        assert_eq!(hangup.fate(Duration::ZERO).await, Fate::GivenUp);
    }
}
