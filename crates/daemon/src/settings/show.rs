//! `config show` and `config validate`: the effective settings, where each came from, and what is wrong with them.

use std::fmt::Write as _;

use super::flags::ConfigCommand;
use super::table::SETTINGS;
use super::{Role, Settings, SettingsError, Sources};
use crate::Exit;

/// What stands for a secret.
const MASK: &str = "********";

/// One line a setting: key, value, origin; then the notices.
pub fn text(settings: &Settings) -> String {
    let rows: Vec<[String; 3]> =
        rows(settings).map(|(key, value, origin)| [key.to_owned(), value.unwrap_or_else(|| "-".to_owned()), origin]).collect();
    let width = |column: usize| rows.iter().map(|row| row[column].chars().count()).max().unwrap_or(0);
    let (keys, values) = (width(0), width(1));
    let mut text = String::new();
    for [key, value, origin] in rows {
        let _ = writeln!(text, "{key:keys$}  {value:values$}  {origin}");
    }
    for notice in &settings.notices {
        let _ = writeln!(text, "note: {notice}");
    }
    text
}

/// `{"role": …, "settings": {key: {"value": …, "origin": …}}, "notices": […]}`; a setting without a value is null.
pub fn json(settings: &Settings) -> serde_json::Value {
    let entries: serde_json::Map<String, serde_json::Value> =
        rows(settings).map(|(key, value, origin)| (key.to_owned(), serde_json::json!({ "value": value, "origin": origin }))).collect();
    serde_json::json!({ "role": settings.role().name(), "settings": entries, "notices": settings.notices })
}

fn rows(settings: &Settings) -> impl Iterator<Item = (&'static str, Option<String>, String)> {
    let of_role = SETTINGS.iter().filter(|setting| setting.roles.contains(&settings.role()));
    of_role.map(|setting| match settings.value(setting.key) {
        Some(value) => {
            let shown = if setting.secret { MASK.to_owned() } else { value.text.clone() };
            (setting.key, Some(shown), value.origin.to_string())
        }
        None => (setting.key, None, "not set".to_owned()),
    })
}

/// What `config show` and `config validate` print, and their exit code.
///
/// # Errors
/// `show` has nothing to show where the sources contradict themselves.
pub fn answer(role: Role, sources: &Sources, command: &ConfigCommand) -> Result<(String, Exit), SettingsError> {
    match command {
        ConfigCommand::Show { json: true } => Ok((format!("{:#}\n", json(&Settings::load(role, sources)?)), Exit::Done)),
        ConfigCommand::Show { json: false } => Ok((text(&Settings::load(role, sources)?), Exit::Done)),
        ConfigCommand::Validate => {
            let problems = Settings::check(role, sources);
            if problems.is_empty() {
                return Ok(("the settings are complete\n".to_owned(), Exit::Done));
            }
            Ok((problems.iter().map(|problem| format!("{problem}\n")).collect(), Exit::Configuration))
        }
    }
}
