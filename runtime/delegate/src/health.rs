// SPDX-License-Identifier: Apache-2.0
//! Whether a delegate answers, as its last calls showed. A change is logged once.

use tokio::sync::watch;

use crate::error::DelegateError;

/// What the last calls showed.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub enum Health {
    /// It was not called yet.
    #[default]
    Unknown,
    Up,
    /// It did not answer in time.
    Slow,
    Down {
        why: String,
    },
}

impl Health {
    pub fn is_up(&self) -> bool {
        *self == Self::Up
    }
}

/// The health of one delegate. Everyone who waits is told of changes.
#[derive(Debug)]
pub struct Pulse(watch::Sender<Health>);

impl Pulse {
    pub fn new() -> Self {
        Self(watch::Sender::new(Health::Unknown))
    }

    pub fn now(&self) -> Health {
        self.0.borrow().clone()
    }

    pub fn changes(&self) -> watch::Receiver<Health> {
        self.0.subscribe()
    }

    /// Records what the result of a call shows.
    pub fn record<T>(&self, name: &str, result: &Result<T, DelegateError>) {
        let shown = match result {
            Ok(_) | Err(DelegateError::Refused(_)) => Health::Up,
            Err(DelegateError::Slow { .. }) => Health::Slow,
            Err(DelegateError::Down { why, .. }) => Health::Down { why: why.clone() },
        };
        self.0.send_if_modified(|health| {
            // The reason may vary while the server is down.
            if std::mem::discriminant(health) == std::mem::discriminant(&shown) {
                return false;
            }
            match &shown {
                Health::Up | Health::Unknown => tracing::info!(delegate = name, "answers"),
                Health::Slow => tracing::warn!(delegate = name, "does not answer in time"),
                Health::Down { why } => tracing::warn!(delegate = name, "is down: {why}"),
            }
            *health = shown;
            true
        });
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use tonic::Status;

    #[test]
    fn an_answer_shows_that_the_server_is_up_even_if_it_refuses() {
        let pulse = Pulse::new();
        let mut changes = pulse.changes();
        let down = |why: &str| {
            Err::<(), _>(DelegateError::Down {
                name: "runc".into(),
                why: why.into(),
            })
        };
        pulse.record("runc", &down("no such file"));
        assert!(changes.has_changed().unwrap());
        changes.borrow_and_update();
        pulse.record("runc", &down("refused"));
        assert!(!changes.has_changed().unwrap(), "still down");
        let refused = DelegateError::Refused(Status::not_found("no such pod"));
        pulse.record("runc", &Err::<(), _>(refused));
        assert!(pulse.now().is_up());
    }
}
