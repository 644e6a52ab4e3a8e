use std::time::{Duration, SystemTime};

use jiff::Timestamp;
use serde_json::Value;

/// A text that is safe on a terminal: control characters and those that turn the direction of writing are spelt out.
pub(in crate::cli) fn clean(text: &str) -> String {
    text.chars().fold(String::with_capacity(text.len()), |mut safe, c| {
        if c.is_control()
            || matches!(c, '\u{200e}' | '\u{200f}' | '\u{202a}'..='\u{202e}' | '\u{2066}'..='\u{2069}')
        {
            safe.extend(c.escape_unicode());
        } else {
            safe.push(c);
        }
        safe
    })
}

/// As [`clean`], keeping the ends of lines.
pub(in crate::cli) fn clean_lines(text: &str) -> String {
    text.split('\n').map(clean).collect::<Vec<_>>().join("\n")
}

/// The scalar at a JSON pointer as safe text, `-` when there is none.
pub(in crate::cli) fn cell(value: &Value, pointer: &str) -> String {
    match value.pointer(pointer) {
        Some(Value::String(text)) if !text.is_empty() => clean(text),
        Some(Value::Number(number)) => number.to_string(),
        Some(Value::Bool(true)) => "yes".to_owned(),
        Some(Value::Bool(false)) => "no".to_owned(),
        _ => "-".to_owned(),
    }
}

/// The whole number at a JSON pointer, 0 when there is none.
pub(in crate::cli) fn number(value: &Value, pointer: &str) -> u64 {
    value.pointer(pointer).and_then(Value::as_u64).unwrap_or_default()
}

/// `1 proxy`, `2 proxies`: for words whose plural is regular but for a final y.
pub(in crate::cli) fn count(count: impl Into<u64>, word: &str) -> String {
    let count = count.into();
    match (count, word.strip_suffix('y')) {
        (1, _) => format!("1 {word}"),
        (_, Some(stem)) => format!("{count} {stem}ies"),
        _ => format!("{count} {word}s"),
    }
}

/// The first names of a list, and how many more there are.
pub(in crate::cli) fn some_of(names: &[String]) -> String {
    const SHOWN: usize = 10;
    let shown = names.iter().take(SHOWN).map(String::as_str).collect::<Vec<_>>().join(", ");
    match names.len().saturating_sub(SHOWN) {
        0 => shown,
        more => format!("{shown} and {more} more"),
    }
}

/// How long ago the RFC 3339 time at a JSON pointer was at `now`: `12s`, `3m`, `5h`, `2d`; `-` when there is none.
pub(in crate::cli) fn age(value: &Value, pointer: &str, now: SystemTime) -> String {
    let parsed =
        value.pointer(pointer).and_then(Value::as_str).and_then(|text| text.parse::<Timestamp>().ok());
    let Some(then) = parsed else { return "-".to_owned() };
    // A clock that is behind the server's must not show a negative age.
    short(now.duration_since(SystemTime::from(then)).unwrap_or_default())
}

fn short(age: Duration) -> String {
    let seconds = age.as_secs();
    match seconds {
        0..120 => format!("{seconds}s"),
        120..7_200 => format!("{}m", seconds / 60),
        7_200..172_800 => format!("{}h", seconds / 3_600),
        _ => format!("{}d", seconds / 86_400),
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn ages() {
        let now = SystemTime::from("2026-11-20T12:00:00Z".parse::<Timestamp>().unwrap());
        for (then, want) in [
            ("2026-11-20T12:00:00Z", "0s"),
            ("2026-11-20T11:58:01.5Z", "118s"),
            ("2026-11-20T13:50:00+02:00", "10m"),
            ("2026-11-20T09:00:00Z", "3h"),
            ("2026-11-01T12:00:00Z", "19d"),
            ("2026-11-20T12:00:09Z", "0s"),
            ("yesterday", "-"),
        ] {
            assert_eq!(age(&json!({"at": then}), "/at", now), want, "{then}");
        }
        assert_eq!(age(&json!({}), "/at", now), "-");
    }

    #[test]
    fn counts_and_lists() {
        assert_eq!([0u64, 1, 2].map(|n| count(n, "proxy")), ["0 proxies", "1 proxy", "2 proxies"]);
        assert_eq!(count(3u64, "problem"), "3 problems");
        let names: Vec<String> = (1..=12).map(|n| n.to_string()).collect();
        assert_eq!(some_of(&names), "1, 2, 3, 4, 5, 6, 7, 8, 9, 10 and 2 more");
        assert_eq!(some_of(&names[..2]), "1, 2");
    }

    #[test]
    fn texts_cannot_steer_the_terminal() {
        assert_eq!(clean("a\u{1b}[31mb\r\n\u{202e}c ü"), "a\\u{1b}[31mb\\u{d}\\u{a}\\u{202e}c ü");
        assert_eq!(clean_lines("a\n\u{7}b"), "a\n\\u{7}b");
    }
}
