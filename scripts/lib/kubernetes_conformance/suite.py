# SPDX-License-Identifier: Apache-2.0
"""Runs the suite's program: lists specs, and runs some of them in the cluster of $KUBECONFIG."""
import os
import re
import subprocess
import tempfile

from ginkgo import name_of, specs_of
from kubernetes_conformance.results import area_of, result_of

# In this order, because what depends most on the runtime should be known first.
AREAS = ("node", "storage", "network", "apps")
MARK = r"\[Conformance\]"


class Suite:
    """`programs` has e2e.test and ginkgo. `repositories` is the file that says where the images are. What a spec that
    failed wrote is left in `logs`."""

    def __init__(self, programs, repositories, logs):
        self.program, self.ginkgo = os.path.join(programs, "e2e.test"), os.path.join(programs, "ginkgo")
        self.environment = {**os.environ, "KUBE_TEST_REPO_LIST": repositories}
        self.logs = logs

    def names(self):
        """Returns the names of all conformance specs."""
        with tempfile.TemporaryDirectory() as work:
            report = os.path.join(work, "report.json")
            subprocess.run([self.program, "--ginkgo.dry-run", f"--ginkgo.focus={MARK}", f"--ginkgo.json-report={report}"],
                           env=self.environment, cwd=work, stdout=subprocess.DEVNULL, check=True)
            return [name_of(spec) for spec in specs_of(report)[1] if spec["State"] == "passed"]

    def run(self, names, procs):
        """Runs these specs, `procs` at a time. Returns their results."""
        with tempfile.TemporaryDirectory() as work:
            report, log = os.path.join(work, "report.json"), os.path.join(self.logs, "suite.log")
            command = [self.ginkgo, f"--procs={procs}", "--no-color", "--silence-skips", "--timeout=12h", "--json-report=report.json",
                       f"--output-dir={work}", f"--focus={focus_of(names)}", self.program, "--", "--provider=local",
                       "--disable-log-dump", "--delete-namespace-on-failure=true", f"--e2e-output-dir={work}"]
            with open(log, "ab") as output:
                code = subprocess.run(command, env=self.environment, cwd=work, stdout=output,
                                      stderr=subprocess.STDOUT).returncode
            if not os.path.exists(report):
                raise SystemExit(f"conformance: the suite ended with {code} and left no report; see {log}")
            wanted, results = set(names), {}
            for spec in specs_of(report)[1]:
                if name_of(spec) in wanted:
                    results[name_of(spec)] = result_of(spec)
                    self.keep(spec)
            return results

    def keep(self, spec):
        """Writes what a spec that failed said into a file of its own."""
        if spec["State"] in ("passed", "skipped"):
            return
        name = re.sub(r"[^A-Za-z0-9]+", "-", name_of(spec)).strip("-")[:180]
        with open(os.path.join(self.logs, f"{name}.log"), "w") as file:
            file.write(f"{name_of(spec)}\n{spec.get('Failure', {}).get('Message', '')}\n\n"
                       f"{spec.get('CapturedGinkgoWriterOutput', '')}\n")


def focus_of(names):
    """Returns a regular expression for exactly these specs: Ginkgo matches it with the suite's name before a spec's."""
    return "(" + "|".join(map(re.escape, names)) + ")$"


def in_order(names):
    """Sorts names by area. Specs that must run alone come last in their area."""
    def key(name):
        area = area_of(name)
        return AREAS.index(area) if area in AREAS else len(AREAS), area, "[Serial]" in name, name
    return sorted(names, key=key)


def batches(names, size):
    """Cuts names into parts, in their order. Specs that must run alone are never beside others."""
    parts = []
    for name in names:
        serial = "[Serial]" in name
        if not parts or parts[-1][0] != serial or len(parts[-1][1]) == size:
            parts.append((serial, []))
        parts[-1][1].append(name)
    return [part for _, part in parts]
