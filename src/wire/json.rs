//! Strict JSON: no duplicate keys, bounded depth, and a reader of objects that collects every problem instead of the first.
//!
//! Invariant: a text that does not parse, or holds a key twice, never becomes a value.

use std::cell::{Cell, RefCell};
use std::fmt;

use serde::de::{self, DeserializeSeed, Deserializer, MapAccess, SeqAccess, Visitor};
use serde_json::{Map, Value};

use crate::limits;
use crate::workload::Unfit;

/// One rule a body breaks, and where (RFC 6901).
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Problem {
    /// A JSON pointer; empty for the whole body.
    pub pointer: String,
    /// The rule, in words; never the value.
    pub detail: String,
}

/// All rules a body breaks.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Problems(Vec<Problem>);

impl Problems {
    /// Adds one, up to `PROBLEMS_MAX`.
    pub fn add(&mut self, pointer: impl Into<String>, detail: impl Into<String>) {
        if self.0.len() < limits::PROBLEMS_MAX {
            self.0.push(Problem { pointer: pointer.into(), detail: detail.into() });
        }
    }

    /// A single problem.
    pub fn one(pointer: impl Into<String>, detail: impl Into<String>) -> Self {
        Self(vec![Problem { pointer: pointer.into(), detail: detail.into() }])
    }

    /// Whether all is well.
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// All of them, in the order of the fields.
    pub fn as_slice(&self) -> &[Problem] {
        &self.0
    }
}

/// `/a: rule; /b: rule`.
impl fmt::Display for Problems {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (i, problem) in self.0.iter().enumerate() {
            let separator = if i == 0 { "" } else { "; " };
            let pointer = if problem.pointer.is_empty() { "body" } else { &problem.pointer };
            write!(f, "{separator}{pointer}: {}", problem.detail)?;
        }
        Ok(())
    }
}

impl std::error::Error for Problems {}

/// Parses a JSON text.
///
/// # Errors
/// A syntax error, as one problem at the whole body; every duplicate key, each at its place.
pub fn parse(bytes: &[u8]) -> Result<Value, Problems> {
    parse_within(bytes, limits::JSON_VALUES_MAX)
}

/// As [`parse`], with a bound of its own on the number of values.
///
/// # Errors
/// As [`parse`].
pub fn parse_within(bytes: &[u8], values_max: usize) -> Result<Value, Problems> {
    let strict = Strict { pointer: RefCell::default(), problems: RefCell::default(), values: Cell::new(0), values_max };
    let mut deserializer = serde_json::Deserializer::from_slice(bytes);
    let value = (At { strict: &strict, depth: 0 })
        .deserialize(&mut deserializer)
        .and_then(|value| deserializer.end().map(|()| value))
        .map_err(|error| Problems::one("", syntax(&error)))?;
    let problems = strict.problems.into_inner();
    if problems.is_empty() { Ok(value) } else { Err(problems) }
}

/// serde_json's words hold no byte of the text; only the position is added.
fn syntax(error: &serde_json::Error) -> String {
    if error.is_eof() { "not JSON: the text ends too early".into() } else { format!("not JSON: {error}") }
}

struct Strict {
    pointer: RefCell<String>,
    problems: RefCell<Problems>,
    values: Cell<usize>,
    values_max: usize,
}

#[derive(Clone, Copy)]
struct At<'a> {
    strict: &'a Strict,
    depth: usize,
}

impl At<'_> {
    fn deeper<E: de::Error>(self) -> Result<Self, E> {
        let depth = self.depth.saturating_add(1);
        if depth > limits::JSON_DEPTH_MAX {
            return Err(E::custom(format_args!("nested deeper than {}", limits::JSON_DEPTH_MAX)));
        }
        Ok(Self { depth, ..self })
    }

    /// Runs `inside` with `token` at the end of the pointer.
    fn within<T>(self, token: &str, inside: impl FnOnce() -> T) -> T {
        let length = self.strict.pointer.borrow().len();
        push_token(&mut self.strict.pointer.borrow_mut(), token);
        let result = inside();
        self.strict.pointer.borrow_mut().truncate(length);
        result
    }
}

/// A key as a step of a pointer.
pub fn token(key: &str) -> String {
    let mut pointer = String::new();
    push_token(&mut pointer, key);
    pointer.split_off(1)
}

