use std::{cell::RefCell, collections::VecDeque, rc::Rc};

use tokio::sync::watch;

use super::*;

/// What was done, each with its time in milliseconds.
type Transcript = Rc<RefCell<Vec<String>>>;

/// What happens from outside.
enum Event {
    Exit(Exit),
    Stop,
    State(SessionState),
}
use Event::{Exit as Exits, State, Stop};

/// A life as data. Times are in milliseconds, None means never.
struct Script {
    /// Results of the checks in order, the last one for ever.
    checks: Vec<Result<(), &'static str>>,
    events: Vec<(u64, Event)>,
    /// From a drain to its answer.
    drained: Option<u64>,
    /// From asking who has acknowledged to the answer.
    acknowledged: Option<u64>,
    /// From SIGTERM to the command's end.
    obeys: Option<u64>,
    no_check: bool,
}

impl Default for Script {
    fn default() -> Self {
        Self {
            checks: vec![Ok(())],
            events: vec![],
            drained: Some(1),
            acknowledged: Some(20),
            obeys: Some(100),
            no_check: false,
        }
    }
}

#[derive(Clone)]
struct Clock {
    since: Instant,
    done: Transcript,
}

impl Clock {
    fn note(&self, what: &str) {
        self.done.borrow_mut().push(format!("{} {what}", self.since.elapsed().as_millis()));
    }
}

struct FakeProcess {
    clock: Clock,
    exit: watch::Sender<Option<(Instant, Exit)>>,
    obeys: Option<u64>,
}

impl Process for FakeProcess {
    async fn wait(&mut self) -> Exit {
        let mut exit = self.exit.subscribe();
        let (at, exit) = exit.wait_for(Option::is_some).await.unwrap().unwrap();
        tokio::time::sleep_until(at).await;
        exit
    }

    fn signal(&mut self, signal: Signal) {
        let (name, delay) =
            if signal == Signal::KILL { ("SIGKILL", Some(0)) } else { ("SIGTERM", self.obeys) };
        self.clock.note(name);
        if let Some(delay) = delay {
            let exit = Exit::Signal(signal.as_raw());
            self.exit.send_replace(Some((Instant::now() + Duration::from_millis(delay), exit)));
        }
    }
}

struct FakeRegistrar {
    clock: Clock,
    states: mpsc::Receiver<SessionState>,
    drained: Option<u64>,
    acknowledged: Option<u64>,
}

async fn after(delay: Option<u64>) {
    match delay {
        Some(delay) => sleep(Duration::from_millis(delay)).await,
        None => std::future::pending().await,
    }
}

impl Registrar for FakeRegistrar {
    async fn register(&mut self) {
        self.clock.note("register");
    }

    fn report(&mut self, verdict: Verdict, seen: String) {
        self.clock.note(format!("{verdict} {seen}").trim());
    }

    async fn news(&mut self) -> SessionState {
        match self.states.recv().await {
            Some(state) => state,
            None => std::future::pending().await,
        }
    }

    async fn drain(&mut self) -> Result<Revision, String> {
        self.clock.note("drain");
        after(self.drained).await;
        Ok(Revision(5))
    }

    async fn acknowledged(&mut self, revision: Revision, limit: Duration) -> Acknowledged {
        self.clock.note(&format!("ask for {revision}"));
        let late = timeout(limit, after(self.acknowledged)).await.is_err();
        let pending = if late { vec!["envoy-b".to_owned()] } else { vec![] };
        Acknowledged { proxies: 1, pending, unknown: vec![] }
    }

    async fn deregister(&mut self) -> Result<Revision, String> {
        self.clock.note("deregister");
        Ok(Revision(6))
    }
}

