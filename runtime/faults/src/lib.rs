// SPDX-License-Identifier: Apache-2.0
//! The points at which a test can kill the daemon or make it fail: before and after each [`Step`].
//!
//! A step is something that is taken, given back or recorded. Without the feature `injected` a point does nothing and
//! cannot fail, because there is no value of [`Fault`]. With it, points look into a directory (`plan.rs`) and do what the
//! test has put there. Own code and not a library, because a test must be able to list all points, and to choose one of
//! a daemon that runs already.

#![forbid(unsafe_code)]

#[cfg(feature = "injected")]
mod plan;
mod step;

use std::future::Future;

#[cfg(feature = "injected")]
pub use plan::{all, arm};
pub use step::Step;

/// A failure that a test asked for.
#[cfg(feature = "injected")]
#[derive(Debug, thiserror::Error)]
#[error("a test made {0} fail")]
pub struct Fault(String);

/// A failure that a test asked for. There is none in a program without the feature.
#[cfg(not(feature = "injected"))]
#[derive(Debug, thiserror::Error)]
pub enum Fault {}

impl From<Fault> for std::io::Error {
    fn from(fault: Fault) -> Self {
        Self::other(fault)
    }
}

/// On which side of a step a point is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Side {
    Before,
    After,
}

/// The point before a step.
pub fn before(step: Step) -> Result<(), Fault> {
    point(step, Side::Before)
}

/// The point after a step.
pub fn after(step: Step) -> Result<(), Fault> {
    point(step, Side::After)
}

/// Does a step between its two points.
pub fn within<T, E: From<Fault>>(step: Step, work: impl FnOnce() -> Result<T, E>) -> Result<T, E> {
    before(step)?;
    let done = work()?;
    after(step)?;
    Ok(done)
}

/// Does an asynchronous step between its two points.
pub async fn around<T, E: From<Fault>>(
    step: Step,
    work: impl Future<Output = Result<T, E>>,
) -> Result<T, E> {
    before(step)?;
    let done = work.await?;
    after(step)?;
    Ok(done)
}

#[cfg(feature = "injected")]
fn point(step: Step, side: Side) -> Result<(), Fault> {
    plan::pass(step, side)
}

#[cfg(not(feature = "injected"))]
#[inline]
fn point(_: Step, _: Side) -> Result<(), Fault> {
    Ok(())
}
