# SPDX-License-Identifier: Apache-2.0
"""Starts `bulkhead serve` with its own configuration and directory. Nothing else in scripts/ starts a daemon."""
import json
import os

from background import start, wait_until

PROGRAMS = os.environ.get("BULKHEAD_PROGRAMS", "target/bulkhead")


def program(name):
    return os.path.join(PROGRAMS, name)


def toml(table, path=()):
    """Returns a table of tables, strings, numbers, booleans and lists as TOML."""
    plain = {key: value for key, value in table.items() if not isinstance(value, dict)}
    lines = [f"[{'.'.join(map(json.dumps, path))}]"] if path and plain else []
    # For these types, JSON's notation is also TOML's.
    lines += [f"{json.dumps(key)} = {json.dumps(value)}" for key, value in plain.items()]
    lines += [toml(value, (*path, key)) for key, value in table.items() if isinstance(value, dict)]
    return "\n".join(lines)


def merged(table, other):
    """Returns `table` with the entries of `other` added or replaced."""
    result = dict(table)
    for key, value in other.items():
        inner = result.get(key)
        result[key] = merged(inner, value) if isinstance(inner, dict) and isinstance(value, dict) else value
    return result


def write_bridge(directory, name, bridge, subnet, *plugins, **more):
    """Writes a CNI configuration into `directory`/cni: a bridge, then `plugins`. `more` are further keys of the
    bridge."""
    os.makedirs(f"{directory}/cni")
    ipam = {"type": "host-local", "dataDir": f"{directory}/addresses", "ranges": [[{"subnet": subnet}]],
            "routes": [{"dst": "0.0.0.0/0"}]}
    first = {"type": "bridge", "bridge": bridge, "isGateway": True, "ipam": ipam, **more}
    with open(f"{directory}/cni/10-bridge.conflist", "w") as file:
        json.dump({"cniVersion": "1.0.0", "name": name, "plugins": [first, *plugins]}, file)


class Daemon:
    """A daemon that lives as long as its `with` block.

    All its files are in `directory`, unless `config` says otherwise. `config` has further keys of its configuration as
    nested dictionaries. Pods get the network that is configured in `directory`/cni. `options` are those of
    background.start.
    """

    def __init__(self, directory, config, **options):
        own = {"socket": f"{directory}/run/cri.sock", "state_dir": f"{directory}/state", "run_dir": f"{directory}/run",
               "cni": {"conf_dir": f"{directory}/cni"}}
        config, path = merged(own, config), f"{directory}/config.toml"
        self.socket = config["socket"]
        self.hint = f"; see {options['log']}" if options.get("log") else ""
        os.makedirs(directory, exist_ok=True)
        with open(path, "w") as file:
            file.write(toml(config) + "\n")
        self.process = start([program("bulkhead"), "serve", "--config", path], **options)
        wait_until(self.is_up, f"bulkhead serve{self.hint}")

    def is_up(self):
        if self.process.poll() is not None:
            raise SystemExit(f"bulkhead serve ended with {self.process.returncode}{self.hint}")
        return os.path.exists(self.socket)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.process.terminate()
        self.process.wait()
