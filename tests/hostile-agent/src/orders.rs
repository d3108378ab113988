// SPDX-License-Identifier: Apache-2.0
//! What a test has ordered, by the words of an `ExecSync`: `news KIND`, `statistics KIND`, `control KIND SECONDS`,
//! `exec KIND`, `devices KIND`, `ready flood`, `deaf`, `calm`.

use std::sync::Mutex;
use std::time::{Duration, Instant};

use tokio::sync::{Notify, watch};

use crate::containers::Containers;
use crate::devices::{self, Device};
use crate::lies::{Figures, News};
use crate::lock;
use crate::wire::Wire;

/// All orders, and the containers that the daemon believes in.
#[derive(Debug)]
pub struct Orders {
    pub containers: Containers,
    /// What comes as news. Also changed when a container changes.
    pub news: watch::Sender<News>,
    pub figures: Mutex<Figures>,
    control: Mutex<Option<(Wire, Instant)>>,
    pub control_changed: Notify,
    /// The connection that says that the guest is ready is to be flooded.
    pub ready: Notify,
    /// Connections to the port of streams are not accepted any more.
    pub deaf: Mutex<bool>,
}

impl Default for Orders {
    fn default() -> Self {
        Self {
            containers: Containers::default(),
            news: watch::Sender::new(News::True),
            figures: Mutex::new(Figures::Plain),
            control: Mutex::new(None),
            control_changed: Notify::new(),
            ready: Notify::new(),
            deaf: Mutex::new(false),
        }
    }
}

impl Orders {
    /// Carries an order out. `None` if there is no such order.
    pub fn give(&self, words: &[&str]) -> Option<()> {
        match *words {
            ["news", kind] => drop(self.news.send_replace(News::parse(kind)?)),
            ["statistics", kind] => *lock(&self.figures) = Figures::parse(kind)?,
            ["control", kind, seconds] => {
                let until = Instant::now() + Duration::from_secs(seconds.parse().ok()?);
                *lock(&self.control) = Some((Wire::parse(kind)?, until));
                self.control_changed.notify_one();
            }
            ["devices", kind] => devices::attack(Device::parse(kind)?),
            ["ready", "flood"] => self.ready.notify_one(),
            ["deaf"] => *lock(&self.deaf) = true,
            ["calm"] => {
                self.news.send_replace(News::True);
                *lock(&self.figures) = Figures::Plain;
                *lock(&self.deaf) = false;
                devices::calm();
            }
            _ => return None,
        }
        Some(())
    }

    /// What is spoken on the control port now, if not the protocol, and until when.
    pub fn control(&self) -> Option<(Wire, Instant)> {
        let ordered = *lock(&self.control);
        ordered.filter(|(_, until)| Instant::now() < *until)
    }

    /// Tells the daemon of changed containers.
    pub fn tell(&self) {
        self.news.send_modify(|_| {});
    }
}
