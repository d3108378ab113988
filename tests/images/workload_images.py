#!/usr/bin/env python3
"""Makes the images of the suite of workloads (tests/tests/workloads): programs of Debian's packages, one image for each
workload or for some small ones.

The storage of a registry is filled here, on this machine, because it would take minutes on an emulated host. The tests
serve that storage read-only. An image is made again only if what it is made of has changed.

    workload_images.py --storage DIRECTORY [--mirror URL] [NAME...]    makes all images or these
"""
import argparse
import fcntl
import hashlib
import inspect
import json
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time

import debian_packages
from debian_packages import Suite
from make_images import Registry, push

SUITE = "bookworm"
REPOSITORY = "workload"
PROGRAMS = os.path.join(os.path.dirname(os.path.abspath(__file__)), "programs")
# Changed by hand if all images must be made again.
LAYOUT = 1
# What programs of a shell need. The layer is the same in all images.
BASE = ["base-files", "base-passwd", "bash", "coreutils", "dash", "findutils", "grep", "gzip", "hostname", "libc-bin", "mawk",
        "netbase", "perl-base", "procps", "sed", "tar", "util-linux"]
# Only maintainer scripts need these, and none of them runs.
UNNEEDED = {"adduser", "debconf", "init-system-helpers", "libperl5.36", "lsb-base", "perl", "perl-modules-5.36", "sensible-utils",
            "sysvinit-utils", "ucf", "usrmerge"}


class Tree:
    """The files of an image above the base, for what maintainer scripts or an administrator would add."""

    def __init__(self, root, suite):
        self.root, self.suite = root, suite

    def path(self, path):
        return os.path.join(self.root, path)

    def directory(self, path, mode=0o755, user=0):
        os.makedirs(self.path(path), exist_ok=True)
        os.chmod(self.path(path), mode)
        os.chown(self.path(path), user, user)

    def write(self, path, text, mode=0o644):
        os.makedirs(os.path.dirname(self.path(path)), exist_ok=True)
        with open(self.path(path), "w") as file:
            file.write(text)
        os.chmod(self.path(path), mode)

    def link(self, path, target):
        os.makedirs(os.path.dirname(self.path(path)), exist_ok=True)
        if os.path.lexists(self.path(path)):
            os.remove(self.path(path))
        os.symlink(target, self.path(path))

    def users(self, **numbers):
        """Adds users, each with a group of the same name and number."""
        base = ("root:x:0:0:root:/root:/bin/bash\ndaemon:x:1:1::/:/usr/sbin/nologin\nwww-data:x:33:33::/var/www:/usr/sbin/nologin\n"
                "nobody:x:65534:65534::/nonexistent:/usr/sbin/nologin\n")
        groups = "root:x:0:\ndaemon:x:1:\nadm:x:4:\ntty:x:5:\ndisk:x:6:\nutmp:x:43:\nshadow:x:42:\nwww-data:x:33:\nstaff:x:50:\nnogroup:x:65534:\n"
        self.write("etc/passwd", base + "".join(f"{name}:x:{id}:{id}::/var/lib/{name}:/bin/sh\n" for name, id in numbers.items()))
        self.write("etc/group", groups + "".join(f"{name}:x:{id}:\n" for name, id in numbers.items()))


def base(tree):
    tree.users()
    tree.write("etc/nsswitch.conf", "passwd: files\ngroup: files\nhosts: files dns\n")
    tree.link("usr/bin/awk", "mawk")
    for path in ("proc", "sys", "dev", "run"):
        tree.directory(path)
    tree.directory("tmp", 0o1777)
    tree.directory("var/tmp", 0o1777)
    tree.directory("root", 0o700)


def postgres(tree):
    tree.users(postgres=999)
    tree.directory("data", 0o700, 999)
    tree.directory("run/postgresql", 0o2775, 999)


def redis(tree):
    tree.users(redis=998)
    tree.directory("data", 0o700, 998)


