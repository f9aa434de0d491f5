//! Contributions of honest learners as they really are: how close they are to each other, and what merge rules make of them when some
//! are replaced by an attacker's.

use std::fmt::Write;

use protocol::documents::Codec;
use protocol::{MergeRule, Reason, Slice};
use quasar_tests::training::attack::{Attack, median};
use quasar_tests::training::server::Rule;
use quasar_tests::training::setting::{Base, Setting};
use quasar_tests::training::swarm::{self, Scheme, Seen};

/// The contributions of one merge.
struct Round {
    fragment: usize,
    contributions: Vec<Vec<f32>>,
}

/// Trains honest learners and looks at the contributions of the last cycle before the closing round.
pub fn study(setting: &Setting, learners: usize) -> anyhow::Result<String> {
    let (base, order) = (setting.base(1)?, setting.order(1, learners));
    let scheme =
        Scheme { up: Codec::Bf16, closing: Codec::Bf16, down: Codec::Bf16, feedback: None, ..Scheme::of(&setting.parameters, learners) };
    let last = setting.steps - u64::from(setting.parameters.inner_steps)..setting.steps;
    let mut rounds = Vec::new();
    let keep = |seen: &Seen| {
        if last.contains(&seen.step) {
            rounds.push(Round { fragment: seen.fragment, contributions: seen.contributions.to_vec() });
        }
    };
    let tell = |step, loss| {
        if (step + 1) % u64::from(setting.parameters.inner_steps) == 0 {
            eprintln!("contributions of {learners} learners: step {}, training loss {loss:.3}", step + 1);
        }
    };
    swarm::train(setting, &base, &order, scheme, keep, tell)?;
    Ok(format!("{}{}", cosines(&base, &rounds), rules(&base, &rounds)?))
}

fn dot(left: &[f32], right: &[f32]) -> f64 {
    left.iter().zip(right).map(|(left, right)| f64::from(*left) * f64::from(*right)).sum()
}

fn kind(slice: &Slice) -> &'static str {
    let embedding = slice.tensor.contains("word_embeddings") || slice.tensor.contains("lm_head");
    match slice.rule {
        _ if embedding => KINDS[0],
        MergeRule::Rda if slice.unit_rows < slice.rows() => KINDS[1],
        MergeRule::Rda => KINDS[2],
        MergeRule::Mean => KINDS[3],
    }
}

const KINDS: [&str; 4] = ["embedding and head, row blocks", "experts, each", "other matrices", "routers, norms, scalars"];

/// Mutual cosines by kind of merge unit, and of whole fragments.
fn cosines(base: &Base, rounds: &[Round]) -> String {
    let mut found: Vec<(&str, Vec<f64>)> = KINDS.iter().chain(&["whole fragment"]).map(|kind| (*kind, Vec::new())).collect();
    for round in rounds {
        let mut start = 0;
        for slice in &base.plan.fragments[round.fragment] {
            let elements = (slice.unit_rows * slice.row_elements) as usize;
            for _ in 0..slice.rows() / slice.unit_rows {
                let cosines = mutual(round.contributions.iter().map(|values| &values[start..start + elements]).collect());
                let place = found.iter_mut().find(|(name, _)| *name == kind(slice));
                place.into_iter().for_each(|(_, all)| all.extend(&cosines));
                start += elements;
            }
        }
        let whole = mutual(round.contributions.iter().map(Vec::as_slice).collect());
        found.last_mut().into_iter().for_each(|(_, all)| all.extend(&whole));
    }
    let learners = rounds.first().map_or(0, |round| round.contributions.len());
    let mut text = format!(
        "\nmutual cosines of {learners} honest learners over one cycle\n\n| merge unit | pairs | 5 % | median | 95 % |\n|---|---|---|---|---|\n"
    );
    for (name, mut cosines) in found.into_iter().filter(|(_, cosines)| !cosines.is_empty()) {
        cosines.sort_by(f64::total_cmp);
        let quantile = |part: usize| cosines[(cosines.len() - 1) * part / 100];
        let _ =
            writeln!(text, "| {name} | {} | {:.3} | {:.3} | {:.3} |", cosines.len(), quantile(5), median(cosines.clone()), quantile(95));
    }
    text
}

