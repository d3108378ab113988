# SPDX-License-Identifier: Apache-2.0
import os
import re
import tempfile
import unittest

from kubernetes_conformance import page
from kubernetes_conformance.results import REASON_LENGTH, Results, area_of, reason_of, result_of
from kubernetes_conformance.suite import batches, focus_of, in_order

POD, VOLUME = "[sig-node] Pods should run (a|b) [Conformance]", "[sig-storage] EmptyDir should hold [Conformance]"
SERIAL = "[sig-node] Taints should evict [Serial] [Conformance]"


def spec(state, **more):
    return {"State": state, "RunTime": 12_400_000_000, **more}


class Reports(unittest.TestCase):
    def test_a_state_of_ginkgo_becomes_a_result(self):
        table = [
            (spec("passed"), {"state": "passed", "seconds": 12}),
            (spec("skipped", Failure={"Message": "needs two nodes"}),
             {"state": "not run", "seconds": 12, "reason": "needs two nodes"}),
            (spec("failed", Failure={"Message": "timed out\n\nafter 300s"}),
             {"state": "failed", "seconds": 12, "reason": "timed out after 300s"}),
            (spec("panicked", Failure={"Message": ""}), {"state": "failed", "seconds": 12, "reason": "panicked"}),
            (spec("timedout"), {"state": "failed", "seconds": 12, "reason": "timedout"}),
        ]
        for given, wanted in table:
            self.assertEqual(result_of(given), wanted)

    def test_a_long_reason_ends_at_a_word(self):
        reason = reason_of("word " * 1000)
        self.assertLessEqual(len(reason), REASON_LENGTH + 4)
        self.assertTrue(reason.endswith("word ..."))

    def test_a_name_says_its_area(self):
        for name, area in ((POD, "node"), ("[sig-api-machinery] Watchers", "api-machinery"), ("Pods", "other")):
            self.assertEqual(area_of(name), area)


class Selection(unittest.TestCase):
    def test_the_focus_matches_these_specs_and_no_others(self):
        focus = re.compile(focus_of([POD, VOLUME]))
        for text, matches in ((f"Kubernetes e2e suite {POD}", True), (f"Kubernetes e2e suite {POD} twice", False),
                              ("Kubernetes e2e suite " + POD.replace("(a|b)", "a"), False)):
            self.assertEqual(bool(focus.search(text)), matches, text)

    def test_areas_come_in_order_and_specs_that_run_alone_are_apart(self):
        names = in_order([SERIAL, "[sig-apps] Job", VOLUME, POD, "[sig-auth] Tokens"])
        self.assertEqual(batches(names, 2), [[POD], [SERIAL], [VOLUME, "[sig-apps] Job"], ["[sig-auth] Tokens"]])


class Files(unittest.TestCase):
    def test_a_later_run_adds_to_the_file(self):
        with tempfile.TemporaryDirectory() as work:
            path = os.path.join(work, "results.json")
            first = Results(path)
            first.know("runtime-class", [POD, VOLUME, "[sig-node] gone"])
            first.add("runtime-class", {POD: {"state": "passed", "seconds": 3}})
            first.settings["runtime-class"]["1"] = {"kernel": "6.1"}
            first.write()
            second = Results(path)
            second.know("runtime-class", [POD, VOLUME])
            second.settings["runtime-class"]["2"] = {"kernel": "6.2"}
            second.add("plain", {POD: {"state": "failed", "reason": "x"}})
            second.write()
            third = Results(path)
        self.assertEqual(third.passed("runtime-class"), {POD})
        self.assertEqual(third.specs["runtime-class"], {POD: {"state": "passed", "seconds": 3}, VOLUME: {"state": "not run"}})
        self.assertEqual(third.specs["plain"], {POD: {"state": "failed", "reason": "x"}})
        self.assertEqual(third.settings["runtime-class"], {"1": {"kernel": "6.1"}, "2": {"kernel": "6.2"}})


class Page(unittest.TestCase):
    def setUp(self):
        self.results = Results("/nonexistent")
        self.results.specs["runtime-class"] = {
            POD: {"state": "passed", "alone": True}, SERIAL: {"state": "failed", "reason": "no <nil> | address"},
            "[sig-node] hosts [Conformance]": {"state": "failed", "reason": "HostNetwork"}, VOLUME: {"state": "not run"},
            "[sig-apps] spreads [Conformance]": {"state": "passed", "nodes": 2}}
        self.results.settings["runtime-class"] = {"1": {"kernel": "6.1"}, "2": {"kernel": "6.2"}}
        self.causes = [page.Cause({"spec": "hosts", "why": "The pod wants the host's network."})]
        self.text = page.page(self.results, self.causes)

    def test_the_table_counts_by_area(self):
        self.assertEqual(page.counts(self.results.specs["runtime-class"]),
                         [("apps", 1, 1, 0, 0), ("node", 3, 1, 2, 0), ("all", 4, 2, 2, 0)], "areas of which something ran")
        self.assertIn("| node | 3 | 1 | 2 | 0 |", self.text)

    def test_each_spec_that_failed_has_a_reason(self):
        self.assertIn("| `no <nil> \\| address` |", self.text)
        self.assertIn("| The pod wants the host's network. |", self.text)

    def test_specs_that_passed_only_alone_or_on_several_nodes_are_named(self):
        self.assertTrue(self.text.endswith(f"### Passed only when run again alone\n\n- {POD}\n"
                                           "\n### Passed in a cluster of several nodes\n\n- [sig-apps] spreads [Conformance]\n"))

    def test_each_number_of_nodes_has_a_line(self):
        for kernel in ("6.1", "6.2"):
            self.assertIn(f"| {kernel} |", self.text)

    def test_a_way_that_never_ran_has_no_section(self):
        self.assertNotIn(page.TITLES["plain"], self.text)

    def test_the_causes_that_are_kept_can_be_read(self):
        self.assertTrue(all(cause.why.endswith(".") for cause in page.read_causes()))


if __name__ == "__main__":
    unittest.main()
