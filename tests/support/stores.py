"""Object stores of the tests: real servers on loopback, gone when the test process is."""

from __future__ import annotations

import base64
import hmac
import http.client
import itertools
import json
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import urlsplit

from tests.support.process import spawn, stop
from tests.support.s3 import S3
from tests.support.tools import cache_folder

__all__ = ["AZURITE", "Azurite", "SeaweedFs", "Served", "azurite", "rclone", "s3rver", "seaweedfs"]

ACCESS_KEY = "test-access-key"
READER_KEY = "test-reader-key"
"""May list and read; with the same secret."""
SECRET_KEY = "test-secret-key-0123456789"  # noqa: S105 - of a server that the tests start
AZURITE = cache_folder() / "npm" / "node_modules" / ".bin"
_TRIES = 4
# Azurite's own well-known account; it has no other.
_AZURE_ACCOUNT = "devstoreaccount1"
_AZURE_KEY = (
    "Eby8vdM02xNOcqFlqUwJPLlmEtlCDXJ1OUzFT50uSRZ6IFsuFq2UVErCz4I6tq/K1SZFPTOtr/KBHBeksoGMGw=="
)


def free_ports(count: int) -> list[int]:
    """Ports that nobody listens on now."""
    sockets = [socket.socket() for _ in range(count)]
    try:
        for one in sockets:
            one.bind(("127.0.0.1", 0))
        return [one.getsockname()[1] for one in sockets]
    finally:
        for one in sockets:
            one.close()


def _answers(endpoint: str) -> bool:
    connection = http.client.HTTPConnection(urlsplit(endpoint).netloc, timeout=5)
    try:
        connection.request("GET", "/")
        return connection.getresponse().status < 500
    except OSError:
        return False
    finally:
        connection.close()


def _wait_for(endpoint: str, process: subprocess.Popen[bytes], log: Path) -> None:
    deadline = time.monotonic() + 120
    while not _answers(endpoint):
        if process.poll() is not None or time.monotonic() > deadline:
            raise AssertionError(f"{endpoint} does not answer: {log.read_text()[-4000:]}")
        time.sleep(0.1)


@dataclass(slots=True, kw_only=True)
class Served:
    """A running S3 server.

    Attributes:
        endpoint: its URL.
        env: what nbdpull is to find in its environment.
        client: an S3 client of the tests' own.
    """

    endpoint: str
    env: Mapping[str, str]
    client: S3
    _names: Iterator[int] = field(default_factory=itertools.count)

    def bucket(self, *, lock: bool = False) -> str:
        """A new bucket's name."""
        return self.client.make_bucket(f"bucket{next(self._names)}", lock=lock)


@dataclass(slots=True, kw_only=True)
class SeaweedFs(Served):
    """A SeaweedFS that can be killed and started again.

    Attributes:
        argv: its command line.
        process: the running one.
        log: what it says.
    """

    argv: Sequence[str]
    process: subprocess.Popen[bytes]
    log: Path

    def kill(self) -> None:
        """SIGKILL."""
        stop(self.process)

    def start(self) -> None:
        """Start again with the same data, ports and keys."""
        self.process = spawn(self.argv, log=self.log)
        _wait_for(self.endpoint, self.process, self.log)


def s3_env(endpoint: str) -> dict[str, str]:
    """What nbdpull needs in its environment for that endpoint, and nothing of the user's own."""
    nowhere = "/nonexistent"
    return {
        "AWS_ENDPOINT_URL": endpoint,
        "AWS_ACCESS_KEY_ID": ACCESS_KEY,
        "AWS_SECRET_ACCESS_KEY": SECRET_KEY,
        "AWS_REGION": "us-east-1",
        "AWS_CONFIG_FILE": nowhere,
        "AWS_SHARED_CREDENTIALS_FILE": nowhere,
    }


@contextmanager
def _folder() -> Iterator[Path]:
    folder = Path(tempfile.mkdtemp(prefix="nbdpull-store-"))
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


@contextmanager
def seaweedfs() -> Iterator[SeaweedFs]:
    """SeaweedFS with one identity that may do everything."""
    with _folder() as folder:
        config = folder / "s3.json"
        config.write_text(
            json.dumps(
                {
                    "identities": [
                        {
                            "name": "admin",
                            "credentials": [{"accessKey": ACCESS_KEY, "secretKey": SECRET_KEY}],
                            "actions": ["Admin", "Read", "Write", "List", "Tagging"],
                        },
                        {
                            "name": "reader",
                            "credentials": [{"accessKey": READER_KEY, "secretKey": SECRET_KEY}],
                            "actions": ["Read", "List"],
                        },
                    ]
                }
            )
        )
        server = _started(folder, config)
        try:
            yield server
        finally:
            server.kill()


def _started(folder: Path, config: Path) -> SeaweedFs:
    """A running one. Another process may take a port between our look at it and its use: then again."""
    number = 0
    while True:
        number += 1
        server = _spawned(folder, config, folder / f"data{number}")
        try:
            _wait_for(server.endpoint, server.process, server.log)
            _wait_for_buckets(server)
        except BaseException:
            server.kill()
            if number == _TRIES or b"address already in use" not in server.log.read_bytes():
                raise
        else:
            return server


