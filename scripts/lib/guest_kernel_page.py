#!/usr/bin/env python3
"""Writes docs/guest-kernel.md from the options in guest-kernel/*.config: what is built in, what is a module, what is left out.
A test compares the page with the options, so it is true.
usage: scripts/lib/guest_kernel_page.py    writes the page"""
import glob
import os
import re

PROJECT = os.path.realpath(os.path.join(os.path.dirname(__file__), "..", ".."))
PAGE = os.path.join(PROJECT, "docs", "guest-kernel.md")
WIDTH = 120
HEAD = """\
# The guest's kernel

Which options the kernel of every pod has, and why. `scripts/lib/guest_kernel_page.py` writes this page from
`guest-kernel/*.config`; a test fails if it is not up to date. **To find out whether the guest has X**, search here for
its name as in Kconfig, without `CONFIG_`; in a pod, `zcat /proc/config.gz` says the same.

The source is Debian's `linux-source-6.12`. The build starts from `allnoconfig`, adds these options, and fails if Kconfig
does not grant one. What an option selects or needs comes with it and is not listed.

**A module loads by itself** when a program first uses what it implements: a kind of socket, a file system, an interface, a
match of iptables. The kernel asks the agent, which finds the module in `modules.erofs`, the first extent of every VM's
image disk. Nothing is read or mounted before, so a pod that needs no module pays for none. As on any node, some modules load
only for those who may administer the network: BBR and TLS in the kernel (`CAP_NET_ADMIN`). `modprobe` in a container
finds no modules, and need not.

A container with `CAP_SYS_MODULE` can load modules of its own, if they were built for this kernel. They change its own VM only.
"""


class Group:
    """Options that stand below one comment."""

    def __init__(self, comment):
        self.comment = comment
        self.options = []

    def names(self, value):
        """The options with a value: y, m, n, or anything else."""
        plain = [(name, own) for name, own in self.options if own in ("y", "m", "n")]
        other = [f"{name}={own}" for name, own in self.options if own not in ("y", "m", "n")]
        return [name for name, own in plain if own == value] + (other if value == "y" else [])


def groups(text):
    """The groups of a file: each comment and the options up to the next."""
    found, comment = [], []
    for line in text.splitlines():
        if line.startswith("#"):
            comment.append(line.lstrip("# "))
            continue
        option = re.fullmatch(r"CONFIG_(\w+)=(.+)", line)
        if not option:
            continue
        if comment or not found:
            found.append(Group(" ".join(comment)))
            comment = []
        found[-1].options.append(option.groups())
    return found


def wrapped(words, first):
    """A line of Markdown's source, broken between words."""
    lines, line = [], first
    for word in words:
        if len(line) + 1 + len(word) > WIDTH:
            lines.append(line)
            line = word
        else:
            line += " " + word
    return lines + [line]


def title(path):
    """`60-network.config` is about the network."""
    return re.sub(r"^\d+-|\.config$", "", os.path.basename(path)).replace("-", " ").capitalize()


def page(directory):
    """The page for the files of options in a directory."""
    lines = HEAD.splitlines()
    for path in sorted(glob.glob(os.path.join(directory, "*.config"))):
        with open(path, encoding="utf-8") as file:
            found = groups(file.read())
        lines += ["", f"## {title(path)}"]
        for group in found:
            lines.append("")
            if group.comment:
                words = group.comment.split()
                lines += wrapped(words[1:], words[0])
                lines.append("")
            for value, word in (("y", "built in"), ("m", "modules"), ("n", "left out")):
                names = group.names(value)
                if names:
                    quoted = [f"`{name}`" + ("," if name != names[-1] else "") for name in names]
                    lines += wrapped(quoted, f"- {word}:")
    return "\n".join(lines) + "\n"


def main():
    with open(PAGE, "w", encoding="utf-8") as file:
        file.write(page(os.path.join(PROJECT, "guest-kernel")))


if __name__ == "__main__":
    main()