/// RFC 6901 section 3: `~` and `/` are escaped. A long key is cut: it is only shown.
fn push_token(pointer: &mut String, token: &str) {
    pointer.push('/');
    for c in token.chars().take(limits::LABEL_BYTES_MAX) {
        match c {
            '~' => pointer.push_str("~0"),
            '/' => pointer.push_str("~1"),
            c => pointer.push(c),
        }
    }
}

impl<'de> DeserializeSeed<'de> for At<'_> {
    type Value = Value;

    fn deserialize<D: Deserializer<'de>>(self, deserializer: D) -> Result<Value, D::Error> {
        let values = self.strict.values.get().saturating_add(1);
        self.strict.values.set(values);
        if values > self.strict.values_max {
            return Err(de::Error::custom(format_args!("more than {} values", self.strict.values_max)));
        }
        deserializer.deserialize_any(self)
    }
}

impl<'de> Visitor<'de> for At<'_> {
    type Value = Value;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a JSON value")
    }

    fn visit_unit<E>(self) -> Result<Value, E> {
        Ok(Value::Null)
    }

    fn visit_bool<E>(self, b: bool) -> Result<Value, E> {
        Ok(Value::Bool(b))
    }

    fn visit_u64<E>(self, n: u64) -> Result<Value, E> {
        Ok(n.into())
    }

    fn visit_i64<E>(self, n: i64) -> Result<Value, E> {
        Ok(n.into())
    }

    fn visit_f64<E>(self, n: f64) -> Result<Value, E> {
        Ok(n.into())
    }

    fn visit_str<E>(self, text: &str) -> Result<Value, E> {
        Ok(text.into())
    }

    fn visit_string<E>(self, text: String) -> Result<Value, E> {
        Ok(text.into())
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut seq: A) -> Result<Value, A::Error> {
        let inner = self.deeper()?;
        let mut items = Vec::new();
        while let Some(item) = self.within(&items.len().to_string(), || seq.next_element_seed(inner))? {
            items.push(item);
        }
        Ok(items.into())
    }

    fn visit_map<A: MapAccess<'de>>(self, mut entries: A) -> Result<Value, A::Error> {
        let inner = self.deeper()?;
        let mut map = Map::new();
        while let Some(key) = entries.next_key::<String>()? {
            let value = self.within(&key, || {
                if map.contains_key(&key) {
                    self.strict.problems.borrow_mut().add(self.strict.pointer.borrow().as_str(), "duplicate key");
                }
                entries.next_value_seed(inner)
            })?;
            map.insert(key, value);
        }
        Ok(map.into())
    }
}

/// The fields of one object, taken one by one. What is taken and does not fit becomes a problem; what is left over too.
pub struct Fields<'a> {
    map: Map<String, Value>,
    pointer: String,
    problems: &'a mut Problems,
    known: Vec<&'static str>,
}

impl<'a> Fields<'a> {
    /// The fields of `value`, which stands at `pointer`; `None`, and a problem, when it is no object.
    pub fn of(value: Value, pointer: &str, problems: &'a mut Problems) -> Option<Self> {
        match value {
            Value::Object(map) => Some(Self { map, pointer: pointer.to_owned(), problems, known: Vec::new() }),
            other => {
                problems.add(pointer, format!("must be an object, not {}", kind(&other)));
                None
            }
        }
    }

    /// Takes a field as it is. `null` is as good as absent.
    pub fn take(&mut self, name: &'static str) -> Option<Value> {
        self.known.push(name);
        self.map.remove(name).filter(|v| !v.is_null())
    }

    /// Adds a problem at a field.
    pub fn problem(&mut self, name: &str, detail: impl Into<String>) {
        let pointer = self.at(name);
        self.problems.add(pointer, detail);
    }

    /// Notes that a field that must be there is not.
    pub fn required<T>(&mut self, name: &'static str, value: Option<T>) -> Option<T> {
        // A field that was there and did not fit has its problem already.
        if value.is_none() && !self.problems.0.iter().any(|p| p.pointer == self.at(name)) {
            self.problem(name, "is required");
        }
        value
    }

    /// A string that holds no NUL, of at most `bytes_max` bytes.
    pub fn text(&mut self, name: &'static str, bytes_max: usize) -> Option<String> {
        let value = self.take(name)?;
        let pointer = self.at(name);
        text(value, &pointer, bytes_max, self.problems)
    }

