use super::*;
use crate::store::{EtcdTls, EtcdUser};

fn parse(text: &str) -> Result<Config, ConfigError> {
    Config::parse("disco.yaml", text, &Overrides::default())
}

/// The problems of a file as `line:column field: message`, one a line.
fn problems(text: &str) -> String {
    match parse(text) {
        Err(ConfigError::Invalid { problems, .. }) => problems
            .0
            .iter()
            .map(|problem| match problem.at {
                Some(at) => format!("{}:{} {problem}\n", at.line, at.column),
                None => format!("- {problem}\n"),
            })
            .collect(),
        other => format!("{other:?}"),
    }
}

#[test]
fn an_example_with_everything() {
    let text = "
roles: [registry, discovery, xds, admin]
listen:
  grpc: 10.0.0.1:18000
  http: '[::1]:0'
insecure: true
store:
  file: {dir: /var/lib/disco, accept_loss: true}
limits:
  ttl_min: 500ms
  ttl_max: 2h
  body: 64KiB
  weight_max: 7
  name_bytes: 99
  http_requests: 8
shutdown: {drain: 3s}
log: {filter: 'warn,disco::xds=debug', format: json}
registry: {session_grace: 0s, empty_service_retention: 24h}
guards: {min_share: 0.75, window: 5m, ask_timeout: 300ms, ask_interval: 1m}
history: {keep: 48h, entries: 0, per_service: 7}
xds: {ack_timeout: 5s, load_report_interval: 1s, streams: 9, max_connection_age: 30m, resend_on_reconnect: [endpoints, route], leds_from: 0}
";
    let config = parse(text).unwrap();
    assert_eq!(config.roles, Role::ALL.into());
    assert_eq!(config.listen.grpc, "10.0.0.1:18000".parse().unwrap());
    assert_eq!(config.listen.http, "[::1]:0".parse().unwrap());
    assert_eq!(config.store, Store::File { dir: "/var/lib/disco".into(), accept_loss: true });
    assert_eq!(config.limits.registration.ttl_min, Duration::from_millis(500));
    assert_eq!(config.limits.registration.ttl_default, Duration::from_secs(30));
    assert_eq!((config.limits.body, config.limits.name_bytes), (64 << 10, 99));
    assert_eq!((config.limits.http_requests, config.limits.grpc_connections), (8, 100_000));
    assert_eq!(config.xds.max_connection_age, Some(Duration::from_secs(30 * 60)));
    assert_eq!(config.log, Log { filter: "warn,disco::xds=debug".into(), format: LogFormat::Json });
    assert_eq!(config.registry.session_grace, Duration::ZERO);
    assert_eq!((config.history.entries, config.history.per_service), (0, 7));
    assert_eq!((config.guards.min_share, config.guards.window), (0.75, Duration::from_secs(300)));
    assert_eq!((config.xds.ack_timeout, config.xds.streams), (Duration::from_secs(5), 9));
    assert_eq!(config.xds.load_report_interval, Duration::from_secs(1));
    assert_eq!(config.xds.resend_on_reconnect, [ResourceType::Endpoints, ResourceType::Route]);
    assert_eq!(config.xds.leds_from, 0);
    assert_eq!(parse(&config.to_yaml()).unwrap(), config, "{}", config.to_yaml());
}

#[test]
fn a_store_in_etcd_is_shared_so_each_process_has_the_roles_it_likes() {
    let text = "
roles: [xds]
store:
  etcd:
    endpoints: ['https://10.0.0.1:2379', 'https://etcd-2:2379/']
    prefix: /mesh/
    user: disco
    password_file: /etc/disco/etcd.password
    tls: {ca: ca.pem, cert: disco.pem, key: disco.key}
    timeout: 3s
    session_ttl: 15s
";
    let config = parse(text).unwrap();
    let etcd = EtcdConfig {
        endpoints: vec!["https://10.0.0.1:2379".into(), "https://etcd-2:2379".into()],
        prefix: "/mesh/".into(),
        user: Some(EtcdUser { name: "disco".into(), password_file: "/etc/disco/etcd.password".into() }),
        tls: Some(EtcdTls { ca: "ca.pem".into(), identity: Some(("disco.pem".into(), "disco.key".into())) }),
        timeout: Duration::from_secs(3),
        session_ttl: Duration::from_secs(15),
    };
    assert_eq!(config.store, Store::Etcd(etcd));
    assert_eq!(parse(&config.to_yaml()).unwrap(), config, "{}", config.to_yaml());
    let least = parse("roles: [xds]\nstore: {etcd: {endpoints: ['http://127.0.0.1:2379']}}").unwrap();
    assert_eq!(parse(&least.to_yaml()).unwrap(), least, "{}", least.to_yaml());
}

