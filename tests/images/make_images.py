#!/usr/bin/env python3
"""Makes the small images that the tests, the quickstart and the benchmarks use, and pushes them to a registry.

Their content comes from this machine's Debian packages (busybox-static) or is generated here, so no other
registry is needed. The formats vary on purpose: OCI and Docker manifests, indexes, gzip, zstd and plain layers.

    make_images.py --registry http://127.0.0.1:5000 [--only NAME ...] [--bench-mib 200]
"""
import argparse
import glob
import gzip
import hashlib
import io
import json
import os
import random
import subprocess
import sys
import tarfile
import tempfile
import urllib.error
import urllib.request

OCI = "application/vnd.oci.image"
DOCKER = "application/vnd.docker"
PATH = "PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
MTIME = 1_700_000_000
# Where Debian's iptables has its matches and targets.
EXTENSIONS = "/usr/lib/x86_64-linux-gnu/xtables"


def digest(data):
    return "sha256:" + hashlib.sha256(data).hexdigest()


class Registry:
    """A client that pushes by the distribution protocol, with monolithic uploads only."""

    def __init__(self, url):
        self.url = url.rstrip("/")

    def request(self, method, url, data=None, **headers):
        headers = {key.replace("_", "-"): value for key, value in headers.items()}
        request = urllib.request.Request(url, data=data, method=method, headers=headers)
        with urllib.request.urlopen(request, timeout=120) as response:
            return response.headers

    def push_blob(self, name, data):
        where = f"{self.url}/v2/{name}/blobs/{digest(data)}"
        try:
            self.request("HEAD", where)
            return
        except urllib.error.HTTPError as error:
            if error.code != 404:
                raise
        location = self.request("POST", f"{self.url}/v2/{name}/blobs/uploads/", b"")["Location"]
        joiner = "&" if "?" in location else "?"
        self.request("PUT", f"{location}{joiner}digest={digest(data)}", data,
                     Content_Type="application/octet-stream")

    def push_manifest(self, name, reference, media_type, manifest):
        data = json.dumps(manifest).encode()
        self.request("PUT", f"{self.url}/v2/{name}/manifests/{reference}", data, Content_Type=media_type)
        return {"mediaType": media_type, "digest": digest(data), "size": len(data)}


class Layer:
    """A layer: a tar that is written entry by entry."""

    def __init__(self):
        self.buffer = io.BytesIO()
        self.tar = tarfile.open(fileobj=self.buffer, mode="w", format=tarfile.PAX_FORMAT)

    def add(self, path, kind=tarfile.REGTYPE, data=b"", mode=0o644, **fields):
        info = tarfile.TarInfo(path)
        info.type, info.mode, info.mtime = kind, mode, MTIME
        if kind == tarfile.REGTYPE:
            info.size = len(data)
        for field, value in fields.items():
            setattr(info, field, value)
        self.tar.addfile(info, io.BytesIO(data) if kind == tarfile.REGTYPE else None)
        return self

    def directory(self, path, mode=0o755, **fields):
        return self.add(path, tarfile.DIRTYPE, mode=mode, **fields)

    def symlink(self, path, target):
        return self.add(path, tarfile.SYMTYPE, mode=0o777, linkname=target)

    def hardlink(self, path, target, mode=0o644):
        """Adds a second name of a file. Some runtimes give the file the mode that stands here, so it must be the same."""
        return self.add(path, tarfile.LNKTYPE, linkname=target, mode=mode)

    def done(self):
        self.tar.close()
        return self.buffer.getvalue()


def compress(tar, how):
    if how == "gzip":
        return gzip.compress(tar, 6, mtime=0), f"{OCI}.layer.v1.tar+gzip"
    if how == "zstd":
        return subprocess.run(["zstd", "-q", "-c"], input=tar, stdout=subprocess.PIPE, check=True).stdout, \
            f"{OCI}.layer.v1.tar+zstd"
    return tar, f"{OCI}.layer.v1.tar"


