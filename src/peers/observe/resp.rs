//! The few kinds of answers of Redis' protocol (RESP2) that are needed here.

/// Longest answer, in bytes.
pub(super) const LONGEST: usize = 64 << 10;

/// Most entries of a list, and how deep lists may be within lists.
const MOST: usize = 1024;
const DEPTH: usize = 4;

/// One answer.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Value {
    /// Text of any kind; bytes that are none are replaced.
    Text(String),
    Number(i64),
    List(Vec<Value>),
    Null,
    /// Refused, with the server's words.
    Error(String),
}

impl Value {
    pub(super) fn text(&self) -> Option<&str> {
        match self {
            Self::Text(text) => Some(text),
            _ => None,
        }
    }
}

/// What is sent for a command.
pub(super) fn command(words: &[&str]) -> Vec<u8> {
    let mut bytes = format!("*{}\r\n", words.len()).into_bytes();
    for word in words {
        bytes.extend_from_slice(format!("${}\r\n{word}\r\n", word.len()).as_bytes());
    }
    bytes
}

/// Takes one whole answer off the front; `None` when its end is still to come.
pub(super) fn take(bytes: &mut &[u8]) -> Result<Option<Value>, String> {
    let mut rest = *bytes;
    let found = value(&mut rest, DEPTH)?;
    if found.is_some() {
        *bytes = rest;
    }
    Ok(found)
}

fn value(rest: &mut &[u8], depth: usize) -> Result<Option<Value>, String> {
    let Some(line) = line(rest)? else { return Ok(None) };
    let (kind, text) = line.split_at_checked(1).ok_or("an empty line where an answer should begin")?;
    let number = || text.parse::<i64>().map_err(|_| format!("{text:?} is no number"));
    Ok(Some(match kind {
        "+" => Value::Text(text.to_owned()),
        "-" => Value::Error(text.to_owned()),
        ":" => Value::Number(number()?),
        "$" => match usize::try_from(number()?) {
            Err(_) => Value::Null,
            Ok(length) if length > LONGEST => return Err(format!("a text of {length} bytes")),
            Ok(length) => {
                let Some((text, after)) = rest.split_at_checked(length) else { return Ok(None) };
                let Some((end, after)) = after.split_at_checked(2) else { return Ok(None) };
                if end != b"\r\n" {
                    return Err("a text that does not end where it said".to_owned());
                }
                *rest = after;
                Value::Text(String::from_utf8_lossy(text).into_owned())
            }
        },
        "*" => match usize::try_from(number()?) {
            Err(_) => Value::Null,
            Ok(count) if count > MOST || depth == 0 => {
                return Err("a list that is too long or too deep".to_owned());
            }
            Ok(count) => {
                let mut list = Vec::new();
                for _ in 0..count {
                    let Some(entry) = value(rest, depth - 1)? else { return Ok(None) };
                    list.push(entry);
                }
                Value::List(list)
            }
        },
        other => return Err(format!("{other:?} begins no answer of Redis")),
    }))
}

fn line<'a>(rest: &mut &'a [u8]) -> Result<Option<&'a str>, String> {
    let Some(end) = rest.windows(2).position(|pair| pair == b"\r\n") else { return Ok(None) };
    let (line, after) = rest.split_at_checked(end).ok_or("no line")?;
    *rest = after.get(2..).unwrap_or_default();
    std::str::from_utf8(line).map(Some).map_err(|_| "a line that is no text".to_owned())
}
