use std::{fmt, io::ErrorKind, net::SocketAddr, time::Duration};

use futures_util::future::BoxFuture;
use tokio::{net::TcpStream, time::timeout};

use crate::model::format_duration;

/// What an instance says to a connection.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Answer {
    /// Its machine says that nobody listens there: evidence that it is gone.
    Refused,
    /// Anything else; it may be alive.
    Unsure(String),
}

/// How instances are asked.
pub(super) trait Ask: Send + Sync + fmt::Debug {
    /// Asks the one at `address`.
    fn ask(&self, address: SocketAddr, within: Duration) -> BoxFuture<'_, Answer>;
}

/// By a connection.
#[derive(Debug)]
pub(super) struct Tcp;

impl Ask for Tcp {
    fn ask(&self, address: SocketAddr, within: Duration) -> BoxFuture<'_, Answer> {
        Box::pin(ask(address, within))
    }
}

/// Opens one connection and closes it.
async fn ask(address: SocketAddr, within: Duration) -> Answer {
    match timeout(within, TcpStream::connect(address)).await {
        // Where nobody listens, a port of this machine that is also a free one can meet itself.
        Ok(Ok(stream)) if stream.local_addr().is_ok_and(|own| own == address) => Answer::Refused,
        Ok(Ok(_)) => Answer::Unsure("it still accepts connections".to_owned()),
        Ok(Err(error)) if error.kind() == ErrorKind::ConnectionRefused => Answer::Refused,
        Ok(Err(error)) => Answer::Unsure(format!("it cannot be asked: {error}")),
        Err(_) => Answer::Unsure(format!("it did not answer within {}", format_duration(within))),
    }
}

#[cfg(test)]
pub(super) mod tests {
    use tokio::net::{TcpListener, TcpSocket};

    use super::*;

    /// An address where connections get no answer while what comes with it is kept.
    pub(in crate::registry) async fn silence() -> (SocketAddr, TcpListener, Vec<TcpStream>) {
        let socket = TcpSocket::new_v4().unwrap();
        socket.bind(([127, 0, 0, 1], 0).into()).unwrap();
        let listener = socket.listen(0).unwrap();
        let address = listener.local_addr().unwrap();
        let mut waiting = Vec::new();
        // Nobody accepts, and once its queue is full the kernel drops what else comes.
        while let Ok(stream) = timeout(Duration::from_millis(100), TcpStream::connect(address)).await {
            waiting.push(stream.unwrap());
        }
        (address, listener, waiting)
    }

    #[tokio::test]
    async fn answers() {
        let second = Duration::from_secs(1);
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        assert_eq!(ask(address, second).await, Answer::Unsure("it still accepts connections".to_owned()));
        drop(listener);
        assert_eq!(ask(address, second).await, Answer::Refused);
        let (silent, ..) = &silence().await;
        let answer = ask(*silent, Duration::from_millis(50)).await;
        assert_eq!(answer, Answer::Unsure("it did not answer within 50ms".to_owned()));
    }
}