def push(registry, name, tags, layers, config=None, how="gzip", docker=False, architecture="amd64"):
    """Pushes one single-platform image; returns the descriptor of its manifest."""
    hows = how if isinstance(how, list) else [how] * len(layers)
    descriptors = []
    for tar, one in zip(layers, hows):
        blob, media_type = compress(tar, one)
        if docker:
            media_type = f"{DOCKER}.image.rootfs.diff.tar.gzip"
        registry.push_blob(name, blob)
        descriptors.append({"mediaType": media_type, "digest": digest(blob), "size": len(blob)})
    image = {"architecture": architecture, "os": "linux", "created": "2023-11-14T22:13:20Z",
             "config": {"Env": [PATH], "Cmd": ["sh"], **(config or {})},
             "rootfs": {"type": "layers", "diff_ids": [digest(tar) for tar in layers]},
             "history": [{"created": "2023-11-14T22:13:20Z", "created_by": "make_images.py"} for _ in layers]}
    blob = json.dumps(image).encode()
    registry.push_blob(name, blob)
    manifest = {
        "schemaVersion": 2,
        "mediaType": f"{DOCKER}.distribution.manifest.v2+json" if docker else f"{OCI}.manifest.v1+json",
        "config": {"mediaType": f"{DOCKER}.container.image.v1+json" if docker else f"{OCI}.config.v1+json",
                   "digest": digest(blob), "size": len(blob)},
        "layers": descriptors}
    descriptor = None
    for tag in tags:
        descriptor = registry.push_manifest(name, tag, manifest["mediaType"], manifest)
    return {**descriptor, "platform": {"architecture": architecture, "os": "linux"}}


def push_artifact(registry, name, tag, blobs):
    """Pushes an artifact; each of `blobs` is its media type, its title or None, and its bytes."""
    empty = b"{}"
    registry.push_blob(name, empty)
    layers = []
    for media_type, title, data in blobs:
        registry.push_blob(name, data)
        layers.append({"mediaType": media_type, "digest": digest(data), "size": len(data),
                       "annotations": {"org.opencontainers.image.title": title} if title else {}})
    registry.push_manifest(name, tag, f"{OCI}.manifest.v1+json", {
        "schemaVersion": 2, "mediaType": f"{OCI}.manifest.v1+json", "artifactType": "application/vnd.bulkhead.tests",
        "config": {"mediaType": "application/vnd.oci.empty.v1+json", "digest": digest(empty), "size": len(empty)},
        "layers": layers})


def push_index(registry, name, tag, manifests):
    media_type = f"{OCI}.index.v1+json"
    registry.push_manifest(name, tag, media_type,
                           {"schemaVersion": 2, "mediaType": media_type, "manifests": manifests})


def busybox_layer():
    with open("/bin/busybox", "rb") as file:
        binary = file.read()
    applets = subprocess.run(["/bin/busybox", "--list"], stdout=subprocess.PIPE, check=True, text=True)
    layer = Layer()
    for path in ("bin", "etc", "home", "root", "tmp", "usr", "usr/bin", "var", "var/log", "dev", "proc", "sys"):
        layer.directory(path, mode=0o1777 if path == "tmp" else 0o755)
    layer.add("bin/busybox", data=binary, mode=0o755)
    for applet in applets.stdout.split():
        if applet != "busybox":
            layer.symlink(f"bin/{applet}", "busybox")
    layer.add("etc/passwd", data=b"root:x:0:0:root:/root:/bin/sh\n"
                                 b"www-data:x:33:33:www:/home:/bin/sh\nnobody:x:65534:65534::/:/bin/sh\n")
    layer.add("etc/group", data=b"root:x:0:\nwww-data:x:33:\nextra:x:1234:www-data\nnogroup:x:65534:\n")
    return layer.done()


