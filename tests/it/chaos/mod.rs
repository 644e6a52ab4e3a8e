//! `make chaos`: one fault after the other, on several machines made of network namespaces, under steady calls and
//! registrations. Each gives a line of a table. `DISCO_CHAOS` names those to try: all whose line has that text in it.

mod table;
mod world;

use std::{
    fs, thread,
    time::{Duration, Instant},
};

use anyhow::{Context as _, ensure};
use rustix::process::Signal;

use self::{
    table::{Row, Table},
    world::{Kind, World},
};
use crate::harness::{Client, Disco, Envoy, Greeter, Load, Network, PATIENCE, eventually, scene};

/// How long a process is frozen, or a network cut: longer than etcd's lease of a node (10 s) and than the lease of an instance.
const FAULT: Duration = Duration::from_secs(15);
/// How long a process stays dead.
const DEAD: Duration = Duration::from_secs(4);

const DISCOS: [&str; 3] = ["n1", "n2", "n3"];
const ETCDS: [&str; 3] = ["e1", "e2", "e3"];
const INSTANCES: &str = "services";

type Scene = fn(&mut World, &mut Table);

#[test]
#[ignore = "takes ten minutes and a network namespace: make chaos"]
fn chaos() {
    scene(|folder| {
        let mut table = Table::default();
        let network = Network::new(&[&DISCOS[..], &ETCDS, &[INSTANCES]].concat())?;
        let mut world = World::new(folder, network)?;
        eprintln!("{}", Table::HEAD);
        let scenes: [Scene; 3] = [processes, cuts, instances];
        scenes.iter().for_each(|scene| scene(&mut world, &mut table));
        let registered = world.finish()?;
        let disk = folder.join("disk");
        fs::create_dir(&disk)?;
        table.add(full_disk(&disk));
        table.write(registered)?;
        table.judge(registered)
    });
}

fn processes(world: &mut World, table: &mut Table) {
    for name in DISCOS {
        table.add(world.fault(&format!("kill -9 of Disco {name}"), |world| {
            world.nodes.node_mut(name)?.kill();
            thread::sleep(DEAD);
            world.nodes.node_mut(name)?.start_again()
        }));
    }
    table.add(world.fault("kill -9 of all Discos, 15 s", |world| {
        world.nodes.all.iter_mut().for_each(Disco::kill);
        thread::sleep(FAULT);
        world.nodes.all.iter_mut().try_for_each(Disco::start_again)
    }));
    for name in DISCOS {
        table.add(world.fault(&format!("SIGSTOP of Disco {name}, 15 s"), |world| {
            world.nodes.node(name)?.signal(Signal::STOP)?;
            thread::sleep(FAULT);
            world.nodes.node(name)?.signal(Signal::CONT)
        }));
    }
    table.add(world.fault("SIGSTOP of all Discos, 15 s", |world| {
        world.nodes.all.iter().try_for_each(|disco| disco.signal(Signal::STOP))?;
        thread::sleep(FAULT);
        world.nodes.all.iter().try_for_each(|disco| disco.signal(Signal::CONT))
    }));
    for (n, name) in ETCDS.into_iter().enumerate() {
        table.add(world.fault(&format!("kill -9 of etcd {name}"), |world| {
            world.nodes.etcd.kill(n);
            thread::sleep(DEAD);
            world.nodes.etcd.begin(n)
        }));
    }
    table.add(world.fault("kill -9 of all etcds, 15 s", |world| {
        (0..ETCDS.len()).for_each(|n| world.nodes.etcd.kill(n));
        thread::sleep(FAULT);
        (0..ETCDS.len()).try_for_each(|n| world.nodes.etcd.begin(n))
    }));
    for (n, name) in ETCDS.into_iter().enumerate() {
        table.add(world.fault(&format!("SIGSTOP of etcd {name}, 15 s"), |world| {
            world.nodes.etcd.signal(n, Signal::STOP)?;
            thread::sleep(FAULT);
            world.nodes.etcd.signal(n, Signal::CONT)
        }));
    }
    table.add(world.fault("SIGSTOP of all etcds, 15 s", |world| {
        (0..ETCDS.len()).try_for_each(|n| world.nodes.etcd.signal(n, Signal::STOP))?;
        thread::sleep(FAULT);
        (0..ETCDS.len()).try_for_each(|n| world.nodes.etcd.signal(n, Signal::CONT))
    }));
}

fn cuts(world: &mut World, table: &mut Table) {
    let proxy = [Network::TEST];
    let cuts: [(&str, &[&str], &[&str]); 7] = [
        ("Discos from etcds", &DISCOS, &ETCDS),
        ("Disco n1 from etcds", &DISCOS[..1], &ETCDS),
        ("etcd e1 from the other etcds", &ETCDS[..1], &ETCDS[1..]),
        ("each etcd from the others", &ETCDS[..2], &ETCDS[1..]),
        ("Discos from instances", &DISCOS, &[INSTANCES]),
        ("Disco n1 from instances", &DISCOS[..1], &[INSTANCES]),
        ("Discos from the proxy", &DISCOS, &proxy),
    ];
    for (what, one, other) in cuts {
        // Who is in both groups is not cut from itself.
        let mut pairs = Vec::new();
        for a in one {
            pairs.extend(other.iter().filter(|b| a != *b).map(|b| (*a, *b)));
        }
        table.add(world.fault(&format!("cut {what}, 15 s"), |world| {
            for (a, b) in &pairs {
                world.network.cut(&[a], &[b])?;
            }
            thread::sleep(FAULT);
            for (a, b) in &pairs {
                world.network.mend(&[a], &[b])?;
            }
            Ok(())
        }));
    }
}

