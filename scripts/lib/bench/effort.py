# SPDX-License-Identifier: Apache-2.0
"""How much a run does of everything. A counted host is slow and its figures repeat well, so little is enough there."""
import dataclasses


@dataclasses.dataclass
class Effort:
    boots: int = 7
    pods: int = 7
    commands: int = 15
    containers: int = 7
    connections: int = 9
    transfers: int = 3
    pulls: int = 3
    # MiB through a stream and through a network. On hardware, use 1024.
    mib: int = 32
    image_mib: int = 200
    file_mib: int = 128
    file_rounds: int = 2
    random_requests: int = 2000
    small_files: int = 2000
    crowds: tuple = (25, 50)
    memory_pods: tuple = (1, 10, 50)
    # Bulkhead's sandbox.parallel_boots; 0: the default.
    parallel_boots: int = 0


TIMED = Effort()
COUNTED = dataclasses.replace(TIMED, boots=5, transfers=3, pulls=3, mib=8, image_mib=24, file_mib=4, file_rounds=1,
                              random_requests=100, small_files=50, crowds=(4,))
