# SPDX-License-Identifier: Apache-2.0
"""pull: pulls an image of 6 layers (by the clock: 200 MB), and reads the daemon's peak memory. Compared with
containerd. Each pull has a new daemon."""


def peak_mib(pid):
    with open(f"/proc/{pid}/status") as file:
        return next(int(line.split()[1]) for line in file if line.startswith("VmHWM:")) / 1024


def measure(setting):
    image, mib = setting.image("bench"), setting.effort.image_mib

    def pull(side, lap):
        with side.fresh() as runtime:
            lap(f"pull: {mib} MB in 6 layers", lambda: runtime.pull(image))
            lap.note("pull: peak memory of the daemon", {"MiB": peak_mib(runtime.daemon.process.pid)})

    setting.comparison.alternate(setting.starters(), setting.effort.pulls, pull, warm_up=False)