def oddities():
    """Returns three layers with every kind of whiteout, and with entries that simple unpackers lose."""
    long_name = "long/" + "/".join(["n" * 100, "m" * 120, "o" * 250])
    bottom = (Layer().add("gone", data=b"gone").add("kept", data=b"kept").add("changed", data=b"old")
              .directory("removed").add("removed/file", data=b"x")
              .directory("opaque").add("opaque/below", data=b"x").directory("opaque/sub").add("opaque/sub/below")
              .directory("merged").add("merged/below", data=b"below")
              .add("file-then-dir", data=b"file").directory("dir-then-file").add("dir-then-file/x")
              .add("hard-a", data=b"linked").hardlink("hard-b", "hard-a")
              .add("setuid", data=b"#!/bin/sh\n", mode=0o4755).directory("sticky", mode=0o1777)
              .add("owned", data=b"x", uid=1000, gid=100_000, mode=0o640)
              .add("null", tarfile.CHRTYPE, mode=0o666, devmajor=1, devminor=3)
              .add("fifo", tarfile.FIFOTYPE, mode=0o600)
              .symlink("link", "kept").symlink("dangling", "/no/such/" + "d" * 200)
              .add(long_name, data=b"long").add("./dotted/name", data=b"dotted")
              .add("xattr", data=b"x", pax_headers={"SCHILY.xattr.user.colour": "blue"})
              .add("old", data=b"old", mtime=1).add("empty").add("big", data=bytes(range(256)) * 20_000)
              .directory("private", mode=0o750, uid=33, gid=33, pax_headers={"SCHILY.xattr.user.colour": "red"}, mtime=7)
              .directory("private/sub", mode=0o700, uid=34, gid=35).directory("emptied", mode=0o700).done())
    middle = (Layer().add(".wh.gone").add(".wh.removed")
              .directory("opaque").add("opaque/.wh..wh..opq").add("opaque/above", data=b"above")
              .add("changed", data=b"new").directory("merged").add("merged/above", data=b"above")
              .add(".wh.file-then-dir").directory("file-then-dir").add("file-then-dir/inside", data=b"in")
              .add(".wh.dir-then-file").add("dir-then-file", data=b"file").done())
    # Without entries for the directories, as Bazel and ko write them.
    top = (Layer().add("merged/.wh.below").add("gone-again", data=b"x").add("tmp/above").add("private/sub/above")
           .add("new/above").add("emptied/.wh..wh..opq").add("emptied/above").done())
    return [bottom, middle, top]


