# SPDX-License-Identifier: Apache-2.0
"""Runs an action on both sides in turn, and keeps what each pass measured, as figures with a name and a unit."""
import statistics

from bench.passes import WarmUp


class Lap:
    """What one pass measures on one side."""

    def __init__(self, one_pass, side, samples):
        self.one_pass, self.side, self.samples = one_pass, side, samples

    def __call__(self, name, action):
        """Measures an action; returns its answer."""
        figures, answer = self.one_pass.lap(self.side, action)
        self.note(name, figures)
        return answer

    def transfer(self, name, action, mib):
        """Measures an action that moves so many MiB."""
        self.note(name, self.one_pass.transfer(self.side, action, mib))

    def told(self, name, action, amount=1, what="MiB"):
        """Measures an action that measures itself: {unit: value} is its answer. Counted passes ignore that and divide by
        the amount of what it did."""
        self.note(name, self.one_pass.told(self.side, action, amount, what))

    def note(self, name, figures):
        for unit, value in figures.items():
            self.samples.setdefault((name, unit), []).append(value)


class Comparison:
    """Of two sides: `sides` have a name and a cgroup, the first is ours."""

    def __init__(self, passes, report):
        """`passes` gives the passes in which something is measured that is to be done so many times."""
        self.passes, self.report = passes, report

    def alternate(self, sides, times, action, warm_up=True):
        """`action(side, lap)` on both sides in turn; each goes first as often, as what one leaves to do in the
        background hits both. What is different the first time is done once before."""
        samples = [{} for _ in sides]
        for number, one_pass in enumerate([WarmUp()] * warm_up + self.passes(times)):
            both = list(zip(sides, samples))
            for side, own in both[::-1 if number % 2 else 1]:
                action(side, Lap(one_pass, side, {} if isinstance(one_pass, WarmUp) else own))
        self.report.figures(*samples)


class Report:
    """Prints figures as they come, and keeps them for a file."""

    def __init__(self):
        self.rows = []
        print(f"{'name':<46} {'ours':>10} {'theirs':>10} {'':<18} ratio", flush=True)

    def figures(self, ours, theirs):
        """Medians of what was sampled, {(name, unit): values}."""
        for (name, unit), values in ours.items():
            self.row(name, unit, values, theirs.get((name, unit), []))

    def row(self, name, unit, ours, theirs):
        """A figure by its values in all passes."""
        row = {"name": name, "unit": unit, "ours": statistics.median(ours),
               "theirs": statistics.median(theirs) if theirs else None, "our_values": ours, "their_values": theirs}
        self.rows.append(row)
        ratio = f"{row['ours'] / row['theirs']:.2f}" if row["theirs"] else "-"
        print(f"{name:<46} {shown(row['ours']):>10} {shown(row['theirs']):>10} {unit:<18} {ratio}", flush=True)


def shown(value):
    if value is None:
        return "-"
    return f"{value:.2f}" if abs(value) < 10 else f"{value:.1f}"
