#!/usr/bin/env python3
"""Makes the images that critest pulls, under the names that it uses, and pushes them to a registry.

Their content comes from Debian packages (busybox, util-linux, nginx and their libraries), which are downloaded and
extracted into a cache and not installed, and from two small programs in programs/. The formats vary on purpose, see
make_images.py. A runtime finds the images by mirrors for registry.k8s.io, k8s.gcr.io and gcr.io.

    conformance_images.py --fetch DIRECTORY                                downloads and builds into DIRECTORY
    conformance_images.py --from DIRECTORY --registry http://127.0.0.1:5000   pushes
"""
import argparse
import glob
import os
import re
import subprocess
import sys

from make_images import PATH, Layer, Registry, push, push_index

PACKAGES = ["busybox", "util-linux", "nginx", "nginx-common", "libc6", "libcrypt1", "libpcre2-8-0", "libssl3", "zlib1g"]
PROGRAMS = ["effective-uid", "pause"]
LIBRARIES = ["lib/x86_64-linux-gnu", "usr/lib/x86_64-linux-gnu"]
LOADER = "lib64/ld-linux-x86-64.so.2"
LOADERS = ["lib/x86_64-linux-gnu/ld-linux-x86-64.so.2", "usr/" + LOADER, LOADER]
TOOLS = "k8s-staging-cri-tools"
E2E = "e2e-test-images"
NGINX = {"Cmd": ["nginx", "-g", "daemon off;"], "StopSignal": "SIGQUIT", "ExposedPorts": {"80/tcp": {}}}
NGINX_CONF = b"""user www-data;
worker_processes 1;
pid /var/run/nginx.pid;
error_log stderr warn;
events { worker_connections 128; }
http {
    include /etc/nginx/mime.types;
    access_log /dev/stdout;
    server { listen %d; root /srv/www; }
}
"""
# Debian's busybox has no pgrep, and the one of procps needs many libraries, some of systemd's.
PGREP = b"""#!/bin/sh
ps -o pid,comm | awk -v name="$1" '$2 ~ name {print $1; found = 1} END {exit !found}'
"""
HTTPD = b"""#!/bin/sh
echo "httpd -D FOREGROUND" >&2
exec busybox httpd -f -vv -p 80 -h /srv/www
"""


def fetch(directory):
    """Downloads and extracts the packages and builds our programs, if that is not done yet."""
    done = os.path.join(directory, "complete")
    if os.path.exists(done):
        return
    debs, root = os.path.join(directory, "debs"), os.path.join(directory, "root")
    for path in (debs, root):
        os.makedirs(path, exist_ok=True)
    subprocess.run(["apt-get", "download", "-qq", *PACKAGES], cwd=debs, check=True)
    for deb in glob.glob(os.path.join(debs, "*.deb")):
        subprocess.run(["dpkg-deb", "-x", deb, root], check=True)
    build_programs(directory)
    open(done, "w").close()


def build_programs(directory):
    source = os.path.join(os.path.dirname(os.path.abspath(__file__)), "programs")
    for name in PROGRAMS:
        subprocess.run(["gcc", "-Os", "-static", "-s", "-Wall", "-Werror", "-o", os.path.join(directory, name),
                        os.path.join(source, name + ".c")], check=True)


class Packages:
    """Extracted packages in `directory`/root, and the programs of `build_programs` in `directory`. `replaced` has files
    that take the place of a package's, by their path in it."""

    def __init__(self, directory, replaced=None):
        self.directory, self.replaced = directory, replaced or {}

    def find(self, *paths):
        """Returns the first of these files that exists in the extracted packages: some have /bin, others /usr/bin."""
        for path in paths:
            real = self.replaced.get(path, os.path.join(self.directory, "root", path))
            if os.path.exists(real):
                return real
        sys.exit(f"{os.path.basename(sys.argv[0])}: none of {paths} is in the packages in {self.directory}")

    def read(self, *paths):
        with open(self.find(*paths), "rb") as file:
            return file.read()

    def output(self, path, *arguments):
        """Runs a program of the packages with the packages' libraries. Returns its standard output."""
        loader = self.find(*LOADERS)
        return subprocess.run([loader, "--library-path", os.path.dirname(loader), path, *arguments],
                              stdout=subprocess.PIPE, check=True, text=True).stdout

    def program(self, name):
        with open(os.path.join(self.directory, name), "rb") as file:
            return file.read()

    def needed(self, paths, known=()):
        """Returns the names of all shared libraries that the first of these files needs, directly or not."""
        known = set(known)
        shown = subprocess.run(["readelf", "-d", self.find(*paths)], stdout=subprocess.PIPE, check=True, text=True).stdout
        for library in re.findall(r"\(NEEDED\).*\[(.*)\]", shown):
            if library not in known and library != os.path.basename(LOADER):
                known.add(library)
                known |= self.needed([f"{where}/{library}" for where in LIBRARIES], known)
        return known

    def add_program(self, layer, path, *sources):
        """Adds a program to a layer. Returns the names of the libraries that it needs."""
        layer.add(path, data=self.read(*sources), mode=0o755)
        return self.needed(sources)

    def add_libraries(self, layer, names):
        for name in sorted(names):
            layer.add(f"lib/{name}", data=self.read(*(f"{where}/{name}" for where in LIBRARIES)), mode=0o755)


