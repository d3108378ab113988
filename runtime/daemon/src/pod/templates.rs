// SPDX-License-Identifier: Apache-2.0
//! The templates from which this node's VMs are forked: which sizes there are, when one is made, and how much memory all of
//! them may take.
//!
//! A template has the memory that a VM starts with, one of a few [`SIZES`]; a fork gets the rest of its memory, and its CPUs,
//! when it becomes a pod's ([`super::owner`]). The first pod of a size waits for its template, and so do the pods that come
//! meanwhile: it takes little more than a boot, and a boot that nobody else gains from would come on top. All tenants share
//! a template: it has booted the guest's kernel and agent, and nothing of any pod. Whoever does not want to share pages, and
//! the addresses of the kernel, with others gets one for each Kubernetes namespace ([`Sharing`]).
//!
//! Without a template a pod boots, and so it does if its fork fails. Then the template is given up, and another is made after
//! [`PAUSE`]. [`Templates::status`] counts all of that, so it does not go unnoticed.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use bulkhead_host::template::Template;
use bulkhead_records::Stamp;
use bulkhead_vmm::config::MAX_VCPUS;
use serde::{Deserialize, Serialize};
use tokio::sync::{Semaphore, watch};

use super::life::record::VmSize;
use super::plan::sizing;

const MIB: u64 = 1 << 20;
/// The memory of templates, in MiB. A VM is forked from the largest that has no more than it should start with. No VM starts
/// with less than the first of them.
const SIZES: [u32; 4] = [96, 256, 512, 1024];
/// What a template is expected to take before it is made.
const EXPECTED_BYTES: u64 = 64 * MIB;
/// After a failure, how long no template of that kind is made.
const PAUSE: Duration = Duration::from_secs(60);

/// A template has no room.
#[derive(Debug, thiserror::Error)]
#[error(
    "it takes {needed} MiB, and all templates together may take {most} MiB (sandbox.templates_mib)"
)]
pub struct TooLarge {
    needed: u64,
    most: u64,
}

/// The files that a template is made from, as they are. When one has changed, it is made anew.
pub type Sources = Vec<Stamp>;

/// Who shares a template.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Sharing {
    Node,
    Namespace,
}

/// Which template: its memory in MiB, and whose it is. The empty name is the whole node's.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Key {
    pub memory_mib: u32,
    pub namespace: String,
}

/// All templates of this node.
#[derive(Debug)]
pub struct Templates {
    most_bytes: u64,
    sharing: Sharing,
    /// How many CPUs a fork can have.
    pub vcpus: u8,
    state: Mutex<State>,
    /// Held while one is made.
    pub making: Semaphore,
}

#[derive(Debug, Default)]
struct State {
    known: BTreeMap<Key, Known>,
    counts: Counts,
}

#[derive(Debug)]
enum Known {
    Making {
        /// Closed when it is made, or has failed.
        done: watch::Receiver<()>,
    },
    Ready {
        template: Arc<Template>,
        sources: Sources,
        used: Instant,
    },
    Failed {
        since: Instant,
    },
}

/// How VMs of this daemon began.
#[derive(Clone, Copy, Debug, Default, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Counts {
    pub forked: u64,
    pub booted: u64,
    /// Of those that booted: because their fork failed.
    pub fell_back: u64,
    pub templates_made: u64,
    pub templates_failed: u64,
}

/// What there is, for status answers.
#[derive(Debug, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Status {
    #[serde(flatten)]
    pub counts: Counts,
    pub most_bytes: u64,
    pub templates: Vec<Shown>,
}

impl Status {
    /// For people: how VMs began.
    pub fn sentence(&self) -> String {
        let Counts {
            forked,
            booted,
            fell_back,
            templates_made,
            templates_failed,
        } = self.counts;
        if self.most_bytes == 0 {
            return format!("{booted} VMs booted, none is forked (sandbox.templates_mib is 0)");
        }
        format!(
            "{forked} VMs were forked, {booted} booted, {fell_back} of these because their fork had failed; {templates_made} \
             templates were made, {templates_failed} could not be made"
        )
    }
}

