"""Packages of one suite of Debian as trees of files: fetched with all that they depend on, extracted and not installed.

Nothing of a package runs: no maintainer script, no trigger. What such a script would have made (users, links of
alternatives) is added by who makes an image of the tree. An apt of its own fetches them, with its lists and archives in
one directory, so this machine's apt and its packages are not changed.
"""
import fnmatch
import os
import re
import shutil
import subprocess
import tempfile

KEYRING = "/usr/share/keyrings/debian-archive-keyring.gpg"
# What apt says of a package: Inst NAME (VERSION SUITES [ARCHITECTURE])
INSTALLED = re.compile(r"Inst ([^ :]+)\S* \((\S+) [^)]*\[(\w+)\]\)")
# Links of a merged /usr, which packages expect and which no package of this suite has.
MERGED = ("bin", "lib", "lib32", "lib64", "sbin")
# What nobody reads in an image of a test.
UNREAD = ("usr/share/doc", "usr/share/man", "usr/share/locale", "usr/share/info", "usr/share/lintian", "usr/share/bug",
          "usr/share/doc-base", "usr/share/bash-completion", "usr/share/zsh", "usr/share/apport", "usr/share/gcc",
          "usr/share/icons", "usr/share/pixmaps", "usr/share/applications", "usr/share/initramfs-tools")


class Suite:
    """Fetches packages of one suite into `directory`. The architectures beside amd64 are for packages named with one:
    `busybox-static:i386`."""

    def __init__(self, directory, mirror, name):
        self.directory, self.mirror, self.name = directory, mirror, name
        self.archives = os.path.join(directory, "archives")
        self.is_up_to_date = False

    def apt(self, *arguments, cwd=None):
        """Runs apt-get. For this apt nothing is installed, so it fetches every package that is needed."""
        environment = {**os.environ, "APT_CONFIG": os.path.join(self.directory, "apt.conf")}
        done = subprocess.run(["apt-get", "-qq", *arguments], env=environment, cwd=cwd, text=True, stdout=subprocess.PIPE,
                              stderr=subprocess.PIPE)
        if done.returncode:
            raise SystemExit(f"apt-get {' '.join(arguments)}, with {self.name} of {self.mirror}: {done.stderr.strip()}")
        return done.stdout

    def update(self):
        """Fetches the lists of packages, once in a run."""
        if self.is_up_to_date:
            return
        for path in ("lists/partial", "archives/partial", "none"):
            os.makedirs(os.path.join(self.directory, path), exist_ok=True)
        open(os.path.join(self.directory, "status"), "w").close()
        with open(os.path.join(self.directory, "sources"), "w") as file:
            for kind, where in (("deb", "arch=amd64,i386 "), ("deb-src", "")):
                file.write(f"{kind} [{where}signed-by={KEYRING}] {self.mirror} {self.name} main\n")
        settings = {"Dir::State::lists": "lists", "Dir::State::status": "status", "Dir::State::extended_states": "extended",
                    "Dir::Cache": "", "Dir::Cache::archives": "archives", "Dir::Etc::sourcelist": "sources",
                    "Dir::Etc::sourceparts": "none", "Dir::Etc::preferencesparts": "none"}
        lines = [f'{key} "{os.path.join(self.directory, value)}";' for key, value in settings.items()]
        lines += ['Dir::Etc::preferences "/dev/null";', 'Acquire::Languages "none";', 'APT::Sandbox::User "root";',
                  'APT::Install-Recommends "false";', 'APT::Architectures {"amd64"; "i386";};']
        with open(os.path.join(self.directory, "apt.conf"), "w") as file:
            file.write("\n".join(lines) + "\n")
        self.apt("update")
        self.is_up_to_date = True

    def closure(self, names):
        """Returns the files of these packages and of all that they depend on, by name, in the order of their
        dependencies."""
        self.update()
        self.apt("install", "-y", "--download-only", *names)
        files = {}
        for line in self.apt("install", "-s", *names).splitlines():
            found = INSTALLED.match(line)
            if found:
                name, version, architecture = found.groups()
                files[name] = os.path.join(self.archives, f"{name}_{version.replace(':', '%3a')}_{architecture}.deb")
        return files

    def source(self, name, target):
        """Fetches the source of a package and extracts it to `target`."""
        self.update()
        work = target + ".fetch"
        os.makedirs(work)
        self.apt("source", name, cwd=work)
        (tree,) = (entry.path for entry in os.scandir(work) if entry.is_dir())
        os.rename(tree, target)
        shutil.rmtree(work)


