# SPDX-License-Identifier: Apache-2.0
"""The blocks of docs/kubernetes.md: a cluster has what the page says, word for word.

    python3 -m cluster.page FILE    prints the block under a file's name
"""
import os
import sys

PAGE = os.path.join(os.path.dirname(os.path.abspath(__file__)), "../../../docs/kubernetes.md")


def block(name):
    """Returns the code block after the first mention of a file."""
    with open(PAGE) as file:
        _, named, after = file.read().partition(f"`{name}`")
    _, begun, after = after.partition("\n```")
    text, ended, _ = after.partition("\n```")
    if not (named and begun and ended):
        sys.exit(f"docs/kubernetes.md has no block for {name}: cluster.page reads the one after `{name}`")
    return text.partition("\n")[2] + "\n"


if __name__ == "__main__":
    print(block(sys.argv[1]), end="")