/// One template.
#[derive(Debug, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Shown {
    pub memory_mib: u32,
    /// Whose it is; empty for the node's.
    pub namespace: String,
    /// What it takes on the host.
    pub bytes: u64,
}

impl Templates {
    /// Templates may take `most_bytes` together; with 0 there are none. `cpus` is how many the host has.
    pub fn new(most_bytes: u64, sharing: Sharing, cpus: usize) -> Self {
        Self {
            most_bytes,
            sharing,
            vcpus: u8::try_from(cpus).unwrap_or(MAX_VCPUS).clamp(1, MAX_VCPUS),
            state: Mutex::default(),
            making: Semaphore::new(1),
        }
    }

    /// What there is of this kind, made from these files.
    pub fn look(&self, key: &Key, now: &[Stamp]) -> Found {
        let mut state = self.state();
        match state.known.get_mut(key) {
            Some(Known::Ready {
                template,
                sources,
                used,
            }) if sources.as_slice() == now => {
                *used = Instant::now();
                Found::Ready(Arc::clone(template))
            }
            Some(Known::Making { done }) => Found::Made(done.clone()),
            Some(Known::Failed { since }) if since.elapsed() < PAUSE => Found::Nothing,
            None | Some(Known::Ready { .. } | Known::Failed { .. }) => {
                let (maker, done) = watch::channel(());
                state.known.insert(key.clone(), Known::Making { done });
                Found::ToMake(maker)
            }
        }
    }

    /// Counts a VM that has started: `fell_back` if it booted because its fork had failed.
    pub fn count(&self, is_forked: bool, fell_back: bool) {
        let counts = &mut self.state().counts;
        counts.forked += u64::from(is_forked);
        counts.booted += u64::from(!is_forked);
        counts.fell_back += u64::from(fell_back);
    }

    /// Forgets a template from which a VM could not be forked.
    pub fn give_up(&self, template: &Arc<Template>) {
        for known in self.state().known.values_mut() {
            if matches!(known, Known::Ready { template: ready, .. } if Arc::ptr_eq(ready, template))
            {
                let since = Instant::now();
                *known = Known::Failed { since };
            }
        }
    }

    pub fn status(&self) -> Status {
        let state = self.state();
        let all = state.known.iter();
        let ready = all.filter_map(|(key, known)| Some((key, known.template()?)));
        Status {
            counts: state.counts,
            most_bytes: self.most_bytes,
            templates: ready
                .map(|(key, template)| Shown {
                    memory_mib: template.memory_mib,
                    namespace: key.namespace.clone(),
                    bytes: template.bytes,
                })
                .collect(),
        }
    }

    /// Whether the pods of all namespaces share them.
    pub fn are_the_nodes(&self) -> bool {
        self.sharing == Sharing::Node
    }

    /// Which template is for a VM of this size, of a pod in this namespace. `None` if none is.
    pub fn key(&self, size: &VmSize, namespace: &str) -> Option<Key> {
        let can_fork = self.most_bytes > 0 && size.vcpus <= self.vcpus;
        let fits = SIZES.into_iter().rfind(|mib| *mib <= size.memory_mib);
        let memory_mib = fits.filter(|_| can_fork)?;
        Some(Key {
            memory_mib,
            namespace: match self.sharing {
                Sharing::Node => String::new(),
                Sharing::Namespace => namespace.to_owned(),
            },
        })
    }

    /// Drops templates until one more is likely to have room.
    pub fn make_room_for_another(&self) {
        self.make_room(EXPECTED_BYTES);
    }

    /// Drops the templates that were not used for longest, until `bytes` more may be taken.
    fn make_room(&self, bytes: u64) {
        let mut state = self.state();
        while state.bytes().saturating_add(bytes) > self.most_bytes {
            let used = |known: &Known| match known {
                Known::Ready { used, .. } => Some(*used),
                Known::Making { .. } | Known::Failed { .. } => None,
            };
            let all = state.known.iter();
            let ready = all.filter_map(|(key, known)| Some((used(known)?, key.clone())));
            let Some((_, oldest)) = ready.min() else {
                return;
            };
            state.known.remove(&oldest);
        }
    }

