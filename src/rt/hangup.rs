use std::{
    io,
    pin::Pin,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    task::{Context, Poll},
};

use tokio::{
    io::{AsyncRead, AsyncWrite, ReadBuf},
    net::TcpStream,
};

/// Whether the other end of a connection closed or reset it, as its kernel does for a process that ended. A connection that
/// only fell silent was not hung up: who is behind it may be alive. Above the socket the two look the same.
#[derive(Debug, Clone, Default)]
pub struct Hangup(Arc<AtomicBool>);

impl Hangup {
    /// True once the other end is gone.
    pub fn happened(&self) -> bool {
        self.0.load(Ordering::Acquire)
    }

    fn note(&self) {
        self.0.store(true, Ordering::Release);
    }

    fn note_error<T>(&self, result: Poll<io::Result<T>>) -> Poll<io::Result<T>> {
        use io::ErrorKind::{BrokenPipe, ConnectionAborted, ConnectionReset};
        if let Poll::Ready(Err(error)) = &result
            && matches!(error.kind(), BrokenPipe | ConnectionAborted | ConnectionReset)
        {
            self.note();
        }
        result
    }
}

/// A connection that notes when its other end hangs up.
#[derive(Debug)]
pub struct Watched {
    stream: TcpStream,
    hangup: Hangup,
}

impl Watched {
    /// Watches an accepted connection.
    pub fn new(stream: TcpStream) -> Self {
        Self { stream, hangup: Hangup::default() }
    }

    /// The connection itself.
    pub fn stream(&self) -> &TcpStream {
        &self.stream
    }

    /// What is noted of it.
    pub fn hangup(&self) -> Hangup {
        self.hangup.clone()
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
        if room && matches!(result, Poll::Ready(Ok(()))) && buffer.filled().len() == before {
            self.hangup.note();
        }
        self.hangup.note_error(result)
    }
}

impl AsyncWrite for Watched {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        let result = Pin::new(&mut self.stream).poll_write(cx, bytes);
        self.hangup.note_error(result)
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        slices: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        let result = Pin::new(&mut self.stream).poll_write_vectored(cx, slices);
        self.hangup.note_error(result)
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

    #[tokio::test]
    async fn a_closed_connection_is_noted_and_a_silent_one_is_not() {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let mut client = TcpStream::connect(listener.local_addr().unwrap()).await.unwrap();
        let mut watched = Watched::new(listener.accept().await.unwrap().0);
        client.write_all(b"hello").await.unwrap();
        let mut buffer = [0; 5];
        watched.read_exact(&mut buffer).await.unwrap();
        assert!(!watched.hangup().happened());
        drop(client);
        assert_eq!(watched.read(&mut buffer).await.unwrap(), 0);
        assert!(watched.hangup().happened());
    }
}
