//! Tables in Markdown, as they stand in `docs/experiments.md`.

use std::fmt::Write;

use quasar_tests::training::setting::Setting;

use crate::arms::{Arm, Group, Outcome};

/// One table for each group; outcomes are `[arm][seed]`.
pub fn arms(setting: &Setting, learners: usize, seeds: u64, groups: &[Group], arms: &[Arm], outcomes: &[Vec<Outcome>]) -> String {
    let mut text = format!(
        "{learners} learners, {} steps each ({} cycles), seeds: {seeds}, {} held-out rows\n",
        setting.steps,
        setting.parameters.cycles,
        setting.held_out.count()
    );
    for group in groups {
        let attacks = *group == Group::Attacks;
        let _ = match group {
            Group::Codecs => writeln!(text, "\n| codecs | nats gained |\n|---|---|"),
            Group::Outer => writeln!(text, "\n| outer optimizer | nats gained |\n|---|---|"),
            Group::Apply => writeln!(text, "\n| a new version arrives | nats gained |\n|---|---|"),
            Group::Attacks => {
                writeln!(text, "\n| attackers; merge | nats gained | attackers left out | honest left out |\n|---|---|---|---|")
            }
        };
        for (arm, outcomes) in arms.iter().zip(outcomes).filter(|(arm, _)| arm.group == *group) {
            let _ = write!(text, "| {} | {} |", arm.name, gains(outcomes));
            if attacks {
                let mean = |part: fn(&Outcome) -> f64| 100.0 * outcomes.iter().map(part).sum::<f64>() / outcomes.len().max(1) as f64;
                let (attackers, honest) = (mean(|outcome| outcome.refused_attackers), mean(|outcome| outcome.refused_honest));
                let _ = write!(text, " {attackers:.0} % | {honest:.1} % |");
            }
            text.push('\n');
        }
    }
    text
}

/// The mean gain, and each seed's where there are several.
fn gains(outcomes: &[Outcome]) -> String {
    let each: Vec<String> = outcomes.iter().map(Outcome::text).collect();
    let gains: Option<Vec<f64>> = outcomes.iter().map(|outcome| outcome.gain).collect();
    match gains {
        Some(gains) if gains.len() > 1 => {
            format!("{:.3} ({})", gains.iter().sum::<f64>() / gains.len() as f64, each.join(", "))
        }
        _ => each.join(", "),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_run_that_diverged_has_no_mean() {
        let outcome = |gain| Outcome { gain, refused_honest: 0.0, refused_attackers: 0.0 };
        assert_eq!(gains(&[outcome(Some(2.0)), outcome(Some(1.0))]), "1.500 (2.000, 1.000)");
        assert_eq!(gains(&[outcome(Some(2.0)), outcome(None)]), "2.000, diverged");
        assert_eq!(gains(&[outcome(Some(2.0))]), "2.000");
    }
}