    /// A string that `parse` accepts.
    pub fn parsed<T>(&mut self, name: &'static str, parse: impl FnOnce(&str) -> Result<T, Unfit>) -> Option<T> {
        let text = self.text(name, limits::PATH_BYTES_MAX)?;
        parse(&text).map_err(|unfit| self.problem(name, unfit.0)).ok()
    }

    /// One of a closed set of spellings.
    pub fn one_of<T: Copy>(&mut self, name: &'static str, all: &[T], spelling: impl Fn(T) -> &'static str) -> Option<T> {
        let text = self.text(name, limits::NAME_BYTES_MAX)?;
        let found = all.iter().copied().find(|value| spelling(*value) == text);
        if found.is_none() {
            let words: Vec<&str> = all.iter().map(|value| spelling(*value)).collect();
            self.problem(name, format!("must be one of {}", words.join(", ")));
        }
        found
    }

    /// A whole number within bounds.
    pub fn integer(&mut self, name: &'static str, min: u64, max: u64) -> Option<u64> {
        let value = self.take(name)?;
        let fits = value.as_u64().filter(|n| (min..=max).contains(n));
        if fits.is_none() {
            let was = if value.is_number() { String::new() } else { format!(", not {}", kind(&value)) };
            self.problem(name, format!("must be a whole number from {min} to {max}{was}"));
        }
        fits
    }

    /// `true` or `false`.
    pub fn flag(&mut self, name: &'static str) -> Option<bool> {
        let value = self.take(name)?;
        let fits = value.as_bool();
        if fits.is_none() {
            self.problem(name, format!("must be true or false, not {}", kind(&value)));
        }
        fits
    }

    /// An array of at most `items_max` items, each read by `read` at its own pointer. Absent is empty.
    pub fn items<T>(
        &mut self,
        name: &'static str,
        items_max: usize,
        mut read: impl FnMut(Value, &str, &mut Problems) -> Option<T>,
    ) -> Vec<T> {
        let Some(value) = self.take(name) else { return Vec::new() };
        let pointer = self.at(name);
        match value {
            Value::Array(items) if items.len() <= items_max => {
                let read_at = |(i, item)| read(item, &format!("{pointer}/{i}"), self.problems);
                items.into_iter().enumerate().filter_map(read_at).collect()
            }
            Value::Array(_) => {
                self.problem(name, format!("must have at most {items_max} items"));
                Vec::new()
            }
            other => {
                self.problem(name, format!("must be an array, not {}", kind(&other)));
                Vec::new()
            }
        }
    }

    /// An array of strings.
    pub fn texts(&mut self, name: &'static str, items_max: usize, bytes_max: usize) -> Vec<String> {
        self.items(name, items_max, |item, pointer, problems| text(item, pointer, bytes_max, problems))
    }

    /// An object of at most `entries_max` entries, each read by `read` at its own pointer. Absent is empty.
    pub fn entries<T>(
        &mut self,
        name: &'static str,
        entries_max: usize,
        mut read: impl FnMut(&str, Value, &str, &mut Problems) -> Option<T>,
    ) -> Vec<T> {
        let Some(value) = self.take(name) else { return Vec::new() };
        let pointer = self.at(name);
        match value {
            Value::Object(map) if map.len() <= entries_max => {
                let read_at = |(key, value): (String, Value)| {
                    let mut pointer = pointer.clone();
                    push_token(&mut pointer, &key);
                    read(&key, value, &pointer, self.problems)
                };
                map.into_iter().filter_map(read_at).collect()
            }
            Value::Object(_) => {
                self.problem(name, format!("must have at most {entries_max} entries"));
                Vec::new()
            }
            other => {
                self.problem(name, format!("must be an object, not {}", kind(&other)));
                Vec::new()
            }
        }
    }

    /// Where the object stands.
    pub fn pointer(&self) -> &str {
        &self.pointer
    }

    /// The problems so far, to read an inner object into.
    pub fn problems(&mut self) -> &mut Problems {
        self.problems
    }

    /// Reports what was not taken.
    pub fn finish(self) {
        for key in self.map.keys() {
            let mut pointer = self.pointer.clone();
            push_token(&mut pointer, key);
            let near = self.known.iter().find(|name| is_near(name, key));
            let hint = near.map(|name| format!("; did you mean {name}?")).unwrap_or_default();
            self.problems.add(pointer, format!("unknown field{hint}"));
        }
    }

