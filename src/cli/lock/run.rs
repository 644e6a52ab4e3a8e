//! `disco lock run`: takes a lock, runs a command while it holds it, and ends the command before the lock can be another's.

use std::{ffi::OsString, future, io::Write as _, time::Duration};

use rustix::process::Signal;
use tokio::sync::mpsc;

use super::guard::{Guard, GuardArgs};
use crate::{
    cli::{
        Failure, Global,
        run::{
            host,
            process::{Process as _, Running, stop_requests},
        },
    },
    client::{LockError, Locks, Servers},
    model::{Claim, Lock, LockName, Problems, Revision, format_duration, parse_duration},
    rt::{Tasks, boot_time, sleep_until_boot},
};

/// What a renewal gets at least, however short the TTL.
const SHORTEST: Duration = Duration::from_millis(200);
/// How long giving the lock back may hold up the exit.
const RELEASE: Duration = Duration::from_secs(2);
/// The exit code of who was asked to end while it waited: as if SIGTERM had ended it.
const TERMINATED: u8 = 143;
/// A guard that lives shorter than this is not started again.
const GUARD: Duration = Duration::from_secs(1);
/// The same trouble is told this often.
const REPEAT: Duration = Duration::from_secs(10);

pub(super) const LONG: &str = "\
Waits for the lock NAME, runs COMMAND while it holds it, and gives it back when the command ends. Of all that run with the same \
name at most one runs its command at a time; the others stand by and are served in their order.

The lock is renewed as long as a server answers. When none has for the TTL (measured from when the last good renewal was sent, by \
a clock that goes on while the machine is suspended) the command gets SIGTERM, and SIGKILL a quarter of the TTL later (at most \
10s); only after that do the servers give the lock to the next one. A guard process does the same when this one is frozen, and \
kills the command when this one is killed.

What no clock can prevent: a command that stands still (SIGSTOP, a paused machine) does not know what time it is, and a write \
that it had begun may arrive late. Therefore the command gets a fencing token, in DISCO_LOCK_TOKEN: a number that is greater for \
each later holder, for ever. Send it with each write, and let what you write to refuse a token smaller than the greatest it has seen, \
e.g. UPDATE … SET token = $TOKEN WHERE token <= $TOKEN.

On SIGTERM, SIGINT, SIGHUP or SIGQUIT the command gets SIGTERM, and the next holder the lock as soon as the command has ended. The \
exit code is the command's own; 1 when the lock was lost, 2 when --no-wait finds it held.";

const EXAMPLES: &str = "\
Examples:
  disco lock run nightly-report -- ./report.sh
  disco lock run leader --ttl 5s -- ./worker          # active-standby: start it on three machines
  disco lock run cron --no-wait -- ./job || true";

/// Run a command while holding a lock.
#[derive(Debug, Clone, clap::Args)]
#[command(after_help = EXAMPLES)]
pub(in crate::cli) struct RunArgs {
    /// The lock
    name: LockName,
    /// How long the command may go on without news from a server
    #[arg(long, value_name = "TIME", default_value = "10s", value_parser = ttl)]
    ttl: Duration,
    /// End with 2 when the lock is held, or no server is there, instead of waiting
    #[arg(long)]
    no_wait: bool,
    /// What to tell people of the holder [default: HOST:PID]
    #[arg(long, value_name = "TEXT")]
    holder: Option<String>,
    /// From SIGTERM to SIGKILL when asked to end
    #[arg(long, value_name = "TIME", default_value = "10s", value_parser = parse_duration)]
    stop_timeout: Duration,
    /// The command and its arguments, after `--`
    #[arg(last = true, required = true, value_name = "COMMAND")]
    command: Vec<OsString>,
}

fn ttl(text: &str) -> Result<Duration, String> {
    parse_duration(text).and_then(Claim::check_ttl)
}

pub(super) fn say(line: &str) {
    // Nobody to tell when standard error is closed; the command matters more.
    let _ = writeln!(std::io::stderr().lock(), "disco lock: {line}");
}

