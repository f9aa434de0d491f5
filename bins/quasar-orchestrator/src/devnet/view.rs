//! What a person sees while a devnet runs: a progress bar with one line for each role on a terminal, plain lines elsewhere.

use std::io::IsTerminal;
use std::time::{Duration, Instant};

use indicatif::{MultiProgress, ProgressBar, ProgressStyle};

use super::DevnetArgs;
use crate::machine::Status;

/// Plain lines come this often.
const PLAIN_INTERVAL: Duration = Duration::from_secs(5);
/// Points of the loss curve.
const CURVE_POINTS: usize = 48;

pub struct View {
    terminal: Option<Terminal>,
    last_line: Option<Instant>,
    curve: Vec<f64>,
    curve_step: u64,
}

struct Terminal {
    all: MultiProgress,
    bar: ProgressBar,
    curve: ProgressBar,
    learners: Vec<ProgressBar>,
    audits: ProgressBar,
}

impl View {
    pub fn new(arguments: &DevnetArgs) -> Self {
        let terminal = std::io::stderr().is_terminal().then(|| Terminal::new(arguments));
        Self { terminal, last_line: None, curve: Vec::new(), curve_step: u64::MAX }
    }

    /// A line that stays.
    pub fn note(&self, text: &str) {
        match &self.terminal {
            Some(terminal) => drop(terminal.all.println(text)),
            None => eprintln!("{text}"),
        }
    }

    pub fn show(&mut self, status: &Status) {
        let losses: Vec<f64> =
            status.learners.iter().filter(|learner| learner.local_step > 0).map(|learner| learner.loss as f64 / 1e6).collect();
        let mean = if losses.is_empty() { None } else { Some(losses.iter().sum::<f64>() / losses.len() as f64) };
        if let Some(mean) = mean
            && status.closed_below != self.curve_step
        {
            self.curve_step = status.closed_below;
            self.curve.push(mean);
        }
        match &self.terminal {
            Some(terminal) => terminal.show(status, &sparkline(&self.curve)),
            None => {
                if self.last_line.is_some_and(|at| at.elapsed() < PLAIN_INTERVAL) {
                    return;
                }
                self.last_line = Some(Instant::now());
                let live = status.learners.iter().filter(|learner| learner.live).count();
                let loss = mean.map_or_else(|| "-".to_owned(), |mean| format!("{mean:.3}"));
                eprintln!(
                    "cycle {}  outer step {}  merges {}  contributions {}  learners {live}  loss {loss}  step {} ms  audits {}",
                    status.cycle, status.closed_below, status.merges, status.contributions, status.step_ms, status.audits_ordered
                );
            }
        }
    }

    pub fn finish(&self) {
        if let Some(terminal) = &self.terminal {
            let _ = terminal.all.clear();
        }
    }
}

impl Terminal {
    fn new(arguments: &DevnetArgs) -> Self {
        let all = MultiProgress::new();
        let line = || {
            let bar = all.add(ProgressBar::new_spinner());
            bar.set_style(ProgressStyle::with_template("{msg}").unwrap_or_else(|_| ProgressStyle::default_spinner()));
            bar
        };
        let bar = all.add(ProgressBar::new(arguments.cycles));
        let template = "{elapsed_precise} [{bar:32.cyan/blue}] {msg}";
        bar.set_style(ProgressStyle::with_template(template).unwrap_or_else(|_| ProgressStyle::default_bar()).progress_chars("━╸─"));
        let curve = line();
        let learners = (0..arguments.miners).map(|_| line()).collect();
        let audits = line();
        Self { all, bar, curve, learners, audits }
    }

    fn show(&self, status: &Status, curve: &str) {
        self.bar.set_position(status.cycle);
        self.bar.set_message(format!(
            "cycle {}  outer step {}  {} merges, {} contributions",
            status.cycle, status.closed_below, status.merges, status.contributions
        ));
        self.curve.set_message(format!("loss   {curve}"));
        for (line, learner) in self.learners.iter().zip(&status.learners) {
            let state = if learner.live { format!("{:?}", learner.state).to_lowercase() } else { "gone".to_owned() };
            line.set_message(format!(
                "{:<10} {state:<9} step {:<5} loss {:<7.3} {} contributions",
                learner.worker,
                learner.local_step,
                learner.loss as f64 / 1e6,
                learner.contributions
            ));
        }
        self.audits
            .set_message(format!("audits     {} ordered, {} open; {} tokens", status.audits_ordered, status.audits_open, status.tokens));
    }
}

/// The last points of a curve in eight heights, with its first and last value.
fn sparkline(values: &[f64]) -> String {
    const BLOCKS: [char; 8] = ['▁', '▂', '▃', '▄', '▅', '▆', '▇', '█'];
    let (Some(first), Some(last)) = (values.first(), values.last()) else { return String::new() };
    let (low, high) = values.iter().fold((f64::MAX, f64::MIN), |(low, high), value| (low.min(*value), high.max(*value)));
    let span = (high - low).max(1e-9);
    let stride = values.len().div_ceil(CURVE_POINTS).max(1);
    let line: String = values
        .chunks(stride)
        .map(|chunk| chunk[chunk.len() - 1])
        .map(|value| BLOCKS[(((value - low) / span) * 7.0).round() as usize])
        .collect();
    format!("{first:.2} {line} {last:.2}")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_falling_curve_falls_and_a_flat_one_is_flat() {
        assert_eq!(sparkline(&[8.0, 4.0, 1.0]), "8.00 █▄▁ 1.00");
        assert_eq!(sparkline(&[2.0, 2.0]), "2.00 ▁▁ 2.00");
        assert_eq!(sparkline(&[]), "");
        assert!(sparkline(&vec![1.0; 1000]).chars().count() < 70);
    }
}
