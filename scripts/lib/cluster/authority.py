# SPDX-License-Identifier: Apache-2.0
"""The certificates of a cluster, by openssl, and the kubeconfig files that carry them."""
import base64
import json
import os
import subprocess

DAYS = "90"


def openssl(*arguments):
    subprocess.run(["openssl", *arguments], check=True, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL,
                   stderr=subprocess.PIPE)


def new_key(path):
    openssl("genpkey", "-algorithm", "EC", "-pkeyopt", "ec_paramgen_curve:P-256", "-out", path)


class Authority:
    """A certificate authority whose files are in `directory`: ca.crt, ca.key, and NAME.crt, NAME.key for each that it
    certifies."""

    def __init__(self, directory):
        self.directory = directory
        os.makedirs(directory, mode=0o700, exist_ok=True)
        new_key(self.path("ca.key"))
        openssl("req", "-x509", "-new", "-key", self.path("ca.key"), "-subj", "/CN=kubernetes-ca", "-days", DAYS,
                "-out", self.path("ca.crt"))

    def path(self, name):
        return os.path.join(self.directory, name)

    def certify(self, name, subject, *alternatives):
        """Makes a key and a certificate. `alternatives` are further names, such as DNS:localhost."""
        new_key(self.path(f"{name}.key"))
        openssl("req", "-new", "-key", self.path(f"{name}.key"), "-subj", subject, "-out", self.path(f"{name}.csr"))
        with open(self.path(f"{name}.ext"), "w") as file:
            file.write("extendedKeyUsage = serverAuth, clientAuth\n")
            if alternatives:
                file.write(f"subjectAltName = {', '.join(alternatives)}\n")
        openssl("x509", "-req", "-in", self.path(f"{name}.csr"), "-CA", self.path("ca.crt"), "-CAkey", self.path("ca.key"),
                "-CAcreateserial", "-days", DAYS, "-out", self.path(f"{name}.crt"), "-extfile", self.path(f"{name}.ext"))

    def service_account_key(self):
        """Makes sa.key and sa.pub, which sign and verify the tokens of service accounts."""
        new_key(self.path("sa.key"))
        openssl("pkey", "-in", self.path("sa.key"), "-pubout", "-out", self.path("sa.pub"))

    def kubeconfig(self, path, server, subject):
        """Writes the kubeconfig file of a user. It needs no other files."""
        name = os.path.basename(path)
        self.certify(name, subject)
        cluster = {"server": server, "certificate-authority-data": self.encoded("ca.crt")}
        user = {"client-certificate-data": self.encoded(f"{name}.crt"), "client-key-data": self.encoded(f"{name}.key")}
        config = {"apiVersion": "v1", "kind": "Config", "current-context": "cluster",
                  "clusters": [{"name": "cluster", "cluster": cluster}], "users": [{"name": "user", "user": user}],
                  "contexts": [{"name": "cluster", "context": {"cluster": "cluster", "user": "user"}}]}
        with open(path, "w", opener=lambda path, flags: os.open(path, flags, 0o600)) as file:
            # JSON is YAML too.
            json.dump(config, file)

    def encoded(self, name):
        with open(self.path(name), "rb") as file:
            return base64.b64encode(file.read()).decode()
