use clap::Parser;

use super::*;

#[derive(Debug, Parser)]
struct Cli {
    #[command(flatten)]
    args: RunArgs,
}

/// The settings of a command line after `disco run`, or the text of what is wrong with it.
fn settings(line: &str) -> Result<Settings, String> {
    let cli = Cli::try_parse_from(std::iter::once("run").chain(line.split_whitespace()))
        .map_err(|error| error.to_string())?;
    Settings::new(cli.args, "host.local").map_err(|failure| {
        assert_eq!(failure.code, 64);
        failure.message
    })
}

#[test]
fn defaults() {
    let settings = settings("--service greeter --port 50051 -- ./greeter --verbose").unwrap();
    let registration = settings.registration;
    assert_eq!(registration.key.to_string(), "greeter/host.local-50051");
    assert_eq!(registration.address.to_string(), "127.0.0.1");
    assert_eq!((registration.port.get(), registration.weight.get()), (50051, 1));
    assert_eq!(settings.method, Some(Method::Probe(Probe::Tcp)));
    assert_eq!(registration.check, Some(crate::model::Check::Owner));
    assert_eq!(settings.program, "./greeter");
    assert_eq!(settings.arguments, ["--verbose"]);
    assert_eq!(settings.plan.start_limit, Duration::from_secs(30));
    assert_eq!(settings.plan.start_interval, Duration::from_millis(200));
    assert_eq!(settings.plan.drain_limit, Duration::from_secs(10));
}

#[test]
fn everything_given() {
    let line = "--service a.b --port 1 --id x --address ::1 --health none --zone z --region r --weight 7 \
                --metadata k=v --metadata url=http://x?a=b --drain-timeout 1m --stop-timeout 500ms -- true";
    let settings = settings(line).unwrap();
    let registration = settings.registration;
    assert_eq!(registration.key.to_string(), "a.b/x");
    assert_eq!(registration.address.to_string(), "::1");
    assert_eq!((&*registration.locality.region, &*registration.locality.zone), ("r", "z"));
    assert_eq!(registration.weight.get(), 7);
    assert_eq!(registration.metadata["url"], "http://x?a=b");
    assert_eq!(settings.method, None);
    assert_eq!(registration.check, None);
    assert_eq!(settings.plan.drain_limit, Duration::from_secs(60));
    assert_eq!(settings.plan.stop_limit, Duration::from_millis(500));
}

#[test]
fn replicas() {
    let line = "--peer-set db --raft-port 7001 --data-dir /data --peer-key n1 --port 8001 --zone z -- true";
    let registration = settings(line).unwrap().registration;
    assert_eq!((registration.key.to_string().as_str(), registration.port.get()), ("db/n1", 8001));
    let settings_of_one_port = settings("--peer-set db --raft-port 7001 --data-dir /data -- true").unwrap();
    assert_eq!(settings_of_one_port.registration.key.to_string(), "db/host.local-7001");
    assert_eq!(settings_of_one_port.registration.port.get(), 7001);
    assert!(settings_of_one_port.replica.is_some());
    assert!(settings("--service a --port 1 -- true").unwrap().replica.is_none());
    for (line, wanted) in [
        ("--peer-set db --raft-port 1 -- true", "--data-dir"),
        ("--peer-set db --data-dir /data -- true", "--raft-port"),
        ("--service a --port 1 --data-dir /data -- true", "--peer-set"),
        ("--service a --port 1 --peer-set db --raft-port 1 --data-dir /data -- true", "cannot be used with"),
        ("--peer-set db --raft-port 1 --data-dir /data --peers-format x -- true", "is not a format"),
        ("--peer-set db --raft-port 1 --data-dir /data --extra-port x -- true", "NAME=PORT"),
        (
            "--peer-set db --raft-port 1 --data-dir /data --peers-format hashicorp-peers-json -- true",
            "--peers-format: hashicorp-peers-json is for one recovery",
        ),
    ] {
        let message = settings(line).unwrap_err();
        assert!(message.contains(wanted), "{wanted} in {message}");
    }
}

#[test]
fn checks() {
    let http = |path: &str| format!("http:{path}").parse::<Probe>().ok();
    let grpc = |service: &str| Some(Probe::Grpc { service: service.into() });
    for (flags, probe) in [
        ("--health tcp", Some(Probe::Tcp)),
        ("--health none", None),
        ("--health http", http("/")),
        ("--health http /healthz", http("/healthz")),
        ("--health http:/healthz", http("/healthz")),
        ("--health http --health-path /healthz", http("/healthz")),
        ("--health grpc", grpc("")),
        ("--health grpc greeter.v1.Greeter", grpc("greeter.v1.Greeter")),
        ("--health grpc --zone z", grpc("")),
    ] {
        let settings = settings(&format!("--service a --port 1 {flags} -- true")).unwrap();
        assert_eq!(settings.method, probe.map(Method::Probe), "{flags}");
    }
}

#[test]
fn what_is_wrong_is_said_at_once_and_by_flag() {
    let line = "--service Greeter --port 70000 --address db.local --weight 0 --health ping \
                --health-interval 0s -- true";
    let message = settings(line).unwrap_err();
    for flag in
        ["--service: ", "--port: 70000", "--address: \"db.local\"", "--weight: 0", "--health: \"ping\""]
    {
        assert!(message.lines().any(|line| line.starts_with(flag)), "{flag} in {message}");
    }
    for (line, wanted) in [
        ("--port 1 -- true", "--service"),
        ("--service a --port 1", "COMMAND"),
        ("--service a --port x -- true", "--port"),
        ("--service a --port 1 --metadata k -- true", "is not KEY=VALUE"),
        ("--service a --port 1 --drain-timeout 10 -- true", "is not a duration"),
        ("--service a --port 1 --health-path /x -- true", "goes with `--health http`"),
        ("--service a --port 1 --health tcp --health-command true -- true", "cannot be used with"),
        ("--service a --port 1 --id x- -- true", "--id"),
        ("--service a --port 1 --health-failures 0 -- true", "--health-failures"),
    ] {
        let message = settings(line).unwrap_err();
        assert!(message.contains(wanted), "{wanted} in {message}");
    }
}

#[test]
fn default_ids_are_ids() {
    for (name, id) in [
        ("box", "box-80"),
        ("a.b_c-", "a.b_c--80"),
        ("_x y\u{7}é", "x-y---80"),
        ("", "instance-80"),
        ("...", "instance-80"),
    ] {
        assert_eq!(default_id(name, 80), id);
    }
    for name in ["é", &"h".repeat(1000)] {
        assert!(default_id(name, 65_535).parse::<crate::model::InstanceId>().is_ok());
    }
}