def _spawned(folder: Path, config: Path, data: Path) -> SeaweedFs:
    data.mkdir()
    names = ("s3", "master", "volume", "filer")
    ports = iter(free_ports(2 * len(names)))
    argv = [
        str(Path(sys.executable).with_name("weed")),
        f"-logdir={folder}",
        "server",
        f"-dir={data}",
        "-ip=127.0.0.1",
        "-ip.bind=127.0.0.1",
        "-s3",
        f"-s3.config={config}",
        "-s3.port.iceberg=0",
        "-s3.port.lance=0",
        "-volume.max=300",
        "-volume.minFreeSpace=0",
        "-master.volumeSizeLimitMB=64",
        "-master.telemetry=false",
        f"-filer.localSocket={folder}/filer.sock",
        f"-s3.localSocket={folder}/s3.sock",
    ]
    endpoint = ""
    for name in names:
        port = next(ports)
        argv += [f"-{name}.port={port}", f"-{name}.port.grpc={next(ports)}"]
        endpoint = endpoint or f"http://127.0.0.1:{port}"
    log = data.with_suffix(".log")
    return SeaweedFs(
        endpoint=endpoint,
        env=s3_env(endpoint),
        client=S3(endpoint, ACCESS_KEY, SECRET_KEY),
        argv=argv,
        process=spawn(argv, log=log),
        log=log,
    )


def _wait_for_buckets(server: SeaweedFs) -> None:
    """Wait until an object can be written: the volumes join a moment after the S3 port answers."""
    bucket = server.bucket()
    deadline = time.monotonic() + 60
    while (answer := server.client.request("PUT", f"/{bucket}/x", body=b"x")).status != 200:
        if time.monotonic() > deadline:
            raise AssertionError(f"SeaweedFS takes no object: {answer}")
        time.sleep(0.1)


@contextmanager
def rclone() -> Iterator[Served]:
    """`rclone serve s3`, which ignores the condition of a conditional PUT."""
    with _folder() as folder:
        (folder / "bucket0").mkdir()
        endpoint = f"http://127.0.0.1:{free_ports(1)[0]}"
        argv = [
            str(Path(sys.executable).with_name("rclone")),
            "serve",
            "s3",
            "--addr",
            urlsplit(endpoint).netloc,
            "--auth-key",
            f"{ACCESS_KEY},{SECRET_KEY}",
            "--config",
            "/dev/null",
            str(folder),
        ]
        yield from _serve(argv, endpoint, folder / "log")


@contextmanager
def s3rver() -> Iterator[Served]:
    """Npm's s3rver, where `scripts/setup --full` put it."""
    with _folder() as folder:
        (port,) = free_ports(1)
        argv = [
            str(AZURITE / "s3rver"),
            *("--directory", str(folder), "--address", "127.0.0.1", "--port", str(port)),
            *("--configure-bucket", "bucket0"),
        ]
        yield from _serve(argv, f"http://127.0.0.1:{port}", folder / "log", "S3RVER", "S3RVER")


def _serve(
    argv: Sequence[str],
    endpoint: str,
    log: Path,
    access_key: str = ACCESS_KEY,
    secret_key: str = SECRET_KEY,
) -> Iterator[Served]:
    process = spawn(argv, log=log, env={"RCLONE_CONFIG": os.devnull})
    keys = {"AWS_ACCESS_KEY_ID": access_key, "AWS_SECRET_ACCESS_KEY": secret_key}
    try:
        _wait_for(endpoint, process, log)
        yield Served(
            endpoint=endpoint,
            env=s3_env(endpoint) | keys,
            client=S3(endpoint, access_key, secret_key),
        )
    finally:
        stop(process)


@dataclass(frozen=True, slots=True)
class Azurite:
    """A running Azurite; `env` is what nbdpull is to find in its environment."""

    endpoint: str
    env: Mapping[str, str]

    def make_container(self, name: str) -> str:
        """Make a container, by a request signed here; returns its name."""
        path = f"/{_AZURE_ACCOUNT}/{name}"
        sent = {
            "x-ms-date": time.strftime("%a, %d %b %Y %H:%M:%S GMT", time.gmtime()),
            "x-ms-version": "2023-11-03",
        }
        headers = "".join(f"{key}:{value}\n" for key, value in sorted(sent.items()))
        text = f"PUT{chr(10) * 12}{headers}/{_AZURE_ACCOUNT}{path}\nrestype:container"
        digest = hmac.digest(base64.b64decode(_AZURE_KEY), text.encode(), "sha256")
        sent["authorization"] = f"SharedKey {_AZURE_ACCOUNT}:{base64.b64encode(digest).decode()}"
        connection = http.client.HTTPConnection(urlsplit(self.endpoint).netloc, timeout=30)
        try:
            connection.request(
                "PUT", f"{path}?restype=container", headers=sent | {"content-length": "0"}
            )
            answer = connection.getresponse()
            if answer.status != 201:
                raise AssertionError(f"no container: {answer.status} {answer.read()!r}")
        finally:
            connection.close()
        return name


@contextmanager
def azurite() -> Iterator[Azurite]:
    """Azurite's blob service, where `scripts/setup --full` put it."""
    with _folder() as folder:
        (port,) = free_ports(1)
        argv = [
            str(AZURITE / "azurite-blob"),
            *("--location", str(folder), "--blobHost", "127.0.0.1", "--blobPort", str(port)),
            *("--silent", "--disableTelemetry", "--skipApiVersionCheck"),
        ]
        log = folder / "log"
        process = spawn(argv, log=log)
        endpoint = f"http://127.0.0.1:{port}"
        try:
            _wait_for(endpoint, process, log)
            endpoint = f"{endpoint}/{_AZURE_ACCOUNT}"
            yield Azurite(
                endpoint,
                {
                    "AZURE_STORAGE_ACCOUNT": _AZURE_ACCOUNT,
                    "AZURE_STORAGE_KEY": _AZURE_KEY,
                    "AZURE_STORAGE_ENDPOINT": endpoint,
                },
            )
        finally:
            stop(process)
