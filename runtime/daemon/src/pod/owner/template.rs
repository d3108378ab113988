// SPDX-License-Identifier: Apache-2.0
//! Makes the templates that [`crate::pod::templates`] keeps, when the first pod needs one: a VM of no pod boots, is saved, and
//! all that it took of the host is given back.

use std::fs::File;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use bulkhead_host::cgroup::{CgroupError, HostLimits};
use bulkhead_host::launch::{self, Beginning, LaunchError, Launcher, Machine, Net};
use bulkhead_host::template::{Template, Unsaved};
use bulkhead_host::{Files, Guest};
use bulkhead_network::NetworkError;
use bulkhead_records::Stamp;
use bulkhead_text::chain;
use tokio::sync::watch;
use tokio::time::Instant;

use super::{ID_DIGITS, RUN_NAME_DIGITS};
use crate::pod::host::{Host, Shared};
use crate::pod::life::record::VmSize;
use crate::pod::plan::sizing;
use crate::pod::templates::{Found, Key, Sources, TooLarge};
use crate::random::new_id;

const MIB: u64 = 1 << 20;
/// The network device of a template has an address that no pod keeps, and the largest MTU, because a driver takes no MTU
/// above the one that its device had at first.
const MAC: [u8; 6] = [2, 0, 0, 0, 0, 1];
const MTU: u16 = 65521;

/// A file in the run directory of a template's VM, with the id of which its cgroup has the name: a daemon that dies before the
/// VM is in it leaves a cgroup that no process leads to.
const ID_FILE: &str = "template";

/// The cgroup of a template's VM that an earlier daemon has left with this run directory. `None` if it is not a template's.
pub fn left_cgroup(host: &Host, run: &Path) -> Option<PathBuf> {
    let id = std::fs::read_to_string(run.join(ID_FILE)).ok()?;
    let is_id = id.len() == ID_DIGITS && id.bytes().all(|byte| byte.is_ascii_hexdigit());
    host.cgroups.place(&id, None, None).filter(|_| is_id)
}

