//! Registry credentials as Docker keeps them: `config.json` with `auths`.

use std::collections::BTreeMap;
use std::fmt;

use serde::Deserialize;

#[derive(Deserialize)]
struct Config {
    #[serde(default)]
    auths: BTreeMap<String, Auth>,
}

#[derive(Deserialize)]
struct Auth {
    /// Base64 of `user:password`.
    #[serde(default)]
    auth: Option<String>,
    #[serde(default)]
    username: Option<String>,
    #[serde(default)]
    password: Option<String>,
    #[serde(default)]
    identitytoken: Option<String>,
}

/// What to show a registry. `Debug` shows nothing.
#[derive(Clone, PartialEq, Eq)]
pub struct Credentials {
    /// Base64 of `user:password`; empty when the other two are given.
    pub auth: String,
    /// The user.
    pub username: String,
    /// The secret.
    pub password: String,
    /// A refresh token in place of both.
    pub identity_token: String,
}

impl fmt::Debug for Credentials {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Credentials(..)")
    }
}

/// The credentials for a registry, if the file has any.
///
/// # Errors
/// When the text is not such a file; the error quotes nothing of it.
pub fn credentials(text: &str, registry: &str) -> Result<Option<Credentials>, NotDockerConfig> {
    let config: Config = serde_json::from_str(text).map_err(|e| NotDockerConfig { line: e.line() })?;
    // Docker Hub goes by the address of its first API.
    let is_hub = registry == "docker.io";
    let names = |key: &str| {
        let host = key.trim_start_matches("https://").trim_start_matches("http://").split('/').next().unwrap_or_default();
        host == registry || (is_hub && host == "index.docker.io")
    };
    let found = config.auths.into_iter().find(|(key, _)| names(key)).map(|(_, auth)| Credentials {
        auth: auth.auth.unwrap_or_default(),
        username: auth.username.unwrap_or_default(),
        password: auth.password.unwrap_or_default(),
        identity_token: auth.identitytoken.unwrap_or_default(),
    });
    Ok(found)
}

/// A file that is not what `docker login` writes.
#[derive(Debug, PartialEq, Eq)]
pub struct NotDockerConfig {
    /// Where reading stopped.
    pub line: usize,
}

impl fmt::Display for NotDockerConfig {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "not a docker config.json (line {})", self.line)
    }
}

impl std::error::Error for NotDockerConfig {}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn credentials_are_found_by_registry() {
        let text = r#"{"auths":{"127.0.0.1:5000":{"auth":"YTpi"},"https://index.docker.io/v1/":{"username":"u","password":"p"}},"credsStore":"x"}"#;
        let check = |registry: &str| credentials(text, registry).expect("valid");
        assert_eq!(check("127.0.0.1:5000").map(|c| c.auth), Some("YTpi".into()));
        assert_eq!(check("docker.io").map(|c| c.password), Some("p".into()));
        assert_eq!(check("ghcr.io"), None);
        assert_eq!(credentials("{\"auths\":\"secret\"}", "x"), Err(NotDockerConfig { line: 1 }));
        assert_eq!(format!("{:?}", check("docker.io")), "Some(Credentials(..))");
    }
}
