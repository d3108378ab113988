# SPDX-License-Identifier: Apache-2.0
"""net: iperf3 moves --mib MiB between host and pod, both ways. Compared with the same between the host and a network
namespace on a veth of the same bridge, which is what a pod without a VM would have. A counted pass counts both ends,
because one is in the VM."""
import contextlib
import json
import subprocess
import time

from bench.setting import bridge_of

NAMESPACE, NEIGHBOR = "bench-veth", "10.85.0.250"
TRIES = 60


class End:
    """An iperf3 server. Its client runs in the cgroup of the same side."""

    def __init__(self, name, cgroup, address):
        self.name, self.cgroup, self.address = name, cgroup, address
        self.client = cgroup.child("client")

    def move(self, mib, direction):
        """Runs iperf3 once and returns the receiver's figure. Retries while the server is not up."""
        command = ["iperf3", "-c", self.address, "-n", f"{mib}M", "-J", *direction]
        for _ in range(TRIES):
            answer = json.loads(subprocess.run(command, capture_output=True, text=True,
                                               preexec_fn=self.client.enter).stdout or "{}")
            if "sum_received" in answer.get("end", {}):
                return {"Mbit/s": answer["end"]["sum_received"]["bits_per_second"] / 1e6}
            time.sleep(1)
        raise SystemExit(f"iperf3 at {self.address} does not answer: {answer}")


@contextlib.contextmanager
def veth(cgroup):
    """Runs an iperf3 server in a network namespace that a veth joins to the pods' bridge."""
    for line in (f"ip netns add {NAMESPACE}", f"ip link add {NAMESPACE} type veth peer eth0 netns {NAMESPACE}",
                 f"ip link set {NAMESPACE} master {bridge_of('bulkhead')} up", f"ip -n {NAMESPACE} link set eth0 up",
                 f"ip -n {NAMESPACE} addr add {NEIGHBOR}/24 dev eth0"):
        subprocess.run(line.split(), check=True)
    server = subprocess.Popen(["ip", "netns", "exec", NAMESPACE, "iperf3", "-s"], stdout=subprocess.DEVNULL,
                              preexec_fn=cgroup.child("server").enter)
    try:
        yield End("veth", cgroup, NEIGHBOR)
    finally:
        server.kill()
        server.wait()
        subprocess.run(["ip", "netns", "del", NAMESPACE], check=True)


def measure(setting):
    image, effort = setting.image("iperf3"), setting.effort
    with setting.bulkhead() as ours:
        ours.pull(image)
        pod = ours.pod("net", setting.directory("logs"))
        pod.start(image, "iperf3", "-s")
        with veth(setting.cgroup.child("veth")) as neighbor:
            for name, direction in (("host to pod", []), ("pod to host", ["-R"])):
                setting.comparison.alternate(
                    [End("pod", ours.cgroup, pod.address()), neighbor], effort.transfers,
                    lambda end, lap: lap.told(f"iperf3: {name}, {effort.mib} MiB", lambda: end.move(effort.mib, direction),
                                              effort.mib))
        pod.end()
