//! The node's files of registry credentials: which one counts, and what of it. Read anew for each pull, so that a rotated one counts
//! at once.
//!
//! Invariant: what a file holds leaves this room only towards the runtime; errors say which set and which rule, never a path or a word
//! of it.

use std::collections::BTreeMap;
use std::fmt;
use std::fs::File;
use std::io::{self, Read};
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};

use rustix::fs::{Mode, OFlags, open};

use super::ledger::Source;
use crate::limits;
use crate::wire::docker::{self, Credentials};
use crate::workload::{ImageRef, Name, Reason};

/// Docker's `config.json`, several of them.
pub(super) struct Files {
    /// For workloads that name none.
    pub(super) node: Option<PathBuf>,
    /// Those workloads may name.
    pub(super) named: BTreeMap<Name, PathBuf>,
}

/// What a registry is shown.
#[derive(Debug)]
pub(super) struct Shown {
    pub(super) credentials: Option<Credentials>,
    pub(super) source: Source,
}

/// Why there is nothing to show.
#[derive(Debug)]
pub(super) struct Error {
    /// The set, where one was named.
    name: Option<Name>,
    kind: Kind,
}

#[derive(Debug)]
enum Kind {
    /// Others may read or change the file.
    Exposed(u32),
    Format(docker::Error),
    NoSuchSet,
    NotAFile,
    NotForRegistry(String),
    Read(io::Error),
    TooLarge,
}

impl Error {
    pub(super) fn reason(&self) -> Reason {
        match self.kind {
            Kind::NoSuchSet | Kind::NotForRegistry(_) => Reason::ImageUnauthorized,
            Kind::Exposed(_) | Kind::Format(_) | Kind::NotAFile | Kind::Read(_) | Kind::TooLarge => Reason::ImagePullFailed,
        }
    }
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.name {
            Some(name) => write!(f, "registry credentials {name:?}: ", name = name.as_str())?,
            None => f.write_str("registry credentials: ")?,
        }
        match &self.kind {
            Kind::Exposed(mode) => write!(f, "others may read or change the file (mode {mode:o}): chmod 600 it"),
            Kind::Format(error) => error.fmt(f),
            Kind::NoSuchSet => f.write_str("this node has no credentials of that name"),
            Kind::NotAFile => f.write_str("not a file"),
            Kind::NotForRegistry(registry) => write!(f, "there are none for {registry}"),
            Kind::Read(error) => write!(f, "the file cannot be read: {error}"),
            Kind::TooLarge => write!(f, "the file is larger than {} bytes", limits::CREDENTIALS_BYTES_MAX),
        }
    }
}

impl Files {
    /// What to show the registry of an image.
    ///
    /// # Errors
    /// [`Error`]. A set that was named and has nothing for the registry is one: to ask as nobody is not what was meant.
    pub(super) fn find(&self, image: &ImageRef, name: Option<&Name>) -> Result<Shown, Error> {
        let fail = |kind| Error { name: name.cloned(), kind };
        let path = match name {
            Some(name) => self.named.get(name).ok_or_else(|| fail(Kind::NoSuchSet))?,
            None => match &self.node {
                Some(path) => path,
                None => return Ok(Shown { credentials: None, source: Source::Anonymous }),
            },
        };
        let text = read(path).map_err(fail)?;
        match (docker::credentials(&text, image).map_err(|error| fail(Kind::Format(error)))?, name) {
            (Some(credentials), Some(name)) => Ok(Shown { credentials: Some(credentials), source: Source::Named(name.clone()) }),
            (Some(credentials), None) => Ok(Shown { credentials: Some(credentials), source: Source::Node }),
            (None, Some(_)) => Err(fail(Kind::NotForRegistry(image.registry().to_owned()))),
            (None, None) => Ok(Shown { credentials: None, source: Source::Anonymous }),
        }
    }
}

