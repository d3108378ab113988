# SPDX-License-Identifier: Apache-2.0
"""Runs what a cluster has outside of its nodes: etcd, API server, controllers, scheduler, and the registry of images.

    python3 -m cluster.control_plane STATE CLIENTS NODES

Runs in the cluster's network namespace, until it is ended; then all of them end. STATE gets admin.conf, logs/, and the
file `ready` once the API is ready. STATE/share, which the nodes see, gets the files of each node. CLIENTS is where
scripts/build-clients put the programs; NODES is the number of nodes.
"""
import os
import shutil
import ssl
import sys
import time
import urllib.error
import urllib.request

from background import ENDS_WITH_US
from cluster import places
from cluster.authority import Authority
from cluster.services import Services
from registry import Registry, can_connect

ETCD = "http://127.0.0.1:2379"
CONTROLLERS_PORT, SCHEDULER_PORT = 10257, 10259


def certify(state, nodes):
    """Makes all certificates and kubeconfig files."""
    authority = Authority(f"{state}/pki")
    addresses = ["127.0.0.1", places.OUTSIDE, places.OUTSIDE_KEPT, places.API_SERVICE]
    names = ["localhost", "kubernetes", "kubernetes.default", "kubernetes.default.svc",
             "kubernetes.default.svc.cluster.local"]
    authority.certify("apiserver", "/CN=kube-apiserver", *(f"IP:{one}" for one in addresses),
                      *(f"DNS:{one}" for one in names))
    authority.certify("kubelet-client", "/O=system:masters/CN=kube-apiserver-kubelet-client")
    authority.certify("front-proxy", "/CN=front-proxy")
    authority.service_account_key()
    authority.kubeconfig(f"{state}/admin.conf", places.API, "/O=system:masters/CN=admin")
    for name in ("kube-controller-manager", "kube-scheduler"):
        authority.kubeconfig(f"{state}/{name}.conf", places.API, f"/CN=system:{name}")
    for number in range(1, nodes + 1):
        name = places.node_name(number)
        directory = f"{state}/share/{name}"
        os.makedirs(f"{directory}/pki")
        shutil.copy(f"{state}/pki/ca.crt", f"{directory}/pki/ca.crt")
        authority.kubeconfig(f"{directory}/kubelet.conf", places.API, f"/O=system:nodes/CN=system:node:{name}")


def api_server(clients, pki):
    return [
        f"{clients}/kube-apiserver", "--etcd-servers", ETCD, "--bind-address", "0.0.0.0", "--secure-port", "6443",
        "--advertise-address", places.OUTSIDE, "--service-cluster-ip-range", places.SERVICES,
        "--tls-cert-file", f"{pki}/apiserver.crt", "--tls-private-key-file", f"{pki}/apiserver.key",
        "--client-ca-file", f"{pki}/ca.crt",
        "--service-account-issuer", "https://kubernetes.default.svc.cluster.local",
        "--service-account-key-file", f"{pki}/sa.pub", "--service-account-signing-key-file", f"{pki}/sa.key",
        "--authorization-mode", "Node,RBAC", "--enable-admission-plugins", "NodeRestriction", "--allow-privileged=true",
        "--kubelet-client-certificate", f"{pki}/kubelet-client.crt", "--kubelet-client-key", f"{pki}/kubelet-client.key",
        "--kubelet-preferred-address-types", "InternalIP",
        # The API server reaches pods by the route to their subnet, and no Service, because no kube-proxy runs here.
        "--enable-aggregator-routing=true",
        "--requestheader-client-ca-file", f"{pki}/ca.crt", "--requestheader-allowed-names", "front-proxy",
        "--requestheader-username-headers", "X-Remote-User", "--requestheader-group-headers", "X-Remote-Group",
        "--requestheader-extra-headers-prefix", "X-Remote-Extra-",
        "--proxy-client-cert-file", f"{pki}/front-proxy.crt", "--proxy-client-key-file", f"{pki}/front-proxy.key"]


def controllers(clients, state):
    config = f"{state}/kube-controller-manager.conf"
    return [
        f"{clients}/kube-controller-manager", "--kubeconfig", config, "--authentication-kubeconfig", config,
        "--authorization-kubeconfig", config, "--leader-elect=false", "--use-service-account-credentials=true",
        "--root-ca-file", f"{state}/pki/ca.crt", "--service-account-private-key-file", f"{state}/pki/sa.key",
        "--cluster-signing-cert-file", f"{state}/pki/ca.crt", "--cluster-signing-key-file", f"{state}/pki/ca.key",
        # An emulated node is slow; its kubelet may be late.
        "--node-monitor-grace-period", "120s"]


def scheduler(clients, state):
    config = f"{state}/kube-scheduler.conf"
    return [f"{clients}/kube-scheduler", "--kubeconfig", config, "--authentication-kubeconfig", config,
            "--authorization-kubeconfig", config, "--leader-elect=false"]


def is_api_ready(pki):
    """Returns a function that says whether the API server is ready."""
    context = ssl.create_default_context(cafile=f"{pki}/ca.crt")
    context.load_cert_chain(f"{pki}/kubelet-client.crt", f"{pki}/kubelet-client.key")

    def asks():
        try:
            with urllib.request.urlopen(f"{places.API}/readyz", context=context, timeout=5) as answer:
                return answer.status == 200
        except (OSError, urllib.error.URLError):
            return False
    return asks


def main(state, clients, nodes):
    certify(state, int(nodes))
    services = Services(f"{state}/logs", ENDS_WITH_US)
    os.makedirs(f"{state}/registry")
    services.adopt("registry", Registry(f"{state}/registry", places.REGISTRY_PORT, places.OUTSIDE,
                                        log=services.log("registry")).process)
    services.start("etcd", [f"{clients}/etcd", "--data-dir", f"{state}/etcd", "--unsafe-no-fsync",
                            "--listen-client-urls", ETCD, "--advertise-client-urls", ETCD,
                            "--listen-peer-urls", "http://127.0.0.1:2380"])
    services.wait("etcd", lambda: can_connect(2379))
    services.start("kube-apiserver", api_server(clients, f"{state}/pki"))
    services.wait("kube-apiserver", is_api_ready(f"{state}/pki"))
    services.start("kube-controller-manager", controllers(clients, state))
    services.start("kube-scheduler", scheduler(clients, state))
    services.wait("kube-controller-manager", lambda: can_connect(CONTROLLERS_PORT))
    services.wait("kube-scheduler", lambda: can_connect(SCHEDULER_PORT))
    open(f"{state}/ready", "w").close()
    while True:
        services.check_all()
        time.sleep(1)


main(*sys.argv[1:])
