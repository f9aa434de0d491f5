//! Lays the four layers over one another: defaults, file, environment, flags; the later one wins.

use std::collections::BTreeMap;
use std::ffi::OsString;
use std::fmt;
use std::path::{Path, PathBuf};

use super::table::{self, Role, SETTINGS, Setting};
use super::{SettingsError, value, variables};

/// Where systemd puts a service's credentials.
const CREDENTIALS: &str = "CREDENTIALS_DIRECTORY";
/// Longest configuration file that is read.
const FILE_BYTES_MAX: u64 = 1 << 20;

/// Where a value came from.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Origin {
    Default,
    File(PathBuf),
    Environment(String),
    Flag(String),
}

impl fmt::Display for Origin {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Default => f.write_str("default"),
            Self::File(path) => write!(f, "file {}", path.display()),
            Self::Environment(name) => write!(f, "environment {name}"),
            Self::Flag(name) => write!(f, "flag --{name}"),
        }
    }
}

/// A value and where it came from.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Value {
    pub text: String,
    pub origin: Origin,
}

/// What settings are made from. Reading the process is a step of its own, so that tests need not change the process.
#[derive(Clone, Debug, Default)]
pub struct Sources {
    pub file: Option<PathBuf>,
    pub environment: BTreeMap<String, String>,
    /// Flag name without dashes, and its value.
    pub flags: Vec<(&'static str, String)>,
}

impl Sources {
    /// The process' environment and the flags that were given; the file is that of `--settings` or `QUASAR_CONFIG`.
    ///
    /// # Errors
    /// A `QUASAR_*` variable is not valid UTF-8.
    pub fn of_process(file: Option<PathBuf>, flags: Vec<(&'static str, String)>) -> Result<Self, SettingsError> {
        Self::of(std::env::vars_os(), file, flags)
    }

    fn of(
        variables: impl Iterator<Item = (OsString, OsString)>,
        file: Option<PathBuf>,
        flags: Vec<(&'static str, String)>,
    ) -> Result<Self, SettingsError> {
        let mut environment = BTreeMap::new();
        for (name, text) in variables {
            let Ok(name) = name.into_string() else { continue };
            if !(name.starts_with("QUASAR_") || name.starts_with("AWS_") || name == "HOME" || name == CREDENTIALS) {
                continue;
            }
            match text.into_string() {
                // Shell scripts often export a variable that they leave empty.
                Ok(text) if text.is_empty() => {}
                Ok(text) => {
                    environment.insert(name, text);
                }
                Err(_) if name.starts_with("QUASAR_") => {
                    return Err(SettingsError::Invalid {
                        key: name.clone(),
                        origin: Origin::Environment(name),
                        reason: "it is not valid UTF-8".to_owned(),
                    });
                }
                Err(_) => {}
            }
        }
        let file = file.or_else(|| environment.get(variables::CONFIG_FILE).map(PathBuf::from));
        Ok(Self { file, environment, flags })
    }

    pub(super) fn home(&self) -> Option<&Path> {
        self.environment.get("HOME").map(Path::new)
    }

    pub(super) fn credentials(&self) -> Option<&Path> {
        self.environment.get(CREDENTIALS).map(Path::new)
    }
}

/// The outcome: values by key, and everything that is wrong or worth saying.
#[derive(Debug, Default)]
pub(super) struct Layered {
    pub values: BTreeMap<&'static str, Value>,
    pub notices: Vec<String>,
    pub problems: Vec<SettingsError>,
}

/// Resolves the settings of a role, collecting all problems.
pub(super) fn resolve(role: Role, sources: &Sources) -> Layered {
    let mut layered = Layered::default();
    for setting in SETTINGS.iter().filter(|setting| setting.roles.contains(&role)) {
        if let Some(default) = setting.default {
            layered.set(setting, default.to_owned(), Origin::Default);
        }
    }
    if let Some(path) = &sources.file {
        layered.take_file(role, path);
    }
    layered.take_environment(role, &sources.environment);
    for (flag, text) in &sources.flags {
        match table::by_flag(role, flag) {
            Some(setting) => layered.set(setting, text.clone(), Origin::Flag((*flag).to_owned())),
            None => layered.problems.push(SettingsError::UnknownFlag { role, flag: (*flag).to_owned() }),
        }
    }
    layered
}

impl Layered {
    fn set(&mut self, setting: &'static Setting, text: String, origin: Origin) {
        match value::check(setting.kind, &text) {
            Ok(()) => {
                self.values.insert(setting.key, Value { text, origin });
            }
            Err(reason) => self.problems.push(SettingsError::Invalid { key: setting.key.to_owned(), origin, reason }),
        }
    }

    fn take_environment(&mut self, role: Role, environment: &BTreeMap<String, String>) {
        for setting in SETTINGS.iter().filter(|setting| setting.roles.contains(&role)) {
            let mut present = setting.env.iter().filter(|name| environment.contains_key(**name));
            let Some(name) = present.next() else { continue };
            if let Some(second) = present.find(|second| environment[**second] != environment[*name]) {
                self.notices.push(format!("{second} has no effect beside {name}"));
            }
            self.set(setting, environment[*name].clone(), Origin::Environment((*name).to_owned()));
        }
        for name in environment.keys().filter(|name| name.starts_with("QUASAR_")) {
            match table::by_variable(name) {
                Some(setting) if setting.secret && !setting.roles.contains(&role) => {
                    self.notices.push(format!("{name} has no effect: a {role} has no bucket credentials; unset it on this machine"));
                }
                // Another role's variable: one environment may serve all roles of a machine.
                Some(_) => {}
                None => self.take_unlisted(name),
            }
        }
    }

    fn take_unlisted(&mut self, name: &str) {
        match variables::fate(name) {
            variables::Fate::Ignored => {}
            variables::Fate::Notice(notice) => self.notices.push(notice),
            variables::Fate::Dropped(replacement) => {
                self.problems.push(SettingsError::Dropped { name: name.to_owned(), replacement });
            }
            variables::Fate::Unknown => {
                let known = SETTINGS.iter().flat_map(|setting| setting.env.iter().copied());
                let nearest = value::nearest(name, known);
                self.problems.push(SettingsError::UnknownVariable { name: name.to_owned(), nearest });
            }
        }
    }

    fn take_file(&mut self, role: Role, path: &Path) {
        let text = match read_limited(path) {
            Ok(text) => text,
            Err(reason) => return self.problems.push(SettingsError::Unreadable { path: path.to_owned(), reason }),
        };
        let tree = match toml::from_str::<toml::Table>(&text) {
            Ok(tree) => tree,
            Err(error) => {
                // The parser's own text quotes the line, which may hold a secret: keep the reason and the place only.
                let line = error.span().map_or(1, |span| text[..span.start.min(text.len())].matches('\n').count() + 1);
                let reason = error.message().to_owned();
                return self.problems.push(SettingsError::Syntax { path: path.to_owned(), line, reason });
            }
        };
        self.take_table(role, path, "", tree);
    }

    fn take_table(&mut self, role: Role, path: &Path, prefix: &str, tree: toml::Table) {
        for (name, item) in tree {
            let key = format!("{prefix}{name}");
            let item = match item {
                toml::Value::Table(inner) if SETTINGS.iter().any(|setting| setting.key.starts_with(&format!("{key}."))) => {
                    self.take_table(role, path, &format!("{key}."), inner);
                    continue;
                }
                item => item,
            };
            let Some(setting) = table::by_key(&key) else {
                let nearest = value::nearest(&key, SETTINGS.iter().map(|setting| setting.key));
                self.problems.push(SettingsError::UnknownKey { path: path.to_owned(), key, nearest });
                continue;
            };
            if !setting.roles.contains(&role) {
                self.problems.push(SettingsError::OtherRole { path: path.to_owned(), key, role, owner: setting.roles[0] });
                continue;
            }
            let origin = Origin::File(path.to_owned());
            match scalar(item) {
                Some(text) => self.set(setting, text, origin),
                None => {
                    let reason = "text, a number, true, false or an array of texts is needed".to_owned();
                    self.problems.push(SettingsError::Invalid { key, origin, reason });
                }
            }
        }
    }
}

fn scalar(item: toml::Value) -> Option<String> {
    match item {
        toml::Value::String(text) => Some(text),
        toml::Value::Integer(number) => Some(number.to_string()),
        toml::Value::Float(number) => Some(number.to_string()),
        toml::Value::Boolean(flag) => Some(flag.to_string()),
        toml::Value::Array(items) => {
            let texts: Option<Vec<String>> = items.into_iter().map(scalar).collect();
            texts.map(|texts| texts.join(","))
        }
        toml::Value::Datetime(_) | toml::Value::Table(_) => None,
    }
}

fn read_limited(path: &Path) -> Result<String, String> {
    use std::io::Read as _;
    let mut text = String::new();
    let file = std::fs::File::open(path).map_err(|error| error.to_string())?;
    file.take(FILE_BYTES_MAX + 1).read_to_string(&mut text).map_err(|error| error.to_string())?;
    if text.len() as u64 > FILE_BYTES_MAX {
        return Err(format!("it is longer than {FILE_BYTES_MAX} bytes"));
    }
    Ok(text)
}

#[cfg(test)]
mod tests {
    use std::os::unix::ffi::OsStringExt;

    use super::*;

    fn of(pairs: &[(&str, &[u8])], file: Option<PathBuf>) -> Result<Sources, SettingsError> {
        let pairs = pairs.iter().map(|(name, text)| (OsString::from(name), OsString::from_vec(text.to_vec())));
        Sources::of(pairs.collect::<Vec<_>>().into_iter(), file, Vec::new())
    }

    #[test]
    fn empty_and_foreign_variables_count_as_not_set() {
        let sources = of(&[("QUASAR_RUN_ID", b""), ("QUASAR_NETUID", b"24"), ("PATH", b"/bin"), ("HOME", b"/home/m")], None).unwrap();
        assert_eq!(sources.environment.keys().collect::<Vec<_>>(), ["HOME", "QUASAR_NETUID"]);
        assert_eq!(sources.home(), Some(Path::new("/home/m")));
    }

    #[test]
    fn the_file_is_that_of_the_flag_or_else_of_the_environment() {
        let variable: &[(&str, &[u8])] = &[("QUASAR_CONFIG", b"/etc/quasar/miner.toml")];
        assert_eq!(of(variable, None).unwrap().file, Some(PathBuf::from("/etc/quasar/miner.toml")));
        assert_eq!(of(variable, Some("/a".into())).unwrap().file, Some(PathBuf::from("/a")));
    }

    #[test]
    fn our_variables_must_be_text_and_others_are_not_our_business() {
        assert!(matches!(of(&[("QUASAR_WALLET_NAME", &[0xff])], None), Err(SettingsError::Invalid { .. })));
        assert!(of(&[("AWS_PROFILE", &[0xff])], None).unwrap().environment.is_empty());
    }
}
