// SPDX-License-Identifier: Apache-2.0
//! How many pods boot at a time, and whose turn it is.
//!
//! A boot needs CPU from the first CNI plugin to the last step of the guest. If twice as many pods boot at once, each
//! boot takes twice as long. In the end callers time out and ask again, and the host only starts boots that never
//! finish. So each boot waits for a [`Turn`], first come, first served. [`Admission::turn`] is awaited in the caller's
//! own task, and the waiting pod holds nothing but its name (and, if it is brought back, the files that it is to be
//! brought back from). A caller that goes away drops the future and so leaves the queue.
//!
//! What was begun comes first: while as many containers are made or started as may boot at a time, no boot begins. Else the
//! containers of pods that are ready would share the CPU with all boots that follow, and their callers, who wait for a shorter
//! time, would give up.
//!
//! Network teardowns have a queue of their own, the lane. So a stop never waits behind boots, and a boot that failed
//! can undo what it did.

use std::sync::Arc;
use std::time::Duration;

use tokio::sync::{OwnedSemaphorePermit, Semaphore, SemaphorePermit, watch};
use tokio::task::JoinHandle;
use tokio::time::Instant;

/// How long one boot, or one container, may keep others waiting; then the next one starts beside it. A boot that takes
/// longer is not waiting for the CPU that turns ration, but for something else (a plugin that hangs, a cgroup that
/// others starve). Or the machine is so slow that a second boot makes no difference.
pub const TURN: Duration = Duration::from_secs(20);
/// At most this part of the caller's time limit is spent in the queue; the rest is for the boot. kubelet waits four
/// minutes, so a pod is in the queue for at most three.
const QUEUE_SIXTEENTHS: u32 = 12;
/// After this part of the caller's time limit a boot is given up, early enough for the caller to learn why. With
/// kubelet's four minutes that is 15 s before the end.
const BOOT_SIXTEENTHS: u32 = 15;

/// The turn did not come in time.
#[derive(Debug, thiserror::Error)]
#[error(
    "it waited {waited:.0?} for its turn: {ahead} pods were before it, {parallel} boot at a time (sandbox.parallel_boots)"
)]
pub struct NoTurn {
    waited: Duration,
    ahead: usize,
    parallel: usize,
}

/// How long the caller waits for its pod. A `limit` of `None` means for ever.
#[derive(Clone, Copy, Debug)]
pub struct Patience {
    since: Instant,
    limit: Option<Duration>,
}

impl Patience {
    /// The limit counts from now on.
    pub fn new(limit: Option<Duration>) -> Self {
        Self {
            since: Instant::now(),
            limit,
        }
    }

    /// The half of the time that is left.
    pub fn half(&self) -> Self {
        let left = |limit: Duration| limit.saturating_sub(self.since.elapsed()) / 2;
        Self::new(self.limit.map(left))
    }

    fn turn_until(&self) -> Option<Instant> {
        Some(self.since + self.limit? / 16 * QUEUE_SIXTEENTHS)
    }

    /// When the boot is given up. For a caller that waits for ever, that is `otherwise` from now.
    pub fn boot_until(&self, otherwise: Duration) -> Instant {
        match self.limit {
            Some(limit) => self.since + limit / 16 * BOOT_SIXTEENTHS,
            None => Instant::now() + otherwise,
        }
    }
}

/// Limits how many pods boot, tear down their network or check it at a time.
#[derive(Debug)]
pub struct Admission {
    boots: Arc<Semaphore>,
    parallel: usize,
    /// How many boots wait or have their turn.
    asked: watch::Sender<usize>,
    /// How many containers are being made or started.
    containers: watch::Sender<usize>,
    turn: Duration,
    teardowns: Semaphore,
    checks: Semaphore,
}

/// The right to boot. It ends when it is dropped, or when [`Admission`]'s time limit for a turn is over.
#[derive(Debug)]
#[must_use]
pub struct Turn {
    holder: JoinHandle<()>,
    pub patience: Patience,
    pub waited: Duration,
    /// How many boots had asked earlier and were not done.
    pub ahead: usize,
}

impl Drop for Turn {
    fn drop(&mut self) {
        self.holder.abort();
    }
}

/// A container that is being made or started. Boots wait for it until this is dropped, or [`Admission`]'s time limit for a
/// turn is over.
#[derive(Debug)]
#[must_use]
pub struct Work(JoinHandle<()>);

impl Drop for Work {
    fn drop(&mut self) {
        self.0.abort();
    }
}

/// Counts one in a counter, for as long as it lives.
#[derive(Debug)]
struct Counted(watch::Sender<usize>);

impl Counted {
    /// Also returns what was counted before.
    fn new(counter: &watch::Sender<usize>) -> (Self, usize) {
        let mut before = 0;
        counter.send_modify(|count| {
            before = *count;
            *count += 1;
        });
        (Self(counter.clone()), before)
    }
}

