// SPDX-License-Identifier: Apache-2.0
//! Makes one text of an error and its causes.

use std::error::Error;
use std::iter::successors;

/// Joins the texts of an error and all its sources with ": ". So no error of ours may repeat its source in its own
/// text.
#[must_use]
pub fn chain(error: &dyn Error) -> String {
    successors(Some(error), |&error| error.source())
        .map(ToString::to_string)
        .collect::<Vec<_>>()
        .join(": ")
}

#[cfg(test)]
mod tests {
    use std::fmt;

    use super::*;

    #[derive(Debug)]
    struct Failed(&'static str, Option<Box<Failed>>);

    impl fmt::Display for Failed {
        fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
            f.write_str(self.0)
        }
    }

    impl Error for Failed {
        fn source(&self) -> Option<&(dyn Error + 'static)> {
            self.1.as_deref().map(|cause| cause as _)
        }
    }

    #[test]
    fn causes_follow_the_error_that_they_caused() {
        let cause = Failed("no such file", None);
        let error = Failed("open the image", Some(Box::new(cause)));
        assert_eq!(chain(&error), "open the image: no such file");
    }
}
