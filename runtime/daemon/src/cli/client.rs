// SPDX-License-Identifier: Apache-2.0
//! A connection to the daemon: both CRI services over its unix socket.

use std::path::Path;

use bulkhead_proto::cri;
use bulkhead_proto::cri::image_service_client::ImageServiceClient;
use bulkhead_proto::cri::runtime_service_client::RuntimeServiceClient;
use hyper_util::rt::TokioIo;
use tonic::Status;
use tonic::transport::{Channel, Endpoint};

use super::CliError;

/// The longest answer that is accepted. Lists can be long; the daemon bounds only the output of ExecSync.
const ANSWER_BYTES: usize = 256 << 20;

/// A client of both services. Clones share the connection.
#[derive(Clone, Debug)]
pub struct Client {
    pub runtime: RuntimeServiceClient<Channel>,
    pub images: ImageServiceClient<Channel>,
}

impl Client {
    pub async fn connect(socket: &Path) -> Result<Self, CliError> {
        let path = socket.to_owned();
        let connect = move |_| {
            let path = path.clone();
            async move {
                tokio::net::UnixStream::connect(path)
                    .await
                    .map(TokioIo::new)
            }
        };
        // An address is required but not used: the connector opens the socket.
        let channel = Endpoint::from_static("http://bulkhead")
            .connect_with_connector(tower::service_fn(connect))
            .await
            .map_err(|source| CliError::Connect {
                socket: socket.to_owned(),
                source,
            })?;
        Ok(Self {
            runtime: RuntimeServiceClient::new(channel.clone())
                .max_decoding_message_size(ANSWER_BYTES),
            images: ImageServiceClient::new(channel).max_decoding_message_size(ANSWER_BYTES),
        })
    }

    /// The status of a container, found by its id or a unique prefix of it.
    pub async fn container(&mut self, id: &str) -> Result<cri::ContainerStatus, CliError> {
        let request = cri::ContainerStatusRequest {
            container_id: id.to_owned(),
            verbose: false,
        };
        let answer = self.runtime.container_status(request).await;
        let answer = answer.map_err(failed(format!("container {id}")))?;
        Ok(answer.into_inner().status.unwrap_or_default())
    }
}

/// Adds to the error of an RPC what was tried.
pub fn failed(what: impl Into<String>) -> impl FnOnce(Status) -> CliError {
    let what = what.into();
    move |status| CliError::Call {
        what,
        message: status.message().to_owned(),
    }
}

pub fn image_spec(image: &str) -> cri::ImageSpec {
    cri::ImageSpec {
        image: image.to_owned(),
        user_specified_image: image.to_owned(),
        ..Default::default()
    }
}
