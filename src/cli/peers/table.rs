use serde_json::Value;

use crate::cli::output::{Column, age, cell, count, number, render};
use crate::rt;

/// All sets.
pub(super) fn sets(document: &Value, width: Option<usize>) -> String {
    let sets = document.get("sets").and_then(Value::as_array).into_iter().flatten();
    let row = |set: &Value| {
        let field = |name| cell(set, name);
        let founded = set.get("founded").and_then(Value::as_bool).unwrap_or_default();
        let state = if founded {
            match (set.get("pending").is_some_and(|pending| !pending.is_null()), number(set, "/drift")) {
                (true, _) => format!("{} of {}", field("/pending/change"), field("/pending/key")),
                (false, 0) => "founded".to_owned(),
                (false, _) => "drift: disco peers verify".to_owned(),
            }
        } else {
            format!("{} of {} have come", number(set, "/peers"), number(set, "/expect"))
        };
        vec![
            field("/name"),
            field("/kind"),
            state,
            format!("{}/{}", number(set, "/up"), number(set, "/peers")),
            field("/leader"),
            field("/term"),
            field("/cluster_id"),
            field("/generation"),
        ]
    };
    let rows: Vec<_> = sets.map(row).collect();
    let columns = ["NAME", "KIND", "STATE", "UP", "LEADER", "TERM"].map(Column::new);
    let columns = [columns.as_slice(), &["CLUSTER", "GENERATION"].map(Column::wide)].concat();
    render(&columns, &rows, width)
}

/// One set with its replicas.
pub(super) fn set(document: &Value, width: Option<usize>) -> String {
    let field = |name| cell(document, name);
    let mut text = format!(
        "Set      {}, {} ({})\nCluster  {}, generation {}\nFounded  {} ago by {}, digest {:.12}\nLeader   {}, term {}\n",
        field("/name"),
        field("/kind"),
        field("/class"),
        field("/cluster_id"),
        field("/generation"),
        age(document, "/founding/at", rt::now()),
        count(list(document, "/founding/list").count() as u64, "founder"),
        field("/founding/digest"),
        field("/leader"),
        field("/term"),
    );
    if document.get("pending").is_some_and(|pending| !pending.is_null()) {
        let since = age(document, "/pending/since", rt::now());
        text.push_str(&format!(
            "Pending  {} of {}, for {since}\n",
            field("/pending/change"),
            field("/pending/key")
        ));
    }
    for drift in list(document, "/drift") {
        text.push_str(&format!("Differs  {}\n", cell(drift, "")));
    }
    text.push('\n');
    let row = |peer: &Value| {
        let field = |name| cell(peer, name);
        let leaving = peer.get("leaving").and_then(Value::as_bool).unwrap_or_default();
        vec![
            field("/node_id"),
            field("/key"),
            field("/role"),
            field("/liveness"),
            if leaving { "leaving".to_owned() } else { field("/suffrage") },
            field("/term"),
            field("/lag"),
            field("/zone"),
            field("/raft"),
            field("/client"),
            field("/birth"),
            field("/ordinal"),
            field("/version"),
            field("/disk"),
        ]
    };
    let rows: Vec<_> = list(document, "/peers").map(row).collect();
    let columns = ["NODE", "NAME", "ROLE", "STATE", "MEMBER", "TERM", "LAG", "ZONE", "RAFT"].map(Column::new);
    let wide = ["CLIENT", "BIRTH", "ORDINAL", "VERSION", "DISK"].map(Column::wide);
    text.push_str(&render(&[columns.as_slice(), &wide].concat(), &rows, width));
    text
}

/// The next step of a change.
pub(super) fn step(document: &Value, _: Option<usize>) -> String {
    let field = |name| cell(document, name);
    if document.get("done").and_then(Value::as_bool).unwrap_or_default() {
        return "it is so already: nothing to do\n".to_owned();
    }
    if document.get("step").is_none_or(Value::is_null) {
        return String::new();
    }
    format!(
        "next: {} {} (node {})\n  {}\nwhen the database has it, ask again for the next step\n",
        field("/step/change"),
        field("/step/key"),
        field("/step/node_id"),
        field("/hint")
    )
}

fn list<'a>(document: &'a Value, pointer: &str) -> impl Iterator<Item = &'a Value> {
    document.pointer(pointer).and_then(Value::as_array).into_iter().flatten()
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn a_set_fits_80_columns_and_names_what_an_operator_asks_for() {
        let peer = json!({"node_id": 1, "key": "n1\u{1b}", "role": "leader", "liveness": "up", "suffrage": "voter", "term": 7,
                          "lag": 0, "zone": "a", "raft": "10.0.0.1:2380", "leaving": false});
        let document = json!({"name": "db", "kind": "etcd", "class": "identity", "cluster_id": "x", "generation": 1,
            "founding": {"at": "2000-01-01T00:00:00Z", "digest": "0123456789abcdef", "list": [1, 2, 3]}, "leader": "n1",
            "term": 7, "pending": {"change": "promote", "key": "n4", "since": "2000-01-01T00:00:00Z"},
            "drift": ["n9 is a member of the database and not of the set"], "peers": [peer]});
        let text = set(&document, Some(80));
        for want in ["n1\\u{1b}", "leader", "3 founders", "0123456789ab\n", "promote of n4", "n9 is a member"]
        {
            assert!(text.contains(want), "{want} is not in\n{text}");
        }
        assert!(text.lines().all(|line| line.chars().count() <= 80), "{text}");
    }

    #[test]
    fn a_set_that_collects_says_how_far_it_is() {
        let collecting =
            json!({"name": "db", "kind": "etcd", "founded": false, "peers": 2, "expect": 3, "up": 0});
        let text = sets(&json!({"sets": [collecting]}), Some(80));
        assert!(text.contains("2 of 3 have come"), "{text}");
    }
}
