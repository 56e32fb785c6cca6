"""Certificates and shared keys for the tests of TLS, made by GnuTLS' tools."""

from __future__ import annotations

from pathlib import Path

from tests.support.process import run

__all__ = ["Authority", "make_psk"]


class Authority:
    """A certificate authority in a folder of its own."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir()
        self._folder = folder
        self._key = folder / "ca-key.pem"
        self._cert = folder / "ca-cert.pem"
        _key(self._key)
        template = _template(folder, "ca", "cn = nbdpull test\nca\ncert_signing_key\n")
        options: list[str | Path] = ["--generate-self-signed", "--load-privkey", self._key]
        options += ["--template", template, "--outfile", self._cert]
        run(["certtool", *options])

    def issue(self, folder: Path, *roles: str) -> Path:
        """Put the authority's certificate and one for each role, client or server, into `folder`."""
        folder.mkdir(exist_ok=True)
        (folder / "ca-cert.pem").write_bytes(self._cert.read_bytes())
        for role in roles:
            key = folder / f"{role}-key.pem"
            _key(key)
            lines = f"cn = {role}\nip_address = 127.0.0.1\nip_address = 127.0.0.2\ntls_www_{role}\n"
            lines += "encryption_key\nsigning_key\n"
            options: list[str | Path] = ["--generate-certificate"]
            options += ["--load-ca-certificate", self._cert]
            options += ["--load-ca-privkey", self._key, "--load-privkey", key]
            options += ["--template", _template(self._folder, role, lines)]
            options += ["--outfile", folder / f"{role}-cert.pem"]
            run(["certtool", *options])
        return folder


def _key(path: Path) -> None:
    run(["certtool", "--generate-privkey", "--key-type=rsa", "--bits=2048", "--outfile", path])


def _template(folder: Path, name: str, lines: str) -> Path:
    path = folder / f"{name}.template"
    path.write_text(lines, encoding="ascii")
    return path


def make_psk(path: Path, user: str = "backup") -> Path:
    """Add a new shared key of `user` to a file."""
    path.parent.mkdir(exist_ok=True)
    run(["psktool", "-u", user, "-p", path])
    return path