impl Drop for Counted {
    fn drop(&mut self) {
        self.0.send_modify(|count| *count -= 1);
    }
}

impl Admission {
    /// `parallel` boots at a time, each for `turn` at most.
    pub fn new(parallel: usize, turn: Duration) -> Self {
        Self {
            boots: Arc::new(Semaphore::new(parallel)),
            parallel,
            asked: watch::Sender::new(0),
            containers: watch::Sender::new(0),
            turn,
            teardowns: Semaphore::new(parallel),
            checks: Semaphore::new(1),
        }
    }

    pub fn parallel(&self) -> usize {
        self.parallel
    }

    /// Waits for a turn, in the order of asking.
    pub async fn turn(&self, patience: Patience) -> Result<Turn, NoTurn> {
        let started = Instant::now();
        let (asked, ahead) = Counted::new(&self.asked);
        let permit = Arc::clone(&self.boots).acquire_owned();
        let permit = match patience.turn_until() {
            Some(until) => tokio::time::timeout_at(until, permit).await.ok(),
            None => Some(permit.await),
        };
        // The semaphore is never closed.
        let Some(Ok(permit)) = permit else {
            return Err(NoTurn {
                waited: started.elapsed(),
                ahead,
                parallel: self.parallel,
            });
        };
        let mut containers = self.containers.subscribe();
        let fewer = containers.wait_for(|count| *count < self.parallel);
        // Containers that are started again and again keep nobody from booting, nor does this take time from the boot.
        let longest = Instant::now() + self.turn;
        let until = patience
            .turn_until()
            .map_or(longest, |until| until.min(longest));
        let _ = tokio::time::timeout_at(until, fewer).await;
        Ok(Turn {
            holder: tokio::spawn(hold(permit, asked, self.turn)),
            patience,
            waited: started.elapsed(),
            ahead,
        })
    }

    /// Call this while a container is made or started: boots wait for it.
    pub fn container(&self) -> Work {
        let (counted, _) = Counted::new(&self.containers);
        let turn = self.turn;
        Work(tokio::spawn(async move {
            let _counted = counted;
            tokio::time::sleep(turn).await;
        }))
    }

    /// Whether no pod boots or waits for its turn, and no container is made or started.
    pub fn is_quiet(&self) -> bool {
        *self.asked.borrow() == 0 && *self.containers.borrow() == 0
    }

    /// Waits until it is quiet.
    pub async fn quiet(&self) {
        while !self.is_quiet() {
            for counter in [&self.asked, &self.containers] {
                // The sender lives as long as this, so there is no error.
                let _ = counter.subscribe().wait_for(|count| *count == 0).await;
            }
        }
    }

    /// Waits until a network may be torn down.
    pub async fn teardown(&self) -> Option<SemaphorePermit<'_>> {
        self.teardowns.acquire().await.ok()
    }

    /// Waits until a network may be checked. Checks run one at a time: no caller waits for their result.
    pub async fn check(&self) -> Option<SemaphorePermit<'_>> {
        self.checks.acquire().await.ok()
    }
}

