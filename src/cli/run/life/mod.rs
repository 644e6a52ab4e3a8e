//! The life of a supervised command, from its start to its exit code, over small traits for what it touches.

use std::time::Duration;

use rustix::process::Signal;
use tokio::{
    sync::mpsc,
    time::{Instant, Interval, MissedTickBehavior, interval_at, sleep, timeout},
};

use crate::{
    cli::run::process::{Exit, Process},
    client::{Acknowledged, SessionState},
    health::{Machine, Outcome},
    model::{Revision, Verdict, format_duration},
};

/// Longest time that an ended command's deregistration may hold up the exit. With a server there it takes
/// milliseconds; without one, the end of the session tells the server as much.
const DEREGISTER: Duration = Duration::from_secs(2);
/// What asking who has acknowledged may take beyond its own limit.
const GRACE: Duration = Duration::from_secs(2);
/// The same trouble with the server is logged this often.
const REPEAT: Duration = Duration::from_secs(5);

/// The choices of whoever started it.
#[derive(Debug, Clone)]
pub(super) struct Plan {
    /// For the log, e.g. `greeter/host-50051`.
    pub(super) name: String,
    /// Until when the check must have passed for the first time.
    pub(super) start_limit: Duration,
    /// Pause between two checks until then.
    pub(super) start_interval: Duration,
    /// Pause between two checks afterwards; zero: none.
    pub(super) interval: Duration,
    /// So many failed checks in a row make it drain.
    pub(super) failures: u32,
    /// Longest wait for the proxies to acknowledge a drain.
    pub(super) drain_limit: Duration,
    /// From SIGTERM to SIGKILL.
    pub(super) stop_limit: Duration,
}

/// The instance's place in the registry.
pub(super) trait Registrar {
    /// Starts to register the instance.
    async fn register(&mut self);
    /// Says whether it works, to whatever server there is, now or later.
    fn report(&mut self, verdict: Verdict, seen: String);
    /// Returns with each news of the registration. Cancel-safe.
    async fn news(&mut self) -> SessionState;
    /// Takes it out of load balancing; waits for a server if there is none.
    async fn drain(&mut self) -> Result<Revision, String>;
    /// Waits, at most `limit`, until all proxies that may call the instance know of `revision`.
    async fn acknowledged(&mut self, revision: Revision, limit: Duration) -> Acknowledged;
    /// Removes it; waits for a server if there is none.
    async fn deregister(&mut self) -> Result<Revision, String>;
}

/// Asks the command whether it works.
pub(super) trait Check {
    /// Asks once.
    async fn check(&mut self) -> Outcome;
}

/// Everything that a life touches.
#[derive(Debug)]
pub(super) struct Life<P, R, C, L> {
    pub(super) plan: Plan,
    pub(super) process: P,
    pub(super) registrar: R,
    /// None: it is taken to work as soon as it is started.
    pub(super) check: Option<C>,
    /// One for each request to end.
    pub(super) stops: mpsc::Receiver<()>,
    /// Takes a line for the person who watches.
    pub(super) log: L,
}

/// What ended the time before registration.
enum Started {
    Works,
    Exited(Exit),
    TimedOut,
    Stop,
}

/// What ended the time of service.
enum Served {
    Exited(Exit),
    Stop,
    /// The server will never take this registration.
    Refused(String),
}

impl<P: Process, R: Registrar, C: Check, L: Fn(&str)> Life<P, R, C, L> {
    /// Lives it; returns the exit code.
    pub(super) async fn live(mut self) -> u8 {
        let mut seen = String::new();
        match self.start(&mut seen).await {
            Started::Works => {}
            Started::Exited(exit) => {
                self.say(&format!("the command ended before its check passed: {exit}"));
                return exit.code();
            }
            Started::TimedOut => {
                let limit = format_duration(self.plan.start_limit);
                self.say(&format!(
                    "the check did not pass within {limit}; stopping the command. Last seen: {seen}"
                ));
                self.stop().await;
                return 1;
            }
            Started::Stop => {
                self.say("asked to end before the check passed; stopping the command");
                return self.stop().await.code();
            }
        }
        let mut registered = false;
        match self.serve(&mut registered).await {
            Served::Exited(exit) => self.exited(exit, registered).await,
            Served::Refused(message) => {
                self.say(&format!("the registration was refused; stopping the command. {message}"));
                self.stop().await;
                1
            }
            Served::Stop => {
                if registered && let Some(exit) = self.drain().await {
                    return self.exited(exit, registered).await;
                }
                self.say("stopping the command");
                let exit = self.stop().await;
                let line = self.deregister(registered).await;
                self.say(&format!("the command ended: {exit}"));
                line.iter().for_each(|line| self.say(line));
                exit.code()
            }
        }
    }

