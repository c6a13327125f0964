//! How one value is read: from a flag, else the environment, else the file; checked where it is read, and every problem kept with where
//! the value came from.

use super::*;

/// Flags, environment and file together, and what is wrong with them so far.
pub(super) struct Reader {
    pub(super) matches: Matches,
    pub(super) file: Source,
    pub(super) problems: Vec<Problem>,
}

impl Reader {
    pub(super) fn open<R: DeserializeOwned + Default>(matches: Matches) -> Result<(Self, R), Error> {
        let file = matches.given("config").map_or(Ok(Source::default()), |given| Source::read(Path::new(&given.value)))?;
        let mut problems = Vec::new();
        match file.deserialize(&mut problems) {
            Some(raw) => Ok((Self { matches, file, problems }, raw)),
            None => Err(Error::Problems(problems)),
        }
    }

    pub(super) fn finish<C>(self, config: Option<C>) -> Result<Parsed<C>, Error> {
        match config {
            Some(_) if self.problems.is_empty() && self.matches.present("check-config") => Ok(Parsed::Special("config ok".into())),
            Some(config) if self.problems.is_empty() => Ok(Parsed::Run(config)),
            _ => Err(Error::Problems(self.problems)),
        }
    }

    pub(super) fn problem(&mut self, origin: impl Into<String>, rule: impl fmt::Display) {
        if self.problems.len() < limits::PROBLEMS_MAX {
            self.problems.push(Problem { origin: origin.into(), rule: rule.to_string() });
        }
    }

    pub(super) fn given<T: fmt::Display>(&self, flag: &str, raw: Option<Spanned<T>>) -> Option<Given> {
        self.matches.given(flag).or_else(|| raw.map(|raw| self.file.given(&raw)))
    }

    pub(super) fn all_given(&self, flag: &str, raw: &[Spanned<String>]) -> Vec<Given> {
        let given = self.matches.all_given(flag);
        if given.is_empty() { raw.iter().map(|raw| self.file.given(raw)).collect() } else { given }
    }

    pub(super) fn check<T, E: fmt::Display>(&mut self, given: &Given, parse: impl FnOnce(&str) -> Result<T, E>) -> Option<T> {
        parse(&given.value).map_err(|rule| self.problem(&given.origin, rule)).ok()
    }

    pub(super) fn one<T, E: fmt::Display>(
        &mut self,
        flag: &str,
        raw: Option<Spanned<String>>,
        parse: impl Fn(&str) -> Result<T, E>,
    ) -> Option<T> {
        self.given(flag, raw).and_then(|given| self.check(&given, parse))
    }

    /// A key that no flag sets.
    pub(super) fn file_one<V: fmt::Display, T, E: fmt::Display>(
        &mut self,
        raw: Option<Spanned<V>>,
        parse: impl Fn(&str) -> Result<T, E>,
    ) -> Option<T> {
        raw.and_then(|raw| self.check(&self.file.given(&raw), parse))
    }

    pub(super) fn required<T, E: fmt::Display>(
        &mut self,
        flag: &str,
        raw: Option<Spanned<String>>,
        parse: impl Fn(&str) -> Result<T, E>,
    ) -> Option<T> {
        let given = self.given(flag, raw);
        // A key that is there but broken has been reported already.
        if given.is_none() && self.problems.is_empty() {
            self.problem(format!("--{flag}"), format!("missing: give the flag, or {} in the file", flag.replace('-', "_")));
        }
        given.and_then(|given| self.check(&given, parse))
    }

    pub(super) fn switch(&mut self, flag: &str, raw: Option<Spanned<bool>>) -> bool {
        let given = self.matches.switch(flag).or_else(|| raw.map(|raw| self.file.given(&raw)));
        let parse = |text: &str| match text {
            "true" | "1" => Ok(true),
            "false" | "0" => Ok(false),
            _ => Err("must be true or false"),
        };
        given.and_then(|given| self.check(&given, parse)).unwrap_or(false)
    }

    pub(super) fn number(&mut self, flag: &str, raw: Option<Spanned<u64>>, range: RangeInclusive<u64>) -> Option<u64> {
        self.given(flag, raw).and_then(|given| self.check(&given, within(range)))
    }

