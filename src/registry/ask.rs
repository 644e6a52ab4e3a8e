use std::{fmt, io::ErrorKind, net::SocketAddr, time::Duration};

use futures_util::future::BoxFuture;
use tokio::{net::TcpStream, time::timeout};

use crate::model::format_duration;

/// What an instance says to a connection.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Answer {
    /// Its machine says that nobody listens there: evidence that it is gone.
    Refused,
    /// Another instance has its address by now: evidence that it is gone, as two processes cannot hold one port.
    Taken,
    /// Somebody listens there: what nobody vouches for any more lives. The kernel also answers for a
    /// process that is frozen.
    Accepts,
    /// Nothing came back, for this reason. A machine that died looks so, and a network that is cut.
    Silent(String),
}

impl Answer {
    /// Whether it proves that the instance is gone.
    pub(super) fn is_end(&self) -> bool {
        matches!(self, Self::Refused | Self::Taken)
    }
}

impl fmt::Display for Answer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Refused => f.write_str("it refuses connections"),
            Self::Taken => f.write_str("another instance has its address"),
            Self::Accepts => f.write_str("it still accepts connections"),
            Self::Silent(said) => f.write_str(said),
        }
    }
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
        Ok(Ok(_)) => Answer::Accepts,
        Ok(Err(error)) if error.kind() == ErrorKind::ConnectionRefused => Answer::Refused,
        Ok(Err(error)) => Answer::Silent(format!("it cannot be asked: {error}")),
        Err(_) => Answer::Silent(format!("it did not answer within {}", format_duration(within))),
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
        assert_eq!(ask(address, second).await, Answer::Accepts);
        drop(listener);
        assert_eq!(ask(address, second).await, Answer::Refused);
        let (silent, ..) = &silence().await;
        let answer = ask(*silent, Duration::from_millis(50)).await;
        assert_eq!(answer, Answer::Silent("it did not answer within 50ms".to_owned()));
    }
}
