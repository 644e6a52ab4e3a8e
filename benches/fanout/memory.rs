//! What a stream keeps of what it was sent first: the memory of streams that are sent everything, while the catalog grows.

use std::time::Duration;

use crate::{
    Bench, Contender,
    load::{Fleet, Protocol},
    measure::{sidecar, sidecars},
    report::Figure,
    servers::{Content, Disco, Server},
};

/// Services, of an instance each, and streams.
const SIZES: [(usize, usize); 3] = [(10, 400), (2_000, 400), (10_000, 100)];

/// Nothing is on its way any more after that.
const REST: Duration = Duration::from_secs(1);

pub(crate) fn run(bench: &mut Bench) {
    println!("delta streams that are sent everything; what each of them takes once that is acknowledged");
    let sizes = if bench.quick { &SIZES[..2] } else { &SIZES };
    for &(services, streams) in sizes {
        let case = format!("{services} services, {streams} streams");
        let mut disco = Disco::start(services, 1);
        let first = Fleet::start(disco.address(), vec![sidecar(Protocol::Delta, 0, &["*"])]);
        first.opened();
        first.settled(REST);
        let content = Content { opening: first.captured(), changes: vec![] };
        drop(first);
        let mut limit = bench.start(Contender::Limit, &content, 4, (1, 1));
        let servers: [(_, &mut dyn Server); 2] =
            [(Contender::Limit, limit.as_mut()), (Contender::Disco, &mut disco)];
        for (contender, server) in servers {
            bench.attempt("memory", &case, contender, |bench| {
                let before = server.memory();
                let fleet = Fleet::start(server.address(), sidecars(Protocol::Delta, streams, &["*"]));
                fleet.opened();
                fleet.settled(REST);
                let kib = server.memory().saturating_sub(before) as f64 / streams as f64;
                assert_eq!(fleet.totals().ended, 0, "streams ended");
                let figure = Figure::new("memory a stream", "KiB", kib).aim(1.3);
                bench.report.add("memory", &case, contender, [figure]);
            });
        }
        bench.report.print("memory", &case);
    }
}
