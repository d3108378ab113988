# SPDX-License-Identifier: Apache-2.0
"""Runs an action on both sides in turn, and collects what each pass measured: figures with a name and a unit."""
import statistics

from bench.passes import WarmUp


class Lap:
    """Measures actions of one side in one pass."""

    def __init__(self, one_pass, side, samples):
        self.one_pass, self.side, self.samples = one_pass, side, samples

    def __call__(self, name, action):
        """Measures an action and returns its result."""
        figures, answer = self.one_pass.lap(self.side, action)
        self.note(name, figures)
        return answer

    def transfer(self, name, action, mib):
        """Measures an action that moves so many MiB."""
        self.note(name, self.one_pass.transfer(self.side, action, mib))

    def told(self, name, action, amount=1, what="MiB"):
        """Measures an action that measures itself and returns {unit: value}. Counted passes ignore that and divide what
        they count by the amount of work that the action did."""
        self.note(name, self.one_pass.told(self.side, action, amount, what))

    def note(self, name, figures):
        for unit, value in figures.items():
            self.samples.setdefault((name, unit), []).append(value)


class Comparison:
    """Compares two sides. A side has a name and a cgroup. The first one is Bulkhead."""

    def __init__(self, passes, report):
        """`passes(times)` returns the passes for an action that is to be measured so many times."""
        self.passes, self.report = passes, report

    def alternate(self, sides, times, action, warm_up=True):
        """Runs `action(side, lap)` on both sides in turn. Each side goes first equally often, so that work which one
        leaves in the background disturbs both alike. A warm-up comes before, because the first time may differ."""
        samples = [{} for _ in sides]
        for number, one_pass in enumerate([WarmUp()] * warm_up + self.passes(times)):
            both = list(zip(sides, samples))
            for side, own in both[::-1 if number % 2 else 1]:
                action(side, Lap(one_pass, side, {} if isinstance(one_pass, WarmUp) else own))
        self.report.figures(*samples)


class Report:
    """Prints figures as they come, and collects them for a file."""

    def __init__(self):
        self.rows = []
        print(f"{'name':<46} {'ours':>10} {'theirs':>10} {'':<18} ratio", flush=True)

    def figures(self, ours, theirs):
        """Adds the medians of samples, which are {(name, unit): values}."""
        for (name, unit), values in ours.items():
            self.row(name, unit, values, theirs.get((name, unit), []))

    def row(self, name, unit, ours, theirs):
        """Adds a figure: the median of its values in all passes."""
        row = {"name": name, "unit": unit, "ours": statistics.median(ours),
               "theirs": statistics.median(theirs) if theirs else None, "our_values": ours, "their_values": theirs}
        self.rows.append(row)
        ratio = f"{row['ours'] / row['theirs']:.2f}" if row["theirs"] else "-"
        print(f"{name:<46} {shown(row['ours']):>10} {shown(row['theirs']):>10} {unit:<18} {ratio}", flush=True)


def shown(value):
    if value is None:
        return "-"
    return f"{value:.2f}" if abs(value) < 10 else f"{value:.1f}"
