//! `disco lock run`: real processes that contend, are killed and frozen, and a server that dies under them.

use std::{fs, path::PathBuf, time::Duration};

use anyhow::{Context as _, bail, ensure};
use rustix::process::{Pid, Signal, kill_process};

use crate::harness::{Disco, Nodes, PATIENCE, Process, eventually, scene};

/// Each command under the lock writes its token all the time. An older one after a newer one would be two holders.
const WORK: &str = "while :; do echo $DISCO_LOCK_TOKEN $WHO >> $WORK; sleep 0.01; done";

struct Stage<'a> {
    disco: &'a Disco,
    work: PathBuf,
    ttl: &'a str,
}

impl<'a> Stage<'a> {
    fn new(disco: &'a Disco, ttl: &'a str) -> Self {
        Self { disco, work: disco.folder().join("work"), ttl }
    }

    /// The same, with another server that is asked first: each knows who waits at it.
    fn at<'b>(&'b self, disco: &'b Disco) -> Stage<'b> {
        Stage { disco, work: self.work.clone(), ttl: self.ttl }
    }

    /// Starts one that waits for the lock behind those before.
    fn contender(&self, who: &str) -> anyhow::Result<Process> {
        let waiting = self.waiting()?;
        let mut command = self.disco.command()?;
        command.args(["lock", "run", "job", "--ttl", self.ttl, "--holder", who, "--"]);
        command.args(["sh", "-c", WORK]).env("WORK", &self.work).env("WHO", who);
        let process = Process::start(who, self.disco.folder(), &mut command)?;
        let before = self.holder()?;
        eventually("contender", PATIENCE, || {
            let behind = self.waiting().is_ok_and(|now| now > waiting);
            let holds = before.is_none() && self.holder().is_ok_and(|holder| holder.is_some());
            (behind || holds).then_some(())
        })?;
        Ok(process)
    }

    fn lock(&self) -> anyhow::Result<serde_json::Value> {
        Ok(self.disco.get("/v1/locks/job")?["lock"].take())
    }

    fn holder(&self) -> anyhow::Result<Option<String>> {
        Ok(self.lock()?["holder"].as_str().map(str::to_owned))
    }

    fn waiting(&self) -> anyhow::Result<u64> {
        Ok(self.lock()?["waiting"].as_u64().unwrap_or_default())
    }

    /// What was done under the lock: tokens and who had them, each once, in order. Fails when an older token comes after a
    /// newer one.
    fn done(&self) -> anyhow::Result<Vec<(u64, String)>> {
        let mut done = Vec::<(u64, String)>::new();
        for line in fs::read_to_string(&self.work).unwrap_or_default().lines() {
            let (token, who) = line.split_once(' ').context("a torn line")?;
            let next = (token.parse()?, who.to_owned());
            if done.last() != Some(&next) {
                ensure!(
                    done.last().is_none_or(|last| last.0 < next.0),
                    "two at once: {done:?}, then {next:?}"
                );
                done.push(next);
            }
        }
        Ok(done)
    }

    /// Waits until it works.
    fn works(&self, who: &str) -> anyhow::Result<()> {
        let mut done = Ok(Vec::new());
        eventually(&format!("work of {who}"), PATIENCE, || {
            done = self.done();
            match &done {
                Ok(done) => done.last().is_some_and(|(_, last)| last == who).then_some(()),
                Err(_) => Some(()),
            }
        })?;
        done.map(drop)
    }
}

/// Whether it is the guard of a `disco lock run`.
fn is_guard(pid: Pid) -> bool {
    let line = fs::read(format!("/proc/{}/cmdline", pid.as_raw_nonzero())).unwrap_or_default();
    String::from_utf8_lossy(&line).contains("lock\0guard")
}