def base_layer(packages, passwd="", group="", programs=("usr/bin/ipcs",)):
    """A small system with a dynamic busybox: its shell executes the applets' files, which that of Debian's static one does not."""
    layer = Layer()
    for path in ("bin", "dev", "etc", "home", "lib", "lib64", "proc", "sbin", "sys", "usr", "usr/bin", "usr/sbin", "var"):
        layer.directory(path)
    layer.directory("root", mode=0o700).directory("tmp", mode=0o1777)
    libraries = packages.add_program(layer, "bin/busybox", "bin/busybox", "usr/bin/busybox")
    for path in programs:
        libraries |= packages.add_program(layer, path, path)
    packages.add_libraries(layer, libraries)
    layer.add(LOADER, data=packages.read(*LOADERS), mode=0o755)
    applets = packages.output(packages.find("bin/busybox", "usr/bin/busybox"), "--list").split()
    for applet in sorted(set(applets) - {"busybox"}):
        # Hard links and not symbolic ones: a mount over one applet must not cover all of them.
        layer.hardlink(f"bin/{applet}", "bin/busybox", mode=0o755)
    layer.add("usr/bin/pgrep", data=PGREP, mode=0o755)
    layer.add("etc/passwd", data=("root:x:0:0:root:/root:/bin/sh\nwww-data:x:33:33:www-data:/srv/www:/bin/false\n"
                                  "nobody:x:65534:65534:nobody:/home:/bin/false\n" + passwd).encode())
    layer.add("etc/group", data=("root:x:0:\nwww-data:x:33:\nusers:x:100:\nnogroup:x:65534:\n" + group).encode())
    return layer.done()


def nginx_layers(packages, port):
    """Two layers with Debian's nginx. The second one hides a file of the first and makes a directory of it opaque."""
    first = Layer()
    for path in ("etc/nginx", "srv", "srv/www", "srv/old", "var/lib", "var/lib/nginx", "var/log", "var/log/nginx", "var/run"):
        first.directory(path)
    packages.add_libraries(first, packages.add_program(first, "usr/sbin/nginx", "usr/sbin/nginx"))
    first.add("etc/nginx/mime.types", data=packages.read("etc/nginx/mime.types"))
    first.add("srv/www/index.html", data=b"<html><title>Welcome to nginx!</title></html>\n")
    first.add("srv/www/gone.html", data=b"hidden by a whiteout\n").add("srv/old/gone.html", data=b"hidden\n")
    second = Layer().add("srv/www/.wh.gone.html").directory("srv/old").add("srv/old/.wh..wh..opq")
    second.add("etc/nginx/nginx.conf", data=NGINX_CONF % port)
    return [first.done(), second.done()]


def push_all(packages, registry):
    base = base_layer(packages)

    def image(name, tags, layers, config, platforms=True, **how):
        """Pushes an image: an index of two platforms, of which only one can run here, or a manifest alone."""
        if not platforms:
            push(registry, name, tags, layers, config, **how)
            return
        ours = push(registry, name, tags, layers, config, **how)
        other = push(registry, name, ["arm64"], [Layer().add(name.replace("/", "-")).done()], architecture="arm64")
        for tag in tags:
            push_index(registry, name, tag, [other, ours])

    image(f"{E2E}/busybox", ["1.29-2"], [base], {"Cmd": ["sh"]}, docker=True)
    image(f"{E2E}/nginx", ["1.14-2"], [base, *nginx_layers(packages, 80)], NGINX, docker=True)
    image(f"{TOOLS}/hostnet-nginx-amd64", ["latest"], [base, *nginx_layers(packages, 12003)], NGINX, platforms=False)
    httpd = Layer().directory("srv").directory("srv/www").add("srv/www/index.html", data=b"It works!\n")
    httpd.add("bin/httpd-foreground", data=HTTPD, mode=0o755)
    image(f"{E2E}/httpd", ["2.4.39-4"], [base, httpd.done()], {"Cmd": ["httpd-foreground"]}, how="zstd")
    setuid = Layer().add("nnp", data=packages.program("effective-uid"), mode=0o4755)
    image(f"{E2E}/nonewprivs", ["1.3"], [base, setuid.done()], {"Entrypoint": ["/nnp"]})
    pause = Layer().add("pause", data=packages.program("pause"), mode=0o755).done()
    for version in ("3.6", "3.8", "3.9", "3.10"):
        # A separate image for each version, because a spec counts the tags of 3.9.
        image("pause", [version], [pause],
              {"Entrypoint": ["/pause"], "User": "65535:65535", "Labels": {"version": version}})
    for name in ("1", "2", "3", "latest", "digest"):
        image(f"{TOOLS}/test-image-{name}", ["latest"], [base, Layer().add(f"image-{name}").done()], {})
    for tag in ("test", "all"):
        image(f"{TOOLS}/test-image-tag", [tag], [base, Layer().add(f"tag-{tag}").done()], {})
    image(f"{TOOLS}/test-image-tags", ["1", "2", "3"], [base, Layer().add("tags").done()], {}, platforms=False, how="none")
    for name, user in (("uid", "1002"), ("username", "www-data"), ("uid-group", "1003:1004"),
                       ("username-group", "www-data:1004")):
        image(f"{TOOLS}/test-image-user-{name}", ["latest"], [base], {"User": user})
    known = base_layer(packages, "default-user:x:1000:1000::/home:/bin/sh\n",
                       "default-user:x:1000:\ngroup-defined-in-image:x:50000:default-user\n")
    image(f"{TOOLS}/test-image-predefined-group", ["latest"], [known], {"User": "1000", "Env": [PATH]})


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--fetch", metavar="DIRECTORY")
    parser.add_argument("--from", metavar="DIRECTORY", dest="directory")
    parser.add_argument("--registry")
    options = parser.parse_args()
    if options.fetch:
        fetch(options.fetch)
    if options.directory and options.registry:
        push_all(Packages(options.directory), Registry(options.registry))
    elif not options.fetch:
        parser.error("--fetch DIRECTORY, or --from DIRECTORY with --registry")


if __name__ == "__main__":
    main()