    pub(super) fn workers(&mut self, flag: &str, raw: Option<Spanned<u64>>, default: usize) -> usize {
        let workers = self.number(flag, raw, 1..=limits::WORKERS_MAX);
        workers.and_then(|n| usize::try_from(n).ok()).unwrap_or(default)
    }

    pub(super) fn log_level(&mut self, raw: Option<Spanned<String>>) -> LevelFilter {
        let parse = |text: &str| report::level(text).ok_or(format!("must be one of {}", report::LEVELS));
        self.one("log-level", raw, parse).unwrap_or(LevelFilter::Info)
    }

    /// A path: relative to the working directory, or in a file to the file's directory.
    pub(super) fn path(&mut self, flag: &str, raw: Option<Spanned<String>>) -> Option<PathBuf> {
        let base = if self.matches.given(flag).is_some() { PathBuf::new() } else { self.file.directory.clone() };
        self.one(flag, raw, |text| absolute(&base, text))
    }

    pub(super) fn state_dir(&mut self, flag: &str, raw: Option<Spanned<String>>, program: &str) -> Option<PathBuf> {
        if self.given(flag, raw.clone()).is_some() {
            return self.path(flag, raw);
        }
        let dir = default_dir(program, |name| self.matches.environment(name));
        if dir.is_none() {
            self.problem(format!("--{flag}"), "missing, and there is neither XDG_STATE_HOME nor HOME to choose a default");
        }
        dir
    }

    pub(super) fn listen(&mut self, raw: &[Spanned<String>], default: &str, insecure: bool) -> Vec<Address> {
        let mut given = self.all_given("listen", raw);
        if given.is_empty() {
            given.push(Given { value: default.into(), origin: "--listen".into() });
        }
        if given.len() > limits::LISTENERS_MAX {
            self.problem("--listen", format!("at most {} addresses", limits::LISTENERS_MAX));
        }
        let mut addresses = Vec::new();
        for given in given {
            let Some(address) = self.check(&given, Address::parse) else { continue };
            if !insecure && !address.is_local() {
                self.problem(
                    &given.origin,
                    format!(
                        "other machines could reach {address}, and TLS and client authentication are not in this version: \
                         listen on loopback or a unix socket, or take the risk with --insecure-listen"
                    ),
                );
            }
            addresses.push(address);
        }
        addresses
    }

    pub(super) fn classes(&mut self, raw: BTreeMap<String, Spanned<RawClass>>) -> Vec<ClassConfig> {
        let given = self.matches.all_given("runtime-class");
        let mut classes: Vec<ClassConfig> = if given.is_empty() {
            raw.into_iter().filter_map(|(name, raw)| self.class(&name, raw)).collect()
        } else {
            given.iter().filter_map(|given| self.check(given, class_flag)).collect()
        };
        classes.sort_by(|a, b| a.name.cmp(&b.name));
        if let Some(twice) = classes.windows(2).find_map(|pair| pair.first().filter(|a| pair.last().is_some_and(|b| a.name == b.name))) {
            self.problem("--runtime-class", format!("{} is given twice", twice.name));
        }
        if classes.len() > limits::CLASSES_MAX {
            self.problem("--runtime-class", format!("at most {} classes", limits::CLASSES_MAX));
        }
        classes
    }

    pub(super) fn class(&mut self, name: &str, raw: Spanned<RawClass>) -> Option<ClassConfig> {
        let header = self.file.given(&Spanned::new(raw.span(), name));
        let raw = raw.into_inner();
        let name = self.check(&header, Name::new);
        if raw.handler.is_none() && self.problems.is_empty() {
            self.problem(&header.origin, "handler is missing: a class without one would run under the runtime's default");
        }
        let handler = self.file_one(raw.handler, handler);
        let endpoint = self.file_one(raw.endpoint, address::unix_path);
        let annotations = self.map(raw.annotations, annotation);
        let overhead_mb = self.file_one(raw.overhead_mb, within(0..=limits::MEMORY_MB_MAX));
        let memory_mb_min = self.file_one(raw.memory_mb_min, within(limits::MEMORY_MB_MIN..=limits::MEMORY_MB_MAX));
        let start_timeout_ms = self.file_one(raw.start_timeout_ms, within(1000..=limits::START_DEADLINE_MS_MAX));
        let mut class = ClassConfig::new(name?, handler?, endpoint);
        class.own_kernel = raw.own_kernel.unwrap_or(class.own_kernel);
        class.annotations = annotations;
        class.overhead_mb = overhead_mb.unwrap_or(class.overhead_mb);
        class.memory_mb_min = memory_mb_min.unwrap_or(class.memory_mb_min);
        class.start_timeout_ms = start_timeout_ms.unwrap_or(class.start_timeout_ms);
        Some(class)
    }

