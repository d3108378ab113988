#!/usr/bin/env python3
"""Makes the images that Kubernetes' conformance suite runs, under the names that it uses, and pushes them to a registry.

Their content comes from packages of Debian's sid, which scripts/lib/suites.sh extracts, from the busybox that
scripts/lib/busybox.sh builds, from programs that scripts/build-clients builds, and from small programs in programs/. All
repositories are below e2e/ in one registry, and the suite finds them there by a file for KUBE_TEST_REPO_LIST.

    kubernetes_images.py --packages                              prints the names of the packages
    kubernetes_images.py --repositories ADDRESS                  prints the file for KUBE_TEST_REPO_LIST
    kubernetes_images.py --wanted FILE --root ROOT --busybox BUSYBOX --clients CLIENTS --registry http://127.0.0.1:5000
        pushes those images of FILE that conformance specs need; FILE is what `e2e.test --list-images` prints, ROOT has
        the extracted packages, BUSYBOX is a program and CLIENTS has more of them
"""
import argparse
import os
import subprocess
import sys
import tempfile

from conformance_images import NGINX, Packages, base_layer, build_programs, nginx_layers
from make_images import Layer, Registry, push

PACKAGES = ["bash", "bind9-dnsutils", "curl", "iproute2", "libc-bin", "netcat-openbsd", "nginx", "socat"]
REPOSITORY = "e2e"
# The registries of the suite, all but one that must not exist and one that wants credentials.
REGISTRIES = ["promoterE2eRegistry", "buildImageRegistry", "gcEtcdRegistry", "gcRegistry", "sigStorageRegistry",
              "dockerLibraryRegistry", "cloudProviderGcpRegistry"]
# What the specs run in containers, beside agnhost itself, and where the packages have it.
TOOLS = {"bin/bash": "bin/bash", "usr/bin/curl": "usr/bin/curl", "usr/bin/dig": "usr/bin/dig", "usr/bin/ip": "usr/bin/ip",
         "usr/bin/getent": "usr/bin/getent", "usr/bin/nc": "usr/bin/nc.openbsd", "usr/bin/socat": "usr/bin/socat1"}
AGNHOST = {"Entrypoint": ["/agnhost"], "Cmd": ["pause"],
           "ExposedPorts": {f"{port}/tcp": {} for port in (80, 8080, 8081, 9376, 5000)}}


def certificate():
    """Makes what agnhost's `porter` serves over TLS. Returns a certificate and its key."""
    with tempfile.TemporaryDirectory() as work:
        certificate, key = os.path.join(work, "crt"), os.path.join(work, "key")
        subprocess.run(["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "3650", "-subj",
                        "/O=localhost", "-addext", "subjectAltName=IP:127.0.0.1,DNS:localhost", "-out", certificate,
                        "-keyout", key], check=True, stderr=subprocess.DEVNULL)
        with open(certificate, "rb") as first, open(key, "rb") as second:
            return first.read(), second.read()


class Layers:
    """The layers that the images share. Each is made when an image wants it first."""

    def __init__(self, packages, clients):
        self.packages, self.clients, self.made = packages, clients, {}

    def __call__(self, name):
        if name not in self.made:
            self.made[name] = getattr(self, name)()
        return self.made[name]

    def client(self, name):
        path = os.path.join(self.clients, name)
        if not os.path.exists(path):
            sys.exit(f"kubernetes_images.py: {path} is missing: scripts/build-clients {name}")
        with open(path, "rb") as file:
            return file.read()

    def base(self):
        return base_layer(self.packages, "user-defined-in-image:x:1000:1000::/home:/bin/sh\n",
                          "user-defined-in-image:x:1000:\ngroup-defined-in-image:x:50000:user-defined-in-image\n",
                          programs=())

    def tools(self):
        # As in other distributions: without the file, libc would not read /etc/hosts.
        layer, libraries = Layer().add("etc/nsswitch.conf", data=b"hosts: files dns\n"), set()
        for path, source in TOOLS.items():
            libraries |= self.packages.add_program(layer, path, source)
        self.packages.add_libraries(layer, libraries)
        return layer.done()

    def agnhost(self):
        layer = Layer().add("agnhost", data=self.client("agnhost"), mode=0o755).symlink("agnhost-2", "agnhost")
        for name, data in zip(("localhost.crt", "localhost.key"), certificate()):
            layer.add(name, data=data)
        return layer.directory("uploads", mode=0o777).done()

    def pause(self):
        return Layer().add("pause", data=self.packages.program("pause"), mode=0o755).done()

    def effective_uid(self):
        return Layer().add("usr/local/bin/nnp", data=self.packages.program("effective-uid"), mode=0o4755).done()

    def etcd(self):
        return Layer().add("usr/local/bin/etcd", data=self.client("etcd"), mode=0o755).done()

    def sample_apiserver(self):
        return Layer().add("sample-apiserver", data=self.client("sample-apiserver"), mode=0o755).done()


