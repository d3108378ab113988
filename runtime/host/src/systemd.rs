// SPDX-License-Identifier: Apache-2.0
//! Transient scopes: the systemd units of VMs, if systemd makes the host's cgroups.
//!
//! Below systemd's slices nobody else may make cgroups. But in a scope with `Delegate=yes` the daemon may. A scope is
//! not part of the daemon's service, so a VM keeps running when that is restarted. Each call makes a new connection, so
//! nothing needs to be repaired after a restart of D-Bus or systemd. The rules are in systemd's `CGROUP_DELEGATION.md`
//! and in org.freedesktop.systemd1(5).

use std::time::Duration;

use futures_util::StreamExt;
use zbus::connection::Builder;
use zbus::{Connection, DynamicType, MatchRule, MessageStream, OwnedObjectPath, Variant, message};

const BUS: &str = "unix:path=/run/dbus/system_bus_socket";
const NAME: &str = "org.freedesktop.systemd1";
const PATH: &str = "/org/freedesktop/systemd1";
const MANAGER: &str = "org.freedesktop.systemd1.Manager";
const NO_SUCH_UNIT: &str = "org.freedesktop.systemd1.NoSuchUnit";
/// How long a call may take, including its job. For comparison: kubelet gives RunPodSandbox four minutes.
const PATIENCE: Duration = Duration::from_secs(20);

/// Why a call to systemd failed.
#[derive(Debug, thiserror::Error)]
pub enum SystemdError {
    #[error(
        "connect to systemd over D-Bus at {BUS} (Debian package dbus); if systemd does not make the cgroups of pods, set \
         cgroup_driver = \"cgroupfs\" in the configuration"
    )]
    Connect(#[source] zbus::Error),
    #[error("systemd: {call} {unit}")]
    Call {
        call: &'static str,
        unit: String,
        source: zbus::Error,
    },
    #[error("systemd did not answer {call} {unit} within {limit:?}")]
    Slow {
        call: &'static str,
        unit: String,
        limit: Duration,
    },
    #[error(
        "systemd: the job of {call} {unit} ended as {result:?}; journalctl --unit {unit} says why"
    )]
    Job {
        call: &'static str,
        unit: String,
        result: String,
    },
    #[error("systemd: the connection ended during {call} {unit}")]
    Closed { call: &'static str, unit: String },
}

/// The scope of one VM.
#[derive(Debug)]
pub struct Scope<'a> {
    pub unit: &'a str,
    /// The name of the slice that it is in.
    pub slice: &'a str,
    pub description: &'a str,
    /// Its CPU weight among the units of the slice, on the scale of cgroup v2.
    pub cpu_weight: u64,
    /// The process that is moved into it.
    pub pid: u32,
}

/// The client of the host's systemd.
#[derive(Clone, Debug)]
pub struct Systemd {
    bus: String,
    patience: Duration,
}

impl Systemd {
    pub fn of_host() -> Self {
        Self {
            bus: BUS.to_owned(),
            patience: PATIENCE,
        }
    }

