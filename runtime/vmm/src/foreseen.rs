// SPDX-License-Identifier: Apache-2.0
//! Which pages of its template's memory a fork is expected to use first, because another fork of that template did. Pure.
//!
//! The parent looks at a fork and tells later ones. Their VMMs copy and map these pages before the guest runs
//! ([`crate::memory::ahead`]), each of which would be a VM exit otherwise. A page that is missing here costs that exit.

use serde::{Deserialize, Serialize};

/// The unit in which the host maps memory.
pub const PAGE_BYTES: u64 = 4096;
/// Each of these pages takes memory of its own in every fork.
pub const MOST_WRITTEN_PAGES: u64 = 4096;
/// So that a configuration is shorter than a pipe is long.
pub const MOST_WRITTEN_RUNS: usize = 1024;
pub const MOST_READ_RUNS: usize = 2048;

/// Consecutive pages, numbered by their places in the file of the template's memory. Written as `[first, count]`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(from = "(u64, u64)", into = "(u64, u64)")]
pub struct Run {
    pub first: u64,
    pub count: u64,
}

/// The pages in ascending order.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Foreseen {
    pub written: Vec<Run>,
    /// Without those that are written, too.
    pub read: Vec<Run>,
}

/// Why pages are not accepted.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
pub enum ForeseenError {
    #[error("there are {found} runs of pages to be {what}, at most {most} are possible")]
    Runs {
        what: &'static str,
        found: usize,
        most: usize,
    },
    #[error("{found} pages are to be written, at most {MOST_WRITTEN_PAGES} are possible")]
    Pages { found: u64 },
    #[error(
        "{count} pages from page {first} on are none, in no order, or not in the template's {pages} pages"
    )]
    Place { first: u64, count: u64, pages: u64 },
}

impl From<(u64, u64)> for Run {
    fn from((first, count): (u64, u64)) -> Self {
        Self { first, count }
    }
}

impl From<Run> for (u64, u64) {
    fn from(run: Run) -> Self {
        (run.first, run.count)
    }
}

impl Run {
    /// The page behind the last one. `None` if no number says it.
    fn end(self) -> Option<u64> {
        self.first.checked_add(self.count)
    }
}

/// The runs of pages that are given in ascending order.
#[must_use]
pub fn runs(pages: impl IntoIterator<Item = u64>) -> Vec<Run> {
    let mut runs = Vec::<Run>::new();
    for page in pages {
        match runs.last_mut() {
            Some(last) if last.end() == Some(page) => last.count += 1,
            _ => runs.push(Run {
                first: page,
                count: 1,
            }),
        }
    }
    runs
}

/// How many pages these are.
#[must_use]
pub fn count(runs: &[Run]) -> u64 {
    let counts = runs.iter().map(|run| run.count);
    counts.fold(0, u64::saturating_add)
}

impl Foreseen {
    /// Checks that all are among a template's first `pages`, and not too many.
    pub fn check(&self, pages: u64) -> Result<(), ForeseenError> {
        for (what, runs, most) in [
            ("written", &self.written, MOST_WRITTEN_RUNS),
            ("read", &self.read, MOST_READ_RUNS),
        ] {
            let found = runs.len();
            if found > most {
                return Err(ForeseenError::Runs { what, found, most });
            }
            let mut behind = 0;
            for run in runs {
                let Run { first, count } = *run;
                let end = run.end().filter(|end| *end <= pages);
                let end = end.filter(|_| count > 0 && first >= behind);
                behind = end.ok_or(ForeseenError::Place {
                    first,
                    count,
                    pages,
                })?;
            }
        }
        match count(&self.written) {
            found if found > MOST_WRITTEN_PAGES => Err(ForeseenError::Pages { found }),
            _ => Ok(()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn all(runs: &[(u64, u64)]) -> Vec<Run> {
        runs.iter().copied().map(Run::from).collect()
    }

    #[test]
    fn neighbours_are_one_run() {
        assert_eq!(runs([]), []);
        assert_eq!(
            runs([0, 1, 2, 5, 7, 8, u64::MAX]),
            all(&[(0, 3), (5, 1), (7, 2), (u64::MAX, 1)])
        );
        assert_eq!(count(&all(&[(0, 3), (7, 2)])), 5);
    }

    #[test]
    fn what_is_not_in_the_template_or_in_no_order_is_refused() {
        let check = |runs: &[(u64, u64)]| {
            let [written, read] = [all(runs), all(runs)];
            let [one, other] = [(written, Vec::new()), (Vec::new(), read)]
                .map(|(written, read)| Foreseen { written, read }.check(100));
            assert_eq!(one, other, "{runs:?}");
            one
        };
        for good in [&[][..], &[(0, 100)], &[(0, 1), (1, 1), (99, 1)]] {
            assert_eq!(check(good), Ok(()), "{good:?}");
        }
        for (wrong, first, count) in [
            (&[(0, 101)][..], 0, 101),
            (&[(100, 1)], 100, 1),
            (&[(3, 0)], 3, 0),
            (&[(u64::MAX, 1)], u64::MAX, 1),
            (&[(1, u64::MAX)], 1, u64::MAX),
            (&[(5, 2), (6, 1)], 6, 1),
            (&[(5, 2), (2, 1)], 2, 1),
        ] {
            let pages = 100;
            let expected = ForeseenError::Place {
                first,
                count,
                pages,
            };
            assert_eq!(check(wrong), Err(expected), "{wrong:?}");
        }
    }

    #[test]
    fn there_are_bounds() {
        let single = |count: usize| runs((0..count as u64).map(|number| number * 2));
        let check = |written, read| Foreseen { written, read }.check(u64::MAX);
        let none = Vec::new;
        assert_eq!(
            check(single(MOST_WRITTEN_RUNS), single(MOST_READ_RUNS)),
            Ok(())
        );
        let [one, other] = [MOST_WRITTEN_RUNS, MOST_READ_RUNS].map(|most| single(most + 1));
        assert!(matches!(
            check(one, none()),
            Err(ForeseenError::Runs {
                what: "written",
                ..
            })
        ));
        assert!(matches!(
            check(none(), other),
            Err(ForeseenError::Runs { what: "read", .. })
        ));
        let [most, more] = [0, 1].map(|more| all(&[(0, MOST_WRITTEN_PAGES + more)]));
        assert_eq!(check(most, more.clone()), Ok(()));
        let found = MOST_WRITTEN_PAGES + 1;
        assert_eq!(check(more, none()), Err(ForeseenError::Pages { found }));
    }

    #[test]
    fn the_longest_is_shorter_than_a_pipe() {
        let far = |count: u64| all(&vec![(1 << 28, 4096); usize::try_from(count).unwrap()]);
        let longest = Foreseen {
            written: far(MOST_WRITTEN_RUNS as u64),
            read: far(MOST_READ_RUNS as u64),
        };
        let text = serde_json::to_string(&longest).unwrap();
        assert!(
            text.starts_with("{\"written\":[[268435456,4096],["),
            "{}",
            &text[..40]
        );
        assert!(text.len() < 60 << 10, "{}", text.len());
        assert_eq!(serde_json::from_str::<Foreseen>(&text).unwrap(), longest);
    }
}
