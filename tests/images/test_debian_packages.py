import os
import subprocess
import tempfile
import unittest

import debian_packages

CONTROL = "Package: example\nVersion: 1:2.0-1\nArchitecture: amd64\nMulti-Arch: same\nMaintainer: nobody\nDescription: for a test\n"


def package(work, files):
    """Builds a package. Returns its file."""
    tree, deb = os.path.join(work, "tree"), os.path.join(work, "example.deb")
    for path, text in {"DEBIAN/control": CONTROL, **files}.items():
        os.makedirs(os.path.dirname(os.path.join(tree, path)), exist_ok=True)
        with open(os.path.join(tree, path), "w") as file:
            file.write(text)
    subprocess.run(["dpkg-deb", "--root-owner-group", "-b", tree, deb], check=True, stdout=subprocess.DEVNULL)
    return deb


class Packages(unittest.TestCase):
    FILES = {"lib/x/library": "l", "usr/lib/x/plugin": "p", "usr/share/doc/example/copyright": "c", "usr/share/example/kept": "k"}

    def setUp(self):
        work = tempfile.TemporaryDirectory()
        self.addCleanup(work.cleanup)
        self.deb = package(work.name, self.FILES)
        self.root = os.path.join(work.name, "root")

    def there(self, path):
        return os.path.exists(os.path.join(self.root, path))

    def test_a_tree_has_a_merged_usr_and_lacks_what_is_left_out(self):
        debian_packages.extract([self.deb], self.root, ["usr/lib/x/plug*"])
        self.assertEqual(os.readlink(os.path.join(self.root, "lib")), "usr/lib")
        self.assertTrue(self.there("usr/lib/x/library") and self.there("usr/share/example/kept"))
        self.assertFalse(self.there("usr/lib/x/plugin") or self.there("usr/share/doc"))

    def test_the_same_tree_is_the_same_layer(self):
        debian_packages.extract([self.deb], self.root)
        first = debian_packages.layer(self.root)
        os.utime(os.path.join(self.root, "usr/share/example/kept"), (5, 6))
        self.assertEqual(debian_packages.layer(self.root), first)

    def test_dpkg_takes_a_registered_package_for_installed(self):
        debian_packages.extract([self.deb], self.root)
        debian_packages.register([self.deb], self.root)
        shown = subprocess.run(["dpkg-query", f"--admindir={self.root}/var/lib/dpkg", "-W", "-f", "${Version} ${Status}", "example"],
                               stdout=subprocess.PIPE, check=True, text=True).stdout
        self.assertEqual(shown, "1:2.0-1 install ok installed")
        with open(os.path.join(self.root, "var/lib/dpkg/info/example:amd64.list")) as file:
            self.assertIn("/usr/lib/x/plugin", file.read().splitlines())

    def test_an_index_names_the_files_of_a_repository(self):
        text = debian_packages.index([self.deb])
        self.assertIn("Package: example\n", text)
        self.assertIn(f"Filename: ./example.deb\nSize: {os.path.getsize(self.deb)}\nSHA256: ", text)

    def test_what_apt_would_install_is_read(self):
        line = "Inst libc6:i386 (2.36-9+deb12u14 Debian:12.14/oldstable [i386]) []"
        self.assertEqual(debian_packages.INSTALLED.match(line).groups(), ("libc6", "2.36-9+deb12u14", "i386"))
        self.assertIsNone(debian_packages.INSTALLED.match("Conf libc6 (2.36 Debian:12.14/oldstable [amd64])"))


if __name__ == "__main__":
    unittest.main()
