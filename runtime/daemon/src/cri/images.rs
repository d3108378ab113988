// SPDX-License-Identifier: Apache-2.0
//! `ImageService`.

use std::collections::HashMap;

use base64::Engine;
use base64::alphabet::STANDARD;
use base64::engine::{DecodePaddingMode, GeneralPurpose, GeneralPurposeConfig};
use bulkhead_image::{Credentials, Image, StoreError};
use bulkhead_proto::cri;
use bulkhead_proto::cri::image_service_server::ImageService;
use tonic::{Request, Response, Status};

use super::{BoxStream, image_status, stream_list};
use crate::pod::{Pods, now};

/// The service; all state is in the image store.
#[derive(Clone, Debug)]
pub struct ImageServer {
    pods: Pods,
}

/// In the `info` of a verbose `ImageStatus`: how far the pull is that is in progress.
pub const PULL_INFO: &str = "pull";
/// Docker's tools write padding, others leave it out.
const BASE64: GeneralPurpose = GeneralPurpose::new(
    &STANDARD,
    GeneralPurposeConfig::new().with_decode_padding_mode(DecodePaddingMode::Indifferent),
);

type Answer<T> = Result<Response<T>, Status>;

impl ImageServer {
    pub fn new(pods: Pods) -> Self {
        Self { pods }
    }

    async fn list(&self, filter: Option<cri::ImageFilter>) -> Result<Vec<cri::Image>, Status> {
        let images = &self.pods.host().images;
        let wanted = filter
            .and_then(|filter| filter.image)
            .map(|spec| spec.image);
        let found = match wanted.filter(|wanted| !wanted.is_empty()) {
            Some(wanted) => images.find(&wanted).map_err(failed)?.into_iter().collect(),
            None => images.list().map_err(failed)?,
        };
        Ok(found.iter().map(show).collect())
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
        let images = &self.pods.host().images;
        let found = images.find(&name).map_err(failed)?;
        let mut info = HashMap::new();
        if let Some(image) = found.as_ref().filter(|_| request.verbose) {
            let defaults = &image.defaults;
            let details = serde_json::json!({ "imageSpec": { "config": {
                "Entrypoint": defaults.entrypoint,
                "Cmd": defaults.cmd,
                "Env": defaults.env,
                "WorkingDir": defaults.working_dir,
                "User": defaults.user,
                "StopSignal": defaults.stop_signal,
                "Labels": defaults.labels,
            } } });
            info.insert("info".to_owned(), details.to_string());
        }
        if let Some(progress) = images.progress(&name).filter(|_| request.verbose) {
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
        let credentials = request.auth.map(credentials).transpose()?.flatten();
        let pulled = self.pods.host().images.pull(&name, credentials).await;
        let image = pulled.map_err(|error| image_status(error.kind(), &error))?;
        Ok(Response::new(cri::PullImageResponse {
            image_ref: image.id.to_string(),
        }))
    }

    async fn remove_image(
        &self,
        request: Request<cri::RemoveImageRequest>,
    ) -> Answer<cri::RemoveImageResponse> {
        let name = name(request.into_inner().image)?;
        self.pods.host().images.remove(&name).map_err(failed)?;
        Ok(Response::new(cri::RemoveImageResponse {}))
    }

    async fn image_fs_info(
        &self,
        _request: Request<cri::ImageFsInfoRequest>,
    ) -> Answer<cri::ImageFsInfoResponse> {
        let images = self.pods.host().images.usage().map_err(failed)?;
        let image = usage(&images.directory, images.used_bytes, images.inodes);
        // What containers write is on the scratch disks of their pods.
        let scratch = self.pods.host().state_pods.clone();
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

fn name(spec: Option<cri::ImageSpec>) -> Result<String, Status> {
    let name = spec.unwrap_or_default().image;
    if name.is_empty() {
        return Err(Status::invalid_argument("the image's name is missing"));
    }
    Ok(name)
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

/// What CRI's five ways to say a secret mean. `None`: nothing was said.
fn credentials(auth: cri::AuthConfig) -> Result<Option<Credentials>, Status> {
    if !auth.registry_token.is_empty() {
        return Ok(Some(Credentials::Bearer(auth.registry_token)));
    }
    if !auth.identity_token.is_empty() {
        return Ok(Some(Credentials::Identity(auth.identity_token)));
    }
    if !auth.username.is_empty() {
        return Ok(Some(Credentials::Basic {
            username: auth.username,
            password: auth.password,
        }));
    }
    if auth.auth.is_empty() {
        return Ok(None);
    }
    // The secret itself is in no message.
    let wrong = || Status::invalid_argument("auth is not base64 of user:password");
    let text = BASE64.decode(&auth.auth).map_err(|_| wrong())?;
    let text = String::from_utf8(text).map_err(|_| wrong())?;
    let (username, password) = text.split_once(':').ok_or_else(wrong)?;
    Ok(Some(Credentials::Basic {
        username: username.to_owned(),
        password: password.trim_end_matches('\0').to_owned(),
    }))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_secret_is_read_with_and_without_padding() {
        for text in ["dXNlcjpwYXNzd29yZA==", "dXNlcjpwYXNzd29yZA"] {
            let auth = cri::AuthConfig {
                auth: text.into(),
                ..Default::default()
            };
            let read = credentials(auth).unwrap();
            let Some(Credentials::Basic { username, password }) = read else {
                panic!("{text}: {read:?}");
            };
            assert_eq!((username.as_str(), password.as_str()), ("user", "password"));
        }
    }

    #[test]
    fn a_bad_secret_is_not_repeated() {
        let auth = cri::AuthConfig {
            auth: "c2VjcmV0".into(),
            ..Default::default()
        };
        let error = credentials(auth).err().unwrap();
        assert!(!error.message().contains("c2VjcmV0") && !error.message().contains("secret"));
    }
}
