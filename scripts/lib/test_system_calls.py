# SPDX-License-Identifier: Apache-2.0
import unittest

import system_calls

RULES = """vcpu\tioctl\t16\targument 1: 0xae80 0xae81\t
vcpu\tmmap\t9\targument 2: without 0x4\t
vcpu\tbrk\t12\t\tthe heap grows
io\tread\t0\t\t
"""
COUNTS = """# event histogram
#
# trigger info: hist:keys=id:vals=hitcount:sort=hitcount:size=1024 if comm == "io" || comm ~ "io[0-9]*" [active]
#

{ id:          0 } hitcount:         31

Totals:
    Hits: 31
# event histogram
#
# trigger info: hist:keys=id:vals=hitcount:sort=hitcount:size=1024 if comm == "vcpu" || comm ~ "vcpu[0-9]*" [active]
#

{ id:         16 } hitcount:          7
# trigger info: hist:keys=cmd:vals=hitcount:sort=hitcount:size=1024 if comm == "vcpu" || comm ~ "vcpu[0-9]*" [active]
{ cmd:      44672 } hitcount:          7
"""


class Comparison(unittest.TestCase):
    def test_what_nothing_used_is_named_and_what_is_seldom_is_not_wrong(self):
        found = system_calls.counts(COUNTS) + system_calls.counts(COUNTS)
        lines = list(system_calls.report(list(system_calls.rules(RULES)), found))
        self.assertEqual(lines, [
            ("vcpu: may make 3 system calls, made 14 in this run", False),
            ("FAILED: the list of vcpu has ioctl 0xae81, which nothing used", True),
            ("FAILED: the list of vcpu has mmap, which nothing used", True),
            ("vcpu: brk was not used, as may be: the heap grows", False),
            ("io: may make 1 system calls, made 62 in this run", False),
        ])


if __name__ == "__main__":
    unittest.main()
