//! All proxies come back at once, and hold everything.

use std::{collections::HashMap, time::Duration};

use crate::{
    Bench, Contender,
    load::{self, Ask, CLUSTER, ENDPOINTS, Fleet, LISTENER, Plan, Protocol, ROUTE},
    measure::{content, median, service, sidecar, sidecars},
    report::Figure,
    servers::{Content, Disco, Server},
};

/// Services and instances of each that a reconnecting proxy holds.
const HELD: (usize, usize) = (100, 5);

/// What a server gave: seconds until all were served, CPU a stream, bytes of resources.
#[derive(Debug, Default)]
struct Results {
    seconds: Vec<f64>,
    cpu_us: Vec<f64>,
    resource_bytes: u64,
}

pub(crate) fn run(bench: &mut Bench) {
    let streams = if bench.quick { 1000 } else { 10_000 };
    let blocks = if bench.quick { 2 } else { 3 };
    let (services, instances) = HELD;
    println!("delta streams reconnect at once and hold everything ({services} services)");
    let case = format!("{streams} {}", Protocol::Delta.name());
    let names: Vec<String> = (0..services).map(service).collect();
    let names: Vec<&str> = names.iter().map(String::as_str).collect();
    let mut disco = Disco::start(services, instances);
    let served = content(&mut disco, sidecar(Protocol::Delta, 0, &names));
    // The answer that says a stream is served removes what does not exist; the limit sends the same.
    let answer = {
        let fleet = Fleet::start(disco.address(), returning(&disco, 1, &names));
        fleet.opened();
        Content { opening: fleet.captured(), changes: vec![] }
    };
    drop(disco);
    let held_of_disco = held(&served.opening);
    let contenders = bench.contenders();
    let mut results: Vec<Results> = contenders.iter().map(|_| Results::default()).collect();
    for _ in 0..blocks {
        for (contender, results) in contenders.iter().zip(&mut results) {
            let content = if *contender == Contender::Limit { &answer } else { &served };
            bench.attempt("reconnect", &case, *contender, |bench| {
                let server = bench.start(*contender, content, 4, HELD);
                let plans = match contender {
                    // It looks at nothing that it is asked; but it is asked the same.
                    Contender::Limit => (0..streams).map(|n| plan(n, &names, &held_of_disco)).collect(),
                    _ => returning(server.as_ref(), streams, &names),
                };
                let before = server.cpu();
                let fleet = Fleet::start(server.address(), plans);
                results.seconds.push(fleet.opened().as_secs_f64());
                std::thread::sleep(Duration::from_millis(100));
                results.cpu_us.push((server.cpu() - before) * 1e6 / streams as f64);
                results.resource_bytes = results.resource_bytes.max(fleet.totals().resource_bytes);
                assert_eq!(fleet.totals().ended, 0, "streams ended");
            });
        }
    }
    for (contender, results) in contenders.into_iter().zip(results) {
        if results.seconds.is_empty() {
            continue;
        }
        let figures = [
            Figure::new("all served after", "s", median(results.seconds)).aim(1.3),
            Figure::new("CPU a stream", "us", median(results.cpu_us)),
            Figure::new("resources sent", "bytes", results.resource_bytes as f64),
        ];
        bench.report.add("reconnect", &case, contender, figures);
    }
    bench.report.print("reconnect", &case);
}

/// Clients that hold what this server sends.
fn returning(server: &dyn Server, count: usize, names: &[&str]) -> Vec<Plan> {
    let fleet = Fleet::start(server.address(), sidecars(Protocol::Delta, 1, names));
    fleet.opened();
    let held = held(&fleet.captured());
    (0..count).map(|n| plan(n, names, &held)).collect()
}

/// Versions by type and name, from delta responses.
fn held(responses: &[Vec<u8>]) -> HashMap<String, HashMap<String, String>> {
    let text = |bytes: &[u8]| String::from_utf8(bytes.to_vec()).expect("text");
    let mut held: HashMap<String, HashMap<String, String>> = HashMap::new();
    for response in responses {
        let (mut url, mut versions) = (String::new(), HashMap::new());
        let mut rest = response.as_slice();
        while let Some((tag, value)) = load::field(&mut rest) {
            match tag {
                2 => {
                    let (mut name, mut version) = (String::new(), String::new());
                    let mut resource = value;
                    while let Some((tag, value)) = load::field(&mut resource) {
                        match tag {
                            1 => version = text(value),
                            3 => name = text(value),
                            _ => {}
                        }
                    }
                    versions.insert(name, version);
                }
                4 => url = text(value),
                _ => {}
            }
        }
        held.entry(url).or_default().extend(versions);
    }
    held
}

/// A proxy that comes back and holds everything, and one thing that is gone: the answer to that says that it is served.
fn plan(n: usize, names: &[&str], held: &HashMap<String, HashMap<String, String>>) -> Plan {
    const GONE: &str = "gone";
    let names = [names, &[GONE]].concat();
    let mut asks = [
        Ask::new(CLUSTER, &[]),
        Ask::new(ENDPOINTS, &names),
        Ask::new(LISTENER, &[]),
        Ask::new(ROUTE, &["outbound"]),
    ];
    for ask in &mut asks {
        ask.held = held.get(ask.url).cloned().unwrap_or_default();
    }
    asks[1].held.insert(GONE.to_owned(), "1".to_owned());
    Plan::new(Protocol::Delta, &format!("bench-{n}"), &asks, 1).opened_by(ENDPOINTS)
}
