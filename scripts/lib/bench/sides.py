# SPDX-License-Identifier: Apache-2.0
"""The sides of a comparison: runtimes, each with a CRI socket and a cgroup, and their pods."""
from cri import Cri
from daemon import merged
from spdy import Forward, Process

# The command of a container that does nothing.
SLEEP = ["sleep", "100000"]


class Runtime:
    """A running runtime. `daemon` has its socket and its process."""

    def __init__(self, name, cgroup, daemon):
        self.name, self.cgroup, self.daemon, self.cri = name, cgroup, daemon, Cri(daemon.socket)

    def pull(self, image):
        self.cri.call("PullImage", image={"image": image})

    def pod(self, name, logs, cgroup=None, **config):
        return Pod(self, name, logs, cgroup or self.cgroup.child("pods"), config)


class Pod:
    """A pod. `config` has further fields of its sandbox's configuration."""

    def __init__(self, runtime, name, logs, cgroup, config):
        self.runtime, self.name, self.cgroup, self.cri = runtime, runtime.name, runtime.cgroup, runtime.cri
        self.logs, self.count = logs, 0
        self.security = {"namespace_options": {"pid": self.cri.messages.CONTAINER}}
        own = {"metadata": {"name": name, "uid": name, "namespace": "bench"}, "log_directory": logs,
               "linux": {"security_context": self.security, "cgroup_parent": f"/{cgroup.path}"}}
        self.sandbox = merged(own, config)
        self.id = self.cri.call("RunPodSandbox", config=self.sandbox).pod_sandbox_id

    def end(self):
        self.cri.call("StopPodSandbox", pod_sandbox_id=self.id)
        self.cri.call("RemovePodSandbox", pod_sandbox_id=self.id)

    def start(self, image, *command, **config):
        """Creates and starts a container. Returns its id."""
        self.count += 1
        container = {"metadata": {"name": f"c{self.count}"}, "image": {"image": image}, "command": command,
                     "log_path": f"{self.count}.log", "linux": {"security_context": self.security}, **config}
        made = self.cri.call("CreateContainer", pod_sandbox_id=self.id, config=container,
                             sandbox_config=self.sandbox).container_id
        self.cri.call("StartContainer", container_id=made)
        return made

    def log(self):
        """Returns the path of the last container's log."""
        return f"{self.logs}/{self.count}.log"

    def stop(self, container, grace):
        self.cri.call("StopContainer", container_id=container, timeout=grace)

    def require_exit(self, container, code):
        """Requires that the container has exited with this code."""
        status = self.cri.call("ContainerStatus", container_id=container).status
        if status.state != self.cri.messages.CONTAINER_EXITED or status.exit_code != code:
            raise SystemExit(f"{self.name}: after StopContainer: state {status.state}, code {status.exit_code}")

    def remove(self, container):
        self.cri.call("RemoveContainer", container_id=container)

    def run(self, container, *command):
        """Runs a command that must succeed, and returns its output."""
        answer = self.cri.call("ExecSync", container_id=container, cmd=command, timeout=240)
        if answer.exit_code:
            raise SystemExit(f"{self.name}: {command}: {answer.exit_code}: {answer.stderr.decode()}")
        return answer.stdout.decode()

    def exec(self, container, *command, stdin=False):
        url = self.cri.call("Exec", container_id=container, cmd=command, stdin=stdin, stdout=True, stderr=True).url
        return Process(url, *["stdin"] * stdin, "stdout", "stderr")

    def attach(self, container):
        url = self.cri.call("Attach", container_id=container, stdin=True, stdout=True, stderr=True).url
        return Process(url, "stdin", "stdout", "stderr")

    def forward(self, port):
        return Forward(self.cri.call("PortForward", pod_sandbox_id=self.id, port=[port]).url, port)

    def address(self):
        return self.cri.call("PodSandboxStatus", pod_sandbox_id=self.id).status.network.ip
