// SPDX-License-Identifier: Apache-2.0
//! Imitates kubelet's part on the host for one pod: the directories, files and mounts that kubelet makes before it
//! creates a container. They are removed on drop.

use std::fs::{self, Permissions};
use std::os::unix::fs::{PermissionsExt, chown, symlink};
use std::path::{Path, PathBuf};
use std::process::Command;

use bulkhead_proto::cri::{ContainerConfig, Mount};

/// The volumes of one pod, below a root directory that is reached by a link, as kubelet's often is.
#[derive(Debug)]
pub struct Kubelet {
    root: tempfile::TempDir,
    pod: PathBuf,
    mounted: Vec<PathBuf>,
    states: usize,
}

impl Kubelet {
    /// Makes the directories for the pod with this uid.
    pub fn new(uid: &str) -> Self {
        // /var/lib/bulkhead is a disk; not every file system can be mounted on an emulated host's root, an overlay.
        fs::create_dir_all("/var/lib/bulkhead").expect("make /var/lib/bulkhead");
        let root = tempfile::Builder::new()
            .prefix("kubelet-")
            .tempdir_in("/var/lib/bulkhead")
            .expect("a root for kubelet");
        fs::create_dir(root.path().join("real")).expect("kubelet's real root");
        symlink("real", root.path().join("link")).expect("a link to it");
        let pod = root.path().join("link/pods").join(uid);
        fs::create_dir_all(pod.join("volumes")).expect("the pod's directory");
        Self {
            root,
            pod,
            mounted: Vec::new(),
            states: 0,
        }
    }

    /// The line of a daemon's configuration that names this kubelet's root directory.
    pub fn config(&self) -> String {
        let root = self.root.path().join("link");
        format!("volumes.kubelet_roots = [\"{}\"]", root.display())
    }

    /// Makes a volume's directory with mode 0777, as kubelet does.
    pub fn volume(&self, plugin: &str, name: &str) -> PathBuf {
        let path = self.pod.join("volumes").join(plugin).join(name);
        fs::create_dir_all(&path).expect("a volume's directory");
        fs::set_permissions(&path, Permissions::from_mode(0o777)).expect("its mode");
        path
    }

    pub fn empty_dir(&self, name: &str) -> PathBuf {
        self.volume("kubernetes.io~empty-dir", name)
    }

    /// Makes an emptyDir in memory with a size limit.
    pub fn memory_dir(&mut self, name: &str, size_kib: u64) -> PathBuf {
        let path = self.empty_dir(name);
        let size = format!("mode=0777,size={size_kib}k");
        self.mount(&["-t", "tmpfs", "-o", &size, "tmpfs"], &path);
        path
    }

    /// Makes an emptyDir of huge pages.
    pub fn huge_page_dir(&mut self, name: &str, page_size: &str) -> PathBuf {
        let path = self.empty_dir(name);
        let size = format!("mode=0777,pagesize={page_size}");
        self.mount(&["-t", "hugetlbfs", "-o", &size, "nodev"], &path);
        path
    }

    /// Makes an emptyDir on a small file system of its own on the host.
    pub fn disk_dir(&mut self, name: &str, size_mib: u64) -> PathBuf {
        let path = self.empty_dir(name);
        let disk = self.root.path().join(format!("{name}.disk"));
        let file = fs::File::create(&disk).expect("a disk");
        file.set_len(size_mib << 20).expect("its size");
        let made = Command::new("mkfs.ext4").arg("-qF").arg(&disk).status();
        assert!(made.expect("run mkfs.ext4").success(), "mkfs.ext4");
        self.mount(&["-o", "loop", &disk.display().to_string()], &path);
        fs::set_permissions(&path, Permissions::from_mode(0o777)).expect("its mode");
        path
    }

    /// Gives a volume to a group, as kubelet does for `fsGroup`.
    pub fn set_group(&self, volume: &Path, gid: u32) {
        chown(volume, None, Some(gid)).expect("chown");
        fs::set_permissions(volume, Permissions::from_mode(0o2775)).expect("chmod");
    }

