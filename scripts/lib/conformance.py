"""Runs critest against a fresh daemon, alone or with containerd as its delegate. scripts/conformance and scripts/test run
this on a KVM host."""
import argparse
import contextlib
import os
import re
import subprocess
import sys
import tempfile

from containerd import Containerd
from daemon import Daemon, write_bridge
from ginkgo import name_of, specs_of
from registry import Registry

PROJECT = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
# Registries from which critest pulls its images.
MIRRORED = ["registry.k8s.io", "k8s.gcr.io", "gcr.io"]
# Regular expressions for names of specs, and why these specs do not apply: to pods in VMs, if no delegate may have pods
# that need the host's namespaces; to pods in VMs; to any runtime here.
WITHOUT_DELEGATE = {
    "HostIpc is true": "a pod has a kernel of its own: no IPC namespace of the host to share",
    "HostNetwork is true": "a pod has a kernel of its own: no network namespace of the host to share",
    "portforward in host network": "its pod has the host's network",
}
IN_VMS = {
    "mount with 'rshared'": "mounts of a guest cannot appear on the host",
}
ANYWHERE = {
    r"\[k8s.io\] AppArmor": "loads profiles into the host's kernel by sudo; a pod in a VM has another kernel",
    "public image with digest": "pulls by a digest that only the public registry has",
}
# Specs that containerd by itself does not pass, and why, so a pod that is its cannot pass them either. --containerd checks
# that each of them still does not pass.
BEYOND_CONTAINERD = {
    "should support returning metrics descriptors": "containerd 2.1 has no ListMetricDescriptors",
    "should support listing pod sandbox metrics": "containerd 2.1 has no ListPodSandboxMetrics",
    "should return image digest in ContainerStatus mounts": "containerd 2.1 does not tell the digest of an image volume",
    "Image Volume.* subPath should": "containerd 2.1 mounts the whole image whatever the subPath",
    "Image Identifier Consistency": "containerd 2.1 does not tell the image_id of a container",
}
OURS, DELEGATE = "bulkhead", "runc"
# Messages of critest when it skips a spec for a reason that is not in the runtime. Any other skip counts as a failure.
SKIPPED_FOR_THE_HOST = re.compile("NRI socket not configured|ID mapping is not supported with path|SELinux")
PATIENCE = "180s"


def push_images(registry, images):
    subprocess.run([sys.executable, os.path.join(PROJECT, "tests/images/conformance_images.py"), "--from", images,
                    "--registry", f"http://{registry}"], check=True)


def not_applicable(options):
    """The specs that do not apply to this run, and why."""
    specs = dict(ANYWHERE)
    if options.default_handler is None and not options.containerd:
        specs |= WITHOUT_DELEGATE
    if options.default_handler != DELEGATE and not options.containerd:
        specs |= IN_VMS
    return specs


def beyond_containerd(options):
    """The specs that are not the runtime's to pass in this run, and why. All of them run."""
    return BEYOND_CONTAINERD if options.containerd or options.default_handler == DELEGATE else {}


def start_containerd(work, registry, result):
    directory = os.path.join(work, "containerd")
    write_bridge(directory, "delegate", "bulkhead3", "10.87.0.0/16",
                 {"type": "portmap", "capabilities": {"portMappings": True}}, hairpinMode=True)
    return Containerd(directory, "registry.k8s.io/pause:3.10", {name: registry for name in MIRRORED},
                      log=os.path.join(result, "containerd.log"))


def start_daemon(work, registry, result, delegation):
    write_bridge(work, "conformance", "bulkhead2", "10.86.0.0/16",
                 {"type": "portmap", "capabilities": {"portMappings": True}}, hairpinMode=True)
    mirrored = {name: {"mirrors": [registry]} for name in MIRRORED}
    config = {"sandbox": {"boot_timeout_seconds": 120}, "registries": {registry: {"plain_http": True}, **mirrored}}
    return Daemon(work, {**config, **delegation}, log=os.path.join(result, "daemon.log"))


@contextlib.contextmanager
def runtime(options, work, registry):
    """Starts what critest tests. Its value has a socket and a process."""
    with contextlib.ExitStack() as running:
        delegation = {}
        if options.containerd or options.default_handler:
            containerd = running.enter_context(start_containerd(work, registry, options.result))
            delegation = {"default_handler": options.default_handler, "host_namespaces_handler": DELEGATE,
                          "runtimes": {DELEGATE: {"cri": f"unix://{containerd.socket}"}}}
        yield containerd if options.containerd else running.enter_context(
            start_daemon(work, registry, options.result, delegation))