    async fn start(&mut self, seen: &mut String) -> Started {
        let Some(check) = &mut self.check else { return Started::Works };
        tokio::select! {
            biased;
            exit = self.process.wait() => Started::Exited(exit),
            _ = self.stops.recv() => Started::Stop,
            () = passes(check, self.plan.start_interval, seen) => Started::Works,
            () = sleep(self.plan.start_limit) => Started::TimedOut,
        }
    }

    /// Registered, or trying to be; `registered` tells whether a server ever took it.
    async fn serve(&mut self, registered: &mut bool) -> Served {
        self.registrar.register().await;
        let mut complaints = Complaints::default();
        let mut watch = Watch::new(&self.plan);
        loop {
            tokio::select! {
                biased;
                exit = self.process.wait() => return Served::Exited(exit),
                _ = self.stops.recv() => return Served::Stop,
                state = self.registrar.news() => match state {
                    SessionState::Refused { message } if !*registered => return Served::Refused(message),
                    state => {
                        if let Some(line) = complaints.line(&self.plan.name, &state, *registered) {
                            self.say(&line);
                        }
                        *registered |= matches!(state, SessionState::Connected { .. });
                    }
                },
                (verdict, seen) = watch.verdict(&mut self.check) => {
                    self.say(&line_of(verdict, &seen, &self.plan));
                    self.registrar.report(verdict, seen);
                }
            }
        }
    }

    /// Returns when all proxies know, when the time is up, or when asked again to end; or with the command's own end.
    async fn drain(&mut self) -> Option<Exit> {
        let limit = self.plan.drain_limit;
        self.say(&format!(
            "draining {}: waiting at most {} for the proxies",
            self.plan.name,
            format_duration(limit)
        ));
        let end = Instant::now() + limit;
        let drain = async {
            let revision = timeout(limit, self.registrar.drain())
                .await
                .map_err(|_| format!("no server took the drain within {}", format_duration(limit)))??;
            let left = end.saturating_duration_since(Instant::now());
            let acknowledged = self.registrar.acknowledged(revision, left);
            match timeout(left + GRACE, acknowledged).await {
                Ok(acknowledged) => Ok((revision, acknowledged)),
                Err(_) => Err("nobody could say which proxies know of the drain".to_owned()),
            }
        };
        let line = tokio::select! {
            biased;
            exit = self.process.wait() => return Some(exit),
            _ = self.stops.recv() => "asked again to end: waiting for the proxies no longer".to_owned(),
            outcome = drain => match outcome {
                Ok((revision, acknowledged)) => describe(revision, &acknowledged, limit),
                Err(error) => format!("the drain is not known to be complete: {error}"),
            },
        };
        self.say(&line);
        None
    }

    /// SIGTERM, then SIGKILL when it takes too long or when asked again to end.
    async fn stop(&mut self) -> Exit {
        self.process.signal(Signal::TERM);
        let why = tokio::select! {
            biased;
            exit = self.process.wait() => return exit,
            _ = self.stops.recv() => "asked again to end: killing the command".to_owned(),
            () = sleep(self.plan.stop_limit) => {
                format!("the command did not end within {}: killing it", format_duration(self.plan.stop_limit))
            }
        };
        self.say(&why);
        self.process.signal(Signal::KILL);
        self.process.wait().await
    }

    /// The command ended by itself: the registry hears of it before anybody else does.
    async fn exited(&mut self, exit: Exit, registered: bool) -> u8 {
        let line = self.deregister(registered).await;
        self.say(&format!("the command ended by itself: {exit}"));
        line.iter().for_each(|line| self.say(line));
        exit.code()
    }

    /// Returns what to log of it.
    async fn deregister(&mut self, registered: bool) -> Option<String> {
        if !registered {
            return None;
        }
        let name = &self.plan.name;
        let since = Instant::now();
        Some(match timeout(DEREGISTER, self.registrar.deregister()).await {
            Ok(Ok(revision)) => {
                let took = since.elapsed().as_secs_f64() * 1000.0;
                format!("deregistered {name}, revision {revision}, in {took:.1} ms")
            }
            Ok(Err(error)) => format!("{name} is not deregistered: {error}"),
            Err(_) => format!("no server to deregister {name} at; the end of its session will remove it"),
        })
    }