    /// Makes a scope, with its process in it, and waits until that is done.
    pub async fn start(&self, scope: &Scope<'_>) -> Result<(), SystemdError> {
        let properties = vec![
            ("Description", Variant::from(scope.description)),
            ("Slice", Variant::from(scope.slice)),
            ("Delegate", Variant::from(true)),
            // As in other runtimes: when the node shuts down, kubelet ends the pods, not systemd.
            ("DefaultDependencies", Variant::from(false)),
            ("CollectMode", Variant::from("inactive-or-failed")),
            ("CPUWeight", Variant::from(scope.cpu_weight)),
            ("TasksMax", Variant::from(u64::MAX)),
            ("PIDs", Variant::from(vec![scope.pid])),
        ];
        let auxiliary: Vec<(&str, Vec<(&str, Variant<'_>)>)> = Vec::new();
        let body = (scope.unit, "fail", properties, auxiliary);
        self.job("StartTransientUnit", scope.unit, &body).await
    }

    /// Stops a unit. A unit that does not exist is no error.
    pub async fn stop(&self, unit: &str) -> Result<(), SystemdError> {
        match self.job("StopUnit", unit, &(unit, "replace")).await {
            Err(SystemdError::Call {
                source: zbus::Error::MethodError(name, ..),
                ..
            }) if name.as_str() == NO_SUCH_UNIT => Ok(()),
            done => done,
        }
    }

    pub async fn set_cpu_weight(&self, unit: &str, weight: u64) -> Result<(), SystemdError> {
        const CALL: &str = "SetUnitProperties";
        let body = (unit, true, vec![("CPUWeight", Variant::from(weight))]);
        self.in_time(CALL, unit, async {
            let bus = self.connect().await?;
            call(&bus, CALL, unit, &body).await.map(|_| ())
        })
        .await
    }

    /// Calls a method that starts a job, and waits for the end of the job.
    async fn job<B>(&self, name: &'static str, unit: &str, body: &B) -> Result<(), SystemdError>
    where
        B: serde::Serialize + DynamicType,
    {
        let failed = |source| SystemdError::Call {
            call: name,
            unit: unit.to_owned(),
            source,
        };
        self.in_time(name, unit, async {
            let bus = self.connect().await?;
            let rule = MatchRule::builder()
                .msg_type(message::Type::Signal)
                .path(PATH)
                .interface(MANAGER)
                .member("JobRemoved")
                .arg(2, unit);
            // Accept the signal only from systemd, because others on the bus could send it too.
            let rule = match bus.is_bus() {
                true => rule.sender(NAME),
                false => rule,
            };
            // Subscribe before the call, because the job may end before the answer to the call arrives.
            let rule = rule.build().map_err(failed)?;
            let ends = MessageStream::for_match_rule(rule, &bus, None).await;
            let mut ends = ends.map_err(failed)?;
            let answer = call(&bus, name, unit, body).await?;
            let job: OwnedObjectPath = answer.body().deserialize().map_err(failed)?;
            while let Some(end) = ends.next().await {
                let end = end.map_err(failed)?;
                let body = end.body();
                let (_, ended, _, result): (u32, OwnedObjectPath, &str, &str) =
                    body.deserialize().map_err(failed)?;
                match result {
                    _ if ended != job => {}
                    "done" => return Ok(()),
                    _ => {
                        return Err(SystemdError::Job {
                            call: name,
                            unit: unit.to_owned(),
                            result: result.to_owned(),
                        });
                    }
                }
            }
            Err(SystemdError::Closed {
                call: name,
                unit: unit.to_owned(),
            })
        })
        .await
    }

    async fn in_time<T>(
        &self,
        call: &'static str,
        unit: &str,
        done: impl Future<Output = Result<T, SystemdError>>,
    ) -> Result<T, SystemdError> {
        match tokio::time::timeout(self.patience, done).await {
            Ok(done) => done,
            Err(_) => Err(SystemdError::Slow {
                call,
                unit: unit.to_owned(),
                limit: self.patience,
            }),
        }
    }

    /// Connects over the system bus. systemd's private socket deviates from D-Bus, and zbus refuses it.
    async fn connect(&self) -> Result<Connection, SystemdError> {
        let bus = Builder::address(self.bus.as_str()).build().await;
        bus.map_err(SystemdError::Connect)
    }
}

async fn call<B>(
    bus: &Connection,
    name: &'static str,
    unit: &str,
    body: &B,
) -> Result<message::Message, SystemdError>
where
    B: serde::Serialize + DynamicType,
{
    let answer = bus.call_method(Some(NAME), PATH, Some(MANAGER), name, body);
    answer.await.map_err(|source| SystemdError::Call {
        call: name,
        unit: unit.to_owned(),
        source,
    })
}

#[cfg(test)]
#[path = "systemd_tests.rs"]
pub mod tests;
