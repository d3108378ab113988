// SPDX-License-Identifier: Apache-2.0
//! The daemon's file descriptors: their limit, and how many are left.
//!
//! What takes descriptors for long (pods, containers, streams) is refused while only [`RESERVE`] are left. So kubelet can
//! still connect, list, stop and remove.

use std::error::Error;
use std::io;

use rustix::io::Errno;
use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};

/// These are kept for calls that take some for a moment: connections of CRI, CNI plugins and their pipes, files of
/// records, images that are pulled.
pub const RESERVE: usize = 256;
/// If the limit is lower, the daemon says so at its start: a node of 110 pods with two containers each needs this many.
const FEW: usize = 4096;

/// Too few descriptors are left.
#[derive(Debug, thiserror::Error)]
#[error(
    "the daemon has {open} of at most {limit} file descriptors open, and {RESERVE} are kept for stops and removals: \
     raise its limit of open files (LimitNOFILE in systemd's unit)"
)]
pub struct TooFew {
    open: usize,
    limit: usize,
}

/// Raises the limit as far as the kernel lets this process. A low limit and a failure are logged.
pub fn raise_limit() {
    let maximum = getrlimit(Resource::Nofile).maximum;
    let raised = Rlimit {
        current: maximum,
        maximum,
    };
    if let Err(error) = setrlimit(Resource::Nofile, raised) {
        tracing::warn!("the limit of open files cannot be raised: {error}");
    }
    let limit = limit();
    if limit < FEW {
        tracing::warn!(
            "at most {limit} files can be open: too few for a full node; raise the limit (LimitNOFILE in systemd's unit)"
        );
    }
}

/// Refuses what would take `wanted` descriptors of the reserve.
pub fn check(wanted: usize) -> Result<(), TooFew> {
    let Some(open) = open() else {
        // /proc cannot be read. Most likely no descriptor is left for it.
        let limit = limit();
        return Err(TooFew { open: limit, limit });
    };
    fits(open, wanted, limit())
}

fn fits(open: usize, wanted: usize, limit: usize) -> Result<(), TooFew> {
    if open.saturating_add(wanted).saturating_add(RESERVE) <= limit {
        return Ok(());
    }
    Err(TooFew { open, limit })
}

fn limit() -> usize {
    let current = getrlimit(Resource::Nofile).current;
    current.map_or(usize::MAX, |limit| {
        usize::try_from(limit).unwrap_or(usize::MAX)
    })
}

fn open() -> Option<usize> {
    Some(std::fs::read_dir("/proc/self/fd").ok()?.count())
}

/// Whether an error, or what caused it, is that no descriptor was left.
pub fn ran_out(error: &(dyn Error + 'static)) -> bool {
    let mut next = Some(error);
    while let Some(error) = next {
        let io = error.downcast_ref::<io::Error>();
        let code = io.and_then(io::Error::raw_os_error);
        let errno = error
            .downcast_ref::<Errno>()
            .map(|errno| errno.raw_os_error());
        let out = [Errno::MFILE, Errno::NFILE].map(Errno::raw_os_error);
        if code.or(errno).is_some_and(|code| out.contains(&code)) {
            return true;
        }
        next = error.source();
    }
    false
}

#[cfg(test)]
mod tests {
    use super::*;

    #[derive(Debug, thiserror::Error)]
    #[error("outer")]
    struct Outer(#[from] io::Error);

    #[test]
    fn the_reserve_is_for_nobody_who_stays() {
        assert!(fits(100, 10, 110 + RESERVE).is_ok());
        let words = fits(101, 10, 110 + RESERVE).unwrap_err().to_string();
        assert!(
            words.contains("101 of at most 366") && words.contains("LimitNOFILE"),
            "{words}"
        );
        assert!(fits(usize::MAX, 1, usize::MAX).is_ok(), "no limit");
    }

    #[test]
    fn this_process_has_descriptors_and_a_limit() {
        assert!(open().unwrap() >= 3);
        assert!(limit() > 3);
    }

    #[test]
    fn a_limit_that_was_reached_is_recognized_wherever_it_hides() {
        let of = |errno: Errno| Outer(errno.into());
        assert!(ran_out(&of(Errno::MFILE)));
        assert!(ran_out(&of(Errno::NFILE)));
        assert!(ran_out(&Errno::MFILE));
        assert!(!ran_out(&of(Errno::NOSPC)));
    }
}
