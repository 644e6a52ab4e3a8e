//! `disco run`: starts a command, registers it while it works, and takes it out of load balancing before it stops.

mod life;
pub(super) mod process;
mod registrar;
mod replica;

use std::{collections::BTreeMap, ffi::OsString, fmt, io::Write as _, net::SocketAddr, time::Duration};

use crate::{
    cli::{Failure, Global, parse},
    client::Servers,
    health::{Ask, Command, Network, Outcome, Prober},
    model::{
        Limits, MAX_INSTANCE_ID, Probe, Problems, RawCheck, RawKind, RawRegistration, Registration, excerpt,
        parse_duration,
    },
    rt::Tasks,
};
use life::{Check, Life, Plan};
use process::{Running, stop_requests};
use registrar::Sessions;
use replica::{Replica, ReplicaArgs};

/// Longest time for one check.
const CHECK: Duration = Duration::from_secs(2);
/// Longest look at the port before the command is started.
const GLANCE: Duration = Duration::from_millis(200);

pub(super) const LONG: &str = "\
Starts COMMAND and registers it as an instance of a service once its check passes. The registration lasts as long as \
this program: when the command ends, however it ends, it is removed at once.

On SIGTERM, SIGINT, SIGHUP or SIGQUIT the instance is drained first: it takes no new calls, and when every proxy has \
acknowledged that, the command gets SIGTERM, and SIGKILL if that takes too long. Asking a second time skips the \
waiting. The exit code is the command's own, 128 and the signal's number if it was killed, 127 if it was not found.

The command runs on when no Disco server can be reached, and is registered when there is one. After registration the \
check goes on; when it fails several times in a row the instance is reported unhealthy and gets no calls until it passes \
again. A --health-command is run by /bin/sh: exit code 0 means healthy, 75 degraded, anything else unhealthy.

The command gets DISCO_SERVICE, DISCO_INSTANCE, DISCO_ADDRESS and PORT in its environment. It runs in a process group of \
its own, without the terminal as its input.

With --peer-set it is a replica of a database. It is registered with its name and the mark of its disk, and started when the set is \
founded, or, if it comes later, when its add was seen. The list is in DISCO_PEERS and in the file DISCO_PEERS_FILE, its number in \
DISCO_NODE_ID and DISCO_PEER_ORDINAL, and whether it founds or joins in DISCO_PEER_BIRTH. All that is kept in the data directory: \
a replica starts again with it when no server answers. One that was told nothing yet ends with 2 then.";

const EXAMPLES: &str = "\
Examples:
  disco run --service greeter --port 50051 --health grpc -- ./greeter --listen 127.0.0.1:50051
  disco run --service web --port 8080 --health http /healthz --zone z1 -- python3 -m http.server 8080
  disco run --peer-set kv --peer-key n1 --raft-port 7001 --data-dir /data/n1 --peers-format etcd-env -- ./start.sh
  disco run --service db --port 5432 --health-command 'pg_isready -q -p $PORT' -- postgres -D data";

