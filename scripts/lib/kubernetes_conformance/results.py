# SPDX-License-Identifier: Apache-2.0
"""What each spec did when it ran last. A file keeps it, so that a run of hours can be done in parts.

A way is how pods come to Bulkhead: `runtime-class`, where an admission policy adds a RuntimeClass and its overhead to
each pod, or `plain`, where pods name none. A setting is where a run was done; a way has one for each number of nodes.
"""
import json
import os
import re

PASSED, FAILED, NOT_RUN = "passed", "failed", "not run"
WAYS = ("runtime-class", "plain")
REASON_LENGTH = 400


def area_of(name):
    """Returns the part of Kubernetes that a spec belongs to: `node` for `[sig-node] Pods ...`."""
    found = re.match(r"\[sig-([a-z-]+)\]", name)
    return found.group(1) if found else "other"


def reason_of(message):
    """Returns a spec's message in one line. What Gomega expected is in it, but not the dump of an object."""
    words = " ".join(re.sub(r"\x1b\[[0-9;]*m", "", message).split())
    return words if len(words) <= REASON_LENGTH else words[:REASON_LENGTH].rsplit(" ", 1)[0] + " ..."


def result_of(spec):
    """Makes a result of a spec in a report of Ginkgo."""
    states = {"passed": PASSED, "skipped": NOT_RUN, "pending": NOT_RUN}
    result = {"state": states.get(spec["State"], FAILED), "seconds": round(spec["RunTime"] / 1e9)}
    if result["state"] != PASSED:
        result["reason"] = reason_of(spec.get("Failure", {}).get("Message") or spec["State"])
    return result


class Results:
    """All results of a file. A file that does not exist has none."""

    def __init__(self, path):
        self.path = path
        self.settings, self.specs = {way: {} for way in WAYS}, {way: {} for way in WAYS}
        if os.path.exists(path):
            with open(path) as file:
                kept = json.load(file)
            for way in WAYS:
                self.settings[way] = kept["settings"].get(way, {})
                self.specs[way] = kept["specs"].get(way, {})

    def know(self, way, names):
        """Notes which specs there are. A spec that the suite no longer has is forgotten."""
        known = self.specs[way]
        self.specs[way] = {name: known.get(name, {"state": NOT_RUN}) for name in sorted(names)}

    def add(self, way, results):
        self.specs[way].update(results)

    def passed(self, way):
        return {name for name, result in self.specs[way].items() if result["state"] == PASSED}

    def write(self):
        """Replaces the file. Each spec is a line of it, so that a change can be read."""
        lines = []
        for way in WAYS:
            specs = [f"   {json.dumps(name)}: {json.dumps(result, sort_keys=True)}"
                     for name, result in sorted(self.specs[way].items())]
            lines.append(f'  {json.dumps(way)}: {{' + ("\n" + ",\n".join(specs) + "\n  " if specs else "") + "}")
        new = f"{self.path}.new"
        with open(new, "w") as file:
            file.write(f'{{\n "settings": {json.dumps(self.settings, sort_keys=True)},\n "specs": {{\n' +
                       ",\n".join(lines) + "\n }\n}\n")
        os.replace(new, self.path)
