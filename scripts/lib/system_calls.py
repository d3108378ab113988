# SPDX-License-Identifier: Apache-2.0
"""Compares what the threads of VMMs and file servers may call with what they called in a run of all tests. A rule that
nothing used is one too many. Part of scripts/test.

usage: python3 scripts/lib/system_calls.py RULES COUNTS...   RULES: what `bulkhead-vmm system-calls` prints; COUNTS: what
    `scripts/lib/system-calls stop` wrote on each host"""
import re
import sys
from collections import Counter, namedtuple
from pathlib import Path

Rule = namedtuple("Rule", "kind call number argument values seldom")
IOCTL = "ioctl"


def rules(text):
    """The rules that `bulkhead-vmm system-calls` prints."""
    for line in text.splitlines():
        kind, call, number, condition, seldom = line.split("\t")
        values = re.fullmatch(r"argument (\d+): ((?:0x[0-9a-f]+ ?)+)", condition)
        yield Rule(kind, call, int(number), int(values[1]) if values else None,
                   [int(value, 16) for value in values[2].split()] if values else [], seldom)


def counts(text):
    """How often each kind of thread made each call, and each ioctl: {(kind, "id" or "cmd", value): hits}."""
    found = Counter()
    for part in text.split("# trigger info: ")[1:]:
        kind = re.search(r'comm == "([^"]+)"', part)[1]
        for field, value, hits in re.findall(r"\{ (id|cmd): +(\d+) +\} hitcount: +(\d+)", part):
            found[kind, field, int(value)] += int(hits)
    return found


def unused(rule, found):
    """What of a rule nothing used."""
    if not found[rule.kind, "id", rule.number]:
        return [rule.call]
    if rule.call != IOCTL:
        return []
    return [f"{rule.call} {value:#x}" for value in rule.values if not found[rule.kind, "cmd", value]]


def report(all_rules, found):
    """Lines for people, each with whether it tells of a rule that is one too many."""
    kinds = dict.fromkeys(rule.kind for rule in all_rules)
    for kind in kinds:
        of_kind = [rule for rule in all_rules if rule.kind == kind]
        called = sum(hits for (name, field, _), hits in found.items() if name == kind and field == "id")
        yield f"{kind}: may make {len(of_kind)} system calls, made {called} in this run", False
        for rule in of_kind:
            for what in unused(rule, found):
                if rule.seldom:
                    yield f"{kind}: {what} was not used, as may be: {rule.seldom}", False
                else:
                    yield f"FAILED: the list of {kind} has {what}, which nothing used", True


def main(rules_file, *count_files):
    if not any(Path(name).stat().st_size for name in count_files):
        print("NOT CHECKED: no host could count system calls")
        return 0
    found = Counter()
    for name in count_files:
        found.update(counts(Path(name).read_text()))
    wrong = False
    for line, is_wrong in report(list(rules(Path(rules_file).read_text())), found):
        print(line)
        wrong |= is_wrong
    return 1 if wrong else 0


if __name__ == "__main__":
    if len(sys.argv) < 3:
        sys.exit(__doc__)
    sys.exit(main(*sys.argv[1:]))
