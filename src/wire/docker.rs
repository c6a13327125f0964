//! Registry credentials as Docker keeps them: `config.json` with `auths`. Credential helpers are programs, and are not run.

use std::cmp::Reverse;
use std::collections::BTreeMap;
use std::fmt;

use base64::Engine;
use base64::engine::general_purpose::{STANDARD as BASE64, STANDARD_NO_PAD as BASE64_UNPADDED};
use serde::Deserialize;

use crate::workload::ImageRef;

#[derive(Deserialize)]
struct Config {
    #[serde(default)]
    auths: BTreeMap<String, Auth>,
    /// Helpers by registry.
    #[serde(default, rename = "credHelpers")]
    cred_helpers: BTreeMap<String, String>,
    /// The helper that keeps what `docker login` was told; `auths` then holds empty entries.
    #[serde(default, rename = "credsStore")]
    creds_store: Option<String>,
}

#[derive(Default, Deserialize)]
struct Auth {
    /// Base64 of `user:password`.
    #[serde(default)]
    auth: String,
    #[serde(default)]
    username: String,
    #[serde(default)]
    password: String,
    #[serde(default)]
    identitytoken: String,
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

impl Credentials {
    /// A text without the secrets, should it quote them, as they are or in the escapes of Go, JSON and URLs, whole or cut by its end.
    pub fn scrub(&self, text: String) -> String {
        let mut secrets = vec![self.auth.clone(), self.password.clone(), self.identity_token.clone()];
        // What either form of the two becomes on its way to a registry.
        secrets.extend(password_of(&self.auth));
        secrets.push(BASE64.encode(format!("{}:{}", self.username, self.password)));
        // Shorter ones would tear words apart that merely contain them.
        secrets.retain(|secret| secret.chars().count() >= SCRUBBED_CHARS_MIN);
        // A longer one may contain a shorter one.
        secrets.sort_by_key(|secret| Reverse(secret.len()));
        secrets.iter().fold(text, |text, secret| mask(&text.replace(secret.as_str(), MASK), secret))
    }
}

const SCRUBBED_CHARS_MIN: usize = 4;
const MASK: &str = "***";

/// The password in an `auth`.
fn password_of(auth: &str) -> Option<String> {
    let bytes = BASE64.decode(auth).or_else(|_| BASE64_UNPADDED.decode(auth)).ok()?;
    let text = String::from_utf8(bytes).ok()?;
    // containerd cuts zeros off, too.
    text.split_once(':').map(|(_, password)| password.trim_matches('\0').to_owned())
}

/// A text with a secret masked, however each of its characters is written.
fn mask(text: &str, secret: &str) -> String {
    let forms: Vec<Vec<String>> = secret.chars().map(forms).collect();
    let mut out = String::with_capacity(text.len());
    let mut rest = text;
    while let Some(first) = rest.chars().next() {
        match after(rest, &forms) {
            Some(after) => {
                out.push_str(MASK);
                rest = after;
            }
            None => {
                out.push(first);
                rest = rest.strip_prefix(first).unwrap_or_default();
            }
        }
    }
    out
}

/// What follows a secret that a text begins with. Nothing follows one that the end of the text cuts.
fn after<'a>(text: &'a str, forms: &[Vec<String>]) -> Option<&'a str> {
    let mut rest = text;
    for (n, forms) in forms.iter().enumerate() {
        // As messages are clipped.
        let cut = rest.strip_suffix("...").unwrap_or(rest);
        if n >= SCRUBBED_CHARS_MIN && forms.iter().any(|form| form.len() > cut.len() && form.starts_with(cut)) {
            return Some("");
        }
        rest = forms.iter().find_map(|form| rest.strip_prefix(form.as_str()))?;
    }
    Some(rest)
}

