//! One endpoint changes, and every stream is told.

use crate::{
    Bench, Contender,
    load::Protocol,
    measure::{Block, INSTANCES, block, content, median, ms, service, sidecar, sidecars},
    report::Figure,
    servers::Disco,
};

pub(crate) fn run(bench: &mut Bench) {
    println!(
        "one endpoint change to all streams; p50, p99 in ms from sending the write; CPU of the server a response"
    );
    let sizes: &[(usize, usize, usize)] =
        if bench.quick { &[(1000, 10, 3)] } else { &[(1000, 12, 3), (10_000, 4, 3)] };
    for &(streams, rounds, blocks) in sizes {
        for protocol in [Protocol::Delta, Protocol::Sotw] {
            compare(bench, streams, rounds, blocks, protocol);
        }
    }
}

fn compare(bench: &mut Bench, streams: usize, rounds: usize, blocks: usize, protocol: Protocol) {
    let case = format!("{streams} {}", protocol.name());
    let service = service(0);
    let services = [service.as_str()];
    let content = |protocol| content(&mut Disco::start(1, INSTANCES), sidecar(protocol, 0, &services));
    // Peers are handed resources, which delta responses have with their names.
    let (as_sent, named) = (content(protocol), content(Protocol::Delta));
    let contenders = bench.contenders();
    let mut results: Vec<Vec<Block>> = contenders.iter().map(|_| vec![]).collect();
    for _ in 0..blocks {
        for (contender, results) in contenders.iter().zip(&mut results) {
            let content = if *contender == Contender::Limit { &as_sent } else { &named };
            let measured = bench.attempt("change", &case, *contender, |bench| {
                let mut server = bench.start(*contender, content, 4, (1, INSTANCES));
                block(server.as_mut(), sidecars(protocol, streams, &services), rounds)
            });
            results.extend(measured);
        }
    }
    for (contender, blocks) in contenders.into_iter().zip(results) {
        if blocks.is_empty() {
            continue;
        }
        let of = |figure: &dyn Fn(&Block) -> f64| median(blocks.iter().map(figure).collect());
        let figures = [
            Figure::new("p50", "ms", of(&|block| ms(&block.latency, 0.5))),
            Figure::new("p99", "ms", of(&|block| ms(&block.latency, 0.99))).aim(1.2),
            Figure::new("CPU a response", "us", of(&|block| block.cpu_us)).aim(1.2),
            Figure::new("memory a stream", "KiB", of(&|block| block.kib_a_stream)).aim(1.3),
            Figure::new("opened after", "s", of(&|block| block.opened)),
        ];
        bench.report.add("change", &case, contender, figures);
    }
    bench.report.print("change", &case);
}
