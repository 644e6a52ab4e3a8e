use std::{net::SocketAddr, sync::Arc};

use axum::{Json, Router, routing::get};
use clap::{Command as Clap, CommandFactory as _, error::ErrorKind};
use serde_json::{Value, json};
use tokio::net::TcpListener;

use super::*;
use crate::rt::Tasks;

fn parse(line: &str) -> Result<Cli, clap::Error> {
    super::parse(line.split_whitespace().map(Into::into))
}

/// Every command without further verbs, by its full name.
fn leaves(command: &Clap, path: &str, found: &mut Vec<(String, Clap)>) {
    let path = format!("{path} {}", command.get_name());
    if !command.has_subcommands() {
        found.push((path.trim().to_owned(), command.clone()));
    }
    for verb in command.get_subcommands() {
        leaves(verb, &path, found);
    }
}

#[test]
fn every_command_has_a_help_text_with_an_example() {
    Cli::command().debug_assert();
    let mut commands = Vec::new();
    leaves(&Cli::command(), "", &mut commands);
    assert!(commands.len() > 12);
    for (name, command) in commands {
        assert!(command.get_about().is_some(), "{name} does not say what it does");
        let example = command.get_after_help().map(ToString::to_string).unwrap_or_default();
        assert!(example.contains("Example") && example.contains("disco "), "{name} has no example");
        for argument in command.get_arguments().filter(|argument| !argument.is_hide_set()) {
            assert!(argument.get_help().is_some(), "{name} {} has no help", argument.get_id());
        }
    }
}

#[test]
fn a_noun_names_its_verbs_and_what_is_long_is_shown() {
    for noun in Cli::command().get_subcommands().filter(|noun| noun.has_subcommands()) {
        let about = noun.get_about().unwrap().to_string();
        for verb in noun.get_subcommands().filter(|verb| !verb.is_hide_set() && verb.get_name() != "help") {
            assert!(about.contains(verb.get_name()), "{about}: {} is missing", verb.get_name());
        }
    }
    for line in ["disco run --help", "disco lock run --help"] {
        assert!(parse(line).unwrap_err().to_string().contains("exit code is the command's own"), "{line}");
    }
}

#[test]
fn command_lines() {
    for line in [
        "disco dev",
        "disco dev --data /tmp/x --grpc-listen 127.0.0.1:0 --http-listen [::1]:0 --log info",
        "disco serve",
        "disco serve --config f",
        "disco service list -o wide --watch",
        "disco service ls",
        "disco service show greeter.payments -o yaml",
        "disco --http 127.0.0.1:1 instance list",
        "disco instance list greeter --http 127.0.0.1:1 -ojsonl",
        "disco instance register greeter/a --address 10.0.0.1 --port 1 --metadata a=b --metadata c= --ttl 5m",
        "disco instance register greeter/a --address 10.0.0.1 --port 1 --health http:/ok --health-interval 2s",
        "disco instance drain greeter/a --wait 0s",
        "disco instance deregister greeter/host:1 --incarnation 3",
        "disco service history greeter --since 1h -o jsonl",
        "disco service release greeter",
        "disco instance explain greeter/a --at 2026-01-31T12:00:00Z",
        "disco proxy show some/node~id",
        "disco config check f g",
        "disco rollout status 1 --wait",
        "disco config show",
        "disco completions zsh",
        "disco check -o json",
    ] {
        assert!(parse(line).is_ok(), "{line}: {}", parse(line).unwrap_err());
    }
}

#[test]
fn wrong_command_lines_say_what_is_right() {
    let cases = [
        ("disco", "Usage"),
        ("disco srve", "serve"),
        ("disco service", "Usage"),
        ("disco service show Greeter", "is not a service name: want `name`"),
        ("disco instance show greeter", "want SERVICE/ID, e.g. greeter/a"),
        ("disco instance show greeter/a/b", "is not an instance id"),
        ("disco instance drain greeter/a --wait 10", "want a number and a unit, such as 30s"),
        ("disco instance register greeter/a --address 10.0.0.1", "--port"),
        ("disco instance register greeter/a --address 10.0.0.1 --port 1 --metadata x", "is not KEY=VALUE"),
        ("disco instance register greeter/a --address 10.0.0.1 --port 1 --health ping", "is not a check"),
        ("disco instance register greeter/a --address 10.0.0.1 --port 1 --health-port 1", "--health <CHECK>"),
        ("disco service history greeter --since soon", "or how long ago, e.g. 10m"),
        ("disco service list -o xml", "jsonl"),
        ("disco dev --http 127.0.0.1:1", "where to listen is --http-listen"),
        ("disco --grpc 127.0.0.1:1 serve", "where to listen is --grpc-listen"),
        ("disco dev --accept-loss", "--data"),
        ("disco rollout status x", "is not a whole number"),
        ("disco rollout status 1 --timeout 1s", "--wait"),
        ("disco config check", "<FILE>"),
        ("disco dev --grpc-listen localhost:1", "is not an address to listen on: want IP:PORT"),
    ];
    for (line, want) in cases {
        let error = parse(line).unwrap_err();
        assert!(error.use_stderr(), "{line} would not end with 64");
        assert!(error.to_string().contains(want), "{line}: want {want} in\n{error}");
    }
    assert_eq!(parse("disco --version").unwrap_err().kind(), ErrorKind::DisplayVersion);
}

