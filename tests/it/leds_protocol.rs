//! What one by one (LEDS) does to a real Envoy, with resources that Disco itself seldom makes: a changed cluster, an empty
//! collection, odd addresses. Each was seen to end or to empty an Envoy that is served without care.

use std::{
    net::SocketAddr,
    sync::Arc,
    time::{Duration, Instant, SystemTime},
};

use anyhow::ensure;
use disco::{
    catalog::{self, Snapshot},
    model::{Incarnation, Instance, InstanceKey, Lease, Locality, Revision, State},
    resources::{self, View},
    rt::{Shutdown, Tasks},
    xds::{
        Admit, Admitted, AdsServer, Change, Concern, Config, Feed, Node, Proxies, Publisher, Refusal,
        Resource, ResourceSet, ResourceType, StreamPolicy,
    },
};
use envoy_types::pb::envoy::config::cluster::v3::Cluster;
use prost::Message as _;

use crate::harness::{Disco, Envoy, PATIENCE, eventually, free_port, scene};

/// Envoy gives up waiting after 15 s.
const AT_ONCE: Duration = Duration::from_secs(10);

#[derive(Debug)]
struct Everybody(Feed);

impl Admit for Everybody {
    fn admit(&self, node: &Node) -> Result<Admitted, Refusal> {
        assert!(node.collections, "an Envoy with all on one delta stream can take collections: {node:?}");
        Ok(Admitted { feed: self.0.clone(), policy: StreamPolicy::ENVOY })
    }
}

/// A server of this process, which serves what it is told.
struct Served {
    sets: Publisher,
    proxies: Proxies,
    grpc: SocketAddr,
    runtime: tokio::runtime::Runtime,
}

impl Served {
    fn start() -> anyhow::Result<Self> {
        let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build()?;
        let proxies = Proxies::default();
        let sets = Publisher::new(&proxies);
        let tasks = Tasks::new(Shutdown::default());
        let ads = AdsServer::new(Arc::new(Everybody(sets.feed())), proxies.clone(), Config::default(), tasks);
        let listener = runtime.block_on(tokio::net::TcpListener::bind("127.0.0.1:0"))?;
        let grpc = listener.local_addr()?;
        let mut routes = tonic::service::RoutesBuilder::default();
        ads.add_to(&mut routes);
        let incoming = tokio_stream::wrappers::TcpListenerStream::new(listener);
        let server = tonic::transport::Server::builder().add_routes(routes.routes());
        runtime.spawn(server.serve_with_incoming(incoming));
        Ok(Self { sets, proxies, grpc, runtime })
    }

    /// Serves this and waits until Envoy has acknowledged all of it.
    fn serve(&self, set: ResourceSet) -> anyhow::Result<()> {
        let revision = set.revision();
        self.sets.publish(Arc::new(set));
        let progress =
            self.runtime.block_on(self.proxies.wait_acknowledged(revision, &Concern::All, AT_ONCE));
        ensure!(progress.complete, "not acknowledged at once: {progress:#?}");
        Ok(())
    }

    fn now(&self) -> ResourceSet {
        self.sets.latest().as_deref().cloned().unwrap_or_default()
    }
}

fn instances(service: &str, addresses: &[&str]) -> Vec<catalog::Change> {
    let put = |(n, address): (usize, &&str)| {
        let address: SocketAddr = address.parse().unwrap();
        catalog::Change::PutInstance(Instance {
            key: InstanceKey { service: service.parse().unwrap(), id: format!("i:{n}").parse().unwrap() },
            incarnation: Incarnation(1),
            address: address.ip(),
            port: address.port().try_into().unwrap(),
            locality: Locality { zone: ["", "z"][n % 2].into(), ..Locality::default() },
            weight: [1, u32::MAX][n % 2].try_into().unwrap(),
            metadata: [].into(),
            state: State::Serving,
            lease: Lease::Session,
            owner: None,
            check: None,
            health: disco::model::Health::unchecked(SystemTime::UNIX_EPOCH),
            stale: None,
            damped: None,
            revision: Revision(1),
            registered_at: SystemTime::UNIX_EPOCH,
        })
    };
    addresses.iter().enumerate().map(put).collect()
}

const ODD: [&str; 8] = [
    "127.0.0.1:1",
    "127.0.0.1:65535",
    "0.0.0.0:1",
    "255.255.255.255:1",
    "224.0.0.1:1",
    "[::]:1",
    "[::ffff:1.2.3.4]:1",
    "[fe80::1]:1",
];

#[test]
fn l4_envoy_lives_through_all_that_comes_one_by_one() {
    scene(|folder| {
        let served = Served::start()?;
        // Only for its command line.
        let disco = Disco::start(folder)?;
        let all =
            instances("odd", &ODD).into_iter().chain(instances("empty", &["127.0.0.1:1", "127.0.0.1:2"]));
        let snapshot = Snapshot::default().apply(Revision(1), all);
        let port = free_port()?;
        let set = resources::render(&snapshot, &View { leds_from: 1, ..View::envoy(port) });
        let members = |set: &ResourceSet, service: &str| {
            let names = set.iter(ResourceType::LbEndpoint).map(|(name, _)| Arc::clone(name));
            names.filter(|name| name.contains(&format!("/{service}/"))).collect::<Vec<_>>()
        };
        let gone =
            members(&set, "empty").into_iter().map(|name| Change::Remove(ResourceType::LbEndpoint, name));
        let set = set.apply(Revision(2), gone);
        served.sets.publish(Arc::new(set));

        let start = Instant::now();
        let grpc = served.grpc.to_string();
        let envoy = Envoy::start_with(&disco, port, &["--grpc", &grpc])?;
        ensure!(start.elapsed() < AT_ONCE, "Envoy waited {:?} for an empty collection", start.elapsed());
        let hosts = |want: usize| {
            let mut seen = Ok(Default::default());
            eventually(&format!("{want} hosts"), PATIENCE, || {
                seen = envoy.hosts("odd");
                seen.as_ref().is_ok_and(|seen| seen.len() == want).then_some(())
            })
            .map_err(|error| error.context(format!("{seen:?}\n{}", envoy.output())))
        };
        hosts(ODD.len())?;

        // The new cluster is warm only when it has all of its endpoints.
        let set = served.now();
        let entry = set.get(ResourceType::Cluster, "odd").expect("a cluster");
        let mut cluster = Cluster::decode(entry.resource.body())?;
        cluster.connect_timeout.as_mut().expect("a timeout").seconds += 1;
        let needs = entry.resource.needs.iter().cloned();
        let cluster = Resource::new(ResourceType::Cluster, "odd", &cluster, needs);
        served.serve(set.apply(Revision(3), [Change::Put(cluster)]))?;
        hosts(ODD.len())?;

        // One goes, all go, one comes back.
        let set = served.now();
        let names = members(&set, "odd");
        let remove = |name: &Arc<str>| Change::Remove(ResourceType::LbEndpoint, Arc::clone(name));
        served.serve(set.apply(Revision(4), [remove(&names[0])]))?;
        hosts(ODD.len() - 1)?;
        served.serve(served.now().apply(Revision(5), names.iter().map(remove)))?;
        hosts(0)?;
        let back = set.get(ResourceType::LbEndpoint, &names[1]).expect("a member");
        served.serve(served.now().apply(Revision(6), [Change::Put((*back.resource).clone())]))?;
        hosts(1)
    });
}
