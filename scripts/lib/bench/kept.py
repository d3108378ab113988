# SPDX-License-Identifier: Apache-2.0
"""The file of a run's figures. `python3 -m bench.kept FILE PART...` joins the parts that the benchmarks wrote."""
import json
import sys


def read(path):
    with open(path) as file:
        return json.load(file)


def write(path, counted, rows):
    with open(path, "w") as file:
        json.dump({"counted": counted, "rows": rows}, file, indent=1)


if __name__ == "__main__":
    parts = [read(path) for path in sys.argv[2:]]
    write(sys.argv[1], parts[0]["counted"], [row for part in parts for row in part["rows"]])