async fn hold(_permit: OwnedSemaphorePermit, _asked: Counted, turn: Duration) {
    tokio::time::sleep(turn).await;
    tracing::info!("a boot has taken {turn:?}; the next one starts beside it");
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::Mutex;
    use std::sync::atomic::{AtomicUsize, Ordering};

    /// Longer than any test.
    const LONG: Duration = Duration::from_secs(100);

    fn for_ever() -> Patience {
        Patience::new(None)
    }

    /// Lets every task run until it waits for something.
    async fn settle() {
        for _ in 0..50 {
            tokio::task::yield_now().await;
        }
    }

    #[tokio::test]
    async fn turns_come_in_the_order_of_asking_and_never_more_than_may_at_once() {
        let admission = Arc::new(Admission::new(2, LONG));
        let order = Arc::new(Mutex::new(Vec::new()));
        let (at_once, most) = (Arc::new(AtomicUsize::new(0)), Arc::new(AtomicUsize::new(0)));
        let mut boots = Vec::new();
        for number in 0..20 {
            let (admission, order) = (Arc::clone(&admission), Arc::clone(&order));
            let (at_once, most) = (Arc::clone(&at_once), Arc::clone(&most));
            boots.push(tokio::spawn(async move {
                let turn = admission.turn(for_ever()).await.unwrap();
                order.lock().unwrap().push((number, turn.ahead));
                let now = at_once.fetch_add(1, Ordering::Relaxed) + 1;
                most.fetch_max(now, Ordering::Relaxed);
                settle().await;
                at_once.fetch_sub(1, Ordering::Relaxed);
            }));
            // This boot asks before the next one is spawned.
            tokio::task::yield_now().await;
        }
        for boot in boots {
            boot.await.unwrap();
        }
        let order = order.lock().unwrap();
        let numbers: Vec<_> = order.iter().map(|(number, _)| *number).collect();
        assert_eq!(numbers, (0..20).collect::<Vec<_>>());
        assert!(order.iter().all(|(number, ahead)| ahead <= number));
        assert_eq!(order[0].1, 0);
        assert_eq!(most.load(Ordering::Relaxed), 2);
    }

    #[tokio::test]
    async fn who_leaves_the_queue_holds_nobody_up() {
        let admission = Arc::new(Admission::new(1, LONG));
        let first = admission.turn(for_ever()).await.unwrap();
        let wait = |admission: Arc<Admission>| {
            tokio::spawn(async move { admission.turn(for_ever()).await.map(|turn| turn.ahead) })
        };
        let leaver = wait(Arc::clone(&admission));
        settle().await;
        let stayer = wait(Arc::clone(&admission));
        settle().await;
        leaver.abort();
        assert!(leaver.await.unwrap_err().is_cancelled());
        assert!(!stayer.is_finished());
        drop(first);
        assert_eq!(stayer.await.unwrap().unwrap(), 2);
        settle().await;
        assert!(admission.is_quiet());
    }

    #[tokio::test]
    async fn a_turn_that_does_not_come_in_time_says_what_it_waited_for() {
        let admission = Admission::new(1, LONG);
        let _first = admission.turn(for_ever()).await.unwrap();
        let patience = Patience::new(Some(Duration::from_millis(32)));
        let late = admission.turn(patience).await.unwrap_err();
        assert!(late.waited >= Duration::from_millis(24), "{late:?}");
        let text = late.to_string();
        assert!(
            text.contains("1 pods were before it, 1 boot at a time"),
            "{text}"
        );
        assert_eq!(*admission.asked.borrow(), 1);
    }

    #[tokio::test]
    async fn a_boot_that_takes_too_long_lets_the_next_one_begin() {
        let admission = Admission::new(1, Duration::from_millis(10));
        let _first = admission.turn(for_ever()).await.unwrap();
        let second = admission.turn(for_ever()).await.unwrap();
        assert!(second.waited >= Duration::from_millis(5), "{second:?}");
    }

    #[tokio::test]
    async fn containers_come_before_the_next_boot_but_not_for_ever() {
        let admission = Arc::new(Admission::new(2, LONG));
        let ask = |admission: &Arc<Admission>| {
            let admission = Arc::clone(admission);
            tokio::spawn(async move { admission.turn(for_ever()).await.map(drop) })
        };
        let one = admission.container();
        ask(&admission).await.unwrap().unwrap();
        let two = admission.container();
        let waits = ask(&admission);
        settle().await;
        assert!(!waits.is_finished(), "as many containers as may boot");
        drop(one);
        waits.await.unwrap().unwrap();
        drop(two);
        settle().await;
        assert_eq!(*admission.containers.borrow(), 0);
        // As long as there is one, whichever.
        let hasty = Arc::new(Admission::new(1, Duration::from_millis(20)));
        let other = Arc::clone(&hasty);
        let again = tokio::spawn(async move {
            let mut last = other.container();
            loop {
                tokio::time::sleep(Duration::from_millis(5)).await;
                drop(std::mem::replace(&mut last, other.container()));
            }
        });
        settle().await;
        ask(&hasty).await.unwrap().unwrap();
        again.abort();
    }

    #[tokio::test]
    async fn it_is_quiet_when_nobody_boots_or_waits_and_no_container_is_made() {
        let admission = Arc::new(Admission::new(1, LONG));
        admission.quiet().await;
        let turn = admission.turn(for_ever()).await.unwrap();
        let waiter = Arc::clone(&admission);
        let quiet = tokio::spawn(async move { waiter.quiet().await });
        settle().await;
        assert!(!admission.is_quiet() && !quiet.is_finished());
        let container = admission.container();
        drop(turn);
        settle().await;
        assert!(!admission.is_quiet() && !quiet.is_finished());
        drop(container);
        quiet.await.unwrap();
    }

    #[tokio::test]
    async fn a_network_is_taken_down_while_boots_wait() {
        let admission = Admission::new(1, LONG);
        let _boot = admission.turn(for_ever()).await.unwrap();
        let down = admission.teardown().await.unwrap();
        let second = tokio::time::timeout(Duration::from_millis(10), admission.teardown());
        assert!(second.await.is_err(), "as many at a time as boots");
        drop(down);
        assert!(admission.teardown().await.is_some());
    }

    #[tokio::test]
    async fn kubelets_four_minutes_are_three_in_the_queue_and_most_of_one_to_boot() {
        let patience = Patience::new(Some(Duration::from_secs(240)));
        let turn = patience.turn_until().unwrap() - patience.since;
        let boot = patience.boot_until(LONG) - patience.since;
        assert_eq!((turn.as_secs(), boot.as_secs()), (180, 225));
        assert_eq!(for_ever().turn_until(), None);
        assert!(for_ever().boot_until(LONG) > Instant::now() + LONG / 2);
    }
}
