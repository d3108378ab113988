// SPDX-License-Identifier: Apache-2.0
//! Calls to the agent. Each has a time limit, and its answer has a maximum size.
//!
//! There is one HTTP/2 connection to a guest. It is made when it is first needed, and again after it broke, so an
//! adopted guest needs nothing special.

use std::path::PathBuf;
use std::time::Duration;

use bulkhead_faults::{self as faults, Fault, Step};
use bulkhead_proto::agent::agent_client::AgentClient;
use bulkhead_proto::agent::{self as protocol, CONTROL_PORT};
use hyper_util::rt::TokioIo;
use tonic::transport::{Channel, Endpoint};
use tonic::{Code, Response, Status, Streaming};

use crate::connect;
use crate::exit::Exit;
use crate::news::{Clock, News, Told};
use crate::text::bounded;
use crate::user::ProcessUser;

/// The time limit of calls that only read something or change a setting in the guest.
pub(crate) const SHORT: Duration = Duration::from_secs(20);
/// The time limit of calls that mount disks or start programs: longer than the agent's own, which does not count the time
/// in which the VM waits for a CPU, and shorter than kubelet's two minutes.
const LONG: Duration = Duration::from_secs(110);
/// How much longer the host waits for an exec than the time limit that the guest got.
const EXEC_MARGIN: Duration = Duration::from_secs(2);
/// The longest answer to any other call.
const ANSWER_BYTES: usize = 64 << 10;
/// The longest answer with environment files: 1 MiB, and the overhead of protobuf.
const ENVIRONMENT_FILES_BYTES: usize = (1 << 20) + (64 << 10);
/// The longest answer with statistics, for each container and for the guest itself. A real one has 2 KiB at most. The
/// bound is low because a message takes much more memory than its bytes: an entry that is empty takes two of them.
const STATISTICS_BYTES: usize = 8 << 10;
/// How much a guest may send on one call, and on all, before the daemon has taken it. An answer may wait, and a frame of
/// one byte takes some hundred bytes here.
const CALL_WINDOW_BYTES: u32 = 64 << 10;
const WINDOW_BYTES: u32 = 256 << 10;

