//! Texts to values: what each [`Kind`] accepts.

use std::net::SocketAddr;
use std::path::{Path, PathBuf};

use protocol::AccountId;

use super::table::Kind;
use crate::telemetry;

/// GPUs of a miner.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Devices {
    /// Every GPU there is; the CPU if there is none.
    Auto,
    /// One learner on the CPU.
    Cpu,
    /// One learner for each of these GPUs.
    Cuda(Vec<u32>),
}

/// Checks a value without keeping it; the error is a sentence without a full stop.
pub(super) fn check(kind: Kind, text: &str) -> Result<(), String> {
    match kind {
        Kind::Text | Kind::Path if text.contains('\0') => Err("it contains a zero byte".to_owned()),
        Kind::Text | Kind::Path => Ok(()),
        Kind::Flag => flag(text).map(drop),
        Kind::Integer(low, high) => match text.parse::<u64>() {
            Ok(number) if (low..=high).contains(&number) => Ok(()),
            _ => Err(format!("a whole number from {low} to {high} is needed")),
        },
        Kind::Seconds => milliseconds(text).map(drop),
        Kind::List if list(text).is_empty() => Err("the list is empty".to_owned()),
        Kind::List => Ok(()),
        Kind::Account => text.parse::<AccountId>().map(drop).map_err(|error| error.to_string()),
        Kind::Listen => listen(text).map(drop),
        Kind::Choice(choices) if choices.contains(&text) => Ok(()),
        Kind::Choice(choices) => Err(format!("one of {} is needed", choices.join(", "))),
        Kind::Devices => devices(text).map(drop),
        Kind::Device => device(text),
        Kind::LaunchMode => launch_mode(text),
        Kind::LogFilter => telemetry::check_filter(text).map_err(|error| error.to_string()),
        Kind::Url => url(text),
    }
}

pub(super) fn flag(text: &str) -> Result<bool, String> {
    match text {
        "1" | "true" | "yes" | "on" => Ok(true),
        "0" | "false" | "no" | "off" => Ok(false),
        _ => Err("1 or 0 is needed (also true, false, yes, no, on, off)".to_owned()),
    }
}

/// Seconds with fractions to whole milliseconds; up to about 30 years.
pub(super) fn milliseconds(text: &str) -> Result<u64, String> {
    match text.parse::<f64>() {
        Ok(seconds) if (0.001..=1e9).contains(&seconds) => Ok((seconds * 1000.0).round() as u64),
        _ => Err("seconds are needed, at least 0.001".to_owned()),
    }
}

pub(super) fn list(text: &str) -> Vec<String> {
    text.split(',').map(str::trim).filter(|item| !item.is_empty()).map(str::to_owned).collect()
}

pub(super) fn listen(text: &str) -> Result<Option<SocketAddr>, String> {
    if text == "off" {
        return Ok(None);
    }
    let address: SocketAddr = text.parse().map_err(|_| "an address such as 127.0.0.1:9464, or off, is needed".to_owned())?;
    if !address.ip().is_loopback() {
        return Err("only loopback addresses are allowed; put a local scraper or proxy in front".to_owned());
    }
    Ok(Some(address))
}

pub(super) fn devices(text: &str) -> Result<Devices, String> {
    match text {
        "auto" => return Ok(Devices::Auto),
        "cpu" => return Ok(Devices::Cpu),
        _ => {}
    }
    let malformed = || "auto, cpu, or GPU numbers such as 0,1 are needed".to_owned();
    let mut gpus = Vec::new();
    for item in text.split(',') {
        let gpu = item.trim().parse().map_err(|_| malformed())?;
        if gpus.contains(&gpu) {
            return Err(format!("GPU {gpu} is listed twice"));
        }
        gpus.push(gpu);
    }
    Ok(Devices::Cuda(gpus))
}

fn device(text: &str) -> Result<(), String> {
    let is_gpu = |text: &str| text.strip_prefix("cuda:").is_some_and(|number| number.parse::<u32>().is_ok());
    if matches!(text, "auto" | "cpu") || is_gpu(text) {
        return Ok(());
    }
    Err("auto, cpu or cuda:N is needed".to_owned())
}

