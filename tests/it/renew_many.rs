//! Many leases renewed by one call.

use std::time::Duration;

use anyhow::ensure;
use disco::proto::v1::{
    InstanceRef, RegisterRequest, RenewManyRequest, RenewManyResponse, registry_client::RegistryClient,
};
use tokio::runtime::Runtime;
use tonic::{Code, transport::Channel};

use crate::harness::{Disco, scene};

fn refer(id: &str, incarnation: u64) -> InstanceRef {
    InstanceRef { service: "chain".into(), id: id.into(), incarnation }
}

async fn renew(
    registry: &mut RegistryClient<Channel>,
    instances: &[InstanceRef],
) -> Result<RenewManyResponse, tonic::Status> {
    let request = RenewManyRequest { instances: instances.to_vec() };
    Ok(registry.renew_many(request).await?.into_inner())
}

#[test]
fn one_call_renews_many_leases_and_names_those_that_it_did_not() {
    scene(|folder| {
        let disco = Disco::start(folder)?;
        Runtime::new()?.block_on(async {
            let mut registry = RegistryClient::connect(format!("http://{}", disco.grpc)).await?;
            let mut revision = 0;
            for (id, ttl) in [("a", 3), ("b", 60)] {
                let request = RegisterRequest {
                    service: "chain".into(),
                    id: id.into(),
                    incarnation: 7,
                    address: "127.0.0.1".into(),
                    port: 1,
                    ttl: Duration::from_secs(ttl).try_into().ok(),
                    ..RegisterRequest::default()
                };
                revision = registry.register(request).await?.into_inner().revision;
            }
            let asked = [refer("a", 0), refer("gone", 0), refer("b", 7), refer("b", 8), refer("a b", 0)];
            // For longer than the shorter lease lasts by itself.
            for _ in 0..4 {
                tokio::time::sleep(Duration::from_secs(1)).await;
                let answer = renew(&mut registry, &asked).await?;
                let got: Vec<_> = answer.failures.iter().map(|it| (it.index, Code::from(it.code))).collect();
                let want = [(1, Code::NotFound), (3, Code::Aborted), (4, Code::InvalidArgument)];
                ensure!(got == want, "{answer:?}");
                ensure!(answer.ttl.is_some_and(|ttl| ttl.seconds == 3), "{answer:?}");
                ensure!(answer.revision == revision, "{answer:?}, registered at {revision}");
            }
            let nobody = renew(&mut registry, &[]).await?;
            ensure!(nobody == RenewManyResponse { revision, ..RenewManyResponse::default() }, "{nobody:?}");
            let refused = renew(&mut registry, &vec![refer("a", 0); 1001]).await.unwrap_err();
            ensure!(refused.code() == Code::InvalidArgument, "{refused}");
            ensure!(refused.message().contains("at most 1000"), "{refused}");
            Ok(())
        })
    });
}
