// SPDX-License-Identifier: Apache-2.0
//! Checks the CRI servers to which pods are delegated.

use bulkhead_delegate::{Delegate, Health, Limits};
use bulkhead_text::Problem;

use crate::config::Runtimes;

/// Asks each delegate for its status. The first that cannot serve pods is the problem.
pub async fn ready(runtimes: &Runtimes) -> Result<String, Problem> {
    let mut found = Vec::new();
    for (name, config) in &runtimes.delegates {
        let delegate = Delegate::new(name, &config.socket, Limits::default());
        let report = delegate.examine().await;
        let socket = config.socket.display();
        let why = match (delegate.health(), &report.refusal, report.unready()) {
            (Health::Up, None, None) => {
                found.push(format!("{name} is {}", report.runtime));
                continue;
            }
            (Health::Up, Some(why), _) => format!("{socket} refuses: {why}"),
            (Health::Up, None, Some(unready)) => {
                format!("{} is false: {}", unready.r#type, unready.message)
            }
            (Health::Down { why }, ..) => format!("{socket} does not answer: {why}"),
            (Health::Slow | Health::Unknown, ..) => format!("{socket} does not answer in time"),
        };
        return Err(Problem::new(
            format!("the delegate {name}: {why}"),
            format!("start that CRI server, or correct [runtimes.{name}]"),
        ));
    }
    Ok(found.join(", "))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::{DelegateConfig, Handler};
    use bulkhead_delegate::fake::Fake;

    #[tokio::test]
    async fn a_delegate_that_does_not_answer_is_named_with_what_to_do() {
        let directory = tempfile::tempdir().unwrap();
        let socket = directory.path().join("cri.sock");
        let config = DelegateConfig {
            socket: socket.clone(),
            handler: String::new(),
        };
        let runtimes = Runtimes {
            default: Handler::Bulkhead,
            host_namespaces: None,
            delegates: [("runc".to_owned(), config)].into(),
        };
        let problem = ready(&runtimes).await.unwrap_err();
        assert!(problem.cause.contains("runc"), "{}", problem.cause);
        assert!(problem.remedy.contains("[runtimes.runc]"));
        let _running = Fake::new("fake").serve(&socket);
        assert_eq!(ready(&runtimes).await.unwrap(), "runc is fake 1");
    }
}