    fn at(&self, name: &str) -> String {
        format!("{}/{name}", self.pointer)
    }
}

/// A string without NUL, of at most `bytes_max` bytes.
pub fn text(value: Value, pointer: &str, bytes_max: usize, problems: &mut Problems) -> Option<String> {
    match value {
        Value::String(text) if text.len() > bytes_max => problems.add(pointer, format!("must be at most {bytes_max} bytes")),
        Value::String(text) if text.contains('\0') => problems.add(pointer, "must not contain NUL"),
        Value::String(text) => return Some(text),
        other => problems.add(pointer, format!("must be a string, not {}", kind(&other))),
    }
    None
}

fn kind(value: &Value) -> &'static str {
    match value {
        Value::Null => "null",
        Value::Bool(_) => "a boolean",
        Value::Number(_) => "a number",
        Value::String(_) => "a string",
        Value::Array(_) => "an array",
        Value::Object(_) => "an object",
    }
}

/// Whether two names are alike but for case, `_`, `-` and one letter.
fn is_near(a: &str, b: &str) -> bool {
    let plain = |text: &str| text.chars().filter(|c| c.is_alphanumeric()).flat_map(char::to_lowercase).collect::<Vec<char>>();
    let (a, b) = (plain(a), plain(b));
    let same_start = a.iter().zip(&b).take_while(|(x, y)| x == y).count();
    let same_end = a.iter().rev().zip(b.iter().rev()).take_while(|(x, y)| x == y).count();
    let longer = a.len().max(b.len());
    longer <= limits::NAME_BYTES_MAX && same_start.saturating_add(same_end).saturating_add(1) >= longer
}

#[cfg(test)]
mod tests {
    use super::*;

    fn problems(text: &str) -> Vec<(String, String)> {
        let result = parse(text.as_bytes());
        result.err().map(|p| p.0.into_iter().map(|p| (p.pointer, p.detail)).collect()).unwrap_or_default()
    }

    #[test]
    fn duplicate_keys_are_found_at_any_depth() {
        assert_eq!(
            problems(r#"{"a":1,"b":{"c/d":[{"e":1,"e":2}]},"a":2}"#),
            [("/b/c~1d/0/e".to_owned(), "duplicate key".to_owned()), ("/a".to_owned(), "duplicate key".to_owned())]
        );
    }

    #[test]
    fn depth_is_bounded() {
        let nested = |n: usize| format!("{}{}", "[".repeat(n), "]".repeat(n));
        assert!(parse(nested(limits::JSON_DEPTH_MAX).as_bytes()).is_ok());
        assert!(parse(nested(limits::JSON_DEPTH_MAX + 1).as_bytes()).is_err());
        assert!(parse("[".repeat(1 << 20).as_bytes()).is_err());
    }

    #[test]
    fn values_are_counted() {
        let many = |n: usize| format!("[{}]", vec!["0"; n].join(","));
        assert!(parse(many(limits::JSON_VALUES_MAX - 1).as_bytes()).is_ok());
        assert!(parse(many(limits::JSON_VALUES_MAX).as_bytes()).is_err());
    }

    #[test]
    fn what_is_not_json_is_said_without_quoting_it() {
        for bad in [&b""[..], b"{", b"{\"a\":}", b"nul", b"{} {}", b"\xff", b"{\"secret\" 1}"] {
            let error = parse(bad).expect_err("not JSON");
            assert!(!error.to_string().contains("secret"), "{error}");
        }
    }

    #[test]
    fn every_problem_is_reported_at_once() {
        let mut problems = Problems::default();
        let value = parse(br#"{"memory_mb":0,"image":5,"runtme_class":"x","flag":"yes"}"#).expect("JSON");
        let mut fields = Fields::of(value, "", &mut problems).expect("an object");
        assert_eq!(fields.integer("memory_mb", 4, 8), None);
        assert_eq!(fields.text("image", 10), None);
        assert_eq!(fields.text("runtime_class", 10), None);
        assert_eq!(fields.flag("flag"), None);
        fields.finish();
        assert_eq!(
            problems.to_string(),
            "/memory_mb: must be a whole number from 4 to 8; /image: must be a string, not a number; \
             /flag: must be true or false, not a string; /runtme_class: unknown field; did you mean runtime_class?"
        );
    }
}