#[test]
fn defaults_are_safe_and_durable() {
    let config = parse("roles: [registry]").unwrap();
    assert_eq!(config, Config { roles: [Role::Registry].into(), ..Config::default() });
    assert_eq!(config.store, Store::File { dir: "./disco-data".into(), accept_loss: false });
    assert!(
        !config.insecure && config.listen.grpc.ip().is_loopback() && config.listen.http.ip().is_loopback()
    );
}

#[test]
fn the_example_file_names_every_field_with_its_default() {
    let text = include_str!("../../examples/disco.yaml");
    assert_eq!(parse(text).unwrap(), Config::default());
    for line in Config::default().to_yaml().lines() {
        let (field, _) = line.split_once(':').unwrap();
        let named = |line: &str| line.trim_start().starts_with(&format!("{}:", field.trim()));
        assert!(text.lines().any(named), "{field} is not in examples/disco.yaml");
    }
}

#[test]
fn what_show_prints_reads_back() {
    let data = |dir: &str| Overrides { data: Some(dir.into()), ..Overrides::default() };
    for overrides in [
        Overrides::default(),
        data("/tmp/a b: #c\n\"d\""),
        data("1e3"),
        data("0x10"),
        data("nan"),
        data("~"),
        data("-"),
        data("yes"),
        Overrides { log: Some("info,disco[span{field=1}]=debug".into()), ..Overrides::default() },
    ] {
        let config = Config::dev(&overrides).unwrap();
        let yaml = config.to_yaml();
        assert_eq!(parse(&yaml).unwrap_or_else(|error| panic!("{error}\n{yaml}")), config);
    }
}