/// The ways to write a character, the longer before those they begin with.
fn forms(c: char) -> Vec<String> {
    let bytes = c.to_string().into_bytes();
    let in_bytes = |write: &dyn Fn(&u8) -> String| bytes.iter().map(write).collect::<String>();
    let code = u32::from(c);
    let mut forms = vec![
        in_bytes(&|b| format!("%{b:02X}")),
        in_bytes(&|b| format!("%{b:02x}")),
        in_bytes(&|b| format!("\\x{b:02x}")),
        format!("\\u{code:04x}"),
        format!("\\u{code:04X}"),
    ];
    match c {
        '"' | '\'' | '/' | '\\' => forms.push(format!("\\{c}")),
        '\n' | '\r' | '\t' => forms.push(c.escape_debug().to_string()),
        ' ' => forms.push("+".to_owned()),
        _ => {}
    }
    forms.push(c.to_string());
    forms
}

impl fmt::Debug for Credentials {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Credentials(..)")
    }
}

/// The credentials for an image, if the file has any: of all entries that are its registry, or a beginning of its repository, the
/// longest.
///
/// # Errors
/// When the text is not such a file, or they are kept by a helper; the error quotes nothing of it.
pub fn credentials(text: &str, image: &ImageRef) -> Result<Option<Credentials>, Error> {
    let config: Config = serde_json::from_str(text).map_err(|e| Error::NotDockerConfig { line: e.line() })?;
    let registry = image.registry();
    if config.cred_helpers.keys().any(|key| scope(key).as_deref() == Some(registry)) {
        return Err(Error::Helper);
    }
    let covers = |scope: &str| image.repository().strip_prefix(scope).is_some_and(|rest| rest.is_empty() || rest.starts_with('/'));
    let entries = config.auths.into_iter().filter_map(|(key, auth)| scope(&key).map(|scope| (scope, auth)));
    let Some((_, auth)) = entries.filter(|(scope, _)| covers(scope)).max_by_key(|(scope, _)| scope.len()) else { return Ok(None) };
    let Auth { auth, username, password, identitytoken } = auth;
    let is_empty = [&auth, &username, &password, &identitytoken].iter().all(|part| part.is_empty());
    match (is_empty, config.creds_store) {
        (true, Some(_)) => Err(Error::Helper),
        (true, None) => Ok(None),
        (false, _) => Ok(Some(Credentials { auth, username, password, identity_token: identitytoken })),
    }
}

/// What a key of `auths` covers: `HOST[:PORT][/PATH]`. The addresses of old, with a scheme and an API version, mean the registry.
fn scope(key: &str) -> Option<String> {
    let key = key.trim_start_matches("https://").trim_start_matches("http://").trim_end_matches('/');
    let (host, path) = key.split_once('/').unwrap_or((key, ""));
    // Docker Hub goes by the address of its first API.
    let host = if host == "index.docker.io" { "docker.io" } else { host };
    match path {
        _ if host.is_empty() => None,
        "" | "v1" | "v2" => Some(host.to_owned()),
        path => Some(format!("{host}/{path}")),
    }
}

/// Why a file yields no credentials.
#[derive(Debug, PartialEq, Eq)]
pub enum Error {
    /// A credential helper has them.
    Helper,
    /// The file is not what `docker login` writes.
    NotDockerConfig {
        /// Where reading stopped.
        line: usize,
    },
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Helper => f.write_str(
                "the credentials of this registry are kept by a credential helper (credsStore, credHelpers), and helpers are not run: \
                 write them into auths",
            ),
            Self::NotDockerConfig { line } => write!(f, "not a docker config.json (line {line})"),
        }
    }
}

impl std::error::Error for Error {}

#[cfg(test)]
mod tests {
    use super::*;

    fn find(text: &str, image: &str) -> Result<Option<Credentials>, Error> {
        credentials(text, &ImageRef::new(image).expect("valid"))
    }

