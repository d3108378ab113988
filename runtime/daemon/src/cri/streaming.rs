// SPDX-License-Identifier: Apache-2.0
//! RPCs whose answer is the URL of a stream: exec, attach and port-forward.

use bulkhead_proto::cri;
use tonic::Status;

use crate::pod::Pods;
use crate::streaming::Streaming;
use crate::streaming::tokens::{Request, Streams};

pub fn exec(
    pods: &Pods,
    streaming: &Streaming,
    request: cri::ExecRequest,
) -> Result<cri::ExecResponse, Status> {
    if request.cmd.is_empty() {
        return Err(Status::invalid_argument(
            "the command to execute is missing",
        ));
    }
    let streams = streams(request.stdin, request.stdout, request.stderr, request.tty)?;
    let (record, _) = pods.running(&request.container_id, "exec")?;
    let url = url(
        streaming,
        Request::Exec {
            container: record.id,
            args: request.cmd,
            streams,
        },
    )?;
    Ok(cri::ExecResponse { url })
}

pub fn attach(
    pods: &Pods,
    streaming: &Streaming,
    request: cri::AttachRequest,
) -> Result<cri::AttachResponse, Status> {
    let streams = streams(request.stdin, request.stdout, request.stderr, request.tty)?;
    let (record, _) = pods.running(&request.container_id, "attach")?;
    let url = url(
        streaming,
        Request::Attach {
            container: record.id,
            streams,
        },
    )?;
    Ok(cri::AttachResponse { url })
}

pub fn port_forward(
    pods: &Pods,
    streaming: &Streaming,
    request: cri::PortForwardRequest,
) -> Result<cri::PortForwardResponse, Status> {
    let port = |port: i32| {
        let valid = u16::try_from(port).ok().filter(|port| *port > 0);
        valid.ok_or_else(|| Status::invalid_argument(format!("{port} is not a port")))
    };
    let ports = request
        .port
        .into_iter()
        .map(port)
        .collect::<Result<Vec<_>, _>>()?;
    if ports.len() > MAX_PORTS {
        return Err(Status::invalid_argument(format!(
            "{} ports are too many: the maximum is {MAX_PORTS}",
            ports.len()
        )));
    }
    let (pod, _) = pods.ready(&request.pod_sandbox_id, "port forwarding")?;
    let url = url(streaming, Request::PortForward { pod, ports })?;
    Ok(cri::PortForwardResponse { url })
}

/// In the older WebSocket protocol each port has two channels, and the channel's number is one byte.
const MAX_PORTS: usize = 64;

fn streams(stdin: bool, stdout: bool, stderr: bool, terminal: bool) -> Result<Streams, Status> {
    if !(stdin || stdout || stderr) {
        return Err(Status::invalid_argument(
            "one of stdin, stdout and stderr must be set",
        ));
    }
    if terminal && stderr {
        return Err(Status::invalid_argument(
            "tty and stderr cannot both be set: a terminal has one output",
        ));
    }
    Ok(Streams {
        stdin,
        stdout,
        stderr,
        terminal,
    })
}

fn url(streaming: &Streaming, request: Request) -> Result<String, Status> {
    streaming
        .url(request)
        .map_err(|e| Status::resource_exhausted(e.to_string()))
}

#[cfg(test)]
mod tests {
    use super::streams;

    #[test]
    fn a_client_takes_part_in_something_and_a_terminal_has_one_output() {
        let table = [
            ((false, false, false, false), false),
            ((false, true, true, true), false),
            ((false, false, false, true), false),
            ((true, false, false, false), true),
            ((true, true, false, true), true),
            ((false, true, true, false), true),
        ];
        for ((stdin, stdout, stderr, tty), valid) in table {
            let found = streams(stdin, stdout, stderr, tty);
            assert_eq!(found.is_ok(), valid, "{stdin} {stdout} {stderr} {tty}");
        }
    }
}