def nginx(tree):
    tree.write("etc/nginx/nginx.conf", """user www-data;
worker_processes auto;
error_log stderr warn;
pid /run/nginx.pid;
events { worker_connections 256; }
http {
    include /etc/nginx/mime.types;
    access_log /dev/stdout;
    sendfile on;
    gzip on;
    gzip_types text/plain;
    gzip_http_version 1.0;
    include /etc/nginx/conf.d/*.conf;
    server {
        listen 80 default_server reuseport;
        root /srv/www;
        location /up { proxy_pass http://unix:/run/up.sock; }
    }
    server { listen unix:/run/up.sock; return 200 "from the upstream\\n"; }
}
""")
    tree.write("srv/www/index.html", "<title>Welcome to nginx!</title>\n")
    tree.write("srv/www/big.txt", "".join(f"line {number}\n" for number in range(200_000)))


def java(tree):
    tree.link("usr/bin/java", "../lib/jvm/java-17-openjdk-amd64/bin/java")


def build(tree):
    """A bare repository with the source of zlib, whose configure and make are quick."""
    source = tree.path("zlib")
    tree.suite.source("zlib", source)
    run = {"check": True, "cwd": source, "stdout": subprocess.DEVNULL,
           "env": {**os.environ, "GIT_CONFIG_GLOBAL": "/dev/null", "GIT_AUTHOR_DATE": "@0 +0000", "GIT_COMMITTER_DATE": "@0 +0000"}}
    git = ["git", "-c", "user.name=tests", "-c", "user.email=tests@invalid"]
    subprocess.run([*git, "init", "-q", "-b", "main"], **run)
    subprocess.run([*git, "add", "--force", "."], **run)
    subprocess.run([*git, "commit", "-q", "-m", "the source of Debian's package"], **run)
    subprocess.run([*git, "clone", "-q", "--bare", source, tree.path("srv/zlib.git")], **run)
    shutil.rmtree(source)
    tree.link("usr/bin/cc", "gcc")


def apt(tree):
    """A system on which dpkg knows what is installed, and a repository of packages that are not."""
    installed = tree.suite.closure([*BASE, *IMAGES["apt"]["packages"]])
    debian_packages.register(installed.values(), tree.root)
    more = tree.suite.closure(["netcat-openbsd", "hello", "cron"])
    debs = [deb for name, deb in more.items() if name not in installed]
    tree.directory("srv/repository")
    for deb in debs:
        shutil.copy(deb, tree.path("srv/repository"))
    tree.write("srv/repository/Packages", debian_packages.index(debs))
    tree.write("etc/apt/sources.list", "deb [trusted=yes] http://127.0.0.1:80/ ./\n")
    tree.users(_apt=100)
    tree.directory("var/lib/apt/lists/partial")
    tree.directory("var/cache/apt/archives/partial")
    tree.write("etc/shadow", "root:*:19000:0:99999:7:::\n", 0o640)


def systemd(tree):
    tree.users(messagebus=101, **{"systemd-network": 102, "systemd-resolve": 103, "systemd-journal": 104})
    tree.write("etc/machine-id", "")
    tree.link("etc/systemd/system/default.target", "/lib/systemd/system/multi-user.target")
    tree.write("etc/systemd/system/workload.service", """[Unit]
Description=a service that dies and is started again
[Service]
ExecStart=/bin/sh -c 'echo started by systemd; [ -e /run/second ] || { touch /run/second; sleep 1; kill -SEGV $$$$; }; exec sleep 100000'
Restart=on-failure
RestartSec=0
MemoryMax=64M
DynamicUser=no
[Install]
WantedBy=multi-user.target
""")
    tree.link("etc/systemd/system/multi-user.target.wants/workload.service", "/etc/systemd/system/workload.service")


def docker(tree):
    for six in ("", "6"):
        for what in ("", "-save", "-restore"):
            tree.link(f"usr/sbin/ip{six}tables{what}", "xtables-nft-multi")
    tree.write("srv/Dockerfile", "FROM tiny\nRUN mkdir /made && echo built >/made/file && chown 5:6 /made/file\nCMD [\"cat\", \"/made/file\"]\n")
    tree.directory("var/lib/docker", 0o710)


def network(tree):
    for six in ("", "6"):
        for what in ("", "-save", "-restore"):
            tree.link(f"usr/sbin/ip{six}tables{what}", "xtables-nft-multi")
    tree.link("usr/bin/nc", "nc.openbsd")
    tree.users(proxy=1337)


def kernel(tree):
    thirty_two = os.path.join(tree.path("tmp"), "32")
    debian_packages.extract(tree.suite.closure(["busybox-static:i386"]).values(), thirty_two)
    tree.directory("opt")
    shutil.copy(os.path.join(thirty_two, "bin/busybox"), tree.path("opt/busybox-of-32-bits"))
    shutil.rmtree(tree.path("tmp"))