/// Run a command as an instance of a service.
#[derive(Debug, Clone, clap::Args)]
#[command(after_help = EXAMPLES)]
pub(super) struct RunArgs {
    /// The service that the command is an instance of
    #[arg(long, required_unless_present = "peer_set")]
    service: Option<String>,
    /// The port that it listens on; of a replica the port for clients [default for a replica: its raft port]
    #[arg(long, allow_negative_numbers = true, required_unless_present = "peer_set")]
    port: Option<i64>,
    /// Its id within the service; of a replica its name for ever [default: HOST-PORT]
    #[arg(long, visible_alias = "peer-key")]
    id: Option<String>,
    /// The IP address that callers reach it at
    #[arg(long, value_name = "IP", default_value = "127.0.0.1")]
    address: String,
    /// How to see that it works: `tcp`, `http [/PATH]`, `grpc [SERVICE]` or `none`
    #[arg(long, num_args = 1..=2, value_names = ["KIND", "DETAIL"], action = clap::ArgAction::Set, default_value = "tcp")]
    health: Vec<String>,
    /// A command that tells whether it works, in place of `--health`; run by /bin/sh
    #[arg(long, value_name = "COMMAND", conflicts_with_all = ["health", "health_path"])]
    health_command: Option<String>,
    /// The path for `--health http`
    #[arg(long, value_name = "PATH")]
    health_path: Option<String>,
    /// Until when the check must have passed for the first time
    #[arg(long, value_name = "TIME", default_value = "30s", value_parser = parse_duration)]
    health_timeout: Duration,
    /// Pause between two checks until it has passed
    #[arg(long, value_name = "TIME", default_value = "200ms", value_parser = parse_duration)]
    health_interval: Duration,
    /// Pause between two checks after that; 0s for no more checks
    #[arg(long, value_name = "TIME", default_value = "5s", value_parser = parse_duration)]
    health_recheck: Duration,
    /// Failed checks in a row that make it unhealthy
    #[arg(long, value_name = "N", default_value_t = 3, value_parser = clap::value_parser!(u32).range(1..))]
    health_failures: u32,
    /// The zone it runs in
    #[arg(long, default_value = "", hide_default_value = true)]
    zone: String,
    /// The region it runs in
    #[arg(long, default_value = "", hide_default_value = true)]
    region: String,
    /// Its share of the calls relative to the other instances
    #[arg(long, value_name = "N", default_value_t = 1, allow_negative_numbers = true)]
    weight: i64,
    /// What else to tell of it; may be given several times
    #[arg(long, value_name = "KEY=VALUE", value_parser = parse::pair)]
    metadata: Vec<(String, String)>,
    /// Longest wait for the proxies to acknowledge a drain
    #[arg(long, value_name = "TIME", default_value = "10s", value_parser = parse_duration)]
    drain_timeout: Duration,
    /// From SIGTERM to SIGKILL
    #[arg(long, value_name = "TIME", default_value = "10s", value_parser = parse_duration)]
    stop_timeout: Duration,
    #[command(flatten)]
    replica: ReplicaArgs,
    /// The command and its arguments, after `--`
    #[arg(last = true, required = true, value_name = "COMMAND")]
    command: Vec<OsString>,
}

/// Runs the command to its end. Returns the exit code for the process.
pub(super) async fn run(args: RunArgs, global: &Global) -> Result<u8, Failure> {
    let Settings { registration, method, plan, replica, program, arguments } = Settings::new(args, &host())?;
    let servers = Servers::parse(&global.grpc, global.token.as_deref()).map_err(Failure::usage)?;
    let address = SocketAddr::new(registration.address, registration.port.into());
    let mut environment = vec![
        ("DISCO_SERVICE", registration.key.service.to_string()),
        ("DISCO_INSTANCE", registration.key.id.to_string()),
        ("DISCO_ADDRESS", registration.address.to_string()),
        ("PORT", registration.port.to_string()),
    ];
    let tasks = Tasks::default();
    let prober = |probe, limit| Prober::new(Network::new(tasks.clone(), 0), probe, address, limit);
    if matches!(method, Some(Method::Probe(_))) && prober(Probe::Tcp, GLANCE).ask().await.passed().is_ok() {
        say(&format!(
            "something answers on {address} before the command is started: its check may pass for another process"
        ));
    }

    let (stop, mut stops) = stop_requests(&tasks)?;
    if let Some(replica) = replica {
        let http = global.client()?;
        let ready = tokio::select! {
            ready = replica.ready(&http, say) => ready?,
            _ = stops.recv() => return Err(Failure::not_yet("asked to end before the command was started")),
        };
        environment.extend(ready.environment.iter().cloned());
        tasks.spawn_until_shutdown("peers", replica.keep(http, ready, stop, say));
    }
    let process = Running::start(&program, &arguments, &environment)?;
    let name = &plan.name;
    say(&match &method {
        Some(method) => {
            format!("started {} for {name}; checking {address} by {method}", program.display())
        }
        None => format!("started {} for {name} at {address}, without a check", program.display()),
    });
    let life = Life {
        registrar: Sessions::new(servers, registration, tasks.clone()),
        check: method.map(|method| -> Box<dyn Ask> {
            match method {
                Method::Probe(probe) => Box::new(prober(probe, CHECK)),
                Method::Command(line) => Box::new(Command::new(line, environment, CHECK)),
            }
        }),
        plan,
        process,
        stops,
        log: say,
    };
    let code = Box::pin(life.live()).await;
    tasks.shutdown().start();
    tasks.join(Duration::from_secs(1)).await;
    Ok(code)
}

fn say(line: &str) {
    // Nobody to tell when standard error is closed; the command matters more.
    let _ = writeln!(std::io::stderr().lock(), "disco run: {line}");
}

impl Check for Box<dyn Ask> {
    async fn check(&mut self) -> Outcome {
        self.ask().await
    }
}

/// How to see that the command works.
#[derive(Debug, Clone, PartialEq, Eq)]
enum Method {
    /// It is asked over the network.
    Probe(Probe),
    /// Another command tells.
    Command(String),
}

