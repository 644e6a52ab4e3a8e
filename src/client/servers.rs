use std::{error::Error, net::SocketAddr, time::Duration};

use tonic::{
    Request, Status,
    metadata::{Ascii, MetadataValue},
    service::{Interceptor, interceptor::InterceptedService},
    transport::{Channel, Endpoint},
};

use crate::{model::excerpt, rt::root_cause};

/// How long opening a connection may take before the next server is tried.
const CONNECT: Duration = Duration::from_secs(2);
/// A silent connection is asked for a sign of life this often.
const KEEPALIVE: Duration = Duration::from_secs(10);
/// A connection that does not answer a ping for this long is lost.
const KEEPALIVE_ANSWER: Duration = Duration::from_secs(5);

/// The gRPC servers of one control plane by address, and the token to show them.
#[derive(Debug, Clone)]
pub struct Servers {
    addresses: Vec<SocketAddr>,
    token: Option<MetadataValue<Ascii>>,
}

/// A connection that shows the token with each request.
pub(super) type Link = InterceptedService<Channel, Token>;

impl Servers {
    /// Reads `ip:port`, or several separated by commas. A host name is refused: nothing in Disco depends on DNS.
    pub fn parse(text: &str, token: Option<&str>) -> Result<Self, String> {
        let addresses = text
            .split(',')
            .map(|part| {
                part.trim().parse::<SocketAddr>().ok().filter(|address| address.port() != 0).ok_or_else(|| {
                    format!(
                        "{} is not IP:PORT: want an address such as 127.0.0.1:18000 or [::1]:18000; host names are \
                         not looked up",
                        excerpt(part)
                    )
                })
            })
            .collect::<Result<_, _>>()?;
        let token = token
            .map(|token| {
                format!("Bearer {token}")
                    .parse()
                    .map_err(|_| "the token has characters that cannot be sent in a header".to_owned())
            })
            .transpose()?;
        Ok(Self { addresses, token })
    }

    /// Never empty, in the order given.
    pub fn addresses(&self) -> &[SocketAddr] {
        &self.addresses
    }

    /// Connects to one of them. The error says what was seen.
    pub(super) async fn connect(&self, address: SocketAddr) -> Result<Link, String> {
        let channel = Endpoint::from_shared(format!("http://{address}"))
            .map_err(|error| root_cause(&error))?
            .connect_timeout(CONNECT)
            .tcp_nodelay(true)
            .http2_keep_alive_interval(KEEPALIVE)
            .keep_alive_timeout(KEEPALIVE_ANSWER)
            .keep_alive_while_idle(true)
            .connect()
            .await
            .map_err(|error| format!("{address}: {}", root_cause(&error)))?;
        Ok(InterceptedService::new(channel, Token(self.token.clone())))
    }
}

/// Adds the `authorization` header.
#[derive(Debug, Clone)]
pub(super) struct Token(Option<MetadataValue<Ascii>>);

impl Interceptor for Token {
    fn call(&mut self, mut request: Request<()>) -> Result<Request<()>, Status> {
        if let Some(token) = &self.0 {
            request.metadata_mut().insert("authorization", token.clone());
        }
        Ok(request)
    }
}

/// What a status says, with what lies under it when it comes from the connection and not from the server.
pub(super) fn describe(status: &Status) -> String {
    match (status.source(), status.message()) {
        (Some(source), _) => root_cause(source),
        (None, "") => status.code().description().to_owned(),
        (None, message) => message.to_owned(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses_are_static() {
        let servers = Servers::parse("127.0.0.1:18000, [::1]:18001", None).unwrap();
        assert_eq!(servers.addresses().len(), 2);
        for bad in ["", "localhost:18000", "127.0.0.1", "127.0.0.1:0", "127.0.0.1:18000,", "127.0.0.1:70000"]
        {
            let message = Servers::parse(bad, None).unwrap_err();
            assert!(message.contains("is not IP:PORT"), "{bad}: {message}");
        }
        assert!(Servers::parse("127.0.0.1:1", Some("a\nb")).unwrap_err().starts_with("the token"));
    }
}
