//! Label selectors: `a=b,c!=d,e,!f`, the part of Kubernetes' language people use. Pure.

use std::collections::BTreeMap;

use crate::workload::Unfit;

/// Conditions on labels; all must hold.
#[derive(Debug, Default, PartialEq, Eq)]
pub(super) struct Selector(Vec<Condition>);

#[derive(Debug, PartialEq, Eq)]
enum Condition {
    Absent(String),
    Equal(String, String),
    /// Also where there is no such label, as in Kubernetes.
    NotEqual(String, String),
    Present(String),
}

impl Selector {
    /// Adds the conditions of `text`.
    ///
    /// # Errors
    /// [`Unfit`] when the text is no selector.
    pub(super) fn add(&mut self, text: &str) -> Result<(), Unfit> {
        for condition in text.split(',') {
            self.0.push(parse(condition.trim())?);
        }
        Ok(())
    }

    /// Whether these labels meet every condition.
    pub(super) fn matches(&self, labels: &BTreeMap<String, String>) -> bool {
        self.0.iter().all(|condition| match condition {
            Condition::Absent(key) => !labels.contains_key(key),
            Condition::Equal(key, value) => labels.get(key) == Some(value),
            Condition::NotEqual(key, value) => labels.get(key) != Some(value),
            Condition::Present(key) => labels.contains_key(key),
        })
    }
}

fn parse(text: &str) -> Result<Condition, Unfit> {
    let pair = |make: fn(String, String) -> Condition, key: &str, value: &str| {
        let (key, value) = (word(key)?, value.trim());
        if value.is_empty() { Ok(make(key, String::new())) } else { Ok(make(key, word(value)?)) }
    };
    if let Some((key, value)) = text.split_once("!=") {
        pair(Condition::NotEqual, key, value)
    } else if let Some((key, value)) = text.split_once("==").or_else(|| text.split_once('=')) {
        pair(Condition::Equal, key, value)
    } else if let Some(key) = text.strip_prefix('!') {
        word(key).map(Condition::Absent)
    } else {
        word(text).map(Condition::Present)
    }
}

/// A key or value that a label can have; anything else would silently match nothing.
fn word(text: &str) -> Result<String, Unfit> {
    let text = text.trim();
    if !text.is_empty() && text.bytes().all(|b| b.is_ascii_alphanumeric() || matches!(b, b'.' | b'_' | b'-' | b'/')) {
        Ok(text.to_owned())
    } else {
        Err(Unfit("label must be conditions separated by commas: key=value, key!=value, key, !key".into()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn selectors_select() {
        let labels: BTreeMap<String, String> =
            [("app", "web"), ("tier", ""), ("x/y", "1.0")].into_iter().map(|(k, v)| (k.to_owned(), v.to_owned())).collect();
        let check = |text: &str, expect: bool| {
            let mut selector = Selector::default();
            selector.add(text).expect("a selector");
            assert_eq!(selector.matches(&labels), expect, "{text}");
        };
        for yes in ["app=web", "app==web", "app!=db", "none!=x", "app", "!none", "tier=", "x/y=1.0", "app=web,!none, x/y", " app = web "] {
            check(yes, true);
        }
        for no in ["app=db", "app!=web", "none", "!app", "tier=x", "app=", "none=", "app=web,none", "!app,app=web"] {
            check(no, false);
        }
    }

    #[test]
    fn what_is_no_selector_is_refused() {
        for bad in ["", ",", "a=b,", "=b", "!=b", "!", "!!a", "a=b=c", "a===b", "a in (b)", "a>1", "ä", "a=!b"] {
            assert!(Selector::default().add(bad).is_err(), "{bad}");
        }
    }
}
