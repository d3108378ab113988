# SPDX-License-Identifier: Apache-2.0
"""What each workload did when it ran last. A file keeps it, so that a long run can be done in parts."""
import json
import os
import re

PASSED, FAILED, NOT_RUN = "passed", "failed", "not run"
REPORT = "workload: "
REASON_LENGTH = 600


def reason_of(said, code):
    """Returns why a test failed in one line: what it panicked with, or else the end of what it said."""
    if code is None:
        return "it did not end in time; " + one_line(said[-REASON_LENGTH // 2:])
    found = re.search(r"panicked at [^\n]*\n(.*?)(?:\nnote: |\nstack backtrace:|\Z)", said, re.DOTALL)
    return one_line(found.group(1) if found else said[-REASON_LENGTH:])


def one_line(text):
    words = " ".join(text.split())
    return words if len(words) <= REASON_LENGTH else words[:REASON_LENGTH].rsplit(" ", 1)[0] + " ..."


def result_of(ran, project, day):
    """Makes a result of what inside.py says of a workload. A test that ran nothing has not passed."""
    reports = []
    for line in ran["said"].splitlines():
        # The harness writes the name of a test without an end of line.
        before, found, report = line.partition(REPORT)
        if found and (not before or before.startswith("test ")):
            reports.append(json.loads(report))
    result = {"seconds": ran["seconds"], "host": ran["host"], "project": project, "day": day}
    result["title"] = next((report["title"] for report in reports if "title" in report), "")
    result["cases"] = [[report["case"], report["right"], report["seen"]] for report in reports if "case" in report]
    if ran["code"] == 0 and result["cases"]:
        return {**result, "state": PASSED}
    wrong = [f"{case}: {seen}" for case, right, seen in result["cases"] if not right]
    return {**result, "state": FAILED, "reason": one_line("; ".join(wrong)) if wrong else reason_of(ran["said"], ran["code"])}


class Results:
    """All results of a file. A file that does not exist has none."""

    def __init__(self, path):
        self.path, self.workloads = path, {}
        if os.path.exists(path):
            with open(path) as file:
                self.workloads = json.load(file)

    def know(self, names):
        """Notes which workloads there are. One that the suite no longer has is forgotten."""
        self.workloads = {name: self.workloads.get(name, {"state": NOT_RUN}) for name in sorted(names)}

    def add(self, name, result):
        self.workloads[name] = result

    def passed(self):
        return {name for name, result in self.workloads.items() if result["state"] == PASSED}

    def write(self):
        """Replaces the file. Each workload is a line of it, so that a change can be read."""
        lines = [f" {json.dumps(name)}: {json.dumps(result, sort_keys=True, ensure_ascii=False)}"
                 for name, result in sorted(self.workloads.items())]
        new = f"{self.path}.new"
        with open(new, "w") as file:
            file.write("{\n" + ",\n".join(lines) + "\n}\n")
        os.replace(new, self.path)