    fn say(&self, line: &str) {
        (self.log)(line);
    }
}

/// Returns when the check passes; `seen` holds what the last failed one saw.
async fn passes(check: &mut impl Check, pause: Duration, seen: &mut String) {
    seen.push_str("nothing, the first check did not end");
    while let Err(error) = check.check().await.passed() {
        *seen = error;
        sleep(pause).await;
    }
}

fn describe(revision: Revision, acknowledged: &Acknowledged, limit: Duration) -> String {
    let Acknowledged { proxies, pending, unknown } = acknowledged;
    if pending.is_empty() && unknown.is_empty() {
        return match proxies {
            0 => format!("no proxy uses it; drained at revision {revision}"),
            1 => format!("the proxy that uses it has acknowledged revision {revision}"),
            n => format!("all {n} proxies that use it have acknowledged revision {revision}"),
        };
    }
    let mut parts = Vec::new();
    if !pending.is_empty() {
        parts.push(format!("not acknowledged within {} by {}", format_duration(limit), pending.join(", ")));
    }
    parts.extend(unknown.iter().map(|reason| format!("unknown: {reason}")));
    format!("revision {revision} is acknowledged by {proxies} of the proxies; {}", parts.join("; "))
}

/// Keeps news of a registration from repeating itself.
#[derive(Debug, Default)]
struct Complaints {
    last: Option<Instant>,
}

impl Complaints {
    fn line(&mut self, name: &str, state: &SessionState, registered: bool) -> Option<String> {
        let line = match state {
            SessionState::Connecting => return None,
            SessionState::Connected { revision } => {
                if registered && self.last.take().is_none() {
                    // A change that the session made itself.
                    return None;
                }
                self.last = None;
                return Some(format!("registered {name}, revision {revision}"));
            }
            SessionState::Reconnecting { error } if registered => format!(
                "lost the server ({error}); the command keeps running and is registered again when a server is back"
            ),
            SessionState::Reconnecting { error } => format!(
                "no server takes the registration yet ({error}); the command runs and is registered as soon as one \
                 does. `disco dev` starts one"
            ),
            SessionState::Refused { message } => format!(
                "the registration is lost, the command keeps running without it: {message}. Start it again to \
                 register anew"
            ),
        };
        let due = self.last.is_none_or(|last| last.elapsed() >= REPEAT);
        due.then(|| {
            self.last = Some(Instant::now());
            line
        })
    }
}

fn line_of(verdict: Verdict, seen: &str, plan: &Plan) -> String {
    let (name, failures) = (&plan.name, plan.failures);
    match verdict {
        Verdict::Unhealthy => {
            format!("{failures} checks in a row have failed ({seen}): {name} gets no calls")
        }
        Verdict::Degraded => {
            format!("{name} is degraded ({seen}): it gets calls when no healthy instance is left")
        }
        Verdict::Healthy | Verdict::Unknown => format!("the check passes again: {name} gets calls"),
    }
}

/// The checks after registration.
#[derive(Debug)]
struct Watch {
    interval: Option<Interval>,
    machine: Machine,
}

impl Watch {
    fn new(plan: &Plan) -> Self {
        let interval = (!plan.interval.is_zero()).then(|| {
            let mut interval = interval_at(Instant::now() + plan.interval, plan.interval);
            interval.set_missed_tick_behavior(MissedTickBehavior::Delay);
            interval
        });
        Self { interval, machine: Machine::new(1, plan.failures, plan.interval, Verdict::Healthy, true) }
    }

    /// Returns when the verdict changes, with what was seen. When cancelled, a check that is under way is not counted.
    async fn verdict(&mut self, check: &mut Option<impl Check>) -> (Verdict, String) {
        let (Some(interval), Some(check)) = (&mut self.interval, check) else {
            return std::future::pending().await;
        };
        loop {
            interval.tick().await;
            let outcome = check.check().await;
            let now = Instant::now();
            if let Some(verdict) = outcome.verdict().and_then(|seen| self.machine.observe(seen, now)) {
                self.machine.accept(verdict, now);
                return (verdict, outcome.seen());
            }
        }
    }
}

#[cfg(test)]
mod tests;
