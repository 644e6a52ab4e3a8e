mod access;
mod cluster;
mod faults;

use std::sync::{
    Arc,
    atomic::{AtomicUsize, Ordering},
};

use futures_util::future::BoxFuture;

use self::cluster::Cluster;
use super::*;
use crate::{
    proto::etcd::{CompactionRequest, kv_client::KvClient},
    store::conformance::{Place, conforms},
};

/// A prefix of its own in an etcd.
struct Prefix {
    config: EtcdConfig,
}

impl Place for Prefix {
    fn open(&self) -> BoxFuture<'_, Arc<dyn Store>> {
        Box::pin(async { Arc::new(EtcdStore::open(&self.config).unwrap()) as Arc<dyn Store> })
    }

    fn forget(&self, revision: Revision) -> BoxFuture<'_, ()> {
        Box::pin(compact(&self.config, revision))
    }

    fn remembers_for_readers(&self) -> bool {
        true
    }
}

/// Makes etcd forget the changes before `revision`; its offset must be 0.
async fn compact(config: &EtcdConfig, revision: Revision) {
    let request = CompactionRequest { revision: revision.0.cast_signed(), physical: true };
    let mut client = KvClient::connect(config.endpoints[0].clone()).await.unwrap();
    client.compact(request).await.unwrap();
}

#[tokio::test]
async fn etcd_conforms() {
    let cluster = Cluster::start(1);
    let made = AtomicUsize::new(0);
    conforms(|| {
        let prefix = format!("/test/{}/", made.fetch_add(1, Ordering::Relaxed));
        Prefix { config: EtcdConfig { prefix, ..cluster.config() } }
    })
    .await;
}
