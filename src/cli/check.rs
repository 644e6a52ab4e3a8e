use std::time::Duration;

use clap::Args;
use futures_util::future::join_all;
use http::{Method, StatusCode};
use serde_json::{Value, json};

use super::{
    Failure, Global,
    failure::USAGE,
    output::{Format, ShowOptions, View, cell, clean, count, number, print},
    servers::{Elsewhere, ask_all},
};
use crate::client::{Http, HttpError};

/// How long a proxy may lag before that is a finding: a change may be on its way while we look.
const SETTLE: Duration = Duration::from_secs(2);

/// Arguments of `disco check`.
#[derive(Debug, Args)]
pub(super) struct Check {
    #[command(flatten)]
    options: ShowOptions,
}

/// Something that is not in order.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Finding {
    what: String,
    problem: String,
    next: String,
}

impl Finding {
    fn new(what: impl Into<String>, problem: impl Into<String>, next: impl Into<String>) -> Self {
        Self { what: what.into(), problem: problem.into(), next: next.into() }
    }
}

/// Looks at the servers, their services and their proxies.
///
/// # Errors
/// Exit code 79 when something is not in order.
pub(super) async fn run(arguments: Check, global: &Global) -> Result<(), Failure> {
    let http = global.client()?;
    let (findings, seen) = match look(&http).await {
        Ok(seen) => seen,
        Err(failure) if failure.code == USAGE => return Err(failure),
        Err(failure) => (vec![Finding::new("server", failure.message, "")], String::new()),
    };
    let format = arguments.options.output;
    let view = View { document: document(&findings), items: Some("findings"), table: text, empty: "" };
    if findings.is_empty() && matches!(format, Format::Table | Format::Wide) {
        return print(&format!("all good: {seen}\n"));
    }
    view.print(format)?;
    match findings.len() as u64 {
        0 => Ok(()),
        some => Err(Failure::findings(format!("{} found", count(some, "problem")))),
    }
}

fn document(findings: &[Finding]) -> Value {
    let findings: Vec<Value> = findings
        .iter()
        .map(|Finding { what, problem, next }| json!({"what": what, "problem": problem, "next": next}))
        .collect();
    json!({ "findings": findings })
}

/// Long sentences do not fit columns: one block each.
fn text(document: &Value, _: Option<usize>) -> String {
    let findings = document.get("findings").and_then(Value::as_array).into_iter().flatten();
    findings
        .map(|finding| {
            let problem = finding.get("problem").and_then(Value::as_str).unwrap_or_default();
            let next = finding.get("next").and_then(Value::as_str).filter(|next| !next.is_empty());
            let next = next.map(|next| format!("  -> {}\n", clean(next))).unwrap_or_default();
            format!("{}: {}\n{next}", cell(finding, "/what"), super::output::clean_lines(problem))
        })
        .collect()
}

/// What is not in order, and what was looked at.
async fn look(http: &Http) -> Result<(Vec<Finding>, String), Failure> {
    let servers = http.each();
    let mut findings = Vec::new();
    let looks = join_all(servers.iter().map(server)).await;
    let reached = looks.iter().any(Result::is_ok);
    for (server, look) in servers.iter().zip(looks) {
        let found = match look {
            Ok(found) => found,
            Err(error @ HttpError::Settings(_)) => return Err(error.into()),
            Err(error) => vec![Finding::new("server", error.to_string(), "")],
        };
        findings.extend(found.into_iter().map(|finding| match servers.len() {
            1 => finding,
            _ => Finding { what: format!("{} {}", finding.what, server.address()), ..finding },
        }));
    }
    if !reached {
        return Ok((findings, String::new()));
    }

    let services = http.get("/v1/services", Duration::ZERO).await?;
    findings.extend(service_findings(&services));

    let mut proxies = ask_all(http, "/v1/proxies", Duration::ZERO, Elsewhere::No).await?;
    if !lagging(&proxies).is_empty() {
        let before = lagging(&proxies);
        tokio::time::sleep(SETTLE).await;
        proxies = ask_all(http, "/v1/proxies", Duration::ZERO, Elsewhere::No).await?;
        findings.extend(lag_findings(&before, &lagging(&proxies)));
    }
    findings.extend(rejections(&proxies));

    let serving: u64 = items(&services, "services").map(|service| number(service, "/serving")).sum();
    let are = if servers.len() == 1 { "the server at {} is" } else { "the servers at {} are" };
    let seen = format!(
        "{} ready; {} with {}; {} up to date",
        are.replace("{}", &http.address()),
        count(items(&services, "services").count() as u64, "service"),
        count(serving, "serving instance"),
        count(items(&proxies, "proxies").count() as u64, "proxy"),
    );
    Ok((findings, seen))
}

