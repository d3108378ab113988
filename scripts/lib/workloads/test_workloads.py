# SPDX-License-Identifier: Apache-2.0
import os
import tempfile
import unittest

from workloads import page
from workloads.results import REASON_LENGTH, Results, result_of

TITLE = 'workload: {"title": "Redis: keeps what it confirmed"}'
RIGHT = 'workload: {"case": "writes", "right": true, "seen": "500"}'
WRONG = 'workload: {"case": "killed", "right": false, "seen": "exit code 0: a | b `c`"}'
PANIC = "thread 'x' panicked at tests/src/workload.rs:1:2:\npull: not\n  found\nnote: run with `RUST_BACKTRACE=1`"


def ran(code, *lines):
    return {"name": "databases::redis", "code": code, "said": "\n".join(lines), "seconds": 7, "host": "emulated"}


def result(code, *lines):
    return result_of(ran(code, *lines), "abc", "2026-11-30")


class ResultsOfRuns(unittest.TestCase):
    def test_a_run_becomes_a_result(self):
        passed = result(0, f"test databases::redis ... {TITLE}", RIGHT, "ok")
        self.assertEqual(passed, {"state": "passed", "seconds": 7, "host": "emulated", "project": "abc", "day": "2026-11-30",
                                  "title": "Redis: keeps what it confirmed", "cases": [["writes", True, "500"]]})

    def test_a_failure_has_a_reason(self):
        table = [
            ((101, TITLE, RIGHT, WRONG, PANIC), "killed: exit code 0: a | b `c`"),
            ((101, TITLE, PANIC), "pull: not found"),
            ((None, TITLE, RIGHT), "it did not end in time;"),
            # A program that runs no test says that all went well.
            ((0, "running 0 tests"), "running 0 tests"),
            ((101, "word " * 1000), "word"),
        ]
        for given, wanted in table:
            seen = result(*given)
            self.assertEqual(seen["state"], "failed", given)
            self.assertTrue(seen["reason"].startswith(wanted), seen)
            self.assertLessEqual(len(seen["reason"]), REASON_LENGTH + 4)


class Files(unittest.TestCase):
    def test_a_later_run_adds_to_the_file_and_forgets_what_is_gone(self):
        with tempfile.TemporaryDirectory() as work:
            path = os.path.join(work, "workloads.json")
            first = Results(path)
            first.know(["a", "gone"])
            first.add("a", result(0, TITLE, RIGHT))
            first.write()
            second = Results(path)
            second.know(["a", "b"])
            second.write()
            third = Results(path)
        self.assertEqual(third.passed(), {"a"})
        self.assertEqual(third.workloads["b"], {"state": "not run"})
        self.assertNotIn("gone", third.workloads)


class Page(unittest.TestCase):
    def test_each_workload_has_a_line_and_what_was_seen(self):
        results = Results("/nonexistent")
        results.know(["databases::redis", "network::sctp", "web::nginx"])
        results.add("databases::redis", result(0, TITLE, RIGHT))
        results.add("network::sctp", result(101, TITLE, WRONG, PANIC))
        text = page.page(results)
        self.assertIn("3 workloads: 1 passed, 1 failed, 1 not run.", text)
        self.assertIn("| redis | Redis: keeps what it confirmed | passed | 7 |", text)
        self.assertIn("| nginx |  | not run |  |", text)
        self.assertIn("- writes: `500`", text)
        self.assertIn("- **wrong**, killed: `exit code 0: a | b 'c'`", text)
        self.assertIn("**Failed**: `killed: exit code 0: a | b 'c'`", text)


if __name__ == "__main__":
    unittest.main()