#[test]
fn the_token_is_not_shown() {
    let cli = parse("disco --token secret123 check").unwrap();
    assert!(!format!("{cli:?}").contains("secret123"));
    let help = Cli::command().render_long_help().to_string();
    assert!(!help.contains("secret123"));
}

/// Serves `router` until the tasks are dropped with the test's runtime.
async fn server(router: Router) -> (SocketAddr, Tasks) {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    let tasks = Tasks::default();
    tasks.spawn("server", async move { axum::serve(listener, router).await.unwrap() });
    (address, tasks)
}

fn answer(value: Value) -> axum::routing::MethodRouter {
    let value = Arc::new(value);
    axum::routing::any(move || async move { Json((*value).clone()) })
}

/// Runs a command line against a server, or several; what it prints goes to the test's output.
async fn against(address: impl ToString, line: &str) -> Result<(), Failure> {
    let mut cli = parse(&format!("disco {line}")).unwrap();
    cli.global.http = address.to_string();
    execute(cli).await.map(|_| ())
}

fn mesh(complete: bool) -> Router {
    let instance = json!({"service": "greeter", "id": "a", "address": "::1", "port": 1, "state": "draining"});
    Router::new()
        .route("/readyz", answer(json!({})))
        .route("/v1/services", answer(json!({"revision": 4, "services": [{"name": "greeter", "serving": 1}]})))
        .route("/v1/services/greeter/instances", answer(json!({"revision": 4, "instances": [instance]})))
        .route("/v1/services/greeter/load", answer(json!({"service": "greeter", "localities": []})))
        .route("/v1/services/greeter/instances/a", answer(instance.clone()))
        .route("/v1/services/greeter/instances/a/drain", answer(json!({"revision": 5, "instance": instance})))
        .route("/v1/checks", answer(json!({"instances": 0, "machines": 0, "silent": 0, "suspended": null})))
        .route("/v1/proxies", answer(json!({"proxies": []})))
        .route(
            "/v1/revisions/{revision}",
            answer(json!({"revision": 5, "complete": complete, "acknowledged": 1, "pending": if complete { json!([]) }
                          else { json!(["edge\u{1b}-7"]) }})),
        )
}

#[tokio::test]
async fn commands_end_well() {
    let (address, _tasks) = server(mesh(true)).await;
    for line in [
        "service list",
        "service show greeter",
        "service load greeter",
        "instance list",
        "instance list greeter -o wide",
        "instance show greeter/a",
        "instance register greeter/a --address 127.0.0.1 --port 1",
        "instance drain greeter/a",
        "instance deregister greeter/a",
        "proxy list",
        "rollout status 5 --wait",
        "check",
    ] {
        against(address, line).await.unwrap_or_else(|failure| panic!("{line}: {failure}"));
    }
}

#[tokio::test]
async fn a_drain_that_is_not_acknowledged_names_the_proxies() {
    let (address, _tasks) = server(mesh(false)).await;
    let failure = against(address, "instance drain greeter/a --wait 20ms").await.unwrap_err();
    assert_eq!(failure.code, failure::NOT_YET);
    assert!(failure.message.contains("not yet: edge\\u{1b}-7"), "{failure}");
    for line in ["rollout status 5", "rollout status 5 --wait --timeout 20ms"] {
        let failure = against(address, line).await.unwrap_err();
        assert_eq!(failure.code, failure::NOT_YET, "{line}");
        assert!(failure.message.contains("1 of 2 proxies acknowledged revision 5"), "{failure}");
    }
    against(address, "instance drain greeter/a --wait 0s").await.unwrap();
    let for_ever = against(address, "instance drain greeter/a --wait 9999999999999999s");
    assert!(tokio::time::timeout(std::time::Duration::from_millis(150), for_ever).await.is_err());
}