    /// Keeps a template that was made, if there is room for it.
    pub fn keep(&self, key: Key, template: Template, sources: Sources) -> Result<(), TooLarge> {
        self.make_room(template.bytes);
        let mut state = self.state();
        if state.bytes().saturating_add(template.bytes) > self.most_bytes {
            return Err(TooLarge {
                needed: sizing::mib(template.bytes),
                most: self.most_bytes / MIB,
            });
        }
        state.counts.templates_made += 1;
        let ready = Known::Ready {
            template: Arc::new(template),
            sources,
            used: Instant::now(),
        };
        state.known.insert(key, ready);
        Ok(())
    }

    /// Notes that a template could not be made.
    pub fn fail(&self, key: Key) {
        let mut state = self.state();
        state.counts.templates_failed += 1;
        let since = Instant::now();
        state.known.insert(key, Known::Failed { since });
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl State {
    fn bytes(&self) -> u64 {
        let ready = self.known.values().filter_map(Known::template);
        ready.fold(0, |sum, template| sum.saturating_add(template.bytes))
    }
}

impl Known {
    fn template(&self) -> Option<&Template> {
        match self {
            Self::Ready { template, .. } => Some(template),
            Self::Making { .. } | Self::Failed { .. } => None,
        }
    }
}

/// What there is of a size.
pub enum Found {
    Ready(Arc<Template>),
    /// It is being made, until this is closed.
    Made(watch::Receiver<()>),
    /// It has just been noted as being made. Whoever gets this makes it, and drops it then.
    ToMake(watch::Sender<()>),
    Nothing,
}

#[cfg(test)]
mod tests {
    use super::*;

    fn size(memory_mib: u32, vcpus: u8) -> VmSize {
        VmSize {
            memory_mib,
            vcpus,
            ..VmSize::default()
        }
    }

    #[test]
    fn a_vm_is_forked_from_the_largest_template_that_is_not_larger() {
        let templates = Templates::new(1 << 30, Sharing::Node, 4);
        for (memory_mib, vcpus, expected) in [
            (95, 1, None),
            (96, 1, Some(96)),
            (255, 4, Some(96)),
            (300, 1, Some(256)),
            (512, 1, Some(512)),
            (u32::MAX, 1, Some(1024)),
            (512, 5, None),
        ] {
            let key = templates.key(&size(memory_mib, vcpus), "any");
            let found = key.as_ref().map(|key| key.memory_mib);
            assert_eq!(found, expected, "{memory_mib} {vcpus}");
            assert!(key.is_none_or(|key| key.namespace.is_empty()));
        }
        let none = Templates::new(0, Sharing::Node, 4);
        assert_eq!(none.key(&size(512, 1), "any"), None);
        let own = Templates::new(1, Sharing::Namespace, 4);
        assert_eq!(own.key(&size(512, 1), "a").unwrap().namespace, "a");
        assert!(templates.are_the_nodes() && !own.are_the_nodes());
    }

    #[test]
    fn a_template_is_made_once_and_after_a_failure_not_at_once() {
        let templates = Templates::new(1 << 30, Sharing::Namespace, 1);
        let now = Sources::new();
        let [one, other] = ["a", "b"].map(|name| templates.key(&size(512, 1), name).unwrap());
        let Found::ToMake(_maker) = templates.look(&one, &now) else {
            panic!("the first is to make it");
        };
        assert!(matches!(templates.look(&one, &now), Found::Made(_)));
        assert!(matches!(templates.look(&other, &now), Found::ToMake(_)));
        templates.fail(one.clone());
        assert!(matches!(templates.look(&one, &now), Found::Nothing));
        let status = templates.status();
        assert_eq!(status.counts.templates_failed, 1);
        assert!(status.templates.is_empty());
        templates.count(true, false);
        templates.count(false, true);
        let sentence = templates.status().sentence();
        assert!(
            sentence.starts_with("1 VMs were forked, 1 booted, 1 of these"),
            "{sentence}"
        );
    }
}