    /// Bind-mounts `sub_path` of a volume, which is created if it does not exist, where kubelet mounts it.
    pub fn sub_path(&mut self, volume: &Path, sub_path: &str, container: &str) -> PathBuf {
        let source = volume.join(sub_path);
        if !source.exists() {
            fs::create_dir_all(&source).expect("the sub-path");
        }
        let name = volume.file_name().expect("a volume's name");
        let directory = self.pod.join("volume-subpaths").join(name).join(container);
        let path = directory.join(self.mounted.len().to_string());
        if source.is_dir() {
            fs::create_dir_all(&path).expect("the mount point");
        } else {
            fs::create_dir_all(&directory).expect("the mount point's directory");
            fs::write(&path, "").expect("the mount point");
        }
        let source = source.display().to_string();
        self.mount(&["--bind", &source], &path);
        path
    }

    /// Writes a new state of a volume and swaps it in by `..data`, as kubelet does.
    pub fn write(&mut self, volume: &Path, files: &[(&str, &str)], mode: u32) {
        self.states += 1;
        let state = format!("..2026_11_25_{}", self.states);
        let old = fs::read_link(volume.join("..data")).ok();
        fs::create_dir(volume.join(&state)).expect("a state's directory");
        for (name, content) in files {
            let path = volume.join(&state).join(name);
            fs::write(&path, content).expect("a file");
            fs::set_permissions(&path, Permissions::from_mode(mode)).expect("its mode");
        }
        symlink(&state, volume.join("..data_tmp")).expect("a link");
        fs::rename(volume.join("..data_tmp"), volume.join("..data")).expect("swap");
        for (name, _) in files {
            let link = volume.join(name);
            if link.symlink_metadata().is_err() {
                symlink(Path::new("..data").join(name), link).expect("a link");
            }
        }
        for entry in fs::read_dir(volume).expect("list the volume").flatten() {
            let name = entry.file_name().to_string_lossy().into_owned();
            if !name.starts_with("..") && files.iter().all(|(one, _)| *one != name) {
                fs::remove_file(entry.path()).expect("remove a link");
            }
        }
        if let Some(old) = old {
            fs::remove_dir_all(volume.join(old)).expect("remove the old state");
        }
    }

    /// Writes a file in the pod's directory, such as `etc-hosts` or `containers/main/0a1b`.
    pub fn file(&self, path: &str, content: &str) -> PathBuf {
        let path = self.pod.join(path);
        fs::create_dir_all(path.parent().expect("a parent")).expect("its directory");
        fs::write(&path, content).expect("a file");
        fs::set_permissions(&path, Permissions::from_mode(0o666)).expect("its mode");
        path
    }

    fn mount(&mut self, arguments: &[&str], at: &Path) {
        let status = Command::new("mount").args(arguments).arg(at).status();
        assert!(status.expect("run mount").success(), "mount {arguments:?}");
        self.mounted.push(at.to_owned());
    }

    /// Removes everything, as kubelet does after the pod.
    pub fn clean_up(&mut self) {
        for path in self.mounted.drain(..).rev() {
            // After a failed test, a mount may still be busy.
            let _ = Command::new("umount").arg("-l").arg(path).status();
        }
        let _ = fs::remove_dir_all(&self.pod);
    }
}

impl Drop for Kubelet {
    fn drop(&mut self) {
        self.clean_up();
    }
}

/// A writable mount of a host path.
pub fn mount(host_path: &Path, container_path: &str) -> Mount {
    Mount {
        host_path: host_path.display().to_string(),
        container_path: container_path.into(),
        ..Default::default()
    }
}

/// A read-only mount of a host path.
pub fn readonly(host_path: &Path, container_path: &str) -> Mount {
    Mount {
        readonly: true,
        ..mount(host_path, container_path)
    }
}

/// A container's configuration with mounts.
pub fn with_mounts(config: ContainerConfig, mounts: Vec<Mount>) -> ContainerConfig {
    ContainerConfig { mounts, ..config }
}