    pub(super) fn credentials(&mut self, raw: BTreeMap<String, Spanned<RawCredentials>>) -> BTreeMap<Name, PathBuf> {
        let mut sets = BTreeMap::new();
        for (name, raw) in raw {
            let header = self.file.given(&Spanned::new(raw.span(), &name));
            let name = self.check(&header, Name::new);
            let base = self.file.directory.clone();
            let raw = raw.into_inner();
            // A key that is there but broken has been reported already.
            if raw.file.is_none() && self.problems.is_empty() {
                self.problem(&header.origin, "file is missing: a set of credentials is a docker config.json");
            }
            let file = self.file_one(raw.file, |text| absolute(&base, text));
            sets.extend(name.zip(file));
        }
        if sets.len() > limits::CREDENTIALS_MAX {
            self.problem("credentials", format!("at most {} sets", limits::CREDENTIALS_MAX));
        }
        sets
    }

    pub(super) fn image_gc(
        &mut self,
        marks: [Option<Spanned<u64>>; 2],
        min_age_s: Option<Spanned<u64>>,
        capacity_mb: Option<Spanned<u64>>,
    ) -> ImageGc {
        let origin = marks.iter().flatten().next().map(|mark| self.file.given(mark).origin);
        let [high, low] = marks.map(|mark| self.file_one(mark, within(0..=100)));
        let (high, low) = (high.unwrap_or(limits::IMAGE_GC_HIGH_PERCENT_DEFAULT), low.unwrap_or(limits::IMAGE_GC_LOW_PERCENT_DEFAULT));
        if let Some(origin) = origin.filter(|_| low > high) {
            self.problem(origin, format!("image_gc_low_percent is {low}, above image_gc_high_percent, {high}"));
        }
        let min_age_s = self.file_one(min_age_s, within(0..=limits::IMAGE_GC_MIN_AGE_S_MAX));
        let capacity_mb = self.file_one(capacity_mb, within(1..=limits::NODE_MEMORY_MB_MAX));
        ImageGc {
            high_percent: high,
            low_percent: low,
            min_age_ms: min_age_s.unwrap_or(limits::IMAGE_GC_MIN_AGE_S_DEFAULT) * 1000,
            capacity_bytes: capacity_mb.map(|mb| mb << 20),
        }
    }

    pub(super) fn mount_roots(&mut self, raw: &[Spanned<String>]) -> Vec<PathBuf> {
        let given = self.all_given("mount-root", raw);
        given.iter().filter_map(|given| self.check(given, mount_root)).collect()
    }

    pub(super) fn labels(&mut self, raw: BTreeMap<String, Spanned<String>>) -> BTreeMap<String, String> {
        let given = self.matches.all_given("label");
        let labels = if given.is_empty() {
            self.map(raw, check_label)
        } else {
            let split = |text: &str| {
                let (key, value) = text.split_once('=').ok_or(Unfit("must be KEY=VALUE".into()))?;
                check_label(key, value).map(|()| (key.to_owned(), value.to_owned()))
            };
            given.iter().filter_map(|given| self.check(given, split)).collect()
        };
        if labels.len() > limits::LABELS_MAX {
            self.problem("--label", format!("at most {} labels", limits::LABELS_MAX));
        }
        labels
    }

    pub(super) fn map(
        &mut self,
        raw: BTreeMap<String, Spanned<String>>,
        rule: fn(&str, &str) -> Result<(), Unfit>,
    ) -> BTreeMap<String, String> {
        let mut checked = BTreeMap::new();
        for (key, value) in raw {
            if self.check(&self.file.given(&value), |value| rule(&key, value)).is_some() {
                checked.insert(key, value.into_inner());
            }
        }
        checked
    }

