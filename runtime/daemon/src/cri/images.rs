// SPDX-License-Identifier: Apache-2.0
//! CRI's `ImageService`: pulls, lists and removes images.

use std::collections::HashMap;
use std::path::PathBuf;

use bulkhead_image::{FailureKind, Image, Reference, Store, StoreError};
use bulkhead_proto::cri;
use bulkhead_proto::cri::image_service_server::ImageService;
use bulkhead_text::chain;
use tonic::{Request, Response, Status};

use super::codes::image_status;
use super::credentials::credentials;
use super::lists::{BoxStream, stream_list};
use super::refusal::check_handler;
use crate::clock::now;

/// The service. It has no state of its own; that is in the image store.
#[derive(Clone, Debug)]
pub struct ImageServer {
    images: Store,
    /// The directory of the pods' scratch disks, which hold what containers write.
    scratch: PathBuf,
}

/// The key in the `info` of a verbose `ImageStatus` under which the progress of a running pull is shown.
pub const PULL_INFO: &str = "pull";
/// kubelet recognizes the error of a pull by this prefix, but only if its gRPC code is `Unknown`.
const REGISTRY_UNAVAILABLE: &str = "RegistryUnavailable";

type Answer<T> = Result<Response<T>, Status>;

impl ImageServer {
    pub fn new(images: Store, scratch: PathBuf) -> Self {
        Self { images, scratch }
    }

    async fn list(&self, filter: Option<cri::ImageFilter>) -> Result<Vec<cri::Image>, Status> {
        let wanted = filter.and_then(|filter| filter.image).unwrap_or_default();
        check_handler(&wanted.runtime_handler)?;
        let found = self.ask(move |images| match wanted.image.as_str() {
            "" => images.list(),
            wanted => Ok(images.find(wanted)?.into_iter().collect()),
        });
        Ok(found.await?.iter().map(show).collect())
    }

    /// Does `work` on a thread that may block. All records of images, or the removal of a large layer, would hold up
    /// the calls about other things.
    async fn ask<T: Send + 'static>(
        &self,
        work: impl FnOnce(&Store) -> Result<T, StoreError> + Send + 'static,
    ) -> Result<T, Status> {
        let images = self.images.clone();
        let done = tokio::task::spawn_blocking(move || work(&images));
        done.await
            .map_err(|_| Status::internal("the work on the image store panicked"))?
            .map_err(failed)
    }
}

#[tonic::async_trait]
impl ImageService for ImageServer {
    type StreamImagesStream = BoxStream<cri::StreamImagesResponse>;

    async fn list_images(
        &self,
        request: Request<cri::ListImagesRequest>,
    ) -> Answer<cri::ListImagesResponse> {
        let images = self.list(request.into_inner().filter).await?;
        Ok(Response::new(cri::ListImagesResponse { images }))
    }

    async fn stream_images(
        &self,
        request: Request<cri::StreamImagesRequest>,
    ) -> Answer<Self::StreamImagesStream> {
        let images = self.list(request.into_inner().filter).await?;
        let message = |images| cri::StreamImagesResponse { images };
        Ok(Response::new(stream_list(images, message)))
    }

    async fn image_status(
        &self,
        request: Request<cri::ImageStatusRequest>,
    ) -> Answer<cri::ImageStatusResponse> {
        let request = request.into_inner();
        let name = name(request.image)?;
        let wanted = name.clone();
        let found = self.ask(move |images| images.find(&wanted)).await?;
        let mut info = HashMap::new();
        if let Some(image) = found.as_ref().filter(|_| request.verbose) {
            let defaults = &image.defaults;
            let volumes: HashMap<_, _> = defaults
                .volumes
                .iter()
                .map(|path| (path, serde_json::json!({})))
                .collect();
            let mut details = serde_json::json!({ "imageSpec": { "config": {
                "Entrypoint": defaults.entrypoint,
                "Cmd": defaults.cmd,
                "Env": defaults.env,
                "WorkingDir": defaults.working_dir,
                "User": defaults.user,
                "StopSignal": defaults.stop_signal,
                "Labels": defaults.labels,
                "Volumes": volumes,
            } } });
            if let Some(artifact_type) = &image.artifact_type {
                details["artifactType"] = artifact_type.clone().into();
            }
            info.insert("info".to_owned(), details.to_string());
        }
        if let Some(progress) = self.images.progress(&name).filter(|_| request.verbose) {
            let details = serde_json::json!({
                "receivedBytes": progress.received_bytes,
                "totalBytes": progress.total_bytes,
            });
            info.insert(PULL_INFO.to_owned(), details.to_string());
        }
        Ok(Response::new(cri::ImageStatusResponse {
            image: found.as_ref().map(show),
            info,
        }))
    }

