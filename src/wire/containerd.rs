//! The configuration containerd shows in `Status(verbose)`: where releases before 2.0 name their runtime handlers.

use serde::Deserialize;
use serde::de::IgnoredAny;
use std::collections::BTreeMap;

#[derive(Deserialize)]
struct Config {
    containerd: Containerd,
}

#[derive(Deserialize)]
struct Containerd {
    runtimes: BTreeMap<String, IgnoredAny>,
}

/// The handlers named in the `config` of a verbose status; `None` when the text is something else.
pub fn handlers(config: &str) -> Option<Vec<String>> {
    let config: Config = serde_json::from_str(config).ok()?;
    Some(config.containerd.runtimes.into_keys().filter(|name| !name.is_empty()).collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn handlers_are_the_keys_of_runtimes() {
        let config = r#"{"containerd":{"runtimes":{"gvisor":{"runtimeType":"x"},"runc":{}},"snapshotter":"o"},"cni":{}}"#;
        assert_eq!(handlers(config), Some(vec!["gvisor".to_owned(), "runc".to_owned()]));
        assert_eq!(handlers("{}"), None);
        assert_eq!(handlers("not json"), None);
    }
}
