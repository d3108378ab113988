# SPDX-License-Identifier: Apache-2.0
"""A CRI client, for Bulkhead and for containerd. Its messages and stubs are generated from proto/proto/cri.proto."""
import functools
import os
import subprocess
import sys
import tempfile

import grpc  # Debian's package, so scripts that use it run with /usr/bin/python3

PROTOCOL = os.path.join(os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__)))), "proto/proto")
# A crowd of pods may have to wait for each other for longer than kubelet would.
PATIENCE_SECONDS = 1200


@functools.cache
def generated():
    """Generates and returns the modules of messages and of stubs."""
    with tempfile.TemporaryDirectory() as directory:
        subprocess.run([sys.executable, "-m", "grpc_tools.protoc", f"-I{PROTOCOL}", f"--python_out={directory}",
                        f"--grpc_python_out={directory}", "cri.proto"], check=True)
        sys.path.insert(0, directory)
        try:
            import cri_pb2
            import cri_pb2_grpc
        finally:
            sys.path.remove(directory)
    return cri_pb2, cri_pb2_grpc


class Cri:
    """A client of both services at one socket."""

    def __init__(self, socket):
        self.messages, stubs = generated()
        channel = grpc.insecure_channel(f"unix:{socket}")
        self.services = stubs.RuntimeServiceStub(channel), stubs.ImageServiceStub(channel)

    def call(self, name, **fields):
        """Calls an RPC of either service by its name, with the fields of its request."""
        method = next(getattr(service, name) for service in self.services if hasattr(service, name))
        return method(getattr(self.messages, f"{name}Request")(**fields), timeout=PATIENCE_SECONDS)

    def answers(self):
        try:
            return self.call("Version")
        except grpc.RpcError:
            return None