fn launch_mode(text: &str) -> Result<(), String> {
    match text {
        "per-gpu" => Ok(()),
        "grouped" => Err("`grouped` (one learner over several GPUs) does not exist; `per-gpu` runs one learner on each".to_owned()),
        _ => Err("per-gpu is needed".to_owned()),
    }
}

fn url(text: &str) -> Result<(), String> {
    let Some(rest) = text.strip_prefix("https://").or_else(|| text.strip_prefix("http://")) else {
        return Err("a URL that starts with https:// or http:// is needed".to_owned());
    };
    let authority = rest.split('/').next().unwrap_or_default();
    if authority.contains('@') {
        return Err("credentials do not belong into a URL".to_owned());
    }
    if authority.is_empty() {
        return Err("the URL has no host".to_owned());
    }
    Ok(())
}

/// A path with a leading `~/` replaced by the home directory.
pub(super) fn path(text: &str, home: Option<&Path>) -> PathBuf {
    match (text.strip_prefix("~/"), home) {
        (Some(rest), Some(home)) => home.join(rest),
        _ => PathBuf::from(text),
    }
}

/// The known name that is closest to a mistyped one, if any is close.
pub(super) fn nearest<'a>(name: &str, known: impl IntoIterator<Item = &'a str>) -> Option<&'a str> {
    let close = |(distance, _): &(usize, &str)| *distance <= (name.len() / 3).max(2);
    known.into_iter().map(|candidate| (edit_distance(name, candidate), candidate)).filter(close).min().map(|(_, name)| name)
}

/// Levenshtein distance in bytes.
fn edit_distance(from: &str, to: &str) -> usize {
    let mut row: Vec<usize> = (0..=to.len()).collect();
    for (i, a) in from.bytes().enumerate() {
        let mut diagonal = row[0];
        row[0] = i + 1;
        for (j, b) in to.bytes().enumerate() {
            let substituted = diagonal + usize::from(a != b);
            diagonal = row[j + 1];
            row[j + 1] = substituted.min(diagonal + 1).min(row[j] + 1);
        }
    }
    row[to.len()]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn devices_are_a_list_without_repetition() {
        assert_eq!(devices("0, 2"), Ok(Devices::Cuda(vec![0, 2])));
        assert!(devices("0,0").unwrap_err().contains("twice"));
        assert!(devices("gpu").is_err() && devices("0,,1").is_err() && devices("-1").is_err());
    }

    #[test]
    fn only_loopback_is_listened_on() {
        assert!(listen("127.0.0.1:9464").unwrap().is_some() && listen("[::1]:1").unwrap().is_some());
        assert!(listen("0.0.0.0:9464").is_err() && listen("9464").is_err());
        assert_eq!(listen("off"), Ok(None));
    }

    #[test]
    fn a_url_has_a_scheme_a_host_and_no_credentials() {
        assert!(url("https://s3.example.com").is_ok() && url("http://127.0.0.1:9000/x").is_ok());
        for wrong in ["s3.example.com", "ftp://x", "https://", "https://user:pass@host"] {
            assert!(url(wrong).is_err(), "{wrong}");
        }
    }

    #[test]
    fn seconds_may_have_fractions_but_not_be_zero_or_nan() {
        assert_eq!(milliseconds("0.25"), Ok(250));
        assert!(["0", "-1", "NaN", "inf", "1e300", ""].iter().all(|text| milliseconds(text).is_err()));
    }

    #[test]
    fn a_mistyped_name_finds_the_nearest_known_one() {
        assert_eq!(nearest("wallet.nmae", ["wallet.name", "netuid"]), Some("wallet.name"));
        assert_eq!(nearest("completely-different", ["wallet.name", "netuid"]), None);
        assert_eq!(edit_distance("kitten", "sitting"), 3);
    }

    #[test]
    fn the_home_directory_stands_for_a_leading_tilde() {
        assert_eq!(path("~/a", Some(Path::new("/home/m"))), Path::new("/home/m/a"));
        assert_eq!(path("/a/~/b", Some(Path::new("/home/m"))), Path::new("/a/~/b"));
    }
}
