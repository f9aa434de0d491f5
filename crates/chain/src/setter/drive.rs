//! Doing what the machine asks for, over a [`Chain`].

use tokio::sync::mpsc;

use super::{Effect, Input, Outcome};
use crate::chain::Chain;
use crate::error::SetWeightsError;
use crate::hotkey::Hotkey;
use crate::view::Progress;

/// Executes one effect and gives the input that answers it. Progress of a sent row goes to `progress` as it comes; a full queue
/// loses steps, never the end.
pub async fn execute(chain: &dyn Chain, hotkey: &Hotkey, effect: &Effect, place: (u16, u8), progress: &mpsc::Sender<Input>) -> Input {
    let (netuid, mechanism) = place;
    match effect {
        Effect::Look => match chain.weights_view(netuid, mechanism, &hotkey.account()).await {
            Ok(view) => Input::View(Box::new(view)),
            Err(error) => Input::Unreachable { why: one_line(&error) },
        },
        Effect::Send { attempt, request } => {
            let attempt = *attempt;
            let tell = |step: Progress| {
                let _ = progress.try_send(Input::Progress { attempt, progress: step });
            };
            let outcome = match chain.send_weights(hotkey, request, &tell).await {
                Ok(landed) => Outcome::Landed(landed),
                Err(SetWeightsError::Refused(reason)) => Outcome::Refused(reason),
                Err(error @ (SetWeightsError::NotFinalized { .. } | SetWeightsError::ReadBackDiffers { .. })) => {
                    Outcome::Unknown { why: one_line(&error) }
                }
                Err(error @ (SetWeightsError::Chain(_) | SetWeightsError::Timelock(_))) => Outcome::NotSent { why: one_line(&error) },
            };
            Input::Ended { attempt, outcome }
        }
    }
}

fn one_line(error: &dyn std::fmt::Display) -> String {
    error.to_string().replace('\n', "; ")
}
