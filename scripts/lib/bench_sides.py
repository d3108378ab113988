"""What the benchmark of streams compares: Bulkhead and containerd with runc, each as a CRI socket with one pod."""
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time

import bench_files
import bench_network
from registry import wait_until
from spdy import Forward, Process

PATIENCE = 120
PAUSE = ["sleep", "100000"]


def milliseconds(action):
    started = time.monotonic()
    answer = action()
    return (time.monotonic() - started) * 1000, answer


class Cri(bench_files.Cri):
    def pull(self, image):
        method = self.channel.unary_unary("/runtime.v1.ImageService/PullImage", lambda one: one.SerializeToString(),
                                          self.messages.PullImageResponse.FromString)
        method(self.messages.PullImageRequest(image={"image": image}), timeout=PATIENCE)


class Side:
    """One runtime with one pod."""

    def __init__(self, name, cri, image, logs):
        self.name, self.cri, self.image, self.logs, self.count = name, cri, image, logs, 0
        os.makedirs(logs)
        cri.pull(image)
        self.security = {"namespace_options": {"pid": cri.messages.CONTAINER}}
        self.sandbox = {"metadata": {"name": name, "uid": name, "namespace": "bench"}, "log_directory": logs,
                        "linux": {"security_context": self.security}}
        self.pod = cri.call("RunPodSandbox", config=self.sandbox).pod_sandbox_id

    def close(self):
        self.cri.call("StopPodSandbox", pod_sandbox_id=self.pod)
        self.cri.call("RemovePodSandbox", pod_sandbox_id=self.pod)

    def start(self, *command, stdin=False):
        self.count += 1
        container = {"metadata": {"name": f"c{self.count}"}, "image": {"image": self.image}, "command": command,
                     "log_path": f"{self.count}.log", "stdin": stdin,
                     "linux": {"security_context": self.security}}
        made = self.cri.call("CreateContainer", pod_sandbox_id=self.pod, config=container,
                             sandbox_config=self.sandbox).container_id
        self.cri.call("StartContainer", container_id=made)
        return made

    def log(self):
        """The log of the container that came last."""
        return f"{self.logs}/{self.count}.log"

    def stop(self, container, grace, code):
        """Returns how long it took, if the container has ended then, and as it should."""
        took, _ = milliseconds(lambda: self.cri.call("StopContainer", container_id=container, timeout=grace))
        status = self.cri.call("ContainerStatus", container_id=container).status
        if status.state != self.cri.messages.CONTAINER_EXITED or status.exit_code != code:
            raise SystemExit(f"{self.name}: after StopContainer: state {status.state}, code {status.exit_code}")
        return took

    def remove(self, container):
        self.cri.call("RemoveContainer", container_id=container)

    def exec_sync(self, container):
        if self.cri.call("ExecSync", container_id=container, cmd=["true"], timeout=60).exit_code:
            raise SystemExit(f"{self.name}: true failed")

    def exec(self, container, *command, stdin=False):
        url = self.cri.call("Exec", container_id=container, cmd=command, stdin=stdin, stdout=True, stderr=True).url
        return Process(url, *["stdin"] * stdin, "stdout", "stderr")

    def attach(self, container):
        url = self.cri.call("Attach", container_id=container, stdin=True, stdout=True, stderr=True).url
        return Process(url, "stdin", "stdout", "stderr")

    def forward(self, port):
        return Forward(self.cri.call("PortForward", pod_sandbox_id=self.pod, port=[port]).url, port)

    def info(self):
        return json.loads(self.cri.call("PodSandboxStatus", pod_sandbox_id=self.pod, verbose=True).info["info"])


class Containerd:
    """containerd with runc, its CRI plugin, and directories of its own."""

    def __init__(self, work, pause):
        self.state = tempfile.mkdtemp(dir=work.name)
        self.socket = f"{self.state}/c.sock"
        config = os.path.join(self.state, "config.toml")
        cri = 'plugins."io.containerd.grpc.v1.cri"'
        with open(config, "w") as file:
            file.write(f'version = 2\nroot = "{self.state}/root"\nstate = "{self.state}/state"\n'
                       f'[grpc]\naddress = "{self.socket}"\n[{cri}]\nsandbox_image = "{pause}"\n'
                       f'stream_server_address = "127.0.0.1"\nstream_server_port = "0"\n'
                       f'[{cri}.cni]\nbin_dir = "/usr/lib/cni"\nconf_dir = "{self.state}/cni"\n')
        bench_network.configure(self.state, "bench-br1", "10.86.0")
        self.daemon = subprocess.Popen(["containerd", "--config", config], stdout=subprocess.DEVNULL,
                                       stderr=subprocess.DEVNULL)
        wait_until(self.up, "containerd with its CRI plugin")

    def up(self):
        listed = subprocess.run(["ctr", "--address", self.socket, "plugins", "ls"], capture_output=True, text=True)
        return re.search(r"\scri\s.*\sok\s", listed.stdout)

    def close(self):
        self.daemon.terminate()
        self.daemon.wait()
        shutil.rmtree(self.state, ignore_errors=True)


def push_pause(registry, project):
    """An image whose own command does not end: containerd runs it as every pod's first process."""
    sys.path.insert(0, f"{project}/tests/images")
    import make_images
    make_images.push(make_images.Registry(f"http://{registry}"), "bench/pause", ["latest"],
                     [make_images.busybox_layer()], {"Cmd": PAUSE})
    return f"{registry}/bench/pause:latest"