#[test]
fn every_problem_names_its_place() {
    let cases = [
        (
            "",
            "1:1 roles: is missing: name at least one role for this process; available: registry, discovery, xds, admin",
        ),
        ("# nothing\n", "1:1 roles: is missing"),
        ("listen: {}", "1:1 roles: is missing"),
        ("roles: []", "1:1 roles: is missing"),
        ("roles: registry", "1:8 roles: is text: want a list"),
        (
            "roles:\n - registry\n - regsitry\n",
            "3:4 roles: \"regsitry\" is not a role; did you mean `registry`?; available: ",
        ),
        (
            "roles: [registry, federation]",
            "1:19 roles: `federation` is not available in this version; available: registry, discovery, xds, admin",
        ),
        ("roles: [registry, 3]", "1:19 roles: is not the name of a role"),
        ("roles: [registry, registry]", "1:19 roles: `registry` stands here twice"),
        ("roles: [xds, admin]", "1:1 roles: want `registry` too"),
        ("roles: [registry]\nlisen:\n  grpc: 1\n", "2:1 lisen: is not a known field; did you mean `listen`?"),
        (
            "roles: [registry]\nlisten:\n  grcp: 1\n",
            "3:3 listen.grcp: is not a known field; did you mean `grpc`?",
        ),
        (
            "roles: [registry]\nlisten: {grpc: localhost:18000}",
            "2:16 listen.grpc: \"localhost:18000\" is not an address to listen on: want IP:PORT",
        ),
        (
            "roles: [registry]\nlisten: {grpc: 18000}",
            "2:16 listen.grpc: \"18000\" is not an address to listen on: want IP:PORT",
        ),
        (
            "roles: [registry]\nxds: {resend_on_reconnect: [eds]}",
            "2:29 xds.resend_on_reconnect: \"eds\" is not a type; want cluster, endpoints, lb-endpoint, listener, route",
        ),
        (
            "roles: [registry]\nlisten:\n  grpc: 0.0.0.0:18000\n",
            "3:9 listen.grpc: 0.0.0.0:18000 listens beyond loopback without TLS",
        ),
        (
            "roles: [registry]\nlisten:\n  http: 127.0.0.1:18000\n",
            "3:9 listen.http: 127.0.0.1:18000 is also listen.grpc",
        ),
        (
            "roles: [registry]\nlisten:\n  advertise: 0.0.0.0:18000\n",
            "3:14 listen.advertise: \"0.0.0.0:18000\" is not where other processes could connect to",
        ),
        (
            "roles: [registry]\nguards: {min_share: 50}",
            "2:21 guards.min_share: is not a share: want a number from 0 to 1, such as 0.5",
        ),
        ("roles: [registry]\nlisten: 3\n", "2:9 listen: is a whole number: want a map of fields"),
        ("roles: [registry]\ninsecure: yes\n", "2:11 insecure: is text: want true or false"),
        (
            "roles: [registry]\nstore: disk\n",
            "2:8 store: is not a store: want `memory`, `file: {dir: PATH}` or `etcd: {endpoints: [URL]}`",
        ),
        ("roles: [registry]\nstore: {}\n", "2:1 store: names no store"),
        (
            "roles: [registry]\nstore: {flie: {}}\n",
            "2:9 store.flie: is not a known field; did you mean `file`?",
        ),
        ("roles: [xds]\nstore: {etcd: {}}\n", "2:9 store.etcd.endpoints: is missing: name the members"),
        (
            "roles: [xds]\nstore:\n  etcd: {endpoints: ['http://a:1', b:2]}\n",
            "3:36 store.etcd.endpoints: \"b:2\" is not an endpoint: want http://HOST:PORT",
        ),
        (
            "roles: [xds]\nstore:\n  etcd: {endpoints: ['http://a:1/x']}\n",
            "3:22 store.etcd.endpoints: \"http://a:1/x\" is not an endpoint",
        ),
        (
            "roles: [xds]\nstore:\n  etcd: {endpoints: ['https://a:1']}\n",
            "3:10 store.etcd.endpoints: want `tls: {ca: FILE}` too",
        ),
        (
            "roles: [xds]\nstore:\n  etcd:\n    endpoints: ['http://a:1']\n    tls: {ca: c}\n",
            "5:5 store.etcd.tls: is for endpoints that begin with https://",
        ),
        (
            "roles: [xds]\nstore:\n  etcd:\n    endpoints: ['https://a:1']\n    tls: {ca: c, cert: d}\n",
            "5:5 store.etcd.tls: has only one of `cert` and `key`",
        ),
        (
            "roles: [xds]\nstore:\n  etcd:\n    endpoints: ['https://a:1']\n    tls: {}\n",
            "5:5 store.etcd.tls.ca: is missing",
        ),
        (
            "roles: [xds]\nstore:\n  etcd:\n    endpoints: ['http://a:1']\n    user: u\n",
            "5:11 store.etcd.user: wants `password_file` too",
        ),
        (
            "roles: [xds]\nstore:\n  etcd:\n    endpoints: ['http://a:1']\n    prefix: disco\n",
            "5:13 store.etcd.prefix: \"disco\" does not begin and end with a slash",
        ),
        (
            "roles: [xds]\nstore:\n  etcd:\n    endpoints: ['http://a:1']\n    session_ttl: 2500ms\n",
            "5:18 store.etcd.session_ttl: has a fraction of a second",
        ),
        (
            "roles: [xds]\nstore: {file: {}, etcd: {endpoints: ['http://a:1']}}\n",
            "2:1 store: names two stores",
        ),
        ("roles: [registry]\nstore: {file: {dir: ''}}\n", "2:21 store.file.dir: is empty"),
        (
            "roles: [registry]\nlimits: {ttl_min: 30}\n",
            "2:19 limits.ttl_min: 30 has no unit: want a number and a unit, such as 30s",
        ),
        (
            "roles: [registry]\nlimits: {ttl_min: 0s}\n",
            "2:19 limits.ttl_min: 0s is out of range: want 100ms to 24h",
        ),
        (
            "roles: [registry]\nlimits: {ttl_min: 3h}\n",
            "2:1 limits.ttl_max: 1h is less than limits.ttl_min, which is 3h",
        ),
        (
            "roles: [registry]\nlimits: {ttl_max: 10s}\n",
            "2:1 limits.ttl_default: 30s is out of range: want 1s to 10s",
        ),
        (
            "roles: [registry]\nlimits: {body: 1MB}\n",
            "2:16 limits.body: \"1MB\" is not a size: want a number of bytes",
        ),
        (
            "roles: [registry]\nlimits: {body: 99999999999GiB}\n",
            "2:16 limits.body: \"99999999999GiB\" is not a size",
        ),
        ("roles: [registry]\nlimits: {body: 1}\n", "2:16 limits.body: 1B is out of range: want 1KiB to 1GiB"),
        (
            "roles: [registry]\nlimits: {services: 0}\n",
            "2:20 limits.services: 0 is out of range: want a whole number from 1",
        ),
        (
            "roles: [registry]\nlimits: {services: 1.5}\n",
            "2:20 limits.services: is a fraction: want a whole number",
        ),
        ("roles: [registry]\nlog: {filter: 'a=b=c'}\n", "2:15 log.filter: \"a=b=c\" is not a filter"),
        (
            "roles: [registry]\nlog: {format: xml}\n",
            "2:15 log.format: \"xml\" is not a log format: want text or json",
        ),
        ("- roles", "1:1 is a list: want a map of fields"),
    ];
    for (text, want) in cases {
        let got = problems(text);
        assert!(got.lines().any(|line| line.starts_with(want)), "{text:?}\nwant {want}\ngot  {got}");
    }
}