/// Runs the command to its end. Returns the exit code for the process.
pub(super) async fn run(args: RunArgs, global: &Global) -> Result<u8, Failure> {
    let servers = Servers::parse(&global.grpc, global.token.as_deref()).map_err(Failure::usage)?;
    let mut problems = Problems::default();
    let holder = args.holder.unwrap_or_else(|| format!("{}:{}", host(), std::process::id()));
    let attempt = format!("{:032x}", fastrand::u128(..));
    let claim = Claim::check_into(args.name.as_str(), holder, attempt, Some(args.ttl), &mut problems);
    let claim = claim.ok_or_else(|| Failure::usage(format!("--{problems}")))?;

    let tasks = Tasks::default();
    let (_, mut stops) = stop_requests(&tasks)?;
    let mut locks = Locks::new(servers);
    let taken = tokio::select! {
        taken = take(&mut locks, &claim, !args.no_wait) => taken?,
        _ = stops.recv() => {
            say(&format!("asked to end while waiting for lock {}", claim.name));
            return Ok(TERMINATED);
        }
    };
    let Taken { token, until } = taken;
    say(&format!("holding lock {} with token {token}", claim.name));

    let mut command = args.command.into_iter();
    let program = command.next().unwrap_or_default();
    let arguments: Vec<_> = command.collect();
    let environment = [("DISCO_LOCK_NAME", claim.name.to_string()), ("DISCO_LOCK_TOKEN", token.to_string())];
    let grace = Lock::stop_grace(claim.ttl);
    let guarding = GuardArgs {
        name: claim.name.clone(),
        fence: token.0,
        grace: u64::try_from(grace.as_millis()).unwrap_or(u64::MAX),
    };
    // Before the command, so that it is never without one.
    let mut guard = Guard::start(&guarding, global, until).await?;
    let outcome = match Running::start(&program, &arguments, &environment) {
        Ok(process) => {
            if let Some(group) = process.group() {
                guard.group(group).await;
            }
            let (news, heard) = mpsc::channel(1);
            let held = Held {
                claim: &claim,
                process,
                guard,
                restart: async |until| Guard::start(&guarding, global, until).await,
                until,
                grace,
                stop_limit: args.stop_timeout,
            };
            tokio::select! {
                code = held.supervise(&mut stops, heard) => Ok(code),
                () = renewals(&mut locks, &claim, token, until, news) => unreachable_end(),
            }
        }
        Err(failure) => {
            guard.done().await;
            Err(failure)
        }
    };
    match locks.release(&claim.name, token, RELEASE).await {
        Ok(()) => say(&format!("released lock {}", claim.name)),
        // Lost before; what there is to say of it was said.
        Err(LockError::Held(_)) => {}
        Err(error) => say(&format!("lock {} ends with its lease: {error}", claim.name)),
    }
    tasks.shutdown().start();
    outcome
}

fn unreachable_end() -> Result<u8, Failure> {
    Err(Failure::failed("the renewals ended by themselves"))
}

/// A lock that is held for sure until then, by [`boot_time`].
struct Taken {
    token: Revision,
    until: Duration,
}

/// Takes the lock and renews it once: how long ago a server gave it is not known, when that renewal was sent is.
async fn take(locks: &mut Locks, claim: &Claim, patient: bool) -> Result<Taken, Failure> {
    let told = Told::default();
    if patient {
        say(&format!("waiting for lock {}", claim.name));
    }
    loop {
        let news = |reason: &str| {
            told.say(&format!(
                "no server gives lock {} yet ({reason}); still trying. `disco dev` starts one",
                claim.name
            ));
        };
        let token = locks.acquire(claim, patient, news).await.map_err(|error| match error {
            LockError::Held(message) | LockError::Unreachable(message) => Failure::not_yet(message),
            LockError::Refused(message) => Failure::bad_data(message),
        })?;
        let sent = boot_time();
        match locks.renew(&claim.name, token, claim.ttl).await {
            Ok(()) => return Ok(Taken { token, until: sent + claim.ttl }),
            Err(LockError::Refused(message)) => return Err(Failure::bad_data(message)),
            // It came too late, or from a server that is gone.
            Err(error) => told.say(&format!("lock {} is not held for sure: {error}", claim.name)),
        }
    }
}

/// Says a thing now and then only.
#[derive(Debug, Default)]
struct Told(std::cell::Cell<Option<Duration>>);

impl Told {
    fn say(&self, line: &str) {
        let now = boot_time();
        if self.0.get().is_none_or(|last| now >= last + REPEAT) {
            self.0.set(Some(now));
            say(line);
        }
    }
}