impl fmt::Display for Method {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Probe(probe) => probe.fmt(f),
            Self::Command(line) => write!(f, "`{line}`"),
        }
    }
}

/// The arguments, checked.
#[derive(Debug)]
struct Settings {
    registration: Registration,
    method: Option<Method>,
    plan: Plan,
    replica: Option<Replica>,
    program: OsString,
    arguments: Vec<OsString>,
}

impl Settings {
    /// Reports everything that is wrong at once.
    fn new(args: RunArgs, host: &str) -> Result<Self, Failure> {
        let mut problems = Problems::default();
        let method = match args.health_command {
            Some(line) => Some(Some(Method::Command(line))),
            None => {
                let probe = problems.take("health", probe(&args.health, args.health_path.as_deref()));
                probe.map(|probe| probe.map(Method::Probe))
            }
        };
        if args.health_interval.is_zero() {
            problems.add("health-interval", "0s is too short: want at least 1ms");
        }
        let service = args.service.or(args.replica.peer_set.clone()).unwrap_or_default();
        let port = args.port.or(args.replica.raft_port.map(Into::into)).unwrap_or_default();
        let id = args.id.unwrap_or_else(|| default_id(if host.is_empty() { &service } else { host }, port));
        let raw = RawRegistration {
            service,
            id,
            incarnation: None,
            new_run: false,
            address: Some(args.address),
            port: Some(port.into()),
            locality: [args.region, args.zone, String::new()],
            weight: Some(args.weight.into()),
            metadata: args.metadata.into_iter().collect::<BTreeMap<_, _>>(),
            ttl: None,
            // Without a further check there is nothing to report.
            check: (!args.health_recheck.is_zero() && !matches!(method, Some(None)))
                .then(|| RawCheck { kind: RawKind::Owner, ..RawCheck::default() }),
        };
        let registration = Registration::check_into(raw, &form_only(), &mut problems);
        let replica = match (&registration, &args.replica.peer_set) {
            (Some(registration), Some(_)) => Replica::new(args.replica, registration, &mut problems),
            _ => None,
        };
        let mut command = args.command.into_iter();
        let (Some(registration), Some(method), Some(program), true) =
            (registration, method, command.next(), problems.is_empty())
        else {
            let lines: Vec<_> =
                problems.0.iter().map(|p| format!("{}: {}", flag(&p.field), p.message)).collect();
            return Err(Failure::usage(lines.join("\n")));
        };
        let plan = Plan {
            name: registration.key.to_string(),
            start_limit: args.health_timeout,
            start_interval: args.health_interval,
            interval: args.health_recheck,
            failures: args.health_failures,
            drain_limit: args.drain_timeout,
            stop_limit: args.stop_timeout,
        };
        Ok(Self { registration, method, plan, replica, program, arguments: command.collect() })
    }
}

/// How large a registration may be is the server's choice; here only its form is checked.
fn form_only() -> Limits {
    Limits {
        weight_max: u32::MAX,
        metadata_entries: usize::MAX,
        metadata_key: usize::MAX,
        metadata_value: usize::MAX,
        locality: usize::MAX,
        ..Limits::default()
    }
}

/// The flag that sets a field.
fn flag(field: &str) -> String {
    let name = field.strip_prefix("locality.").unwrap_or(field);
    format!("--{}", name.split('.').next().unwrap_or(name))
}

/// `http /path` and `http:/path` are the same.
fn probe(words: &[String], path: Option<&str>) -> Result<Option<Probe>, String> {
    let mut text = words.join(":");
    if let Some(path) = path {
        if text != "http" {
            return Err(format!("a --health-path goes with `--health http`, not with {}", excerpt(&text)));
        }
        text = format!("http:{path}");
    }
    if text == "none" {
        return Ok(None);
    }
    let wrong = |error| format!("{error}; or none");
    text.parse().map(Some).map_err(wrong)
}

/// The name of this machine; empty when it has none.
pub(super) fn host() -> String {
    rustix::system::uname().nodename().to_string_lossy().into_owned()
}

/// `name-port`, with what an instance id may not hold replaced.
fn default_id(name: &str, port: i64) -> String {
    let tail = format!("-{port}");
    let head: String = name
        .chars()
        .map(|c| if c.is_ascii_alphanumeric() || matches!(c, '-' | '_' | '.') { c } else { '-' })
        .skip_while(|c| !c.is_ascii_alphanumeric())
        .take(MAX_INSTANCE_ID.saturating_sub(tail.len()))
        .collect();
    if head.is_empty() { format!("instance{tail}") } else { format!("{head}{tail}") }
}

#[cfg(test)]
mod tests;