/// Cosines of all pairs in which both moved.
fn mutual(vectors: Vec<&[f32]>) -> Vec<f64> {
    let norms: Vec<f64> = vectors.iter().map(|values| dot(values, values).sqrt()).collect();
    let pairs = (0..vectors.len()).flat_map(|left| (0..left).map(move |right| (left, right)));
    let moved = pairs.filter(|(left, right)| norms[*left] * norms[*right] > 0.0);
    moved.map(|(left, right)| dot(vectors[left], vectors[right]) / (norms[left] * norms[right])).collect()
}

/// What replacing some contributions does to the result of each rule: cosine to what the rule makes of all honest contributions,
/// and norm relative to it, over all fragments together.
fn rules(base: &Base, rounds: &[Round]) -> anyhow::Result<String> {
    let learners = rounds.first().map_or(0, |round| round.contributions.len());
    let mut text = String::from(
        "\ncosine to the merge of all honest contributions / norm relative to it; in the last column: attackers, honest learners left out by the filters\n\n| attackers |",
    );
    for rule in Rule::ALL {
        let _ = write!(text, " {} |", rule.name());
    }
    text.push_str(" left out |\n|---|");
    text.push_str(&"---|".repeat(Rule::ALL.len() + 1));
    text.push('\n');
    let nobody = [(None, 0), (None, learners / 8), (None, learners / 4)];
    let attacks = Attack::ALL.iter().flat_map(|attack| [(Some(*attack), learners / 8), (Some(*attack), learners / 4)]);
    for (attack, attackers) in nobody.into_iter().chain(attacks) {
        let _ = match attack {
            None if attackers == 0 => write!(text, "| nobody |"),
            None => write!(text, "| nobody, {attackers} of {learners} absent |"),
            Some(attack) => write!(text, "| {attackers} of {learners}: {} |", attack.name()),
        };
        let mut left_out = (0, 0);
        for rule in Rule::ALL {
            // Over all fragments: a·b, a·a, b·b.
            let (mut product, mut found_squares, mut clean_squares) = (0.0, 0.0, 0.0);
            for (number, round) in rounds.iter().enumerate() {
                let slices = &base.plan.fragments[round.fragment];
                let honest = round.contributions.len() - attackers;
                let mut contributions = round.contributions[..honest].to_vec();
                if let Some(attack) = attack {
                    contributions.extend(attack.contributions(&round.contributions[..honest], attackers, number as u64));
                }
                let (found, clean) = (rule.merge(slices, &contributions)?, rule.merge(slices, &round.contributions)?);
                product += dot(&found.delta, &clean.delta);
                found_squares += dot(&found.delta, &found.delta);
                clean_squares += dot(&clean.delta, &clean.delta);
                if rule == Rule::Robust {
                    let refused = |number: &usize| found.inputs[*number].outcome != Reason::None;
                    left_out.0 += (honest..found.inputs.len()).filter(refused).count();
                    left_out.1 += (0..honest).filter(refused).count();
                }
            }
            let (cosine, ratio) = (product / (found_squares * clean_squares).sqrt(), (found_squares / clean_squares).sqrt());
            let _ = write!(text, " {cosine:.2} / {ratio:.2} |");
        }
        let of = |count: usize, each: usize| {
            if each == 0 { "-".to_owned() } else { format!("{:.0} %", 100.0 * count as f64 / (each * rounds.len()) as f64) }
        };
        let attackers = if attack.is_none() { 0 } else { attackers };
        let honest = learners - attackers;
        let _ = writeln!(text, " {}, {} |", of(left_out.0, attackers), of(left_out.1, honest));
    }
    Ok(text)
}