/// What is new of a lock that is held.
#[derive(Debug, PartialEq, Eq)]
enum News {
    /// It is held until then.
    Until(Duration),
    /// It is not held any more.
    Lost(String),
}

/// Renews the lock four times in a TTL. Never returns.
async fn renewals(
    locks: &mut Locks,
    claim: &Claim,
    token: Revision,
    mut until: Duration,
    news: mpsc::Sender<News>,
) {
    let told = Told::default();
    loop {
        sleep_until_boot(until.saturating_sub(claim.ttl / 4 * 3)).await;
        let sent = boot_time();
        let limit = (claim.ttl / 4).max(SHORTEST);
        let what = match locks.renew(&claim.name, token, limit).await {
            Ok(()) => {
                until = sent + claim.ttl;
                News::Until(until)
            }
            Err(LockError::Unreachable(reason)) => {
                let left = until.saturating_sub(boot_time());
                if !left.is_zero() {
                    told.say(&format!(
                        "lock {} cannot be renewed, the command may go on for {} s: {reason}",
                        claim.name,
                        left.as_secs()
                    ));
                }
                continue;
            }
            Err(LockError::Held(message) | LockError::Refused(message)) => News::Lost(message),
        };
        let lost = matches!(what, News::Lost(_));
        // Nobody hears it when the command has just ended.
        let _ = news.send(what).await;
        if lost {
            return future::pending().await;
        }
    }
}

/// A command that runs under a lock.
struct Held<'a, R> {
    claim: &'a Claim,
    process: Running,
    guard: Guard,
    /// Starts another guard.
    restart: R,
    until: Duration,
    grace: Duration,
    stop_limit: Duration,
}

impl<R: AsyncFn(Duration) -> Result<Guard, Failure>> Held<'_, R> {
    /// Returns the exit code once nothing of the command is left.
    async fn supervise(mut self, stops: &mut mpsc::Receiver<()>, mut news: mpsc::Receiver<News>) -> u8 {
        let mut lost = false;
        let mut kill_at: Option<Duration> = None;
        let exit = loop {
            tokio::select! {
                biased;
                exit = self.process.wait() => break exit,
                () = sleep_until_boot(kill_at.unwrap_or_default()), if kill_at.is_some() => {
                    say("the command did not end in time: killing it");
                    self.process.signal(Signal::KILL);
                    kill_at = None;
                }
                () = sleep_until_boot(self.until), if !lost => {
                    let ttl = format_duration(self.claim.ttl);
                    say(&format!("lock {} was not renewed for {ttl}: stopping the command", self.claim.name));
                    lost = true;
                    self.process.signal(Signal::TERM);
                    let end = self.until + self.grace;
                    kill_at = Some(kill_at.map_or(end, |at| at.min(end)));
                }
                Some(what) = news.recv(), if !lost => match what {
                    News::Until(until) => {
                        self.until = until;
                        self.guard.until(until).await;
                    }
                    News::Lost(message) => {
                        say(&format!("stopping the command: {message}"));
                        lost = true;
                        self.process.signal(Signal::TERM);
                        kill_at = Some(self.until.min(boot_time() + self.grace));
                    }
                },
                _ = stops.recv() => {
                    if kill_at.is_some() {
                        self.process.signal(Signal::KILL);
                    } else if !lost {
                        say("asked to end: stopping the command");
                        self.process.signal(Signal::TERM);
                        kill_at = Some(boot_time() + self.stop_limit);
                    }
                }
                lived = self.guard.ended(), if !lost => {
                    let again = if lived < GUARD {
                        Err(Failure::failed("the guard of the command does not stay"))
                    } else {
                        (self.restart)(self.until).await
                    };
                    match (again, self.process.group()) {
                        (Ok(mut guard), Some(group)) => {
                            guard.group(group).await;
                            self.guard = guard;
                        }
                        (Ok(_), None) => {}
                        (Err(failure), _) => {
                            say(&format!("stopping the command: {failure}"));
                            lost = true;
                            self.process.signal(Signal::TERM);
                            kill_at = Some(self.until.min(boot_time() + self.grace));
                        }
                    }
                }
            }
        };
        // What the command left behind holds the lock as much as the command did.
        self.process.kill_rest();
        self.guard.done().await;
        say(&format!("the command ended: {exit}"));
        // The guard stops it, too, when this process was frozen.
        if lost || boot_time() >= self.until { 1 } else { exit.code() }
    }
}