#[test]
fn one_works_at_a_time_whoever_is_killed_or_frozen() {
    scene(|folder| {
        let disco = Disco::start(folder)?;
        let stage = Stage::new(&disco, "1s");

        let mut first = stage.contender("first")?;
        stage.works("first")?;
        let mut refused = disco.command()?;
        let refused = refused.args(["lock", "run", "job", "--no-wait", "--", "true"]).output()?;
        ensure!(refused.status.code() == Some(2), "{refused:?}");

        // Asked to end: the next one has it at once, far within the TTL of those that follow.
        let second = stage.contender("second")?;
        let mut third = stage.contender("third")?;
        first.signal(Signal::TERM)?;
        stage.works("second")?;
        ensure!(first.ended(PATIENCE)?.code() == Some(143));

        // Killed: its command goes with it.
        second.signal(Signal::KILL)?;
        stage.works("third")?;

        // Frozen with all that belongs to it; when it wakes its command is stopped.
        let mut fourth = stage.contender("fourth")?;
        let (guards, work): (Vec<_>, Vec<_>) =
            third.descendants().into_iter().partition(|pid| is_guard(*pid));
        ensure!(guards.len() == 1 && !work.is_empty());
        third.signal(Signal::STOP)?;
        for pid in guards.iter().chain(&work) {
            // The short sleeps of the shell may be over.
            let _ = kill_process(*pid, Signal::STOP);
        }
        stage.works("fourth")?;
        // The command wakes last: a line that it was about to write when it froze is what the token is for.
        third.signal(Signal::CONT)?;
        for pid in guards {
            kill_process(pid, Signal::CONT)?;
        }
        let ended = third.ended(PATIENCE)?;
        ensure!(ended.code() == Some(1), "{ended:?}");

        // Frozen alone: its guard stops the command in time.
        let fifth = stage.contender("fifth")?;
        fourth.signal(Signal::STOP)?;
        stage.works("fifth")?;
        fourth.signal(Signal::CONT)?;
        ensure!(fourth.ended(PATIENCE)?.code() == Some(1));
        drop(fifth);

        let who: Vec<_> = stage.done()?.into_iter().map(|(_, who)| who).collect();
        ensure!(who == ["first", "second", "third", "fourth", "fifth"], "{who:?}");
        Ok(())
    });
}

#[test]
fn over_several_nodes_tokens_only_grow_whoever_dies() {
    scene(|folder| {
        let nodes = Nodes::start(folder, "ha3", "    session_ttl: 2s\n    timeout: 2s\n")?;
        let [n1, n2, n3] = nodes.all.as_slice() else { bail!("not three nodes") };
        let stage = Stage::new(n1, "2s");
        let first = stage.at(n2).contender("first")?;
        stage.works("first")?;
        ensure!(stage.lock()?["node"] == n2.name(), "{}", stage.lock()?);
        let second = stage.at(n3).contender("second")?;

        // The node that counts the lease dies: the holder goes on at another one.
        let before = stage.lock()?;
        n2.signal(Signal::KILL)?;
        eventually("another node", PATIENCE, || (stage.lock().ok()?["node"] != n2.name()).then_some(()))?;
        ensure!(stage.lock()?["token"] == before["token"], "{before} {}", stage.lock()?);

        // The holder is frozen: another one has it, through another node.
        first.signal(Signal::STOP)?;
        stage.works("second")?;
        let third = stage.contender("third")?;
        first.signal(Signal::CONT)?;
        second.signal(Signal::KILL)?;
        stage.works("third")?;
        drop((first, third));

        let who: Vec<_> = stage.done()?.into_iter().map(|(_, who)| who).collect();
        ensure!(who == ["first", "second", "third"], "{who:?}");
        Ok(())
    });
}

#[test]
fn a_lock_outlives_the_server_and_not_its_ttl_without_one() {
    scene(|folder| {
        let mut disco = Disco::start(folder)?;
        let stage = Stage::new(&disco, "3s");
        let mut holder = stage.contender("holder")?;
        stage.works("holder")?;
        let mut next = stage.contender("next")?;
        let before = stage.lock()?;

        disco.start_again()?;
        let stage = Stage::new(&disco, "3s");
        // Renewed at the new process, which thereby counts its lease.
        eventually("renewal", PATIENCE, || {
            let lock = stage.lock().ok()?;
            (lock["revision"] != before["revision"] && lock["waiting"] == 1).then_some(())
        })?;
        let after = stage.lock()?;
        ensure!(after["token"] == before["token"] && after["holder"] == "holder", "{before} {after}");

        // Asked back: the holder stops, and the next one has it.
        let output = disco.command()?.args(["lock", "release", "job"]).output()?;
        ensure!(output.status.success(), "{output:?}");
        stage.works("next")?;
        ensure!(holder.ended(PATIENCE)?.code() == Some(1));

        disco.kill();
        let since = std::time::Instant::now();
        ensure!(next.ended(PATIENCE)?.code() == Some(1));
        ensure!(since.elapsed() > Duration::from_secs(2), "{:?}", since.elapsed());
        Ok(())
    });
}