/// What one server says of itself.
async fn server(http: &Http) -> Result<Vec<Finding>, HttpError> {
    let (status, body) = http.raw(Method::GET, "/readyz", None, Duration::ZERO).await?;
    let checks = http.get("/v1/checks", Duration::ZERO).await;
    let ready = readiness(status, &serde_json::from_slice(&body).unwrap_or_default());
    // Before a server is ready it need not answer anything else.
    let checks = if ready.is_some() { checks.unwrap_or_default() } else { checks? };
    Ok(ready.into_iter().chain(check_findings(&checks)).collect())
}

fn items<'a>(document: &'a Value, list: &str) -> impl Iterator<Item = &'a Value> {
    document.get(list).and_then(Value::as_array).into_iter().flatten()
}

fn readiness(status: StatusCode, body: &Value) -> Option<Finding> {
    if status.is_success() {
        return None;
    }
    let waiting: Vec<&str> = items(body, "waiting").filter_map(Value::as_str).collect();
    let problem = match waiting.as_slice() {
        [] => format!("is not ready: /readyz answered {status}"),
        waiting => format!("is not ready: waits for {}", waiting.join(", ")),
    };
    Some(Finding::new("server", problem, "its log says why"))
}

fn service_findings(services: &Value) -> Vec<Finding> {
    let each = || items(services, "services");
    let none = each().filter(|service| number(service, "/serving") == 0).map(nobody_serves);
    let some = each().filter(|service| number(service, "/serving") > 0).filter_map(some_fail);
    none.chain(some).chain(each().filter_map(some_are_stale)).collect()
}

fn some_fail(service: &Value) -> Option<Finding> {
    let (unhealthy, serving) = (number(service, "/unhealthy"), number(service, "/serving"));
    let name = cell(service, "/name");
    (unhealthy > 0).then(|| {
        Finding::new(
            format!("service {name}"),
            format!("checks fail: {unhealthy} unhealthy, {serving} serving: calls go to those that serve"),
            format!("`disco instance list {name} -o wide` shows what the checks see"),
        )
    })
}

fn some_are_stale(service: &Value) -> Option<Finding> {
    let held = number(service, "/held");
    let name = cell(service, "/name");
    (held > 0).then(|| {
        Finding::new(
            format!("service {name}"),
            format!(
                "{}: too many leases ended at once to be believed; they go on taking calls",
                count(held, "stale instance")
            ),
            format!("`disco service release {name}` removes them if they are gone"),
        )
    })
}

fn nobody_serves(service: &Value) -> Finding {
    let name = cell(service, "/name");
    let problem = match (number(service, "/draining"), number(service, "/unhealthy")) {
        (_, unhealthy @ 1..) => {
            let all = count(unhealthy, "instance");
            let problem = format!("all checks fail ({all}): calls go to them all the same, as a last resort");
            let next = format!("`disco instance list {name} -o wide` shows what the checks see");
            return Finding::new(format!("service {name}"), problem, next);
        }
        (0, _) => "has no instances: calls to it fail".to_owned(),
        (draining, _) => format!("has no serving instance, {draining} draining: calls to it fail"),
    };
    let next = format!("start one with `disco run --service {name} …`, or `disco service remove {name}`");
    Finding::new(format!("service {name}"), problem, next)
}

fn check_findings(checks: &Value) -> Option<Finding> {
    let since = checks.get("suspended").and_then(Value::as_str)?;
    let problem = format!(
        "nothing comes back from {} of {} machines since {}: while it may be the server that is cut off, silence makes no \
         instance unhealthy",
        number(checks, "/silent"),
        number(checks, "/machines"),
        clean(since)
    );
    Some(Finding::new(
        "health checks",
        problem,
        "is the network between the server and the instances in order?",
    ))
}

