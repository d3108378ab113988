// SPDX-License-Identifier: Apache-2.0
//! `bulkhead serve`: makes the parts of the daemon, takes over the pods of an earlier daemon, and serves CRI until a
//! signal.
//!
//! The parts get their values from here and do not read [`Config`] themselves. The VMs keep running when the daemon
//! ends.

use std::fs::File;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use bulkhead_cdi::Directories;
use bulkhead_delegate::Limits;
use bulkhead_host::cgroup::Cgroups;
use bulkhead_host::clock::HostClock;
use bulkhead_host::cores::{self, Cores, Support};
use bulkhead_host::launch::Launcher;
use bulkhead_host::probe::Probe;
use bulkhead_host::systemd::Systemd;
use bulkhead_network::{Network, NetworkError};
use bulkhead_proto::cri::image_service_server::{ImageService, ImageServiceServer};
use bulkhead_proto::cri::runtime_service_server::{RuntimeService, RuntimeServiceServer};
use futures_util::stream::{self, Stream};
use rustix::fs::FlockOperation;
use tokio::net::{UnixListener, UnixStream};
use tokio::signal::unix::{SignalKind, signal};
use tokio::time::sleep;
use tonic::service::Routes;

use crate::callers::{Callers, Door};
use crate::config::{CgroupDriver, Config};
use crate::cri::{ImageServer, RuntimeServer};
use crate::endpoint::{Endpoint, ImageEndpoint, Sides};
use crate::intact::{self, IntactError};
use crate::modes;
use crate::notify::{self, Notifier};
use crate::pod::admission::{self, Admission};
use crate::pod::plan::sizing::Defaults;
use crate::pod::templates::Templates;
use crate::pod::users::Users;
use crate::pod::volumes::Volumes;
use crate::pod::warmed::Warmed;
use crate::pod::{Host, Pods};
use crate::scratch::Scratch;
use crate::store::{self, Store, StoreError};
use crate::streaming::{self, StreamingError};

/// The longest request. Other runtimes use the same limit.
const REQUEST_BYTES: usize = 16 << 20;
/// How long no client is accepted after one could not be. Without a pause, a daemon that has no file descriptor left would
/// try again without end.
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);
/// How long calls may still take after the signal to end.
const LAST_CALLS: Duration = Duration::from_secs(3);
/// How long the end of VMs may then take that are no pod's.
const LAST_SPARES: Duration = Duration::from_secs(30);

/// What happens to the pods if their records are moved away.
const WITHOUT_PODS: &str = "Then the VMs of all pods are ended, and kubelet makes their pods anew";
/// What happens to the images if their records are moved away.
const WITHOUT_IMAGES: &str =
    "Then all images are gone, and kubelet pulls them anew; pods go on running";

