# SPDX-License-Identifier: Apache-2.0
"""Prints a run beside an earlier one: python3 -m bench.compare EARLIER LATER, both files of figures."""
import sys

from bench import kept
from bench.comparison import shown


def rows(run):
    return {(row["name"], row["unit"]): row for row in run["rows"]}


def change(before, now):
    return f"{(now / before - 1) * 100:+.1f} %" if before and now is not None else "-"


def main(earlier, later):
    runs = kept.read(earlier), kept.read(later)
    if runs[0]["counted"] != runs[1]["counted"]:
        sys.exit(f"{earlier} and {later} cannot be compared: one is counted, the other is timed")
    before, now = map(rows, runs)
    print(f"{'name':<46} {'unit':<18} {'ours then':>10} {'now':>10} {'':>8} {'theirs then':>12} {'now':>10}")
    for key, row in now.items():
        if key not in before:
            continue
        old = before[key]
        print(f"{key[0]:<46} {key[1]:<18} {shown(old['ours']):>10} {shown(row['ours']):>10} "
              f"{change(old['ours'], row['ours']):>8} {shown(old['theirs']):>12} {shown(row['theirs']):>10} "
              f"{change(old['theirs'], row['theirs']):>8}")
    only = [*(f"only now: {name}, {unit}" for name, unit in now if (name, unit) not in before),
            *(f"only then: {name}, {unit}" for name, unit in before if (name, unit) not in now)]
    print(*only, sep="\n", end="\n" * bool(only))


main(*sys.argv[1:])