fn instances(world: &mut World, table: &mut Table) {
    for (what, kind) in [
        ("a process dies under `disco run`", Kind::Session),
        ("a process and its `disco run` die", Kind::Orphan),
        ("a process with a TTL of 3 s dies", Kind::Ttl),
        ("a process that is checked every 1 s dies", Kind::Checked),
    ] {
        table.add(world.deaths(what, &[kind]));
    }
    table.add(world.deaths("30 % of the instances die at once", &[Kind::Session, Kind::Orphan, Kind::Ttl]));
    table.add(world.unrenewed());
    // Their ends are spread over half a minute.
    table.add(world.fault("all `disco run` frozen, no renewals, 40 s; processes live", |world| {
        world.freeze_owners(true)?;
        thread::sleep(Duration::from_secs(40));
        world.freeze_owners(false)
    }));
}

/// The embedded store on a file system of 2 MiB, filled up under it.
fn full_disk(folder: &std::path::Path) -> Row {
    let start = Instant::now();
    let mut row = Row { fault: "the disk is full (embedded store)".to_owned(), ..Row::default() };
    if let Err(error) = fill_disk(folder, &mut row) {
        row.problem = Some(format!("{error:#}"));
    }
    row.seconds = start.elapsed().as_secs_f64();
    row
}

fn fill_disk(folder: &std::path::Path, row: &mut Row) -> anyhow::Result<()> {
    let disk = folder.join("small");
    fs::create_dir(&disk)?;
    let mounted = std::process::Command::new("mount")
        .args(["-t", "tmpfs", "-o", "size=2m", "small"])
        .arg(&disk)
        .status()?;
    ensure!(mounted.success(), "no file system of 2 MiB: {mounted}");
    let configuration = format!(
        "roles: [registry, xds, admin]\nstore: {{file: {{dir: {}}}}}\nhistory: {{entries: 0}}\n",
        disk.join("data").display()
    );
    let mut disco = Disco::serve(folder, &configuration)?;
    let _greeters = ["g1", "g2"].map(|id| Greeter::start(&disco, id));
    disco.wait_serving(&["g1", "g2"])?;
    let envoy = Envoy::start_with(&disco, crate::harness::free_port()?, &["--upstream", "greeter"])?;
    let load = Load::start(&disco, Client::Envoy(envoy.proxy))?;
    load.wait_more(100)?;
    let before = envoy.updates()?;
    let body = br#"{"address": "127.0.0.1", "port": 9, "ttl": "1h"}"#;
    let mut accepted = Vec::new();
    let mut register = |id: String| {
        let answer = disco.request("PUT", &format!("/v1/services/filler/instances/{id}"), body)?;
        if answer.status == 200 {
            accepted.push(id);
        }
        anyhow::Ok(answer)
    };
    register("before".to_owned())?;
    // Leaves nothing for the store but what it has taken already.
    let filler = disk.join("filler");
    let written = fs::write(&filler, vec![0_u8; 4 << 20]);
    ensure!(written.is_err(), "4 MiB fit on a disk of 2");
    let mut refused = None;
    for n in 0..20_000 {
        let answer = register(format!("full{n}"))?;
        if answer.status != 200 {
            refused = Some(answer);
            break;
        }
    }
    let refused = refused.context("a full disk took 20,000 registrations")?;
    ensure!(refused.status == 503, "{refused:?}");
    load.wait_more(300)?;
    fs::remove_file(&filler)?;
    eventually("a registration when there is room again", PATIENCE, || {
        (register("after".to_owned()).ok()?.status == 200).then_some(())
    })?;
    disco.kill();
    disco.start_again()?;
    disco.wait_serving(&["g1", "g2"])?;
    let read = disco.get("/v1/services/filler/instances")?;
    let there: std::collections::BTreeSet<_> = read["instances"]
        .as_array()
        .context("no instances")?
        .iter()
        .filter_map(|instance| instance["id"].as_str())
        .collect();
    row.lost = accepted.iter().filter(|id| !there.contains(id.as_str())).count();
    let after = envoy.updates()?;
    row.responses = after.values().sum::<u64>() - before.values().sum::<u64>();
    load.wait_more(100)?;
    let stats = load.stop()?;
    (row.calls, row.failed) = (stats.ok + stats.failed, stats.failed);
    row.note = format!("writes: {} {}", refused.status, refused.json()?["error"]["code"]);
    Ok(())
}