def picture(name):
    """Returns a layer with what tells one such image from another. A spec reads in os-release what the suite's own
    images are made from."""
    return (Layer().add(f"{name}.jpg", data=f"a picture of a {name}\n".encode())
            .add("data.json", data=f'{{\n  "image": "{name}.jpg"\n}}\n'.encode())
            .add("etc/os-release", data=b'NAME="Alpine Linux"\n').done())


def mark(tag):
    """Returns a layer that makes each version of an image an image of its own."""
    return Layer().add("version", data=tag.encode()).done()


# For each image: its layers and its configuration. Programs with large files are left uncompressed, which is quicker.
IMAGES = {
    "agnhost": lambda layers, tag: ([layers("base"), layers("tools"), layers("agnhost"), mark(tag)], AGNHOST),
    "busybox": lambda layers, tag: ([layers("base")], {"Cmd": ["sh"]}),
    "etcd": lambda layers, tag: ([layers("base"), layers("etcd")], {}),
    "glibc-dns-testing": lambda layers, tag: ([layers("base"), layers("tools")], {}),
    "kitten": lambda layers, tag: ([layers("base"), layers("tools"), layers("agnhost"), picture("kitten")],
                                   {**AGNHOST, "Cmd": ["test-webserver"]}),
    "nautilus": lambda layers, tag: ([layers("base"), layers("tools"), layers("agnhost"), picture("nautilus")],
                                     {**AGNHOST, "Cmd": ["test-webserver"]}),
    "nginx": lambda layers, tag: ([layers("base"), *nginx_layers(layers.packages, 80), mark(tag)], NGINX),
    "nonewprivs": lambda layers, tag: ([layers("base"), layers("effective_uid")], {"Cmd": ["/usr/local/bin/nnp"]}),
    "nonroot": lambda layers, tag: ([layers("base")], {"User": "1234"}),
    "pause": lambda layers, tag: ([layers("pause")], {"Entrypoint": ["/pause"], "User": "65535:65535"}),
    "sample-apiserver": lambda layers, tag: ([layers("base"), layers("sample_apiserver")],
                                             {"Entrypoint": ["/sample-apiserver"]}),
}


def wanted(text):
    """Reads what `e2e.test --list-images` prints. Returns the names and tags of the images that can be made here."""
    references = {line.strip().rpartition("/")[2] for line in text.splitlines()}
    pairs = {tuple(reference.split(":")) for reference in references if reference.count(":") == 1}
    return sorted((name, tag) for name, tag in pairs if name in IMAGES)


def repositories(address):
    return "".join(f"{registry}: {address}/{REPOSITORY}\n" for registry in REGISTRIES)


def push_all(options):
    with open(options.wanted) as file, tempfile.TemporaryDirectory() as work:
        images = wanted(file.read())
        if not images:
            sys.exit(f"kubernetes_images.py: {options.wanted} names no image that can be made here")
        build_programs(work)
        os.symlink(os.path.abspath(options.root), os.path.join(work, "root"))
        layers = Layers(Packages(work, {"bin/busybox": options.busybox}), options.clients)
        registry = Registry(options.registry)
        for name, tag in images:
            parts, config = IMAGES[name](layers, tag)
            push(registry, f"{REPOSITORY}/{name}", [tag], parts, config,
                 how=["none" if len(part) > 16 << 20 else "gzip" for part in parts])


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--packages", action="store_true")
    parser.add_argument("--repositories", metavar="ADDRESS")
    for option in ("--wanted", "--root", "--busybox", "--clients", "--registry"):
        parser.add_argument(option)
    options = parser.parse_args()
    if options.packages:
        print(*PACKAGES)
    elif options.repositories:
        print(repositories(options.repositories), end="")
    elif all((options.wanted, options.root, options.busybox, options.clients, options.registry)):
        push_all(options)
    else:
        parser.error("--packages, --repositories ADDRESS, or all of --wanted, --root, --busybox, --clients and --registry")


if __name__ == "__main__":
    main()
