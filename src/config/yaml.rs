//! YAML text to a tree of nodes with positions. The only file that knows the YAML library.

use std::{collections::BTreeMap, fmt};

use serde::{
    Deserialize,
    de::{Deserializer, Error as _, MapAccess, SeqAccess, Visitor},
};
use serde_saphyr::{Location, Spanned};

use crate::model::{Node, Position, Problem, Value};

/// The tree of a file. Lists and maps that are the value of a key stand where the key stands, for a block begins on a
/// later line than the key that is its name.
pub(super) struct Tree {
    pub(super) root: Node,
    /// The position of the key of each value that has one, by the position of the value.
    keys: BTreeMap<Position, Position>,
}

impl Tree {
    /// Where the key stands whose value stands at `value`.
    pub(super) fn key_of(&self, value: Position) -> Option<Position> {
        self.keys.get(&value).copied()
    }
}

/// Reads one YAML document. An empty one is [`Value::Null`].
pub(super) fn read(text: &str) -> Result<Tree, Problem> {
    if text.lines().all(|line| line.trim_start().is_empty() || line.trim_start().starts_with('#')) {
        let root = Node { value: Value::Null, at: Some(Position { line: 1, column: 1 }) };
        return Ok(Tree { root, keys: BTreeMap::new() });
    }
    // YAML 1.2: `off` and `yes` are texts, which matters for `log.filter: off`.
    let options = serde_saphyr::options! {
        strict_booleans: true,
        budget: serde_saphyr::budget! { max_nodes: 10_000 },
    };
    let raw: Raw = serde_saphyr::from_str_with_options(text, options).map_err(|error| {
        let error = error.without_snippet();
        let at = error.location().and_then(position);
        let message = error.to_string();
        // The position is said by the problem; the library's advice is for programs that use it.
        let cut = [" at line ", "; use from_str", ", set DuplicateKeyPolicy"]
            .iter()
            .filter_map(|mark| message.find(mark))
            .min();
        let message = cut.and_then(|cut| message.get(..cut)).unwrap_or(&message);
        Problem::new("", message, at)
    })?;
    let mut keys = BTreeMap::new();
    let root = raw.into_node(None, &mut keys);
    Ok(Tree { root, keys })
}

fn position(location: Location) -> Option<Position> {
    let line = usize::try_from(location.line()).ok()?;
    let column = usize::try_from(location.column()).ok()?;
    (line > 0 && column > 0).then_some(Position { line, column })
}

struct Raw(Spanned<RawValue>);

enum RawValue {
    Scalar(Value),
    List(Vec<Raw>),
    Map(Vec<(Spanned<String>, Raw)>),
}

impl Raw {
    fn into_node(self, key: Option<Position>, keys: &mut BTreeMap<Position, Position>) -> Node {
        let own = position(self.0.referenced);
        if let (Some(own), Some(key)) = (own, key) {
            keys.insert(own, key);
        }
        let container = key.or(own);
        match self.0.value {
            RawValue::Scalar(value) => Node { value, at: own.or(key) },
            RawValue::List(items) => {
                let items = items.into_iter().map(|item| item.into_node(None, keys)).collect();
                Node { value: Value::List(items), at: container }
            }
            RawValue::Map(entries) => {
                let entries = entries
                    .into_iter()
                    .map(|(name, value)| {
                        let at = position(name.referenced);
                        (name.value, value.into_node(at, keys))
                    })
                    .collect();
                Node { value: Value::Map(entries), at: container }
            }
        }
    }
}

impl<'de> Deserialize<'de> for Raw {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        Spanned::deserialize(deserializer).map(Self)
    }
}

impl<'de> Deserialize<'de> for RawValue {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_any(AnyValue)
    }
}

struct AnyValue;

impl<'de> Visitor<'de> for AnyValue {
    type Value = RawValue;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a YAML value")
    }

    fn visit_bool<E>(self, value: bool) -> Result<RawValue, E> {
        Ok(RawValue::Scalar(Value::Bool(value)))
    }

    fn visit_i64<E>(self, value: i64) -> Result<RawValue, E> {
        Ok(RawValue::Scalar(Value::Int(value.into())))
    }

    fn visit_u64<E>(self, value: u64) -> Result<RawValue, E> {
        Ok(RawValue::Scalar(Value::Int(value.into())))
    }

    fn visit_i128<E>(self, value: i128) -> Result<RawValue, E> {
        Ok(RawValue::Scalar(Value::Int(value)))
    }

    fn visit_u128<E: serde::de::Error>(self, value: u128) -> Result<RawValue, E> {
        let value = i128::try_from(value).map_err(|_| E::custom("the number is too large"))?;
        Ok(RawValue::Scalar(Value::Int(value)))
    }

    fn visit_f64<E>(self, value: f64) -> Result<RawValue, E> {
        Ok(RawValue::Scalar(Value::Float(value)))
    }

    fn visit_str<E>(self, value: &str) -> Result<RawValue, E> {
        Ok(RawValue::Scalar(Value::Text(value.to_owned())))
    }

    fn visit_unit<E>(self) -> Result<RawValue, E> {
        Ok(RawValue::Scalar(Value::Null))
    }

    fn visit_none<E>(self) -> Result<RawValue, E> {
        Ok(RawValue::Scalar(Value::Null))
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut items: A) -> Result<RawValue, A::Error> {
        let mut list = Vec::new();
        while let Some(item) = items.next_element()? {
            list.push(item);
        }
        Ok(RawValue::List(list))
    }

    fn visit_map<A: MapAccess<'de>>(self, mut entries: A) -> Result<RawValue, A::Error> {
        let mut map: Vec<(Spanned<String>, Raw)> = Vec::new();
        while let Some((key, value)) = entries.next_entry::<Spanned<String>, Raw>()? {
            if map.iter().any(|(known, _)| known.value == key.value) {
                return Err(A::Error::custom(format!("the key `{}` stands here twice", key.value)));
            }
            map.push((key, value));
        }
        Ok(RawValue::Map(map))
    }
}