def share_of_specs(options):
    """Returns the names of this run's specs: every N-th of those that --focus matches."""
    report = os.path.join(options.result, "specs.json")
    subprocess.run([options.critest, "-ginkgo.dry-run", f"-ginkgo.json-report={report}"], cwd=options.result, check=True,
                   stdout=subprocess.DEVNULL)
    share, shares = options.share
    names = sorted(name for name in map(name_of, specs_of(report)[1]) if re.search(options.focus, name))
    return names[share - 1::shares]


def run_critest(options, endpoint, names, log="critest"):
    """Runs the specs of these names. Returns whether critest ran to its end, its report, and the specs in it."""
    path, log = os.path.join(options.result, f"{log}.json"), os.path.join(options.result, f"{log}.log")
    command = [options.critest, f"-runtime-endpoint={endpoint}", f"-image-endpoint={endpoint}",
               f"-runtime-service-timeout={PATIENCE}", f"-image-service-timeout={PATIENCE}",
               "-ginkgo.no-color", "-ginkgo.v", "-ginkgo.timeout=90m", f"-ginkgo.json-report={path}",
               "-ginkgo.skip=" + "|".join(not_applicable(options))]
    if options.websocket:
        command += ["-websocket-exec", "-websocket-attach", "-websocket-portforward"]
    if options.seed:
        command.append(f"-ginkgo.seed={options.seed}")
    command.append("-ginkgo.focus=(" + "|".join(map(re.escape, names)) + ")$")
    if options.parallel > 1:
        command.append(f"-parallel={options.parallel}")
    # critest --parallel starts ginkgo, which is beside it.
    os.environ["PATH"] = os.path.dirname(options.critest) + ":" + os.environ["PATH"]
    with open(log, "wb") as output:
        code = subprocess.run(command, cwd=options.result, stdout=output, stderr=subprocess.STDOUT).returncode
    try:
        report, specs = specs_of(path)
    except (OSError, ValueError, IndexError):
        with open(log, errors="replace") as file:
            sys.exit(f"conformance: critest ended with {code} and left no report; it said:\n{file.read()[-2000:]}")
    # The exit code says the same of a crash and of a spec that failed.
    failed = [spec for spec in specs if spec["State"] not in ("passed", "skipped")]
    return code == 0 or bool(failed) and not report.get("SpecialSuiteFailureReasons"), report, specs


def message_of(spec):
    return spec.get("Failure", {}).get("Message", spec["State"]).strip()


def said_by(spec):
    """Returns the lines that a spec printed."""
    texts = (spec.get("CapturedStdOutErr", ""), spec.get("CapturedGinkgoWriterOutput", ""))
    return [line for text in texts for line in text.splitlines()]


def why_of(name, patterns):
    return next((why for pattern, why in patterns.items() if re.search(pattern, name)), None)


def outcome(spec, options):
    """Returns what a spec counts as: passed, failed, skipped, n/a (not applicable), beyond containerd, or nothing, and
    why."""
    why, beyond = (why_of(name_of(spec), patterns(options)) for patterns in (not_applicable, beyond_containerd))
    if spec["State"] == "passed":
        if beyond and options.containerd:
            return "failed", f"passes now, and must no more be one of BEYOND_CONTAINERD: {beyond}"
        return "passed", None
    if spec["State"] == "skipped" and why:
        return "n/a", why
    if spec["State"] == "skipped" and "Failure" not in spec:
        return None, None    # a benchmark
    if beyond:
        return "beyond", beyond
    if spec["State"] == "skipped" and SKIPPED_FOR_THE_HOST.search(message_of(spec)):
        return "skipped", message_of(spec)
    return "failed", message_of(spec)


def failures(options, specs, names):
    """Returns the specs of these names that failed, by name."""
    return {name_of(spec): spec for spec in specs
            if name_of(spec) in names and outcome(spec, options)[0] == "failed"}


