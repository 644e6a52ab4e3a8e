//! Calls Greeter/Hello with tonic-xds, or with plain tonic through Envoy. `tests/clients/README.md` says what it does.

mod load;
#[path = "../../../examples/greeter/pb.rs"]
mod pb;

use std::{
    error::Error,
    io::{self, Write as _},
    net::SocketAddr,
    sync::Arc,
    thread,
    time::Duration,
};

use clap::Parser;
use load::{Counts, Load, Plan};
use tonic_xds::{
    GrpcRetryClassifierFactory, RetryClassifier, RetryClassifierFactory, RetryOutcome, XdsChannelBuilder,
    XdsChannelConfig, XdsUri,
};

#[derive(Parser)]
struct Args {
    #[arg(long, required_unless_present = "proxy")]
    target: Option<String>,
    #[arg(long)]
    proxy: Option<SocketAddr>,
    #[arg(long, default_value = "greeter")]
    service: String,
    #[arg(long, default_value_t = 8)]
    concurrency: u32,
    #[arg(long, default_value_t = 500.0)]
    rate: f64,
    /// Callers of `Slow` and of `Count` among them, with `--proxy`.
    #[arg(long, default_value_t = 0)]
    long_calls: u32,
}

#[tokio::main]
async fn main() -> Result<(), Box<dyn Error>> {
    let args = Args::parse();
    let greeter = match args.proxy {
        Some(proxy) => load::through_envoy(proxy, &args.service)?,
        None => {
            let target = XdsUri::parse(&args.target.unwrap_or_default())?;
            let builder = XdsChannelBuilder::new(XdsChannelConfig::new(target));
            load::boxed(builder.with_retry_classifier_factory(Arc::new(LostCalls)).build_grpc_channel()?)
        }
    };
    let plan = Plan { concurrency: args.concurrency, rate: args.rate, long_calls: args.long_calls };
    let load = Load::start(greeter, plan);

    let (closed, mut stdin) = tokio::sync::oneshot::channel();
    thread::spawn(move || closed.send(io::copy(&mut io::stdin(), &mut io::sink())));
    let mut reports = tokio::time::interval(Duration::from_millis(100));
    loop {
        tokio::select! {
            _ = reports.tick() => report(&load.counts())?,
            _ = &mut stdin => break,
        }
    }
    report(&load.stop().await)?;
    Ok(())
}

/// Retries calls that lost their connection where the route has unavailable calls retried, as the other gRPC clients do. By itself
/// tonic-xds (0.1.0-alpha.4) retries only calls that were never sent, so a crash would fail those under way.
struct LostCalls;

impl RetryClassifierFactory for LostCalls {
    fn classifier_for(&self, retry_on: &str) -> Option<Arc<dyn RetryClassifier>> {
        let of_answers = GrpcRetryClassifierFactory.classifier_for(retry_on)?;
        let unavailable = retry_on.split(',').any(|condition| condition.trim() == "unavailable");
        Some(if unavailable { Arc::new(LostOr(of_answers)) } else { of_answers })
    }
}

#[derive(Debug)]
struct LostOr(Arc<dyn RetryClassifier>);

impl RetryClassifier for LostOr {
    fn is_retryable(&self, outcome: RetryOutcome<'_>) -> bool {
        matches!(outcome, RetryOutcome::Error(_)) || self.0.is_retryable(outcome)
    }

    fn prepare_retry(&self, headers: &mut http::HeaderMap, attempt: u32) {
        self.0.prepare_retry(headers, attempt);
    }
}

fn report(counts: &Counts) -> Result<(), Box<dyn Error>> {
    writeln!(io::stdout(), "{}", serde_json::to_string(counts)?)?;
    Ok(())
}
