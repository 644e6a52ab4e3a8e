use futures_util::future::BoxFuture;

use crate::{health::Sink, model::HealthReport, registry::Registry};

/// Takes the verdicts of the checker to the registry.
#[derive(Debug)]
pub(super) struct Verdicts(pub(super) Registry);

impl Sink for Verdicts {
    fn report(&self, reports: Vec<HealthReport>) -> BoxFuture<'static, Result<(), String>> {
        let registry = self.0.clone();
        Box::pin(
            async move { registry.set_health(reports).await.map(drop).map_err(|error| error.to_string()) },
        )
    }
}