def extract(debs, root, drop=()):
    """Extracts packages into a tree with a merged /usr, without what nobody reads and without what the patterns of `drop`
    match."""
    os.makedirs(os.path.join(root, "usr"), exist_ok=True)
    for link in MERGED:
        os.makedirs(os.path.join(root, "usr", link), exist_ok=True)
        if not os.path.lexists(os.path.join(root, link)):
            os.symlink(f"usr/{link}", os.path.join(root, link))
    for deb in debs:
        files = subprocess.Popen(["dpkg-deb", "--fsys-tarfile", deb], stdout=subprocess.PIPE)
        subprocess.run(["tar", "-x", "--keep-directory-symlink", "-C", root], stdin=files.stdout, check=True)
        files.stdout.close()
        if files.wait():
            raise SystemExit(f"dpkg-deb cannot read {deb}")
    for path in UNREAD:
        shutil.rmtree(os.path.join(root, path), ignore_errors=True)
    for directory, directories, names in os.walk(root):
        for name in [*names, *directories]:
            path = os.path.join(directory, name)
            if any(fnmatch.fnmatch(os.path.relpath(path, root), pattern) for pattern in drop):
                if os.path.isdir(path) and not os.path.islink(path):
                    shutil.rmtree(path)
                else:
                    os.remove(path)
        directories[:] = [name for name in directories if os.path.exists(os.path.join(directory, name))]


def register(debs, root):
    """Writes dpkg's database as if these packages had been installed, for a dpkg that runs in the image."""
    info = os.path.join(root, "var/lib/dpkg/info")
    os.makedirs(info, exist_ok=True)
    for path in ("var/lib/dpkg/updates", "var/lib/dpkg/triggers"):
        os.makedirs(os.path.join(root, path), exist_ok=True)
    # The format in which files of libraries of several architectures have the architecture in their names.
    with open(os.path.join(info, "format"), "w") as file:
        file.write("1\n")
    with open(os.path.join(root, "var/lib/dpkg/status"), "a") as status:
        for deb in debs:
            fields = subprocess.run(["dpkg-deb", "-f", deb], stdout=subprocess.PIPE, check=True, text=True).stdout
            first, _, rest = fields.partition("\n")
            status.write(f"{first}\nStatus: install ok installed\n{rest.rstrip()}\n\n")
            # What a package says of itself, such as its scripts and its list of sums, is in files of its name.
            same = "\nMulti-Arch: same\n" in fields
            name = first.split()[1] + (":amd64" if same else "")
            with tempfile.TemporaryDirectory() as control:
                subprocess.run(["dpkg-deb", "-e", deb, control], check=True)
                for entry in set(os.listdir(control)) - {"control"}:
                    shutil.copy(os.path.join(control, entry), os.path.join(info, f"{name}.{entry}"))
            files = subprocess.run(["dpkg-deb", "--fsys-tarfile", deb], stdout=subprocess.PIPE, check=True).stdout
            paths = subprocess.run(["tar", "-t"], input=files, stdout=subprocess.PIPE, check=True).stdout.decode()
            with open(os.path.join(info, f"{name}.list"), "w") as file:
                file.write("".join((path.lstrip(".").rstrip("/") or "/.") + "\n" for path in paths.splitlines()))


def index(debs):
    """Returns the text of a file `Packages` for a flat repository that has these packages beside it."""
    text = []
    for deb in debs:
        fields = subprocess.run(["dpkg-deb", "-f", deb], stdout=subprocess.PIPE, check=True, text=True).stdout
        digest = subprocess.run(["sha256sum", deb], stdout=subprocess.PIPE, check=True, text=True).stdout.split()[0]
        text.append(f"{fields.rstrip()}\nFilename: ./{os.path.basename(deb)}\nSize: {os.path.getsize(deb)}\nSHA256: {digest}\n")
    return "\n".join(text)


def layer(root):
    """Returns a tree as a layer: the same bytes for the same files."""
    return subprocess.run(["tar", "-c", "--sort=name", "--mtime=@1700000000", "--numeric-owner", "--format=posix",
                           "--pax-option=delete=atime,delete=ctime", "-C", root, "."], stdout=subprocess.PIPE, check=True).stdout