    #[test]
    fn credentials_are_found_by_registry() {
        let text = r#"{"auths":{"127.0.0.1:5000":{"auth":"YTpi"},"https://index.docker.io/v1/":{"username":"u","password":"p"}},
            "credsStore":"x"}"#;
        let check = |image: &str| find(text, image).expect("valid");
        assert_eq!(check("127.0.0.1:5000/a:1").map(|c| c.auth), Some("YTpi".into()));
        assert_eq!(check("busybox").map(|c| c.password), Some("p".into()));
        assert_eq!(check("ghcr.io/a/b:1"), None);
        assert_eq!(check("127.0.0.1:5001/a:1"), None);
        assert_eq!(find("{\"auths\":\"secret\"}", "x"), Err(Error::NotDockerConfig { line: 1 }));
        assert_eq!(format!("{:?}", check("busybox")), "Some(Credentials(..))");
    }

    #[test]
    fn the_longest_path_counts_and_none_covers_its_neighbour() {
        let text = r#"{"auths":{"r.test":{"auth":"all"},"r.test/team":{"auth":"team"},"r.test/team/app":{"auth":"app"}}}"#;
        let of = |image: &str| find(text, image).expect("valid").map(|c| c.auth);
        assert_eq!(of("r.test/other/app:1").as_deref(), Some("all"));
        assert_eq!(of("r.test/team/web:1").as_deref(), Some("team"));
        assert_eq!(of("r.test/team/app@sha256:0000000000000000000000000000000000000000000000000000000000000000").as_deref(), Some("app"));
        assert_eq!(of("r.test/teammate/app:1").as_deref(), Some("all"));
        let text = r#"{"auths":{"r.test/team":{"auth":"team"}}}"#;
        assert_eq!(find(text, "r.test/teammate/app:1"), Ok(None));
    }

    #[test]
    fn a_helper_is_named_and_not_run() {
        assert_eq!(find(r#"{"credHelpers":{"r.test":"gcloud"}}"#, "r.test/a:1"), Err(Error::Helper));
        assert_eq!(find(r#"{"auths":{"r.test":{}},"credsStore":"desktop"}"#, "r.test/a:1"), Err(Error::Helper));
        assert_eq!(find(r#"{"auths":{},"credsStore":"desktop"}"#, "r.test/a:1"), Ok(None));
        assert_eq!(find(r#"{"auths":{"r.test":{}}}"#, "r.test/a:1"), Ok(None));
        assert!(Error::Helper.to_string().contains("helpers are not run"));
    }

    #[test]
    fn secrets_are_scrubbed() {
        let credentials = Credentials {
            auth: "a3VydTpzZXNhbWU=".into(),
            username: "kuru".into(),
            password: "sesame".into(),
            identity_token: String::new(),
        };
        let text = "kuru said sesame, or a3VydTpzZXNhbWU=, and that was that".to_owned();
        assert_eq!(credentials.scrub(text), "kuru said ***, or ***, and that was that");
    }

    #[test]
    fn a_secret_is_scrubbed_in_every_form_it_takes_on_its_way() {
        let of = |auth: &str, username: &str, password: &str| Credentials {
            auth: auth.into(),
            username: username.into(),
            password: password.into(),
            identity_token: String::new(),
        };
        let check = |credentials: &Credentials, text: &str, expected: &str| assert_eq!(credentials.scrub(text.into()), expected);
        // What is in an `auth`, and what the two others become.
        let auth_alone = of("a3VydTpzZXNhbWU=", "", "");
        check(&auth_alone, "user kuru, password sesame", "user kuru, password ***");
        check(&of("a3VydTpzZXNhbWU", "", ""), "password sesame", "password ***");
        check(&of("", "kuru", "sesame"), "Authorization: Basic a3VydTpzZXNhbWU=", "Authorization: Basic ***");
        // Escaped, of Go's %q and JSON, and of URLs of every strictness.
        let hard = of("", "kuru", "a\"b\\c d%e/f&g");
        for text in
            ["a\"b\\c d%e/f&g", "a\\\"b\\\\c d%e/f&g", "a\\\"b\\\\c d%e/f\\u0026g", "a%22b%5Cc+d%25e%2Ff%26g", "a%22b%5cc%20d%25e/f&g"]
        {
            check(&hard, &format!("x {text} y"), "x *** y");
        }
        check(&of("", "u", "s\u{e9}same"), "s%C3%A9same s\\u00e9same s\\xc3\\xa9same", "*** *** ***");
        // Cut by an end, and by the mark of one.
        check(&auth_alone, "password sesa", "password ***");
        check(&auth_alone, "password sesa...", "password ***");
        check(&hard, "a%22b%5Cc+d%2", "***");
        check(&auth_alone, "password ses", "password ses");
        check(&auth_alone, "sesa and sesam", "sesa and ***");
    }
}
