use std::{
    io::{BufRead as _, BufReader, Write as _},
    net::{SocketAddr, TcpListener, TcpStream},
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    thread,
    time::Instant,
};

use anyhow::ensure;
use serde_json::json;

use super::Set;
use crate::harness::{Nodes, PATIENCE, eventually, scene};

/// A database of two, in this process: the term says which of them leads, the odd or the even one.
#[derive(Debug, Clone, Default)]
struct Pretend(Arc<AtomicU64>);

impl Pretend {
    fn serve(&self, number: u64) -> anyhow::Result<SocketAddr> {
        let listener = TcpListener::bind(("127.0.0.1", 0))?;
        let (address, pretend) = (listener.local_addr()?, self.clone());
        thread::spawn(move || {
            for stream in listener.incoming().flatten() {
                let pretend = pretend.clone();
                thread::spawn(move || pretend.answer(number, stream));
            }
        });
        Ok(address)
    }

    fn answer(&self, number: u64, mut stream: TcpStream) -> std::io::Result<()> {
        let mut lines = BufReader::new(stream.try_clone()?).lines();
        while let Some(line) = lines.next().transpose()? {
            if line.is_empty() {
                let term = self.0.load(Ordering::Relaxed);
                let role = if term % 2 == number % 2 { "leader" } else { "follower" };
                let body = json!({"role": role, "term": term}).to_string();
                write!(stream, "HTTP/1.1 200 OK\r\ncontent-length: {}\r\n\r\n{body}", body.len())?;
            }
        }
        Ok(())
    }
}

#[test]
fn a_standby_observes_when_the_node_that_did_is_dead() {
    scene(|folder| {
        let mut nodes = Nodes::start(folder, "ha3", "    session_ttl: 2s\n    timeout: 2s\n")?;
        let pretend = Pretend::default();
        let spec = json!({"kind": "generic", "expect": 2, "observe": {"adapter": "http", "options": {"path": "/role"}}});
        let set = Set::create(&nodes.all[0], "pair", &spec)?;
        for number in [1, 2] {
            let at = pretend.serve(number)?;
            set.add(&format!("p{number}"), at, at, json!({}))?;
        }
        let mut term = 0;
        let mut change = |set: &Set| -> anyhow::Result<u128> {
            term += 1;
            let began = Instant::now();
            pretend.0.store(term, Ordering::Relaxed);
            let leader = if term % 2 == 1 { "p1" } else { "p2" };
            set.wait_leader(leader, |now| now == Some(leader))?;
            ensure!(set.view()?["term"] == term, "{}", set.view()?);
            Ok(began.elapsed().as_millis())
        };
        change(&set)?;
        // Whichever of them does it.
        for victim in 0..nodes.all.len() {
            let other = &nodes.all[(victim + 1) % nodes.all.len()];
            let set = Set { name: set.name, http: other.http };
            eventually("the others' view", PATIENCE, || set.leader())?;
            let usual = change(&set)?;
            nodes.all[victim].kill();
            let without = change(&set)?;
            eprintln!(
                "another leader is known after {usual} ms, and after {without} ms when a node has just died"
            );
            nodes.all[victim].start_again()?;
            nodes.wait_ready()?;
        }
        Ok(())
    });
}
