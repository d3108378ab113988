# SPDX-License-Identifier: Apache-2.0
"""Starts what a cluster has on a node: the daemon, kubelet and kube-proxy. Leaves them running.

    python3 -m cluster.node SHARE CLIENTS NUMBER

Runs on a KVM host that has the node's address. SHARE/NAME is the node's directory: it has the files that
cluster.control_plane made for the node, and gets the logs and the file `pids`. CLIENTS is where scripts/build-clients put
the programs. kubelet's files are where a real node has them: /etc/kubernetes, /var/lib/kubelet, /var/log/pods.
"""
import os
import shutil
import subprocess
import sys

from background import STAYS
from cluster import places
from cluster.services import Services
from daemon import Daemon, write_bridge
from registry import can_connect

PROJECT = os.path.dirname(os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__)))))
SETTINGS = os.path.join(PROJECT, "tests/cluster/node")
# A host's own disk is mounted here. Not every file system that kubelet needs can be mounted on an overlay.
DISK = "/var/lib/bulkhead"
ON_DISK = {"kubelet": "/var/lib/kubelet", "pod-logs": "/var/log/pods", "container-logs": "/var/log/containers",
           "local": "/var/lib/local"}
CGROUPS = "/sys/fs/cgroup"
KUBELET_PORT, PROXY_PORT = 10248, 10256


def mount_directories():
    """Puts the directories of kubelet on the disk. Mounts below propagate, as under systemd."""
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


def start_daemon(services, clients, number):
    write_bridge("/run/bulkhead", "cluster", "pods0", places.node_pods(number),
                 {"type": "portmap", "capabilities": {"portMappings": True}}, hairpinMode=True)
    config = {"socket": "/run/bulkhead/bulkhead.sock", "run_dir": "/run/bulkhead", "state_dir": f"{DISK}/daemon",
              # Some pods of the tests start at once, and the CPU of an emulated host is slow.
              "sandbox": {"boot_timeout_seconds": 120},
              "cni": {"bin_dirs": [clients]},
              "registries": {places.REGISTRY: {"plain_http": True}}}
    services.adopt("bulkhead", Daemon("/run/bulkhead", config, log=services.log("bulkhead"), holder=STAYS).process)


def start_kubelet(services, clients, number):
    enter = ["sh", "-c", f"echo $$ >{cgroup_of_kubelet()}/cgroup.procs && exec \"$@\"", "kubelet"]
    services.start("kubelet", [
        *enter, f"{clients}/kubelet", "--config", f"{SETTINGS}/kubelet.yaml", "--kubeconfig", "/etc/kubernetes/kubelet.conf",
        "--hostname-override", places.node_name(number), "--node-ip", places.node_address(number),
        "--node-labels", "bulkhead.dev/runtime=true", "--v", "2"])
    services.wait("kubelet", lambda: can_connect(KUBELET_PORT))


def start_proxy(services, clients, number):
    services.start("kube-proxy", [f"{clients}/kube-proxy", "--config", f"{SETTINGS}/kube-proxy.yaml",
                                  "--hostname-override", places.node_name(number)])
    services.wait("kube-proxy", lambda: can_connect(PROXY_PORT))


def main(share, clients, number):
    directory = f"{share}/{places.node_name(number)}"
    shutil.copytree(directory, "/etc/kubernetes", dirs_exist_ok=True)
    mount_directories()
    services = Services(f"{directory}/logs", STAYS)
    start_daemon(services, clients, number)
    start_kubelet(services, clients, number)
    start_proxy(services, clients, number)
    with open(f"{directory}/pids", "w") as file:
        file.writelines(f"{pid} {name}\n" for name, pid in services.pids().items())
    services.leave()


main(sys.argv[1], sys.argv[2], int(sys.argv[3]))