/// Node id and acknowledged revisions of each proxy that does not have everything.
fn lagging(proxies: &Value) -> Vec<(String, Vec<u64>)> {
    items(proxies, "proxies")
        .filter(|proxy| proxy.get("synced").and_then(Value::as_bool) == Some(false))
        .map(|proxy| {
            let acknowledged = items(proxy, "types").map(|kind| number(kind, "/acknowledged")).collect();
            (cell(proxy, "/node_id"), acknowledged)
        })
        .collect()
}

/// Those that lagged before and have not moved since.
fn lag_findings(before: &[(String, Vec<u64>)], now: &[(String, Vec<u64>)]) -> Vec<Finding> {
    now.iter()
        .filter(|proxy| before.contains(proxy))
        .map(|(node, _)| {
            let next = format!("`disco proxy show {node}` says what is missing");
            Finding::new(format!("proxy {node}"), "has not acknowledged the newest state", next)
        })
        .collect()
}

fn rejections(proxies: &Value) -> Vec<Finding> {
    items(proxies, "proxies")
        .filter(|proxy| cell(proxy, "/last_error") != "-")
        .map(|proxy| {
            let node = cell(proxy, "/node_id");
            let problem = format!("rejected what it was sent: {}", cell(proxy, "/last_error"));
            let next = format!("`disco proxy show {node} -o wide` shows which type");
            Finding::new(format!("proxy {node}"), problem, next)
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_a_finding() {
        let services = json!({"services": [
            {"name": "fine", "serving": 2, "draining": 0},
            {"name": "empty", "serving": 0, "draining": 0},
            {"name": "leaving", "serving": 0, "draining": 2},
            {"name": "ill", "serving": 0, "draining": 1, "unhealthy": 2},
            {"name": "partly", "serving": 2, "draining": 0, "unhealthy": 1, "held": 2},
        ]});
        let named = |findings: &[Finding]| {
            findings.iter().map(|f| format!("{}: {}", f.what, f.problem)).collect::<Vec<_>>()
        };
        assert_eq!(
            named(&service_findings(&services)),
            [
                "service empty: has no instances: calls to it fail",
                "service leaving: has no serving instance, 2 draining: calls to it fail",
                "service ill: all checks fail (2 instances): calls go to them all the same, as a last resort",
                "service partly: checks fail: 1 unhealthy, 2 serving: calls go to those that serve",
                "service partly: 2 stale instances: too many leases ended at once to be believed; they go on taking calls"
            ]
        );

        let proxy = |node: &str, acknowledged: u64, error: &str| {
            json!({"node_id": node, "synced": acknowledged > 6, "last_error": error,
                   "types": [{"acknowledged": acknowledged}]})
        };
        let before = json!({"proxies": [proxy("stuck", 5, ""), proxy("moves", 5, ""), proxy("fine", 7, "")]});
        let after =
            json!({"proxies": [proxy("stuck", 5, "bad\u{7}"), proxy("moves", 6, ""), proxy("late", 1, "")]});
        assert_eq!(
            named(&lag_findings(&lagging(&before), &lagging(&after))),
            ["proxy stuck: has not acknowledged the newest state"]
        );
        assert_eq!(named(&rejections(&after)), ["proxy stuck: rejected what it was sent: bad\\u{7}"]);

        assert_eq!(check_findings(&json!({"suspended": null})), None);
        let cut_off =
            check_findings(&json!({"machines": 4, "silent": 3, "suspended": "2026-01-01T00:00:00Z"}));
        assert!(cut_off.unwrap().problem.starts_with("nothing comes back from 3 of 4 machines since 2026"));

        assert_eq!(readiness(StatusCode::OK, &Value::Null), None);
        let waiting =
            readiness(StatusCode::SERVICE_UNAVAILABLE, &json!({"waiting": ["store", "xds"]})).unwrap();
        assert_eq!(waiting.problem, "is not ready: waits for store, xds");
    }
}
