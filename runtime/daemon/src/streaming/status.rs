// SPDX-License-Identifier: Apache-2.0
//! How an exec or attach tells the client its result, on the error stream. The v4 and v5 protocols send Kubernetes'
//! `metav1.Status` as JSON; older ones send only its message.

use serde_json::{Value, json};

/// How a session ended.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Ended {
    Exited(i32),
    /// There is no exit code; this text says why.
    Failed(String),
}

impl Ended {
    pub fn status(&self) -> String {
        self.json().to_string()
    }

    /// The message of a failure. `None` after a success.
    pub fn text(&self) -> Option<String> {
        self.json()["message"].as_str().map(str::to_owned)
    }

    fn json(&self) -> Value {
        match self {
            Self::Exited(0) => json!({"metadata": {}, "status": "Success"}),
            Self::Exited(code) => json!({
                "metadata": {},
                "status": "Failure",
                "message": format!("command terminated with non-zero exit code: exit status {code}"),
                "reason": "NonZeroExitCode",
                "details": {"causes": [{"reason": "ExitCode", "message": code.to_string()}]},
            }),
            Self::Failed(why) => json!({
                "metadata": {},
                "status": "Failure",
                "message": format!("Internal error occurred: {why}"),
                "reason": "InternalError",
                "details": {"causes": [{"message": why}]},
                "code": 500,
            }),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn clients_find_the_exit_code_where_they_look_for_it() {
        assert_eq!(Ended::Exited(0).json()["status"], "Success");
        let status = Ended::Exited(3).json();
        assert_eq!(status["reason"], "NonZeroExitCode");
        assert_eq!(status["details"]["causes"][0]["reason"], "ExitCode");
        assert_eq!(status["details"]["causes"][0]["message"], "3");
        assert_eq!(Ended::Exited(0).text(), None);
        assert_eq!(
            Ended::Exited(3).text().unwrap(),
            "command terminated with non-zero exit code: exit status 3"
        );
        let status = Ended::Failed("no such program".into()).json();
        assert_eq!(status["code"], 500);
        assert!(
            status["message"]
                .as_str()
                .unwrap()
                .contains("no such program")
        );
    }
}