#[tokio::test]
async fn all_servers_are_asked_about_proxies_and_one_that_is_away_leaves_it_open() {
    let (one, _tasks) = server(mesh(true)).await;
    let (two, _tasks) = server(mesh(true)).await;
    let (behind, _tasks) = server(mesh(false)).await;
    let none =
        Router::new().route("/v1/proxies/late/resources", answer(json!({"streams": [{"resources": []}]})));
    let (other, _tasks) = server(none).await;
    let away = TcpListener::bind("127.0.0.1:0").await.unwrap().local_addr().unwrap();

    against(format!("{one},{two}"), "rollout status 5").await.unwrap();
    let cases = [
        (format!("{one},{behind}"), "not yet: edge\\u{1b}-7".to_owned()),
        (format!("{one},{away}"), format!("not known: the proxies of {away} (cannot reach")),
        (format!("{away},{one}"), format!("not known: the proxies of {away} (cannot reach")),
        // It says that it knows no such revision.
        (
            format!("{one},{other}"),
            format!("not known: the proxies of {other} (the server answered with status 404"),
        ),
    ];
    for (servers, want) in cases {
        for line in [
            "rollout status 5",
            "rollout status 5 --wait --timeout 20ms",
            "instance drain greeter/a --wait 20ms",
        ] {
            let failure = against(&servers, line).await.unwrap_err();
            let drain = line.starts_with("instance") && failure.message.contains("revision 5");
            assert_eq!(failure.code, failure::NOT_YET, "{line} {servers}: {failure}");
            assert!(drain || failure.message.contains(&want), "{line} {servers}: {failure}");
        }
    }
    // What one knows is enough, and the others are asked if the first is away.
    against(format!("{away},{one},{other}"), "proxy diff late").await.unwrap();
    against(format!("{away},{one}"), "proxy list").await.unwrap();
    against(format!("{away},{one}"), "instance list").await.unwrap();
    // Each is to be in order.
    against(format!("{one},{two}"), "check").await.unwrap();
    let failure = against(format!("{one},{away}"), "check").await.unwrap_err();
    assert_eq!((failure.code, failure.message.as_str()), (failure::FINDINGS, "1 problem found"));
    let failure = against(format!("{away},{away}"), "rollout status 5").await.unwrap_err();
    assert_eq!(failure.code, failure::FAILED, "{failure}");
}

#[tokio::test]
async fn exit_codes() {
    let refuse = |status: u16, code: &'static str| {
        let status = http::StatusCode::from_u16(status).unwrap();
        get(move || async move { (status, Json(json!({"error": {"code": code, "message": "so it is"}}))) })
    };
    let empty = answer(json!({"services": [{"name": "greeter", "serving": 0}]}));
    let router = mesh(true)
        .route("/v1/services/bad/instances", refuse(400, "invalid"))
        .route("/v1/services/gone/instances", refuse(404, "not_found"))
        .route("/v1/proxies/no%2Fbody", refuse(404, "not_found"))
        .route("/v1/proxies/late/resources", answer(json!({"streams": [{"resources": [{"state": "sent"}]}]})))
        .route(
            "/v1/proxies/fine/resources",
            answer(json!({"streams": [{"resources": [{"state": "absent"}]}]})),
        );
    let (address, _tasks) = server(router).await;
    let sad = Router::new()
        .route("/readyz", answer(json!({})))
        .route("/v1/checks", answer(json!({})))
        .route("/v1/services", empty)
        .route("/v1/proxies", answer(json!({"proxies": []})));
    let (sad, _tasks) = server(sad).await;
    let cases = [
        (address, "instance list bad", failure::BAD_DATA, "so it is"),
        (address, "instance list gone", failure::FAILED, "so it is"),
        (address, "proxy show no/body", failure::FAILED, "so it is"),
        (address, "proxy diff late", failure::FINDINGS, "1 difference found"),
        (address, "serve", failure::USAGE, "registry"),
        (
            address,
            "serve --config /nowhere/disco.yaml",
            failure::BAD_DATA,
            "/nowhere/disco.yaml: cannot be read",
        ),
        (address, "dev --grpc-listen 0.0.0.0:0", failure::BAD_DATA, "listens beyond loopback"),
        (sad, "check", failure::FINDINGS, "1 problem found"),
    ];
    against(address, "proxy diff fine").await.unwrap();
    for (address, line, code, want) in cases {
        let failure = against(address, line).await.unwrap_err();
        assert_eq!((failure.code, failure.message.contains(want)), (code, true), "{line}: {failure}");
    }
}

#[tokio::test]
async fn without_a_server_the_message_says_what_to_do() {
    let address = TcpListener::bind("127.0.0.1:0").await.unwrap().local_addr().unwrap();
    let failure = against(address, "service list").await.unwrap_err();
    assert_eq!(failure.code, failure::FAILED);
    assert_eq!(
        failure.message,
        format!(
            "cannot reach a Disco server at {address} (connection refused): start one with `disco dev`, or name it with \
             --http or DISCO_HTTP"
        )
    );
    assert_eq!(against(address, "check").await.unwrap_err().code, failure::FINDINGS);
}