struct FakeCheck(VecDeque<Result<(), &'static str>>);

impl Check for FakeCheck {
    async fn check(&mut self) -> Outcome {
        let result = if self.0.len() > 1 { self.0.pop_front() } else { self.0.front().copied() };
        match result.unwrap() {
            Ok(()) => Outcome::Passed,
            Err("slow") => Outcome::Degraded("slow".to_owned()),
            Err(seen) => Outcome::Failed(seen.to_owned()),
        }
    }
}

/// Plays the script; wants this exit code, exactly these steps, and each of these words in the log.
async fn check(script: Script, code: u8, steps: &[&str], words: &[&str]) {
    let clock = Clock { since: Instant::now(), done: Transcript::default() };
    let (stop, stops) = mpsc::channel(2);
    let (news, states) = mpsc::channel(8);
    let exit = watch::channel(None).0;
    let log = Transcript::default();
    let lines = log.clone();
    let life = Life {
        plan: Plan {
            name: "greeter/a".into(),
            start_limit: Duration::from_secs(1),
            start_interval: Duration::from_millis(200),
            interval: Duration::from_secs(5),
            failures: 3,
            drain_limit: Duration::from_secs(10),
            stop_limit: Duration::from_secs(3),
        },
        process: FakeProcess { clock: clock.clone(), exit: exit.clone(), obeys: script.obeys },
        registrar: FakeRegistrar {
            clock: clock.clone(),
            states,
            drained: script.drained,
            acknowledged: script.acknowledged,
        },
        check: (!script.no_check).then(|| FakeCheck(script.checks.into())),
        stops,
        log: move |line: &str| lines.borrow_mut().push(line.to_owned()),
    };
    let world = async {
        for (at, event) in script.events {
            tokio::time::sleep_until(clock.since + Duration::from_millis(at)).await;
            match event {
                Exits(how) => {
                    exit.send_replace(Some((Instant::now(), how)));
                }
                Stop => stop.try_send(()).unwrap(),
                State(state) => news.try_send(state).unwrap(),
            }
        }
        std::future::pending::<()>().await;
    };
    let got = tokio::select! {
        got = timeout(Duration::from_secs(3600), life.live()) => got.expect("the life never ends"),
        () = world => unreachable!(),
    };
    let log = log.borrow().join("\n");
    assert_eq!(*clock.done.borrow(), steps, "{log}");
    assert_eq!(got, code, "{log}");
    for word in words {
        assert!(log.contains(word), "{word:?} is not in the log:\n{log}");
    }
}

fn connected() -> Event {
    State(SessionState::Connected { revision: Revision(4) })
}

fn away() -> Event {
    State(SessionState::Reconnecting { error: "connection refused".into() })
}

fn refused() -> Event {
    State(SessionState::Refused { message: "port: is wrong".into() })
}

#[tokio::test(start_paused = true)]
async fn a_whole_life() {
    let script = Script {
        checks: vec![Err("refused"), Err("refused"), Ok(())],
        events: vec![(401, connected()), (1000, Stop)],
        ..Script::default()
    };
    check(
        script,
        143,
        &["400 register", "1000 drain", "1001 ask for 5", "1021 SIGTERM", "1121 deregister"],
        &["registered greeter/a, revision 4", "has acknowledged revision 5", "killed by signal 15"],
    )
    .await;
}

#[tokio::test(start_paused = true)]
async fn a_crash_is_reported_at_once() {
    let crash = (700, Exits(Exit::Signal(9)));
    let script = Script { events: vec![(1, connected()), crash], ..Script::default() };
    check(script, 137, &["0 register", "700 deregister"], &["ended by itself: killed by signal 9"]).await;
}

#[tokio::test(start_paused = true)]
async fn a_crash_during_the_drain_is_reported_at_once() {
    let script = Script {
        events: vec![(1, connected()), (100, Stop), (150, Exits(Exit::Code(3)))],
        acknowledged: None,
        ..Script::default()
    };
    check(script, 3, &["0 register", "100 drain", "101 ask for 5", "150 deregister"], &["exit code 3"]).await;
}

#[tokio::test(start_paused = true)]
async fn before_the_check_passes() {
    let never = || Script { checks: vec![Err("GET / answered 503")], ..Script::default() };
    check(never(), 1, &["1000 SIGTERM"], &["did not pass within 1s", "GET / answered 503"]).await;
    let script = Script { events: vec![(300, Exits(Exit::Code(0)))], ..never() };
    check(script, 0, &[], &["ended before its check passed: exit code 0"]).await;
    let script = Script { events: vec![(300, Stop)], ..never() };
    check(script, 143, &["300 SIGTERM"], &["asked to end before"]).await;
    let script = Script { no_check: true, events: vec![(300, Exits(Exit::Code(2)))], ..never() };
    check(script, 2, &["0 register"], &[]).await;
}

#[tokio::test(start_paused = true)]
async fn proxies_that_do_not_acknowledge_are_named() {
    let script =
        Script { events: vec![(1, connected()), (1000, Stop)], acknowledged: None, ..Script::default() };
    check(
        script,
        143,
        &["0 register", "1000 drain", "1001 ask for 5", "11000 SIGTERM", "11100 deregister"],
        &["not acknowledged within 10s by envoy-b"],
    )
    .await;
}

#[tokio::test(start_paused = true)]
async fn further_requests_to_end_skip_the_waiting() {
    let script = Script {
        events: vec![(1, connected()), (1000, Stop), (2000, Stop), (2500, Stop)],
        acknowledged: None,
        obeys: None,
        ..Script::default()
    };
    check(
        script,
        137,
        &["0 register", "1000 drain", "1001 ask for 5", "2000 SIGTERM", "2500 SIGKILL", "2500 deregister"],
        &["waiting for the proxies no longer", "killing the command"],
    )
    .await;
}

#[tokio::test(start_paused = true)]
async fn a_command_that_ignores_sigterm_is_killed() {
    let script = Script { events: vec![(1, connected()), (10, Stop)], obeys: None, ..Script::default() };
    check(
        script,
        137,
        &["0 register", "10 drain", "11 ask for 5", "31 SIGTERM", "3031 SIGKILL", "3031 deregister"],
        &["did not end within 3s"],
    )
    .await;
}

#[tokio::test(start_paused = true)]
async fn without_a_server_the_command_runs_on() {
    // Never registered: nothing to drain or deregister.
    let script = Script { events: vec![(1, away()), (100, away()), (9000, Stop)], ..Script::default() };
    check(script, 143, &["0 register", "9000 SIGTERM"], &["no server takes the registration yet"]).await;
    // Registered once: the drain waits for a server as long as it may.
    let script = Script {
        events: vec![(1, connected()), (5, away()), (9000, Stop)],
        drained: None,
        ..Script::default()
    };
    check(
        script,
        143,
        &["0 register", "9000 drain", "19000 SIGTERM", "19100 deregister"],
        &["lost the server (connection refused)", "no server took the drain within 10s"],
    )
    .await;
}

#[tokio::test(start_paused = true)]
async fn refused_registrations() {
    let script = Script { events: vec![(5, refused())], ..Script::default() };
    check(script, 1, &["0 register", "5 SIGTERM"], &["was refused", "port: is wrong"]).await;
    let late = vec![(1, connected()), (5, refused()), (700, Exits(Exit::Code(4)))];
    let script = Script { events: late, ..Script::default() };
    check(script, 4, &["0 register", "700 deregister"], &["the command keeps running without it"]).await;
}

#[tokio::test(start_paused = true)]
async fn verdicts_of_the_checks_are_reported() {
    let script = Script {
        // The first passes; two misses are forgiven, three are not.
        checks: vec![
            Ok(()),
            Err("x"),
            Err("x"),
            Ok(()),
            Err("x"),
            Err("x"),
            Err("y"),
            Err("x"),
            Err("slow"),
            Ok(()),
        ],
        events: vec![(1, connected()), (60_000, Exits(Exit::Code(0)))],
        ..Script::default()
    };
    check(
        script,
        0,
        &["0 register", "30000 unhealthy y", "40000 degraded slow", "45000 healthy", "60000 deregister"],
        &["3 checks in a row have failed (y)", "is degraded (slow)", "the check passes again"],
    )
    .await;
}

#[test]
fn the_same_trouble_is_logged_now_and_then() {
    let mut complaints = Complaints::default();
    let state = SessionState::Reconnecting { error: "away".into() };
    assert!(complaints.line("a", &state, true).is_some());
    assert!(complaints.line("a", &state, true).is_none());
    let connected = SessionState::Connected { revision: Revision(1) };
    assert!(complaints.line("a", &connected, true).is_some(), "the end of the trouble is told");
    assert!(complaints.line("a", &connected, true).is_none(), "a change of its own is not");
}