fn read(path: &Path) -> Result<String, Kind> {
    // Without NONBLOCK, opening a pipe would wait for its other end.
    let file =
        File::from(open(path, OFlags::RDONLY | OFlags::NONBLOCK | OFlags::CLOEXEC, Mode::empty()).map_err(|e| Kind::Read(e.into()))?);
    let metadata = file.metadata().map_err(Kind::Read)?;
    if !metadata.is_file() {
        return Err(Kind::NotAFile);
    }
    let mode = metadata.permissions().mode() & 0o777;
    // A group of the agent's own may read it; nobody else may, and none but its owner may write.
    if mode & 0o027 != 0 {
        return Err(Kind::Exposed(mode));
    }
    let mut text = String::new();
    let bytes_max = limits::CREDENTIALS_BYTES_MAX;
    let bytes = file.take(bytes_max as u64 + 1).read_to_string(&mut text).map_err(Kind::Read)?;
    if bytes > bytes_max { Err(Kind::TooLarge) } else { Ok(text) }
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;

    const TEXT: &str = r#"{"auths":{"r.test":{"username":"kakuri","password":"open-sesame"}}}"#;

    struct Dir(PathBuf);

    impl Dir {
        fn file(&self, name: &str, text: &str, mode: u32) -> PathBuf {
            let path = self.0.join(name);
            fs::write(&path, text).expect("written");
            fs::set_permissions(&path, fs::Permissions::from_mode(mode)).expect("a file of ours");
            path
        }
    }

    impl Drop for Dir {
        fn drop(&mut self) {
            // What is left in the temporary directory hurts nobody.
            let _ = fs::remove_dir_all(&self.0);
        }
    }

    fn dir() -> Dir {
        let path = std::env::temp_dir().join(format!("kakuri-credentials-{}-{}", std::process::id(), crate::report::random_id()));
        fs::create_dir(&path).expect("a directory");
        Dir(path)
    }

    fn image(text: &str) -> ImageRef {
        ImageRef::new(text).expect("valid")
    }

    #[test]
    fn the_set_that_is_named_counts_and_no_other() {
        let dir = dir();
        let name = Name::new("team").expect("valid");
        let file = |file: &str, text: &str| dir.file(file, text, 0o600);
        let files = Files {
            node: Some(file("node", r#"{"auths":{"r.test":{"auth":"bm9kZQ=="}}}"#)),
            named: BTreeMap::from([(name.clone(), file("team", TEXT))]),
        };
        let of = |image_name: &str, name: Option<&Name>| files.find(&image(image_name), name);
        let shown = of("r.test/a:1", None).expect("found");
        assert_eq!((shown.credentials.map(|c| c.auth), shown.source), (Some("bm9kZQ==".into()), Source::Node));
        let shown = of("r.test/a:1", Some(&name)).expect("found");
        assert_eq!((shown.credentials.map(|c| c.password), shown.source), (Some("open-sesame".into()), Source::Named(name.clone())));
        let shown = of("other.test/a:1", None).expect("nothing to show");
        assert_eq!((shown.credentials, shown.source), (None, Source::Anonymous));
        let error = of("other.test/a:1", Some(&name)).expect_err("nothing of the set");
        assert_eq!(
            (error.to_string().as_str(), error.reason()),
            ("registry credentials \"team\": there are none for other.test", Reason::ImageUnauthorized)
        );
        let error = of("r.test/a:1", Some(&Name::new("nobody").expect("valid"))).expect_err("no such set");
        assert_eq!(error.reason(), Reason::ImageUnauthorized);
    }

    #[test]
    fn a_file_that_is_no_secret_or_no_file_is_refused() {
        let dir = dir();
        let check = |path: PathBuf, words: &str| {
            let files = Files { node: Some(path.clone()), named: BTreeMap::new() };
            let error = files.find(&image("r.test/a:1"), None).expect_err("refused").to_string();
            assert!(error.contains(words), "{error}");
            assert!(!error.contains("sesame") && !error.contains(&path.display().to_string()), "{error}");
        };
        check(dir.file("world", TEXT, 0o604), "others may read or change the file (mode 604)");
        check(dir.file("writable", TEXT, 0o620), "(mode 620)");
        check(dir.file("large", &" ".repeat(limits::CREDENTIALS_BYTES_MAX + 1), 0o600), "larger than");
        check(dir.file("broken", r#"{"auths":{"r.test":{"password":open-sesame}}}"#, 0o600), "not a docker config.json (line 1)");
        check(dir.0.join("absent"), "cannot be read");
        check(dir.0.clone(), "not a file");
        // Nobody ever writes to it, and nobody waits for that.
        let pipe = dir.0.join("pipe");
        rustix::fs::mkfifoat(rustix::fs::CWD, &pipe, Mode::from_raw_mode(0o600)).expect("a pipe");
        check(pipe, "not a file");
        let files = Files { node: Some(dir.file("group", TEXT, 0o640)), named: BTreeMap::new() };
        assert!(files.find(&image("r.test/a:1"), None).is_ok());
        let full = dir.file("full", &format!("{TEXT}{}", " ".repeat(limits::CREDENTIALS_BYTES_MAX - TEXT.len())), 0o600);
        assert!(Files { node: Some(full), named: BTreeMap::new() }.find(&image("r.test/a:1"), None).is_ok());
    }
}