/// Why the daemon cannot serve.
#[derive(Debug, thiserror::Error)]
pub enum ServeError {
    #[error("directory {path}")]
    Directory { path: PathBuf, source: io::Error },
    #[error("another daemon holds {0}: stop it first, or give this one other directories")]
    Running(PathBuf),
    #[error("lock {path}")]
    Lock { path: PathBuf, source: io::Error },
    #[error("listen on {path}")]
    Listen { path: PathBuf, source: io::Error },
    #[error(transparent)]
    Intact(#[from] IntactError),
    #[error("state of pods")]
    Store(#[from] StoreError),
    #[error("image store")]
    Images(#[from] bulkhead_image::StoreError),
    #[error("network")]
    Network(#[from] NetworkError),
    #[error("streaming server")]
    Streaming(#[from] StreamingError),
    #[error(
        "sandbox.core_scheduling is set, but this kernel cannot do it (CONFIG_SCHED_CORE), and SMT is active: use another \
         kernel, turn SMT off (echo off > /sys/devices/system/cpu/smt/control), or remove the setting"
    )]
    Cores,
    #[error("wait for signals")]
    Signals(#[source] io::Error),
    #[error("serve CRI")]
    Serve(#[from] tonic::transport::Error),
}

/// Serves until SIGTERM or SIGINT.
pub async fn run(config: Config, notifier: Notifier) -> Result<(), ServeError> {
    let (socket, cgroup_driver) = (config.socket.clone(), config.cgroup_driver);
    let callers = config.callers;
    let runtimes = config.runtimes.clone();
    let cdi = Directories::new(config.cdi_spec_dirs.clone());
    // Pods that are listed there do not outlive a reboot, images do.
    let listed_pods = config.run_dir.join("delegates");
    let listed_images = config.state_dir.join("delegates");
    modes::keep_to_ourselves();
    check_cores(config.sandbox.cores)?;
    make_directory(&config.run_dir)?;
    make_directory(&config.state_dir)?;
    if let Some(parent) = socket.parent() {
        // Its mode is not changed, because others may use it, too.
        std::fs::create_dir_all(parent).map_err(|source| ServeError::Directory {
            path: parent.to_owned(),
            source,
        })?;
    }
    let _lock = lock(&config.state_dir.join("lock"))?;
    let mut terminate = signal(SignalKind::terminate()).map_err(ServeError::Signals)?;
    let mut interrupt = signal(SignalKind::interrupt()).map_err(ServeError::Signals)?;
    let streams = streaming::Server::bind(&config.streaming).await?;
    let streaming = streams.handle();
    intact::check(&config.state_dir.join(store::FILE), WITHOUT_PODS).await?;
    intact::check(&config.image_config().records(), WITHOUT_IMAGES).await?;
    let spares = config.sandbox.spares;
    let host = host(config)?;
    let images = ImageServer::new(host.images.clone(), host.state_pods.clone());
    let pods = Pods::new(host, spares);
    pods.adopt().await?;
    tokio::spawn(streams.run(pods.clone()));
    warm_up(&pods);
    tokio::spawn(pods.clone().keep_spares());
    let listener = listen(&socket, callers)?;
    tracing::info!("serving CRI on unix://{}", socket.display());
    notifier.tell(notify::READY);
    tokio::spawn(notifier.clone().watch());
    let (stop, stopped) = tokio::sync::watch::channel(false);
    let mut told = stopped.clone();
    let runtime = RuntimeServer::new(pods.clone(), streaming, cgroup_driver, images.clone(), cdi);
    let routes = if runtimes.delegates.is_empty() {
        routes(runtime, images)
    } else {
        make_directory(&listed_pods)?;
        make_directory(&listed_images)?;
        let sides = Sides::new(runtimes, Limits::default());
        let endpoint = Endpoint::new(runtime, sides, &listed_pods, &listed_images);
        endpoint.watch();
        let images = ImageEndpoint::new(endpoint.clone());
        routes(endpoint, images)
    };
    let server = tonic::transport::Server::builder()
        .add_routes(routes)
        .serve_with_incoming_shutdown(incoming(listener, callers), async move {
            let _ = told.wait_for(|stop| *stop).await;
        });
    tokio::pin!(server);
    tokio::select! {
        served = &mut server => return Ok(served?),
        _ = terminate.recv() => {}
        _ = interrupt.recv() => {}
    }
    tracing::info!("the daemon ends; pods keep running");
    notifier.tell(notify::STOPPING);
    stop.send_replace(true);
    // The time limit is there because streams of events never end by themselves.
    if let Ok(served) = tokio::time::timeout(LAST_CALLS, server).await {
        served?;
    }
    // What is left of them, the next daemon ends.
    let _ = tokio::time::timeout(LAST_SPARES, pods.end_spares()).await;
    // An error is ignored, because the next daemon replaces the socket anyway.
    let _ = std::fs::remove_file(&socket);
    Ok(())
}

/// Checks that VMs can have cores of their own if that is wanted. A wish for isolation is never dropped silently.
fn check_cores(wanted: Cores) -> Result<(), ServeError> {
    if wanted == Cores::Shared {
        return Ok(());
    }
    match cores::support() {
        Support::Works => tracing::info!("core scheduling: no VM shares a CPU core with another"),
        Support::NoSmt => tracing::info!(
            "core scheduling: SMT is not active, so no VM shares a CPU core with another anyway"
        ),
        Support::Missing => return Err(ServeError::Cores),
    }
    Ok(())
}

/// Both CRI services.
fn routes(runtime: impl RuntimeService, images: impl ImageService) -> Routes {
    let runtime = RuntimeServiceServer::new(runtime)
        .max_decoding_message_size(REQUEST_BYTES)
        .max_encoding_message_size(usize::MAX);
    let images = ImageServiceServer::new(images).max_decoding_message_size(REQUEST_BYTES);
    Routes::new(runtime).add_service(images)
}

fn host(config: Config) -> Result<Host, ServeError> {
    let images = bulkhead_image::Store::open(config.image_config())?;
    let templates = config.state_dir.join("templates");
    make_directory(&templates)?;
    for directory in [&config.cni.cache_dir, &config.cni.netns_dir] {
        // Elsewhere it may be of others, too.
        if directory.starts_with(&config.state_dir) || directory.starts_with(&config.run_dir) {
            make_directory(directory)?;
        }
    }
    if let Some(warmed) = &config.sandbox.warmed {
        make_directory(warmed)?;
    }
    let network = Network::new(&config.cni)?;
    let sandbox = config.sandbox;
    let systemd = (config.cgroup_driver == CgroupDriver::Systemd).then(Systemd::of_host);
    // The directory must exist before the first pod: at its start, kubelet asks for the containers' file system.
    let state_pods = config.state_dir.join("pods");
    let run_pods = config.run_dir.join("pods");
    make_directory(&state_pods)?;
    make_directory(&run_pods)?;
    Ok(Host {
        run_pods,
        state_pods,
        sizing: Defaults {
            vcpus: sandbox.vcpus,
            memory_mib: sandbox.memory_mib,
            memory_max_mib: sandbox.memory_max_mib,
            scratch_bytes: sandbox.scratch_bytes,
            scratch_max_bytes: sandbox.scratch_max_bytes,
        },
        admission: Admission::new(sandbox.parallel_boots, admission::TURN),
        store: Arc::new(Store::open(&config.state_dir)?),
        network,
        images,
        cgroups: Cgroups::new(config.cgroup_parent.as_deref(), systemd, config.unbounded),
        users: Users::new(sandbox.users),
        volumes: Volumes::new(config.kubelet_roots),
        scratch: Scratch::new(templates),
        clock: HostClock::start(),
        templates: Templates::new(sandbox.templates_bytes, sandbox.templates_of, cpus()),
        warmed: Warmed::new(sandbox.warmed),
        log_bytes_per_second: sandbox.log_bytes_per_second,
        probe: Probe::new(
            config.vmm.clone(),
            config.kernel.clone(),
            config.initramfs.clone(),
            config.modules.clone(),
        ),
        launcher: Launcher {
            program: config.vmm,
            kernel: config.kernel,
            initramfs: config.initramfs,
            modules: config.modules,
            extra_cmdline: sandbox.extra_cmdline,
            ready_timeout: sandbox.ready_timeout,
            cores: sandbox.cores,
        },
    })
}

fn cpus() -> usize {
    std::thread::available_parallelism().map_or(1, std::num::NonZero::get)
}

/// Probes KVM in the background, so that the first pod need not wait for that. Then cleans up the network from time to
/// time.
fn warm_up(pods: &Pods) {
    let pods = pods.clone();
    tokio::spawn(async move {
        match pods.can_run().await {
            Ok(()) => tracing::info!("KVM runs guests here"),
            Err(why) => tracing::error!("pods cannot run: {why}"),
        }
        if let Err(why) = pods.has_network().await {
            tracing::warn!("the network is not ready: {why}");
        }
        pods.tidy_network().await;
    });
}

fn make_directory(path: &Path) -> Result<(), ServeError> {
    modes::own_directory(path).map_err(|source| ServeError::Directory {
        path: path.to_owned(),
        source,
    })
}

/// Locks the daemon's directories, so that only one daemon uses them. The lock ends with the process.
fn lock(path: &Path) -> Result<File, ServeError> {
    let failed = |source| ServeError::Lock {
        path: path.to_owned(),
        source,
    };
    let file = File::options()
        .create(true)
        .truncate(false)
        .write(true)
        .open(path)
        .map_err(failed)?;
    match rustix::fs::flock(&file, FlockOperation::NonBlockingLockExclusive) {
        Ok(()) => Ok(file),
        Err(rustix::io::Errno::WOULDBLOCK) => Err(ServeError::Running(path.to_owned())),
        Err(e) => Err(failed(e.into())),
    }
}

/// Listens on the socket, with access only for those who may call. A socket file that nobody answers is left over from
/// an earlier daemon and is replaced.
fn listen(path: &Path, callers: Callers) -> Result<UnixListener, ServeError> {
    let failed = |source| ServeError::Listen {
        path: path.to_owned(),
        source,
    };
    if std::os::unix::net::UnixStream::connect(path).is_ok() {
        return Err(ServeError::Running(path.to_owned()));
    }
    match std::fs::remove_file(path) {
        Err(e) if e.kind() != io::ErrorKind::NotFound => return Err(failed(e)),
        _ => {}
    }
    let listener = UnixListener::bind(path).map_err(failed)?;
    callers.own_socket(path).map_err(failed)?;
    Ok(listener)
}

/// The connections of clients that may call.
fn incoming(
    listener: UnixListener,
    callers: Callers,
) -> impl Stream<Item = io::Result<UnixStream>> {
    let start = (listener, Door::new(callers));
    stream::unfold(start, async |(listener, mut door)| {
        loop {
            match listener.accept().await {
                Ok((stream, _)) => {
                    if let Some(stream) = door.pass(stream) {
                        return Some((Ok(stream), (listener, door)));
                    }
                }
                Err(error) => {
                    tracing::warn!("a client of CRI cannot connect now: {error}");
                    sleep(ACCEPT_PAUSE).await;
                }
            }
        }
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_second_daemon_on_the_same_directories_is_refused() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("lock");
        let first = lock(&path).unwrap();
        assert!(matches!(lock(&path), Err(ServeError::Running(_))));
        drop(first);
        assert!(lock(&path).is_ok());
    }

    #[tokio::test]
    async fn a_stale_socket_is_replaced_and_a_live_one_is_not() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("sock");
        let listen = || listen(&path, Callers::default());
        let first = listen().unwrap();
        assert!(matches!(listen(), Err(ServeError::Running(_))));
        drop(first);
        assert!(listen().is_ok());
    }
}
