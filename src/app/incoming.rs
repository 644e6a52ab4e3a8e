use std::{
    collections::VecDeque,
    fs,
    future::poll_fn,
    io,
    net::SocketAddr,
    task::{Context, Poll},
    time::Duration,
};

use tokio::{
    net::{TcpListener, TcpSocket, TcpStream},
    task::coop,
};

/// Connections that may wait to be accepted. After a restart every proxy connects in the same second; those that find the
/// queue full would wait for SYN retransmissions, for seconds.
const BACKLOG: u32 = 16_384;

/// The longest queue that the system gives one socket.
const LONGEST_QUEUE: &str = "/proc/sys/net/core/somaxconn";

/// Where the system allows only short queues, not more sockets than this make up for it.
const SOCKETS: u32 = 16;

/// After a failed accept, most likely for want of descriptors: time for some to become free.
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);

/// Connections in the order in which they come.
///
/// The system's queue is 4,096 long by default, whatever a server asks for, and serving a connection costs many times what
/// accepting it does. So several sockets listen on the port, each with a queue, and whenever there is time to accept, all
/// that have come are accepted and wait here.
#[derive(Debug)]
pub(super) struct Incoming {
    sockets: Vec<TcpListener>,
    /// About [`BACKLOG`] at most.
    waiting: VecDeque<TcpStream>,
}

impl Incoming {
    /// Listens. Fails if anything else listens there already.
    pub(super) fn bind(address: SocketAddr) -> io::Result<Self> {
        let queue = fs::read_to_string(LONGEST_QUEUE).ok().and_then(|text| text.trim().parse().ok());
        let count = BACKLOG.div_ceil(queue.unwrap_or(BACKLOG).max(1)).clamp(1, SOCKETS);
        let open = || {
            let socket = if address.is_ipv4() { TcpSocket::new_v4()? } else { TcpSocket::new_v6()? };
            socket.set_reuseaddr(true)?;
            io::Result::Ok(socket)
        };
        let first = open()?;
        // Only then shared: shared from the start it could be bound beside another server's.
        first.bind(address)?;
        let address = first.local_addr()?;
        first.set_reuseport(count > 1)?;
        let mut sockets = vec![first];
        for _ in 1..count {
            let socket = open()?;
            socket.set_reuseport(true)?;
            socket.bind(address)?;
            sockets.push(socket);
        }
        let sockets = sockets.into_iter().map(|socket| socket.listen(BACKLOG)).collect::<Result<_, _>>()?;
        Ok(Self { sockets, waiting: VecDeque::new() })
    }

    /// Where it listens.
    pub(super) fn address(&self) -> Option<SocketAddr> {
        self.sockets.first()?.local_addr().ok()
    }

    /// The next connection. A failed accept (out of descriptors, a peer that left) is no end: the next one may do.
    pub(super) async fn next(&mut self) -> TcpStream {
        // In a storm there is always a next one, and those that are served want their turn.
        coop::consume_budget().await;
        loop {
            match coop::unconstrained(poll_fn(|context| self.poll(context))).await {
                Ok(stream) => return stream,
                Err(error) => {
                    tracing::warn!(%error, "a connection could not be accepted");
                    tokio::time::sleep(ACCEPT_PAUSE).await;
                }
            }
        }
    }

    /// Accepts all that have come. An error comes again when there is nothing else to do.
    fn poll(&mut self, context: &mut Context<'_>) -> Poll<io::Result<TcpStream>> {
        let mut failed = None;
        for socket in &self.sockets {
            while self.waiting.len() < BACKLOG as usize
                && let Poll::Ready(accepted) = socket.poll_accept(context)
            {
                match accepted {
                    // An answer is written whole; waiting for more of it would only delay it. A peer that has left fails.
                    Ok((stream, _)) if stream.set_nodelay(true).is_ok() => self.waiting.push_back(stream),
                    Ok(_) => {}
                    Err(error) => {
                        failed = Some(error);
                        break;
                    }
                }
            }
        }
        match (self.waiting.pop_front(), failed) {
            (Some(stream), _) => Poll::Ready(Ok(stream)),
            (None, Some(error)) => Poll::Ready(Err(error)),
            (None, None) => Poll::Pending,
        }
    }
}

#[cfg(test)]
mod tests {
    use std::{collections::BTreeSet, net::TcpStream};

    use super::*;

    fn connect(address: SocketAddr, count: usize) -> Vec<TcpStream> {
        // A SYN that is dropped comes again after a second.
        let connect = |_| TcpStream::connect_timeout(&address, Duration::from_millis(900)).unwrap();
        (0..count).map(connect).collect()
    }

    #[tokio::test]
    async fn a_storm_waits_in_the_systems_queues_and_is_accepted_at_once() {
        // More than one queue holds; both ends take a descriptor.
        const STORM: usize = 4500;
        super::super::listen::raise_descriptor_limit();
        let mut incoming = Incoming::bind(([127, 0, 0, 1], 0).into()).unwrap();
        // Nothing is accepted meanwhile.
        let clients = connect(incoming.address().unwrap(), STORM);
        let mut peers = BTreeSet::new();
        for left in (0..STORM).rev() {
            peers.insert(incoming.next().await.peer_addr().unwrap().port());
            assert_eq!(incoming.waiting.len(), left);
        }
        assert_eq!(peers, clients.iter().map(|client| client.local_addr().unwrap().port()).collect());
    }

    #[tokio::test]
    async fn a_port_is_listened_on_once() {
        let first = Incoming::bind(([127, 0, 0, 1], 0).into()).unwrap();
        let again = Incoming::bind(first.address().unwrap()).expect_err("the port is taken");
        assert_eq!(again.kind(), io::ErrorKind::AddrInUse);
    }
}