/// Why a template could not be made.
#[derive(Debug, thiserror::Error)]
enum MakeError {
    #[error("all users of VMs are taken")]
    NoUser,
    #[error("directory {path} of the template")]
    Directory {
        path: PathBuf,
        source: std::io::Error,
    },
    #[error("its network device")]
    Network(#[from] NetworkError),
    #[error("its cgroup")]
    Cgroup(#[from] CgroupError),
    #[error(transparent)]
    Launch(#[from] LaunchError),
    #[error("a background task panicked; see the daemon's log")]
    Panicked,
    #[error(transparent)]
    TooLarge(#[from] TooLarge),
}

/// The files that VMs are started from, as they are. `None` if one is missing: then a boot says which.
pub(super) fn sources(launcher: &Launcher) -> Option<Sources> {
    let files = [
        &launcher.program,
        &launcher.kernel,
        &launcher.initramfs,
        &launcher.modules,
    ];
    let stamp = |path: &PathBuf| Stamp::of(&File::open(path).ok()?).ok();
    files.into_iter().map(stamp).collect()
}

/// The template for a VM of this size, of a pod in this namespace. Waits for one that is made, but not longer than `until`.
/// `None`: the VM is to boot.
pub async fn get(
    shared: &Arc<Shared>,
    size: &VmSize,
    namespace: &str,
    until: Instant,
) -> Option<Arc<Template>> {
    let templates = &shared.host.templates;
    let key = templates.key(size, namespace)?;
    let now = sources(&shared.host.launcher)?;
    let mut made = match templates.look(&key, &now) {
        Found::Ready(template) => return Some(template),
        Found::Nothing => return None,
        Found::Made(done) => done,
        Found::ToMake(maker) => {
            let done = maker.subscribe();
            make_in_background(Arc::clone(shared), key.clone(), maker);
            done
        }
    };
    // An error says that it is closed.
    let _ = tokio::time::timeout_at(until, made.changed()).await;
    match templates.look(&key, &now) {
        Found::Ready(template) => Some(template),
        Found::Made(_) | Found::Nothing => None,
        Found::ToMake(maker) => {
            make_in_background(Arc::clone(shared), key, maker);
            None
        }
    }
}

/// Lets a template learn from its first fork, whose guest has just become a pod's and has no container yet.
pub(super) async fn learn(template: Option<&Arc<Template>>, guest: &Guest) {
    let Some(template) = template.filter(|template| template.foreseen().is_none()) else {
        return;
    };
    let template = Arc::clone(template);
    let vmm = guest.process.identity();
    let learned = tokio::task::spawn_blocking(move || template.learn(vmm)).await;
    if learned.is_err() {
        tracing::warn!("learn from the first fork of a template: the task panicked");
    }
}

/// Makes a template. It goes on if the pod that wanted it is given up.
fn make_in_background(shared: Arc<Shared>, key: Key, maker: watch::Sender<()>) {
    tokio::spawn(async move {
        let templates = &shared.host.templates;
        let _one = templates.making.acquire().await;
        templates.make_room_for_another();
        let made = make(&shared.host, key.memory_mib).await;
        note(&shared.host, key, made);
        drop(maker);
    });
}

/// Keeps what was made, or says why nothing was.
fn note(host: &Host, key: Key, made: Result<(Template, Sources), MakeError>) {
    let kept = made.and_then(|(template, sources)| {
        let takes_mib = sizing::mib(template.bytes);
        host.templates.keep(key.clone(), template, sources)?;
        Ok(takes_mib)
    });
    let memory_mib = key.memory_mib;
    match kept {
        Ok(takes_mib) => tracing::info!(
            memory_mib,
            namespace = key.namespace,
            takes_mib,
            "template made"
        ),
        Err(error) => {
            tracing::warn!(
                memory_mib,
                "no template could be made, so pods boot: {}",
                chain(&error)
            );
            host.templates.fail(key);
        }
    }
}

/// Boots a VM that belongs to no pod, and saves it. Whatever it took of the host is given back.
async fn make(host: &Host, memory_mib: u32) -> Result<(Template, Sources), MakeError> {
    let missing = || LaunchError::Open {
        path: host.launcher.kernel.clone(),
        source: std::io::ErrorKind::NotFound.into(),
    };
    // As they are before they are read: a file that changes meanwhile makes another template necessary.
    let sources = sources(&host.launcher).ok_or_else(missing)?;
    let id = new_id();
    // With the name of a pod's directory, so a daemon that starts finds and ends what is in it.
    let run = host.run_pods.join(id.get(..RUN_NAME_DIGITS).unwrap_or(&id));
    let noted = launch::make_directory(&run).and_then(|()| std::fs::write(run.join(ID_FILE), &id));
    noted.map_err(|source| MakeError::Directory {
        path: run.clone(),
        source,
    })?;
    let cgroup = host
        .cgroups
        .place(&id, None, Some(memory_limit(memory_mib)));
    let user = host.users.take().ok_or(MakeError::NoUser);
    let made = match user {
        Ok(user) => {
            let made = make_in(host, &run, cgroup.as_deref(), user, memory_mib).await;
            host.users.give_back(user);
            made
        }
        Err(error) => Err(error),
    };
    if let Some(cgroup) = &cgroup
        && host.cgroups.remove(cgroup).await.is_err()
    {
        tracing::warn!("remove {}", cgroup.display());
    }
    if let Err(error) = std::fs::remove_dir_all(&run) {
        tracing::warn!("remove {}: {error}", run.display());
    }
    Ok((made?, sources))
}

async fn make_in(
    host: &Host,
    run: &Path,
    cgroup: Option<&Path>,
    user: u32,
    memory_mib: u32,
) -> Result<Template, MakeError> {
    let kernel = host.launcher.kernel.clone();
    let unsaved = tokio::task::spawn_blocking(move || Unsaved::new(&kernel, memory_mib)).await;
    let unsaved = unsaved.map_err(|_| MakeError::Panicked)?;
    let tap = bulkhead_network::lone_tap().await?;
    let machine = Machine {
        vcpus: host.templates.vcpus,
        boot_vcpus: 1,
        memory_mib,
        memory_max_mib: memory_mib,
        scratch: None,
        net: Some(Net {
            tap,
            mac: MAC,
            mtu: MTU,
        }),
        user,
        beginning: Beginning::Template(unsaved.map_err(LaunchError::from)?),
    };
    let files = Files::new(run.to_owned());
    let starting = host.launcher.spawn(files, machine).await?;
    let process = Arc::clone(starting.process());
    let placed = match cgroup {
        Some(path) => {
            let limits = HostLimits {
                memory_bytes: Some(memory_limit(memory_mib)),
                ..HostLimits::default()
            };
            let pid = process.identity().pid;
            host.cgroups.make(path, &limits, pid).await
        }
        None => Ok(()),
    };
    if let Err(error) = placed {
        process.kill();
        process.ended().await;
        return Err(error.into());
    }
    let until = Instant::now() + host.launcher.longest();
    Ok(starting.save(until).await?)
}

/// What a template's VMM may take on the host, in bytes.
fn memory_limit(memory_mib: u32) -> u64 {
    let memory_mib = u64::from(memory_mib);
    memory_mib.saturating_add(sizing::vmm_mib(memory_mib)) * MIB
}