/// An error of a call to the agent.
#[derive(Debug, thiserror::Error)]
pub enum AgentError {
    /// The agent answered with an error.
    #[error("{message}")]
    Refused { code: Code, message: String },
    #[error("the guest did not answer {call} within {limit:?}")]
    Timeout { call: &'static str, limit: Duration },
    #[error("the guest is lost: {call}: {message}")]
    Lost { call: &'static str, message: String },
    #[error("the guest's answer to {call} is not valid: {what}")]
    Untrusted {
        call: &'static str,
        what: &'static str,
    },
    #[error(transparent)]
    Fault(#[from] Fault),
}

/// The result of starting a container.
#[derive(Debug)]
pub enum Started {
    Running {
        pid: u32,
        started_at: i64,
        user: Option<ProcessUser>,
    },
    /// Its program could not be executed.
    Failed(Exit),
}

impl AgentError {
    /// Whether the guest answered FAILED_PRECONDITION: the container is in another state than the call needs.
    pub fn is_precondition(&self) -> bool {
        let code = match self {
            Self::Refused { code, .. } => Some(*code),
            _ => None,
        };
        code == Some(Code::FailedPrecondition)
    }

    /// Whether the agent is of an earlier version, which does not know the call.
    pub fn is_unknown_call(&self) -> bool {
        matches!(
            self,
            Self::Refused {
                code: Code::Unimplemented,
                ..
            }
        )
    }
}

/// The result of an exec.
#[derive(Debug)]
pub struct ExecOutput {
    pub stdout: Vec<u8>,
    pub stderr: Vec<u8>,
    pub exit_code: i32,
    pub timed_out: bool,
}

/// The client of one guest's agent. Clones share the connection.
#[derive(Clone, Debug)]
pub struct Agent {
    channel: Channel,
}

impl Agent {
    /// A client that connects through the VMM's socket `vsock`.
    pub fn new(vsock: PathBuf) -> Self {
        let connector = tower::service_fn(move |_| {
            let vsock = vsock.clone();
            async move {
                let stream = connect::connect(&vsock, CONTROL_PORT).await?;
                Ok::<_, connect::ConnectError>(TokioIo::new(stream))
            }
        });
        let endpoint = Endpoint::from_static("http://guest")
            .initial_stream_window_size(CALL_WINDOW_BYTES)
            .initial_connection_window_size(WINDOW_BYTES);
        Self {
            channel: endpoint.connect_with_connector_lazy(connector),
        }
    }

    pub(crate) fn client(&self) -> AgentClient<Channel> {
        AgentClient::new(self.channel.clone()).max_decoding_message_size(ANSWER_BYTES)
    }

    pub async fn configure(
        &self,
        request: protocol::ConfigureSandboxRequest,
    ) -> Result<(), AgentError> {
        let mut client = self.client();
        let call = client.configure_sandbox(request);
        done(Step::ConfigureGuest, within("ConfigureSandbox", LONG, call)).await
    }

    /// Sets the guest's clock. Late by what the call takes; [`Self::compare_clocks`] is not, but agents of an earlier
    /// version do not know it.
    pub async fn set_clock(&self, clock_unix_nanoseconds: i64) -> Result<(), AgentError> {
        let request = protocol::SetClockRequest {
            clock_unix_nanoseconds,
        };
        let mut client = self.client();
        within("SetClock", SHORT, client.set_clock(request))
            .await
            .map(drop)
    }

    /// Waits until the agent answers anything, for at most `limit`. Returns whether it did.
    pub async fn answers_within(&self, limit: Duration) -> bool {
        let mut client = self.client();
        let call = client.heartbeat(protocol::HeartbeatRequest {});
        let answer = within("Heartbeat", limit, call).await;
        // An agent of an earlier version refuses the call.
        matches!(answer, Ok(_) | Err(AgentError::Refused { .. }))
    }

    pub async fn create(
        &self,
        request: protocol::CreateContainerRequest,
    ) -> Result<(), AgentError> {
        let mut client = self.client();
        let call = client.create_container(request);
        done(Step::CreateContainer, within("CreateContainer", LONG, call)).await
    }

    pub async fn ensure_volume(&self, volume: protocol::Volume) -> Result<(), AgentError> {
        let request = protocol::EnsureVolumeRequest {
            volume: Some(volume),
        };
        let mut client = self.client();
        let call = client.ensure_volume(request);
        done(Step::MakeVolume, within("EnsureVolume", LONG, call)).await
    }

    pub async fn remove_volume(&self, name: &str) -> Result<(), AgentError> {
        let request = protocol::RemoveVolumeRequest {
            name: name.to_owned(),
        };
        let mut client = self.client();
        let call = client.remove_volume(request);
        done(Step::RemoveVolume, within("RemoveVolume", SHORT, call)).await
    }

    /// Reads at most the last `limit_bytes` of a volume that is a file.
    pub async fn read_volume(&self, name: &str, limit_bytes: u32) -> Result<Vec<u8>, AgentError> {
        const CALL: &str = "ReadVolume";
        let request = protocol::ReadVolumeRequest {
            name: name.to_owned(),
            limit_bytes,
        };
        let mut client = self.client();
        let answer = within(CALL, SHORT, client.read_volume(request)).await?;
        if answer.content.len() > usize::try_from(limit_bytes).unwrap_or(usize::MAX) {
            return Err(AgentError::Untrusted {
                call: CALL,
                what: "more than was asked for",
            });
        }
        Ok(answer.content.into())
    }

    /// Starts a container. The result says whether it runs, or has exited because its program could not be executed.
    pub async fn start(&self, id: &str, clock: Clock) -> Result<Started, AgentError> {
        let request = protocol::StartContainerRequest { id: id.to_owned() };
        let mut client = self.client();
        let call = client.start_container(request);
        let call = within("StartContainer", LONG, call);
        let answer = faults::around(Step::StartContainer, call).await?;
        let Some(status) = answer.status else {
            // An agent of an earlier version sends no status. If a container cannot be started, it answers with an
            // error.
            return Ok(Started::Running {
                pid: answer.pid,
                started_at: clock(),
                user: answer.identity.map(ProcessUser::from),
            });
        };
        let news = News::check(status, clock).filter(|news| news.id == id);
        match news.map(|news| (news.state, news.user)) {
            Some((Told::Running { pid, started_at }, user)) => Ok(Started::Running {
                pid,
                started_at,
                user,
            }),
            Some((Told::Exited(exit), _)) => Ok(Started::Failed(exit)),
            Some((Told::Created, _)) | None => Err(AgentError::Untrusted {
                call: "StartContainer",
                what: "neither a process nor an exit of this container",
            }),
        }
    }

    /// Sends a signal to the first process of a container. It is no error if the container has exited.
    pub async fn signal(&self, id: &str, signal: i32) -> Result<(), AgentError> {
        let request = protocol::SignalContainerRequest {
            id: id.to_owned(),
            signal,
            all: false,
        };
        let mut client = self.client();
        let call = client.signal_container(request);
        let call = within("SignalContainer", SHORT, call);
        match faults::around(Step::SignalContainer, call).await {
            Err(AgentError::Refused {
                code: Code::FailedPrecondition | Code::NotFound,
                ..
            }) => Ok(()),
            answer => answer.map(drop),
        }
    }

    pub async fn remove(&self, id: &str) -> Result<(), AgentError> {
        let request = protocol::RemoveContainerRequest { id: id.to_owned() };
        let mut client = self.client();
        let call = client.remove_container(request);
        done(Step::RemoveContainer, within("RemoveContainer", LONG, call)).await
    }

    pub async fn update(
        &self,
        id: &str,
        resources: protocol::Resources,
        oom_score_adj: Option<i32>,
    ) -> Result<(), AgentError> {
        let request = protocol::UpdateContainerResourcesRequest {
            id: id.to_owned(),
            resources: Some(resources),
            oom_score_adj,
        };
        let mut client = self.client();
        let call = client.update_container_resources(request);
        let call = within("UpdateContainerResources", SHORT, call);
        done(Step::UpdateContainer, call).await
    }

    /// Sets limits for all containers together.
    pub async fn limit(&self, resources: protocol::Resources) -> Result<(), AgentError> {
        let request = protocol::UpdateSandboxResourcesRequest {
            resources: Some(resources),
        };
        let mut client = self.client();
        let call = client.update_sandbox_resources(request);
        let call = within("UpdateSandboxResources", SHORT, call);
        done(Step::LimitGuest, call).await
    }

    /// Gives the guest more memory and CPUs.
    pub async fn size(&self, request: protocol::SizeSandboxRequest) -> Result<(), AgentError> {
        let mut client = self.client();
        // The answer is not used, because what a guest says about its own size cannot be trusted.
        let call = within("SizeSandbox", LONG, client.size_sandbox(request));
        done(Step::GrowGuest, call).await
    }

    /// Reads the guest's statistics, which has so many `containers`. The caller must check them.
    pub async fn statistics(
        &self,
        request: protocol::StatisticsRequest,
        containers: usize,
        limit: Duration,
    ) -> Result<protocol::StatisticsResponse, AgentError> {
        let mut client = AgentClient::new(self.channel.clone())
            .max_decoding_message_size(statistics_bytes(containers));
        within("Statistics", limit, client.statistics(request)).await
    }

    /// Freezes all running containers, which are `ids`. If they are neither thawed nor restored within `lease`, the agent
    /// thaws them.
    pub async fn freeze(&self, ids: Vec<String>, lease: Duration) -> Result<(), AgentError> {
        let request = protocol::FreezeContainersRequest {
            ids,
            lease_milliseconds: u64::try_from(lease.as_millis()).unwrap_or(u64::MAX),
        };
        let mut client = self.client();
        let call = client.freeze_containers(request);
        within("FreezeContainers", SHORT, call).await.map(drop)
    }

    /// Thaws what is frozen, if anything is.
    pub async fn thaw(&self) -> Result<(), AgentError> {
        let mut client = self.client();
        let call = client.thaw_containers(protocol::ThawContainersRequest {});
        within("ThawContainers", SHORT, call).await.map(drop)
    }

    /// Makes a guest that was brought back with frozen containers the guest of another pod.
    pub async fn restore(
        &self,
        request: protocol::RestoreSandboxRequest,
    ) -> Result<(), AgentError> {
        let mut client = self.client();
        let call = client.restore_sandbox(request);
        within("RestoreSandbox", LONG, call).await.map(drop)
    }

    /// Runs a command in a container until it ends. A `limit` of zero means no time limit. Of its standard output, and
    /// also of its standard error, the first `output_bytes` are returned.
    pub async fn exec(
        &self,
        id: &str,
        args: Vec<String>,
        limit: Duration,
        output_bytes: u64,
    ) -> Result<ExecOutput, AgentError> {
        const CALL: &str = "ExecSync";
        let request = protocol::ExecSyncRequest {
            id: id.to_owned(),
            args,
            timeout_milliseconds: i64::try_from(limit.as_millis()).unwrap_or(i64::MAX),
            output_limit_bytes: output_bytes,
        };
        // Both streams, and the overhead of protobuf.
        let most = usize::try_from(output_bytes.saturating_mul(2)).unwrap_or(usize::MAX);
        let mut client = AgentClient::new(self.channel.clone())
            .max_decoding_message_size(most.saturating_add(ANSWER_BYTES));
        let call = client.exec_sync(request);
        faults::before(Step::Exec)?;
        let answer = if limit.is_zero() {
            // No timeout, as CRI defines it. The call ends when the process ends, the guest is lost, or the client
            // gives up.
            call.await.map_err(|e| failed(CALL, &e))?.into_inner()
        } else {
            within(CALL, limit.saturating_add(EXEC_MARGIN), call).await?
        };
        faults::after(Step::Exec)?;
        if !(0..=255).contains(&answer.exit_code) {
            return Err(AgentError::Untrusted {
                call: CALL,
                what: "an exit code out of range",
            });
        }
        Ok(ExecOutput {
            stdout: answer.stdout.into(),
            stderr: answer.stderr.into(),
            exit_code: answer.exit_code,
            timed_out: answer.timed_out,
        })
    }

    /// Reads the environment files of an emptyDir. The caller must check them.
    pub async fn environment_files(
        &self,
        volume: &str,
    ) -> Result<Vec<protocol::EnvironmentFile>, AgentError> {
        let request = protocol::ReadEnvironmentFilesRequest {
            volume: volume.to_owned(),
        };
        let mut client = AgentClient::new(self.channel.clone())
            .max_decoding_message_size(ENVIRONMENT_FILES_BYTES);
        let call = client.read_environment_files(request);
        Ok(within("ReadEnvironmentFiles", SHORT, call).await?.files)
    }

    /// Asks the guest to write back its volumes and power off. The caller should wait for the end of the VMM instead of
    /// the answer.
    pub async fn shutdown(&self, limit: Duration) {
        let mut client = self.client();
        let call = client.shutdown(protocol::ShutdownRequest {});
        // An error is expected, because the VM may end before it answers.
        let _ = within("Shutdown", limit, call).await;
    }

    pub async fn watch(&self) -> Result<Streaming<protocol::WatchEvent>, AgentError> {
        let mut client = self.client();
        within("Watch", SHORT, client.watch(protocol::WatchRequest {})).await
    }
}

/// The longest answer with the statistics of a guest that has so many containers.
fn statistics_bytes(containers: usize) -> usize {
    containers
        .saturating_add(1)
        .saturating_mul(STATISTICS_BYTES)
}

/// Waits for a call that takes or gives back something in the guest. Its answer says nothing more.
async fn done<T>(
    step: Step,
    call: impl Future<Output = Result<T, AgentError>>,
) -> Result<(), AgentError> {
    faults::around(step, call).await.map(drop)
}

pub(crate) async fn within<T>(
    call: &'static str,
    limit: Duration,
    answer: impl Future<Output = Result<Response<T>, Status>>,
) -> Result<T, AgentError> {
    match tokio::time::timeout(limit, answer).await {
        Ok(Ok(response)) => Ok(response.into_inner()),
        Ok(Err(status)) => Err(failed(call, &status)),
        Err(_) => Err(AgentError::Timeout { call, limit }),
    }
}

/// Distinguishes an error that the agent answered from the loss of the connection.
fn failed(call: &'static str, status: &Status) -> AgentError {
    let message = bounded(status.message());
    match status.code() {
        Code::InvalidArgument
        | Code::NotFound
        | Code::AlreadyExists
        | Code::FailedPrecondition
        | Code::ResourceExhausted
        | Code::Internal
        | Code::Unimplemented
        | Code::OutOfRange
        | Code::Aborted
        | Code::PermissionDenied => AgentError::Refused {
            code: status.code(),
            message,
        },
        Code::Ok
        | Code::Cancelled
        | Code::Unknown
        | Code::DeadlineExceeded
        | Code::Unavailable
        | Code::DataLoss
        | Code::Unauthenticated => AgentError::Lost { call, message },
    }
}

#[cfg(test)]
mod tests {
    use prost::Message;

    use super::*;

    /// Every number, name and list as large as an honest agent may send it.
    fn full_statistics() -> protocol::ContainerStatistics {
        let line = protocol::PressureLine {
            avg10: 99.9,
            avg60: 99.9,
            avg300: 99.9,
            total_us: u64::MAX,
        };
        let pressure = Some(protocol::Pressure {
            some: Some(line),
            full: Some(line),
        });
        let device = protocol::DeviceIo {
            major: u32::MAX,
            minor: u32::MAX,
            read_bytes: u64::MAX,
            written_bytes: u64::MAX,
            reads: u64::MAX,
            writes: u64::MAX,
            name: "n".repeat(16),
        };
        let pages = protocol::HugepageUsage {
            page_size: "n".repeat(16),
            current_bytes: u64::MAX,
        };
        protocol::ContainerStatistics {
            id: "ab".repeat(32),
            cgroup: Some(protocol::CgroupStatistics {
                cpu_pressure: pressure,
                memory_pressure: pressure,
                io_pressure: pressure,
                tasks: u64::MAX,
                tasks_limit: u64::MAX,
                io: vec![device; 16],
                hugepages: vec![pages; 8],
                ..Default::default()
            }),
            processes: u64::MAX,
            file_descriptors: u64::MAX,
            sockets: u64::MAX,
            open_files_limit: u64::MAX,
            ..Default::default()
        }
    }

    #[test]
    fn statistics_have_room_for_all_containers_and_take_little_memory_whatever_they_are() {
        // Numbers of CPU and memory, 19 of at most 11 bytes.
        let honest = full_statistics().encoded_len() + 19 * 11;
        assert!(honest < STATISTICS_BYTES / 2, "{honest}");
        for (containers, most_mib) in [(0, 4), (1, 8), (10, 40)] {
            let entries = statistics_bytes(containers) / 2;
            let bytes = entries * size_of::<protocol::ContainerStatistics>();
            assert!(bytes < most_mib << 20, "{containers}: {bytes}");
        }
    }

    #[tokio::test]
    async fn a_guest_that_is_not_there_is_lost_not_a_refusal() {
        let agent = Agent::new("/nonexistent/vsock".into());
        let error = agent.start("x", || 1).await.unwrap_err();
        assert!(matches!(error, AgentError::Lost { .. }), "{error:?}");
    }
}
