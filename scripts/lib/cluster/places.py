# SPDX-License-Identifier: Apache-2.0
"""The addresses of a cluster. They can be the same for every cluster, because each has a network namespace of its own.
The manifests in tests/cluster name some of them."""

# The machine outside of the nodes: API server and registry.
OUTSIDE = "10.99.0.1"
API = f"https://{OUTSIDE}:6443"
REGISTRY_PORT = 5000
REGISTRY = f"{OUTSIDE}:{REGISTRY_PORT}"
# A kept cluster has a second card, on which this machine reaches it.
OUTSIDE_KEPT = "10.99.1.1"
SERVICES = "10.96.0.0/16"
API_SERVICE = "10.96.0.1"


def node_name(number):
    return f"node-{number}"


def node_address(number):
    return f"10.99.0.{number + 1}"
