"""The network benchmark of bench.py: iperf3 between the host and a pod, both ways, against the same between the host
and a network namespace on the same bridge: what a pod without a VM would have."""
import glob
import json
import os
import socket
import subprocess
import time

SECONDS = 4
ROUNDS = 3
NAMESPACE, NEIGHBOR, BRIDGE = "bench-veth", "10.85.0.250", "bench-br"


def configure(state, bridge=BRIDGE, prefix="10.85.0"):
    """Writes the network of a daemon with its state in `state`; it is read when the first pod comes."""
    ipam = {"type": "host-local", "subnet": f"{prefix}.0/24", "rangeEnd": f"{prefix}.200", "dataDir": f"{state}/ipam"}
    os.makedirs(f"{state}/cni")
    with open(f"{state}/cni/1.conflist", "w") as file:
        json.dump({"cniVersion": "1.0.0", "name": "bench",
                   "plugins": [{"type": "bridge", "bridge": bridge, "isGateway": True, "ipam": ipam}]}, file)


class Veth:
    """iperf3 in a namespace that a veth joins to the pods' bridge."""

    def __init__(self):
        for line in (f"ip netns add {NAMESPACE}", f"ip link add {NAMESPACE} type veth peer eth0 netns {NAMESPACE}",
                     f"ip link set {NAMESPACE} master {BRIDGE} up", f"ip -n {NAMESPACE} link set eth0 up",
                     f"ip -n {NAMESPACE} addr add {NEIGHBOR}/24 dev eth0"):
            subprocess.run(line.split(), check=True)
        self.server = subprocess.Popen(["ip", "netns", "exec", NAMESPACE, "iperf3", "-s"], stdout=subprocess.DEVNULL)

    def close(self):
        self.server.kill()
        self.server.wait()
        subprocess.run(["ip", "netns", "del", NAMESPACE], check=True)


def megabits(address, *direction):
    """One run, as the receiver counts; tried again while the server is not up."""
    for _ in range(60):
        command = ["iperf3", "-c", address, "-t", str(SECONDS), "-J", *direction]
        answer = json.loads(subprocess.run(command, capture_output=True, text=True).stdout or "{}")
        if "sum_received" in answer.get("end", {}):
            return answer["end"]["sum_received"]["bits_per_second"] / 1e6
        time.sleep(1)
    raise SystemExit(f"iperf3 on {address} does not answer: {answer}")


def vmm(state):
    with socket.socket(socket.AF_UNIX) as control:
        control.connect(glob.glob(f"{state}/run/pods/*/control*")[0])
        control.sendall(b'{"request": "statistics"}\n')
        return json.loads(control.makefile().readline())


def measure(ours, report, median):
    """`ours` runs a pod with iperf3 as a server."""
    address = os.path.basename(glob.glob(f"{ours.state}/ipam/bench/10.*")[0])
    megabits(address)
    veth = Veth()
    try:
        for name, direction in (("host to pod", []), ("pod to host", ["-R"])):
            before = vmm(ours.state)
            pairs = [(megabits(address, *direction), megabits(NEIGHBOR, *direction)) for _ in range(ROUNDS)]
            after = vmm(ours.state)
            report(f"iperf3: {name}, median", *map(median, zip(*pairs)), "Mbit/s")
            key = "written_bytes" if direction else "read_bytes"
            moved = (after["net"][key] - before["net"][key]) / 1e6
            exits = after["exits_total"] - before["exits_total"]
            frames = after["net"]["requests"] - before["net"]["requests"]
            print(f"  {exits / moved:.0f} VM exits and {frames / moved:.0f} frames a megabyte", flush=True)
    finally:
        veth.close()
        subprocess.run(["ip", "link", "del", BRIDGE], check=True)