def nfs(tree):
    tree.directory("export", 0o777)
    tree.directory("mnt")
    tree.directory("run/ganesha")
    tree.directory("var/lib/nfs/ganesha", 0o700)
    # There it looks for the file system of what it exports.
    os.symlink("/proc/self/mounts", tree.path("etc/mtab"))
    tree.write("etc/ganesha/ganesha.conf", """NFS_CORE_PARAM { Protocols = 4; NFS_Port = 2049; Enable_NLM = false; Enable_RQUOTA = false; }
NFSv4 { Grace_Period = 0; Graceless = true; Only_Numeric_Owners = true; RecoveryBackend = fs; Minor_Versions = 1, 2; }
EXPORT { Export_Id = 1; Path = /export; Pseudo = /export; Access_Type = RW; Squash = None; SecType = sys; FSAL { Name = VFS; } }
LOG { Default_Log_Level = EVENT; }
""")


def go(tree):
    """A static program and nothing else."""
    program = os.path.join(PROGRAMS, "limits.go")
    subprocess.run(["go", "build", "-trimpath", "-ldflags=-s -w -buildid=", "-o", tree.path("limits"), program], check=True,
                   env={**os.environ, "CGO_ENABLED": "0", "GOOS": "linux", "GOARCH": "amd64", "GOFLAGS": "-mod=mod"})


# For each image: its packages; of what they depend on, what is left out; files that are left out; what adds files; and
# the configuration of the image. One without packages has no base either.
IMAGES = {
    "postgres": {"packages": ["postgresql-15", "tzdata"], "add": postgres,
                 # The compiler of queries, which is off, and what makes clusters of Debian's layout.
                 "without": ["libllvm14", "libz3-4", "locales", "libc-l10n", "postgresql-common", "ssl-cert", "openssl"],
                 "drop": ["usr/lib/postgresql/15/lib/bitcode", "usr/share/zoneinfo/posix", "usr/share/zoneinfo/right"]},
    "redis": {"packages": ["redis-server"], "add": redis},
    "nginx": {"packages": ["nginx"], "add": nginx, "config": {"StopSignal": "SIGQUIT"}},
    "java": {"packages": ["openjdk-17-jre-headless", "libh2-java"], "add": java, "without": ["ca-certificates-java", "ca-certificates", "openssl"]},
    "python": {"packages": ["python3"]},
    "go": {"packages": [], "add": go, "program": "limits.go", "config": {"Entrypoint": ["/limits"], "User": "65532:65532"}},
    "node": {"packages": ["nodejs"]},
    "build": {"packages": ["git", "make", "gcc", "libc6-dev"], "add": build,
              "without": ["liberror-perl", "libasan8", "libtsan2", "liblsan0", "libubsan1", "libquadmath0"],
              "drop": ["usr/lib/gcc/*/lto1", "usr/lib/gcc/*/plugin", "usr/share/git-core/templates/hooks/*"]},
    "debug": {"packages": ["strace", "gdb-minimal"]},
    "fio": {"packages": ["fio"], "without": ["python3", "python3.11", "python3-minimal"]},
    "apt": {"packages": ["apt", "diffutils", "busybox-static", "debconf", "adduser", "perl-base", "init-system-helpers", "passwd"], "add": apt,
            "whole": True},
    "systemd": {"packages": ["systemd", "systemd-sysv", "dbus"], "add": systemd, "config": {"StopSignal": "SIGRTMIN+3"}},
    "docker": {"packages": ["docker.io", "iptables", "busybox-static"], "add": docker, "without": ["python3"],
               "drop": ["usr/bin/ctr", "usr/bin/containerd-stress"]},
    "network": {"packages": ["iproute2", "iptables", "iputils-ping", "lksctp-tools", "netcat-openbsd", "wireguard-tools"], "add": network},
    "kernel": {"packages": ["diffutils", "inotify-tools", "fuse2fs", "e2fsprogs", "mount"], "add": kernel},
    "nfs": {"packages": ["nfs-ganesha-vfs", "mount"], "add": nfs},
}


