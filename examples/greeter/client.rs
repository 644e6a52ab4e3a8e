//! Calls the greeter through the local Envoy and prints who answered:
//!
//! ```text
//! greeter-client --proxy 127.0.0.1:10000 --service greeter --calls 9
//! ```
//!
//! All a program has to do for Disco: connect to the sidecar, and name the service as the `:authority` of its calls.

mod pb;

use std::net::SocketAddr;

use clap::Parser;
use pb::{HelloRequest, greeter_client::GreeterClient};
use tonic::transport::Endpoint;

/// Calls greeter.v1.Greeter/Hello.
#[derive(Parser)]
struct Args {
    /// Where the sidecar listens.
    #[arg(long, default_value = "127.0.0.1:10000")]
    proxy: SocketAddr,
    /// Whom to call.
    #[arg(long, default_value = "greeter")]
    service: String,
    /// Whom to greet.
    #[arg(long, default_value = "world")]
    name: String,
    /// How many calls to make, one after the other.
    #[arg(long, default_value_t = 1)]
    calls: u32,
}

#[tokio::main]
#[allow(clippy::print_stdout, reason = "a program for people")]
async fn main() -> anyhow::Result<()> {
    let args = Args::parse();
    let channel = Endpoint::from_shared(format!("http://{}", args.proxy))?
        .origin(format!("http://{}", args.service).parse()?)
        .connect()
        .await?;
    let mut greeter = GreeterClient::new(channel);
    for _ in 0..args.calls {
        let reply = greeter.hello(HelloRequest { name: args.name.clone() }).await?.into_inner();
        println!("{}, says {}", reply.message, reply.instance);
    }
    Ok(())
}
