# SPDX-License-Identifier: Apache-2.0
import contextlib
import io
import unittest
from argparse import Namespace
from unittest import mock

import conformance

OPTIONS = Namespace(default_handler=None, containerd=False, said=None)


def spec(name, state, message=None):
    failure = {"Failure": {"Message": message}} if message else {}
    return {"ContainerHierarchyTexts": ["[k8s.io] Pods"], "LeafNodeText": name, "LeafNodeType": "It", "State": state,
            "CapturedGinkgoWriterOutput": f"STEP: {name}\n", **failure}


class Outcome(unittest.TestCase):
    def test_a_skipped_spec_counts_by_the_reason(self):
        table = [(spec("a", "passed"), "passed"), (spec("a", "failed", "no"), "failed"), (spec("a", "panicked"), "failed"),
                 (spec("HostIpc is true", "skipped"), "n/a"), (spec("a benchmark", "skipped"), None),
                 (spec("a", "skipped", "SELinux is off"), "skipped"), (spec("a", "skipped", "not served"), "failed")]
        for one, kind in table:
            self.assertEqual(conformance.outcome(one, OPTIONS)[0], kind, one)

    def test_what_containerd_lacks_is_counted_apart_and_must_not_pass_by_itself(self):
        name = "runtime should support listing pod sandbox metrics [Conformance]"
        by_itself = Namespace(default_handler=None, containerd=True)
        delegate, ours = (Namespace(default_handler=handler, containerd=False) for handler in ("runc", "bulkhead"))
        table = [("failed", by_itself, "beyond"), ("failed", delegate, "beyond"), ("failed", ours, "failed"),
                 ("passed", by_itself, "failed"), ("passed", delegate, "passed"), ("passed", ours, "passed")]
        for state, options, kind in table:
            self.assertEqual(conformance.outcome(spec(name, state), options)[0], kind, (state, options))


class OnceMore(unittest.TestCase):
    def run_again(self, *again):
        first = [spec("good", "passed"), spec("bad", "failed", "no answer"), spec("worse", "failed", "no pod")]
        failed = conformance.failures(OPTIONS, first, {"[k8s.io] Pods bad", "[k8s.io] Pods worse"})
        said = io.StringIO()
        with (mock.patch.object(conformance, "run_critest", return_value=(True, {}, list(again))) as run,
              contextlib.redirect_stdout(said)):
            _, specs = conformance.once_more(OPTIONS, "unix:///nowhere", first, failed)
        self.assertEqual(run.call_args.args[2], ["[k8s.io] Pods bad", "[k8s.io] Pods worse"])
        return said.getvalue(), [one["State"] for one in specs]

    def test_what_passes_then_is_called_unstable_and_what_it_said_first_is_kept(self):
        said, states = self.run_again(spec("bad", "passed"), spec("worse", "failed", "no pod again"))
        self.assertEqual(states, ["passed", "passed", "failed"])
        self.assertIn("UNSTABLE: [k8s.io] Pods bad failed first and passed the second time\n", said)
        self.assertIn("FAILED: [k8s.io] Pods worse failed twice\n", said)
        self.assertIn("=== [k8s.io] Pods bad failed:\nno answer\n[...]\nSTEP: bad\n", said)

    def test_a_spec_that_did_not_run_again_has_failed(self):
        said, states = self.run_again(spec("bad", "passed"))
        self.assertEqual(states, ["passed", "passed", "failed"])
        self.assertIn("FAILED: [k8s.io] Pods worse failed twice\n", said)


if __name__ == "__main__":
    unittest.main()