def key_of(name):
    """Returns a sum of what an image is made of."""
    image = IMAGES[name]
    words = [LAYOUT, SUITE, BASE, sorted(UNNEEDED), inspect.getsource(base)]
    words += [sorted((key, value) for key, value in image.items() if key != "add")]
    if "add" in image:
        words.append(inspect.getsource(image["add"]))
    if "program" in image:
        with open(os.path.join(PROGRAMS, image["program"])) as file:
            words.append(file.read())
    return hashlib.sha256(json.dumps(words).encode()).hexdigest()


class Maker:
    def __init__(self, suite, registry, work):
        self.suite, self.registry, self.work = suite, registry, work
        self.base = None

    def layer(self, debs, add, drop=()):
        with tempfile.TemporaryDirectory(dir=self.work) as root:
            os.chmod(root, 0o755)
            debian_packages.extract(debs, root, drop)
            if add:
                add(Tree(root, self.suite))
            return debian_packages.layer(root)

    def base_layer(self):
        if self.base is None:
            files = self.suite.closure(BASE)
            debs = [deb for package, deb in files.items() if package not in UNNEEDED]
            self.base = self.layer(debs, base, ["usr/lib/x86_64-linux-gnu/gconv", "usr/share/perl5/unicore"]), set(files) - UNNEEDED
        return self.base

    def make(self, name):
        image = IMAGES[name]
        if image["packages"]:
            first, known = self.base_layer()
            files = self.suite.closure(image["packages"])
            left_out = known if image.get("whole") else known | UNNEEDED
            debs = [deb for package, deb in files.items() if package not in left_out | set(image.get("without", ()))]
            layers = [first, self.layer(debs, image.get("add"), image.get("drop", ()))]
        else:
            with tempfile.TemporaryDirectory(dir=self.work) as root:
                os.chmod(root, 0o755)
                image["add"](Tree(root, self.suite))
                layers = [debian_packages.layer(root)]
        # Not compressed, because an emulated host would need longer to take it apart.
        push(self.registry, f"{REPOSITORY}/{name}", ["latest"], layers, image.get("config"), how="none")
        return sum(map(len, layers)) >> 20


class Served:
    """A docker-registry on loopback that fills a storage."""

    def __init__(self, storage, work):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.address = "127.0.0.1:%d" % free.getsockname()[1]
        config = os.path.join(work, "registry.yml")
        with open(config, "w") as file:
            file.write("version: 0.1\nlog: {level: error, accesslog: {disabled: true}}\n"
                       f"storage: {{filesystem: {{rootdirectory: '{storage}'}}}}\nhttp: {{addr: '{self.address}'}}\n")
        self.config = config

    def __enter__(self):
        self.process = subprocess.Popen(["setpriv", "--pdeathsig", "KILL", "docker-registry", "serve", self.config],
                                        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        host, port = self.address.split(":")
        for _ in range(200):
            try:
                socket.create_connection((host, int(port))).close()
                return Registry(f"http://{self.address}")
            except OSError:
                time.sleep(0.05)
        sys.exit("workload_images.py: docker-registry does not answer")

    def __exit__(self, *_):
        self.process.kill()
        self.process.wait()


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--storage", required=True, metavar="DIRECTORY")
    parser.add_argument("--mirror", default="http://deb.debian.org/debian")
    parser.add_argument("names", nargs="*", choices=[[], *IMAGES], metavar="NAME")
    options = parser.parse_args()
    keys = os.path.join(options.storage, "keys")
    os.makedirs(keys, exist_ok=True)
    with open(os.path.join(options.storage, "lock"), "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        make_all(options, keys, options.names or list(IMAGES))


def make_all(options, keys, names):
    def made(name):
        path = os.path.join(keys, name)
        return os.path.exists(path) and open(path).read() == key_of(name)

    todo = [name for name in names if not made(name)]
    if not todo:
        return
    with tempfile.TemporaryDirectory(dir=options.storage) as work:
        suite = Suite(os.path.join(options.storage, "packages"), options.mirror, SUITE)
        with Served(os.path.join(options.storage, "registry"), work) as registry:
            maker = Maker(suite, registry, work)
            for name in todo:
                started = time.monotonic()
                size_mib = maker.make(name)
                with open(os.path.join(keys, name), "w") as file:
                    file.write(key_of(name))
                print(f"image {name}: {size_mib} MiB, {time.monotonic() - started:.0f} s", file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