#[test]
fn broken_yaml_has_a_place() {
    let cases = [
        ("roles: [registry]\nroles: [xds]\n", "2:1 duplicate mapping key: roles"),
        ("roles: [registry]\nlisten: {grpc: 127.0.0.1:1, grpc: 127.0.0.1:2}\n", "2:29 "),
        ("roles: [registry\nlisten: {}\n", "2:7 "),
        ("roles:\n\t- registry\n", "2:"),
        ("roles: *nowhere\n", "1:8 "),
        ("a: &a [x, x]\nb: &b [*a, *a\n", "2:7 "),
        ("roles: [registry]\n---\nroles: [xds]\n", "3:1 multiple YAML documents"),
    ];
    for (text, want) in cases {
        let got = problems(text);
        assert!(got.starts_with(want) && got.lines().count() == 1, "{text:?}\nwant {want}\ngot  {got}");
    }
}

#[test]
fn all_problems_are_reported_at_once_with_their_lines() {
    let text = "roles: [federation]\nlisten:\n  grpc: 0.0.0.0:18000\nlimitz: {}\nshutdown: {drain: soon}\n";
    let message = parse(text).unwrap_err().to_string();
    assert_eq!(
        message,
        "error: disco.yaml:1:9: roles: `federation` is not available in this version; available: registry, discovery, xds, admin
1 | roles: [federation]
  |         ^
error: disco.yaml:3:9: listen.grpc: 0.0.0.0:18000 listens beyond loopback without TLS, so anybody who reaches it may \
         register and see everything: use 127.0.0.1, or accept that with `insecure: true` in the file or `disco dev \
         --insecure` (TLS is not available in this version)
3 |   grpc: 0.0.0.0:18000
  |         ^
error: disco.yaml:4:1: limitz: is not a known field; did you mean `limits`?
4 | limitz: {}
  | ^
error: disco.yaml:5:19: shutdown.drain: \"soon\" is not a duration: want a number and a unit, such as 30s, 5m or 500ms
5 | shutdown: {drain: soon}
  |                   ^"
    );
}

#[test]
fn the_command_line_wins_and_is_checked_too() {
    let open = Overrides { grpc: Some("0.0.0.0:0".parse().unwrap()), ..Overrides::default() };
    for result in [Config::dev(&open), Config::parse("f", "roles: [registry]", &open)] {
        assert!(result.unwrap_err().to_string().contains("listen.grpc: 0.0.0.0:0 listens beyond loopback"));
    }
    let insecure = Overrides { insecure: true, ..open };
    assert_eq!(Config::dev(&insecure).unwrap().listen.grpc, "0.0.0.0:0".parse().unwrap());
    let loss = Overrides { accept_loss: true, ..Overrides::default() };
    let config = Config::parse("f", "roles: [registry]\nstore: {file: {dir: d}}", &loss).unwrap();
    assert_eq!(config.store, Store::File { dir: "d".into(), accept_loss: true });
    assert_eq!(Config::dev(&loss).unwrap().store, Store::Memory);
    let log = Overrides { log: Some("===".into()), ..Overrides::default() };
    assert!(Config::dev(&log).unwrap_err().to_string().contains("log.filter"));
}

#[test]
fn hostile_files_end_in_an_error() {
    let deep = "[".repeat(100_000);
    let bomb = (1..30).fold("a0: &a0 [x, x]\n".to_owned(), |text, i| {
        text + &format!("a{i}: &a{i} [*a{0}, *a{0}, *a{0}, *a{0}]\n", i - 1)
    });
    let long = format!("roles: [registry]\n{}: 1\n", "k".repeat(900));
    for text in [deep.as_str(), &bomb, &long, "\u{0}", "roles: [\"\\e[31m\\n\"]", "? [a]\n: b\n", "{a: b}: c"]
    {
        let message = parse(text).unwrap_err().to_string();
        assert!(message.len() < 5000, "{} bytes", message.len());
        assert!(message.chars().all(|c| c == '\n' || !c.is_control()), "{message:?}");
    }
}