    pub(super) fn nodes(&mut self, raw: Vec<Spanned<RawNode>>) -> Vec<(Name, Address)> {
        let given = self.matches.all_given("node");
        let mut nodes: Vec<(String, (Name, Address))> = Vec::new();
        if given.is_empty() {
            for node in raw {
                let origin = self.file.given(&Spanned::new(node.span(), "")).origin;
                let RawNode { id, address } = node.into_inner();
                if (id.is_none() || address.is_none()) && self.problems.is_empty() {
                    self.problem(&origin, "a node needs id and address");
                }
                let id = self.file_one(id, Name::new);
                let address = self.file_one(address, Address::parse);
                nodes.extend(id.zip(address).map(|node| (origin, node)));
            }
        } else {
            let parsed = given.into_iter().filter_map(|given| self.check(&given, node_flag).map(|node| (given.origin, node)));
            nodes = parsed.collect();
        }
        let mut seen: BTreeMap<Name, Address> = BTreeMap::new();
        for (origin, (id, address)) in nodes {
            if seen.contains_key(&id) {
                self.problem(origin, format!("node {id} is given twice"));
            }
            seen.insert(id, address);
        }
        if seen.len() > limits::NODES_MAX {
            self.problem("--node", format!("at most {} nodes", limits::NODES_MAX));
        }
        seen.into_iter().collect()
    }
}

/// A configuration file, or none.
#[derive(Default)]
pub(super) struct Source {
    pub(super) name: String,
    pub(super) directory: PathBuf,
    pub(super) text: String,
}

impl Source {
    pub(super) fn read(path: &Path) -> Result<Self, Error> {
        let fail = |cause| Error::Read { path: path.to_owned(), cause };
        let mut text = String::new();
        let bytes_max = u64::try_from(limits::CONFIG_BYTES_MAX).unwrap_or(u64::MAX);
        let bytes = File::open(path).and_then(|file| file.take(bytes_max + 1).read_to_string(&mut text)).map_err(fail)?;
        if bytes > limits::CONFIG_BYTES_MAX {
            return Err(fail(io::Error::new(io::ErrorKind::InvalidData, format!("more than {bytes_max} bytes"))));
        }
        Ok(Self { name: path.display().to_string(), directory: path.parent().map(Path::to_owned).unwrap_or_default(), text })
    }

    pub(super) fn origin(&self, span: Option<Range<usize>>) -> String {
        let before = self.text.get(..span.map_or(0, |span| span.start)).unwrap_or(&self.text);
        format!("{}:{}", self.name, before.matches('\n').count() + 1)
    }

    pub(super) fn given<T: fmt::Display>(&self, raw: &Spanned<T>) -> Given {
        Given { value: raw.get_ref().to_string(), origin: self.origin(Some(raw.span())) }
    }

    /// Reads the whole file into `R`. Serde stops at the first thing it does not like: that thing is noted, taken out of the
    /// table, and the rest read again, so that one run shows all of them. `None` when nothing could be taken out.
    pub(super) fn deserialize<R: DeserializeOwned + Default>(&self, problems: &mut Vec<Problem>) -> Option<R> {
        let note = |error: &toml::de::Error| Problem { origin: self.origin(error.span()), rule: error.message().to_owned() };
        let mut table = DeTable::parse(&self.text).map_err(|error| problems.push(note(&error))).ok()?;
        loop {
            match R::deserialize(Deserializer::from(table.clone())) {
                Ok(raw) => return Some(raw),
                Err(error) => {
                    problems.push(note(&error));
                    let removed = error.span().is_some_and(|span| remove(table.get_mut(), &span));
                    if !removed || problems.len() >= limits::PROBLEMS_MAX {
                        return None;
                    }
                }
            }
        }
    }
}

/// Takes the entry out whose key lies at `span` (it is unknown), or else the innermost one whose value does (it is of the wrong type).
fn remove(table: &mut DeTable<'_>, span: &Range<usize>) -> bool {
    if let Some(key) = table.keys().find(|key| key.span() == *span).cloned() {
        return table.remove(&key).is_some();
    }
    let below = table.iter_mut().any(|(_, value)| match value.get_mut() {
        DeValue::Table(inner) => remove(inner, span),
        _ => false,
    });
    let holds = |outer: Range<usize>| outer.start <= span.start && span.end <= outer.end;
    let here = table.iter().find(|(_, value)| holds(value.span())).map(|(key, _)| key.clone());
    below || here.is_some_and(|key| table.remove(&key).is_some())
}