def noise_layer(seed, size):
    """Returns a layer of files of which about half can be compressed, as in real images."""
    source, layer, left = random.Random(seed), Layer(), size
    layer.directory(f"data{seed}")
    number = 0
    while left > 0:
        length = min(left, source.choice([700, 4_000, 30_000, 300_000, 4_000_000]))
        half = source.randbytes(length // 2)
        layer.add(f"data{seed}/file{number}", data=half + b"compressible " * ((length - len(half)) // 13 + 1))
        left -= length
        number += 1
    return layer.done()


def image_busybox(registry, _):
    base = busybox_layer()
    push(registry, "test/busybox", ["latest", "1", "again"], [base])
    push(registry, "test/docker", ["latest"], [base], docker=True)
    # The first process of a delegate's pods.
    push(registry, "test/pause", ["latest"], [base], {"Cmd": ["sleep", "2147483647"]})


def image_oddities(registry, _):
    push(registry, "test/oddities", ["latest"], [busybox_layer(), *oddities()], how=["gzip", "none", "zstd", "gzip"])


def image_users(registry, _):
    base = busybox_layer()
    push(registry, "test/user-name", ["latest"], [base], {"User": "www-data", "WorkingDir": "/made/for/you"})
    push(registry, "test/user-number", ["latest"], [base], {"User": "1003:1004"})
    push(registry, "test/entrypoint", ["latest"], [base],
         {"Entrypoint": ["/bin/echo", "entry"], "Cmd": ["cmd"], "Env": [PATH, "FROM_IMAGE=yes"], "StopSignal": "SIGUSR1"})


def image_index(registry, _):
    base = busybox_layer()
    name = "test/index"
    amd64 = push(registry, name, ["amd64"], [base])
    arm64 = push(registry, name, ["arm64"], [noise_layer(99, 1000)], architecture="arm64")
    push_index(registry, name, "latest", [arm64, amd64])
    push_index(registry, "test/index", "only-arm64", [arm64])


def image_volumes(registry, _):
    """Pushes an image that declares volumes, where it has something and where it has nothing."""
    colour = {"SCHILY.xattr.user.colour": "blue"}
    layer = (Layer().directory("data", mode=0o2750, uid=33, gid=1234, mtime=7, pax_headers=colour)
             .directory("data/sub", mode=0o1777, mtime=8)
             .add("data/sub/file", data=b"from the image", mode=0o640, uid=33, mtime=9, pax_headers=colour)
             .hardlink("data/second", "data/sub/file", mode=0o640).symlink("data/link", "sub/file")
             .symlink("data/out", "/etc/passwd").add("data/pipe", tarfile.FIFOTYPE, mode=0o600)
             .add("data/program", data=b"#!/bin/sh\necho ran\n", mode=0o4755)
             .directory("real").add("real/file", data=b"behind a link").symlink("link", "../../real")
             .directory("covered").add("covered/file", data=b"of the image")
             .directory("above/inside").add("above/inside/file", data=b"of the image").done())
    paths = ["/data", "/link/", "fresh/deep", "/covered", "/above/inside"]
    push(registry, "test/volumes", ["latest"], [busybox_layer(), layer], {"Volumes": {path: {} for path in paths}})
    push(registry, "test/volume-wrong", ["latest"], [busybox_layer()], {"Volumes": {"/a/../../b": {}}})
    push(registry, "test/volume-file", ["latest"], [busybox_layer()], {"Volumes": {"/etc/passwd": {}}})
    push(registry, "test/nothing", ["latest"], [])


def image_artifacts(registry, _):
    archive = (Layer().directory("tree").add("tree/program", data=b"#!/bin/sh\necho ran\n", mode=0o755)
               .symlink("tree/link", "program").done())
    archive, archive_type = compress(archive, "gzip")
    hello = ("text/plain", "hello.txt", b"hello")
    push_artifact(registry, "test/artifact", "latest", [
        hello, ("text/plain", "dir/deep.txt", b"deep"), (archive_type, None, archive),
        # As `oras push` does it by default.
        (f"{OCI}.layer.v1.tar", "oras.txt", b"no archive"), ("text/plain", None, b"untitled")])
    push_artifact(registry, "test/artifact", "renamed", [("text/plain", "renamed.txt", b"hello")])
    push_artifact(registry, "test/artifact", "escape", [hello, ("text/plain", "../escape", b"x")])
    push_artifact(registry, "test/artifact", "twice", [hello, ("text/plain", "./hello.txt", b"x")])


def image_hostile(registry, _):
    for tag, layer in (("dotdot", Layer().add("a/../../escape", data=b"x")),
                       ("absolute", Layer().add("/etc/absolute", data=b"absolute"))):
        push(registry, f"test/hostile-{tag}", ["latest"], [busybox_layer(), layer.done()])
    # A test corrupts the second layer in the registry's storage, so no other image may share it.
    push(registry, "test/corrupt", ["latest"], [busybox_layer(), noise_layer(7, 300_000)])


def image_bench(registry, options):
    size = options.bench_mib * 1024 * 1024 // 6
    push(registry, "bench/six-layers", ["latest"], [noise_layer(seed, size) for seed in range(6)])


def image_udp(registry, _):
    """Pushes busybox with a UDP echo server, because busybox has none."""
    source = os.path.join(os.path.dirname(os.path.abspath(__file__)), "programs", "udp-echo.c")
    with tempfile.TemporaryDirectory() as directory:
        program = os.path.join(directory, "udp-echo")
        subprocess.run(["gcc", "-O1", "-static", "-s", "-Wall", "-Werror", "-o", program, source], check=True)
        with open(program, "rb") as file:
            layer = Layer().add("bin/udp-echo", data=file.read(), mode=0o755).done()
    push(registry, "test/udp", ["latest"], [busybox_layer(), layer])


def image_agnhost(registry, _):
    """Pushes busybox with agnhost, a test program of Kubernetes, which scripts/build-clients built."""
    with open(os.path.join(os.environ["BULKHEAD_CLIENTS"], "agnhost"), "rb") as file:
        layer = Layer().add("agnhost", data=file.read(), mode=0o755).done()
    push(registry, "test/agnhost", ["latest"], [busybox_layer(), layer], {"Entrypoint": ["/agnhost"], "Cmd": ["pause"]},
         how="none")


def client_layer(*names, directory=""):
    """Returns a layer of programs that scripts/build-clients built, and directories to mount at."""
    layer = Layer().directory("etc").directory("tmp", mode=0o1777)
    for name in names:
        with open(os.path.join(os.environ["BULKHEAD_CLIENTS"], name), "rb") as file:
            layer.add(f"{directory}{name}", data=file.read(), mode=0o755)
    return layer.done()


def push_client(registry, name, *layers):
    """Pushes an image of such a program."""
    push(registry, f"cluster/{name}", ["latest"], [*layers, client_layer(name)], {"Entrypoint": [f"/{name}"]}, how="none")


def image_coredns(registry, _):
    push_client(registry, "coredns")


def image_metrics_server(registry, _):
    push_client(registry, "metrics-server")


def program_layer(path, *more, links=()):
    """Returns a layer with a program of this machine, more libraries that it loads, and what all of these need. `links`
    are further names of the program."""
    needed = set()
    for one in [path, *more]:
        names = subprocess.run(["ldd", one], stdout=subprocess.PIPE, check=True, text=True).stdout
        needed |= {word for word in names.split() if word.startswith("/") and not word.endswith(":")}
    layer = Layer()
    for one in [path, *more, *sorted(needed)]:
        with open(one, "rb") as file:
            layer.add(one.lstrip("/"), data=file.read(), mode=0o755)
    for link in links:
        layer.symlink(link, path)
    return layer.directory("tmp", mode=0o1777).done()


def image_kube_proxy(registry, _):
    """Pushes kube-proxy with iptables, which it runs, and a shell."""
    iptables = "/usr/sbin/xtables-nft-multi"
    names = [f"usr/sbin/ip{six}tables{what}" for six in ("", "6") for what in ("", "-save", "-restore")]
    push_client(registry, "kube-proxy", busybox_layer(), program_layer(iptables, *glob.glob(f"{EXTENSIONS}/*.so"), links=names))


def image_cni_agent(registry, _):
    """Pushes the CNI plugins and a shell that installs them."""
    plugins = client_layer("bridge", "host-local", "loopback", "portmap", directory="plugins/")
    push(registry, "cluster/cni-agent", ["latest"], [busybox_layer(), plugins], how="none")


def image_iperf3(registry, _):
    push(registry, "bench/iperf3", ["latest"], [program_layer("/usr/bin/iperf3")], how="none")


def image_fio(registry, _):
    layers = [busybox_layer(), program_layer("/usr/bin/fio"), Layer().directory("bench").done()]
    push(registry, "bench/fio", ["latest"], layers, how="none")


IMAGES = {"busybox": image_busybox, "oddities": image_oddities, "users": image_users, "index": image_index,
          "hostile": image_hostile, "volumes": image_volumes, "artifacts": image_artifacts,
          "bench": image_bench, "udp": image_udp,
          "agnhost": image_agnhost, "coredns": image_coredns, "metrics-server": image_metrics_server,
          "kube-proxy": image_kube_proxy, "cni-agent": image_cni_agent,
          "iperf3": image_iperf3, "fio": image_fio}
# Built only if --only names them.
RARE = ("bench", "udp", "agnhost", "coredns", "metrics-server", "kube-proxy", "cni-agent", "iperf3", "fio")


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--registry", required=True)
    parser.add_argument("--only", nargs="+", choices=IMAGES, default=[name for name in IMAGES if name not in RARE])
    parser.add_argument("--bench-mib", type=int, default=200)
    options = parser.parse_args()
    if not os.path.exists("/bin/busybox"):
        sys.exit("make_images.py: /bin/busybox is missing: apt-get install busybox-static")
    registry = Registry(options.registry)
    for name in options.only:
        IMAGES[name](registry, options)


if __name__ == "__main__":
    main()