    async fn pull_image(
        &self,
        request: Request<cri::PullImageRequest>,
    ) -> Answer<cri::PullImageResponse> {
        let request = request.into_inner();
        let name = name(request.image)?;
        let reference: Reference = name
            .parse()
            .map_err(|error| failed(StoreError::from(error)))?;
        let auth = request.auth.map(|auth| credentials(auth, &reference.host));
        let auth = auth.transpose()?.flatten();
        let pulled = self.images.pull(&name, auth).await;
        let image = pulled.map_err(|error| pull_status(error.kind(), &error))?;
        Ok(Response::new(cri::PullImageResponse {
            image_ref: image.id.to_string(),
        }))
    }

    async fn remove_image(
        &self,
        request: Request<cri::RemoveImageRequest>,
    ) -> Answer<cri::RemoveImageResponse> {
        let name = name(request.into_inner().image)?;
        self.ask(move |images| images.remove(&name)).await?;
        Ok(Response::new(cri::RemoveImageResponse {}))
    }

    async fn image_fs_info(
        &self,
        _request: Request<cri::ImageFsInfoRequest>,
    ) -> Answer<cri::ImageFsInfoResponse> {
        let images = self.ask(Store::usage).await?;
        let image = usage(&images.directory, images.used_bytes, images.inodes);
        let scratch = self.scratch.clone();
        let measured = tokio::task::spawn_blocking(move || {
            let (bytes, inodes) = crate::scratch::disk_usage(&scratch);
            usage(&scratch, bytes, inodes)
        });
        let container = measured
            .await
            .map_err(|_| Status::internal("measuring the scratch disks panicked"))?;
        Ok(Response::new(cri::ImageFsInfoResponse {
            image_filesystems: vec![image],
            container_filesystems: vec![container],
        }))
    }
}

fn failed(error: StoreError) -> Status {
    image_status(error.kind(), &error)
}

fn pull_status(kind: FailureKind, error: &(dyn std::error::Error + 'static)) -> Status {
    match kind {
        FailureKind::Unavailable => {
            Status::unknown(format!("{REGISTRY_UNAVAILABLE}: {}", chain(error)))
        }
        kind => image_status(kind, error),
    }
}

/// The image's name. Other fields of the spec have no effect, because all runtime handlers have the same images.
fn name(spec: Option<cri::ImageSpec>) -> Result<String, Status> {
    let spec = spec.unwrap_or_default();
    if spec.image.is_empty() {
        return Err(Status::invalid_argument("the image's name is missing"));
    }
    check_handler(&spec.runtime_handler)?;
    Ok(spec.image)
}

fn show(image: &Image) -> cri::Image {
    let user = image.defaults.user.split(':').next().unwrap_or_default();
    let number = user.parse::<i64>().ok();
    cri::Image {
        id: image.id.to_string(),
        repo_tags: image.repo_tags.clone(),
        repo_digests: image.repo_digests.clone(),
        size: image.size_bytes,
        uid: number.map(|value| cri::Int64Value { value }),
        username: if number.is_some() {
            String::new()
        } else {
            user.to_owned()
        },
        spec: None,
        pinned: image.pinned,
    }
}

fn usage(directory: &std::path::Path, bytes: u64, inodes: u64) -> cri::FilesystemUsage {
    cri::FilesystemUsage {
        timestamp: now(),
        fs_id: Some(cri::FilesystemIdentifier {
            mountpoint: directory.display().to_string(),
        }),
        used_bytes: Some(cri::UInt64Value { value: bytes }),
        inodes_used: Some(cri::UInt64Value { value: inodes }),
    }
}

#[cfg(test)]
mod tests {
    use tonic::Code;

    use super::*;

    #[test]
    fn an_image_is_asked_for_by_name_and_for_a_handler_that_is_there() {
        for (image, handler, code) in [
            ("busybox", "", None),
            ("busybox", "bulkhead", None),
            ("busybox", "runc", Some(Code::InvalidArgument)),
            ("", "", Some(Code::InvalidArgument)),
        ] {
            let spec = cri::ImageSpec {
                image: image.into(),
                runtime_handler: handler.into(),
                ..Default::default()
            };
            let found = name(Some(spec)).err().map(|status| status.code());
            assert_eq!(found, code, "{image:?} {handler:?}");
        }
    }

    #[test]
    fn a_registry_that_is_not_there_is_named_as_kubelet_looks_for_it() {
        let error = std::io::Error::other("nobody listens");
        let status = pull_status(FailureKind::Unavailable, &error);
        assert_eq!(status.code(), Code::Unknown);
        assert_eq!(status.message(), "RegistryUnavailable: nobody listens");
        let status = pull_status(FailureKind::Unauthenticated, &error);
        assert_eq!(status.code(), Code::Unauthenticated);
        assert_eq!(status.message(), "nobody listens");
    }
}
