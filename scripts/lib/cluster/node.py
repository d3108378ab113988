# SPDX-License-Identifier: Apache-2.0
"""Starts what a cluster has on a node: containerd, the daemon and kubelet. Leaves them running.

    python3 -m cluster.node SHARE CLIENTS NUMBER

Runs on a KVM host that has the node's address. SHARE/NAME is the node's directory: it has the files that
cluster.control_plane made for the node, and gets the logs and the file `pids`. CLIENTS is where scripts/build-clients put
the programs. The files are where a real node has them: /etc/kubernetes, /var/lib/kubelet, /var/log/pods, and those of CNI,
which are empty: a DaemonSet installs them.
"""
import os
import shutil
import subprocess
import sys
import tomllib

from background import STAYS
from cluster import places
from cluster.page import block
from cluster.services import Services
from containerd import RUNTIME, Containerd
from daemon import Daemon, merged
from registry import can_connect

PROJECT = os.path.dirname(os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__)))))
SETTINGS = os.path.join(PROJECT, "tests/cluster")
# A host's own disk is mounted here. Not every file system that kubelet needs can be mounted on an overlay.
DISK = "/var/lib/bulkhead"
ON_DISK = {"kubelet": "/var/lib/kubelet", "pod-logs": "/var/log/pods", "container-logs": "/var/log/containers",
           "local": "/var/lib/local", "cni-conf": "/etc/cni/net.d", "cni-bin": "/opt/cni/bin"}
CNI = {"conf_dir": "/etc/cni/net.d", "bin_dirs": ["/opt/cni/bin"]}
CGROUPS = "/sys/fs/cgroup"
KUBELET_PORT = 10248


def mount_directories():
    """Puts the directories of kubelet and CNI on the disk. Mounts below propagate, as under systemd."""
    subprocess.run(["mount", "--make-rshared", "/"], check=True)
    for name, target in ON_DISK.items():
        os.makedirs(f"{DISK}/{name}", exist_ok=True)
        os.makedirs(target, exist_ok=True)
        subprocess.run(["mount", "--bind", f"{DISK}/{name}", target], check=True)


def cgroup_of_kubelet():
    """Makes a cgroup for kubelet, as systemd does. Outside of one, kubelet sends no limits of swap."""
    cgroup = f"{CGROUPS}/system.slice/kubelet.service"
    os.makedirs(cgroup, exist_ok=True)
    with open(f"{CGROUPS}/system.slice/cgroup.subtree_control", "w") as file:
        file.write("+cpu +memory +pids")
    return cgroup


def start_containerd(services):
    config = {"root": f"{DISK}/containerd/root", "state": "/run/containerd",
              "grpc": {"address": "/run/containerd/containerd.sock"}, "plugins": {RUNTIME: {"cni": CNI}}}
    containerd = Containerd(f"{DISK}/containerd", f"{places.REGISTRY}/test/pause:latest", {places.REGISTRY: places.REGISTRY},
                            config, log=services.log("containerd"), holder=STAYS)
    services.adopt("containerd", containerd.process)


def start_daemon(services):
    """Starts the daemon with containerd as its delegate, as the page says."""
    config = {"socket": "/run/bulkhead/bulkhead.sock", "run_dir": "/run/bulkhead", "state_dir": f"{DISK}/daemon",
              # Some pods of the tests start at once, and the CPU of an emulated host is slow.
              "sandbox": {"boot_timeout_seconds": 120},
              "cni": CNI,
              "registries": {places.REGISTRY: {"plain_http": True}}}
    config = merged(config, tomllib.loads(block("trusted.toml")))
    services.adopt("bulkhead", Daemon("/run/bulkhead", config, log=services.log("bulkhead"), holder=STAYS).process)


def start_kubelet(services, clients, number):
    enter = ["sh", "-c", f"echo $$ >{cgroup_of_kubelet()}/cgroup.procs && exec \"$@\"", "kubelet"]
    services.start("kubelet", [
        *enter, f"{clients}/kubelet", "--config", f"{SETTINGS}/kubelet.yaml", "--kubeconfig", "/etc/kubernetes/kubelet.conf",
        "--hostname-override", places.node_name(number), "--node-ip", places.node_address(number), "--v", "2"])
    services.wait("kubelet", lambda: can_connect(KUBELET_PORT))


def main(share, clients, number):
    directory = f"{share}/{places.node_name(number)}"
    shutil.copytree(directory, "/etc/kubernetes", dirs_exist_ok=True)
    mount_directories()
    services = Services(f"{directory}/logs", STAYS)
    start_containerd(services)
    start_daemon(services)
    start_kubelet(services, clients, number)
    with open(f"{directory}/pids", "w") as file:
        file.writelines(f"{pid} {name}\n" for name, pid in services.pids().items())
    services.leave()


main(sys.argv[1], sys.argv[2], int(sys.argv[3]))