def once_more(options, endpoint, specs, failed):
    """Runs specs that failed once more, by themselves. Says which passed then, and what they had said. Returns whether
    critest ran to its end, and all specs, each with its last result."""
    with open(options.said, "a") if options.said else contextlib.nullcontext(sys.stdout) as said:
        for name, spec in failed.items():
            print(f"=== {name} failed:\n{message_of(spec)}\n[...]", *said_by(spec)[-60:], sep="\n", file=said)
    ended, _, again = run_critest(options, endpoint, list(failed), "once-more")
    again = {name_of(spec): spec for spec in again if name_of(spec) in failed}
    for name in failed:
        if name in again and outcome(again[name], options)[0] == "passed":
            print(f"UNSTABLE: {name} failed first and passed the second time")
        else:
            print(f"FAILED: {name} failed twice")
    return ended, [again.get(name_of(spec), spec) for spec in specs]


def summary(options, report, specs, names):
    """Prints the table. Returns whether all applicable specs passed and there was at least one."""
    areas, titles = {}, {"n/a": "Not applicable", "skipped": "Skipped by critest itself",
                         "beyond": "Not passed by containerd by itself", "failed": "Failed"}
    kinds, lists = ("passed", *titles), {kind: [] for kind in titles}
    for spec in specs:
        name = name_of(spec)
        kind, why = outcome(spec, options)
        if name not in names or kind is None:
            continue
        area = [*(spec["ContainerHierarchyTexts"] or []), name][0].removeprefix("[k8s.io] ")
        areas.setdefault(area, dict.fromkeys(kinds, 0))[kind] += 1
        if kind in lists:
            lists[kind].append((name, why))
    total = {kind: sum(counts[kind] for counts in areas.values()) for kind in kinds}
    for area, row in [("area", dict(zip(kinds, kinds))), *sorted(areas.items()), ("all", total)]:
        print(f"{area:<44}", *(f"{row[kind]:>7}" for kind in kinds))
    for kind, title in titles.items():
        if lists[kind]:
            print(f"\n{title}:")
        for name, why in lists[kind]:
            print(f"  {name}\n      {why.partition(chr(10))[0]}")
    transport = "WebSocket" if options.websocket else "SPDY"
    share, shares = options.share
    part = f"share {share} of {shares}, " if shares > 1 else ""
    if options.containerd:
        part += "containerd by itself, "
    elif options.default_handler:
        part += f"default handler {options.default_handler}, "
    print(f"\nconformance: {total['passed']} of {total['passed'] + total['failed']} applicable specs passed, {part}streams over "
          f"{transport}, seed {report['SuiteConfig']['RandomSeed']}")
    return total["failed"] == 0 and total["passed"] > 0


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--critest", required=True)
    parser.add_argument("--images", required=True)
    parser.add_argument("--result", required=True)
    parser.add_argument("--websocket", action="store_true")
    parser.add_argument("--seed", type=int)
    parser.add_argument("--parallel", type=int, default=1)
    parser.add_argument("--said", metavar="FILE", help="append to it what specs that failed said; else it is printed")
    parser.add_argument("--focus", default="", metavar="REGEXP")
    parser.add_argument("--share", default=(1, 1), metavar="I/N", help="run part I of N; all parts together have all specs",
                        type=lambda text: tuple(map(int, text.split("/"))))
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--default-handler", choices=[OURS, DELEGATE])
    what.add_argument("--containerd", action="store_true")
    options = parser.parse_args()
    os.makedirs("/var/lib/bulkhead", exist_ok=True)
    with (tempfile.TemporaryDirectory(prefix="conformance-", dir="/var/lib/bulkhead") as work,
          Registry(work) as registry):
        # The users of a container with a user namespace must be able to reach its files below.
        os.chmod(work, 0o711)
        push_images(registry, options.images)
        with runtime(options, work, registry) as tested:
            names = share_of_specs(options)
            endpoint = f"unix://{tested.socket}"
            ended, report, specs = run_critest(options, endpoint, names)
            failed = failures(options, specs, names)
            if ended and failed:
                ended, specs = once_more(options, endpoint, specs, failed)
            if tested.process.poll() is not None:
                sys.exit(f"conformance: the runtime ended with {tested.process.returncode}")
    passed = summary(options, report, specs, set(names))
    # A suite that crashed has no failed specs.
    sys.exit(0 if passed and ended else 1)


if __name__ == "__main__":
    main()
