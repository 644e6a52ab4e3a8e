//! A small gRPC service. Start it under Disco, and every sidecar finds it:
//!
//! ```text
//! disco run --service greeter --port 50051 --health grpc -- greeter-server
//! ```
//!
//! Nothing in it knows of Disco: it serves `grpc.health.v1`, and on SIGTERM finishes the calls under way and ends. `disco run`
//! tells it the port and its name in the environment.

mod pb;

use std::{
    net::{IpAddr, Ipv4Addr, SocketAddr},
    pin::Pin,
    time::Duration,
};

use clap::Parser;
use futures_util::{Stream, StreamExt as _, stream};
use pb::{
    CountRequest, HelloReply, HelloRequest, SlowRequest,
    greeter_server::{Greeter, GreeterServer},
};
use tokio::{
    net::TcpSocket,
    signal::unix::{SignalKind, signal},
};
use tonic::{
    Request, Response, Result, Status,
    transport::{Server, server::TcpIncoming},
};

/// Connections that may wait to be accepted.
const BACKLOG: u32 = 4096;
const LONGEST: Duration = Duration::from_secs(60);

/// Serves greeter.v1.Greeter and grpc.health.v1.Health.
#[derive(Parser)]
struct Args {
    /// Port to listen on; 0 takes any free one.
    #[arg(long, env = "PORT", default_value_t = 50051)]
    port: u16,
    /// Address to listen on.
    #[arg(long, default_value_t = IpAddr::V4(Ipv4Addr::LOCALHOST))]
    address: IpAddr,
    /// The name it answers with.
    #[arg(long, env = "DISCO_INSTANCE", default_value = "greeter")]
    instance: String,
}

#[tokio::main]
#[allow(clippy::print_stdout, reason = "a program for people")]
async fn main() -> anyhow::Result<()> {
    let args = Args::parse();
    let socket = if args.address.is_ipv4() { TcpSocket::new_v4()? } else { TcpSocket::new_v6()? };
    socket.set_reuseaddr(true)?;
    socket.bind(SocketAddr::new(args.address, args.port))?;
    let listener = socket.listen(BACKLOG)?;
    println!("{} listens on {}", args.instance, listener.local_addr()?);

    let (health_reporter, health) = tonic_health::server::health_reporter();
    health_reporter.set_serving::<GreeterServer<Service>>().await;

    let mut terminate = signal(SignalKind::terminate())?;
    let mut interrupt = signal(SignalKind::interrupt())?;
    Server::builder()
        .add_service(health)
        .add_service(GreeterServer::new(Service { instance: args.instance }))
        .serve_with_incoming_shutdown(TcpIncoming::from(listener).with_nodelay(Some(true)), async move {
            tokio::select! {
                _ = terminate.recv() => {}
                _ = interrupt.recv() => {}
            }
        })
        .await?;
    Ok(())
}

struct Service {
    instance: String,
}

impl Service {
    fn reply(&self, name: &str) -> HelloReply {
        HelloReply { message: format!("Hello, {name}"), instance: self.instance.clone() }
    }
}

#[tonic::async_trait]
impl Greeter for Service {
    async fn hello(&self, request: Request<HelloRequest>) -> Result<Response<HelloReply>> {
        Ok(Response::new(self.reply(&request.get_ref().name)))
    }

    async fn slow(&self, request: Request<SlowRequest>) -> Result<Response<HelloReply>> {
        let SlowRequest { name, delay_ms } = request.into_inner();
        tokio::time::sleep(bounded("delay_ms", delay_ms)?).await;
        Ok(Response::new(self.reply(&name)))
    }

    type CountStream = Pin<Box<dyn Stream<Item = Result<HelloReply>> + Send>>;

    async fn count(&self, request: Request<CountRequest>) -> Result<Response<Self::CountStream>> {
        let CountRequest { count, interval_ms } = request.into_inner();
        let interval = bounded("interval_ms", interval_ms)?;
        let instance = self.instance.clone();
        let replies = stream::iter(1..=count).then(move |n| {
            let reply = HelloReply { message: format!("{n} of {count}"), instance: instance.clone() };
            async move {
                tokio::time::sleep(interval).await;
                Ok(reply)
            }
        });
        Ok(Response::new(replies.boxed()))
    }
}

fn bounded(field: &str, ms: u32) -> Result<Duration> {
    let wanted = Duration::from_millis(ms.into());
    if wanted > LONGEST {
        return Err(Status::invalid_argument(format!("{field}: {ms} is more than {}", LONGEST.as_millis())));
    }
    Ok(wanted)
}
