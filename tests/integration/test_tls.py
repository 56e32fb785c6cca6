"""NBD over TCP with TLS: QEMU's own server, servers of others as source and as target."""

from __future__ import annotations

import re
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import pytest

import nbdpull
from tests.integration.conftest import Keeper
from tests.integration.test_exports import Servers
from tests.integration.test_exports import servers as servers_fixture
from tests.support.certificates import Authority, make_psk
from tests.support.disk import Disk, compare, create_disk
from tests.support.tools import QEMU_72, QemuTools
from tests.support.vm import Vm

servers = servers_fixture


@pytest.fixture
def authority(tmp_path: Path) -> Authority:
    return Authority(tmp_path / "authority")


@pytest.fixture
def disk(tmp_path: Path, qemu_tools: QemuTools) -> Disk:
    return create_disk(tmp_path, "vda", tools=qemu_tools)


def secrets(kind: str, authority: Authority, tmp_path: Path) -> Path:
    if kind == "psk":
        return make_psk(tmp_path / "psk" / "keys.psk")
    return authority.issue(tmp_path / "pki", "client", "server")


@pytest.mark.parametrize("kind", ["x509", "psk"])
def test_a_running_vm_is_read_over_tls(
    qemu_tools: QemuTools,
    keeper: Keeper,
    disk: Disk,
    authority: Authority,
    tmp_path: Path,
    kind: str,
    caplog: pytest.LogCaptureFixture,
) -> None:
    tls = secrets(kind, authority, tmp_path)
    seen: list[str] = []
    with Vm([disk], tools=qemu_tools) as vm:

        def told(progress: nbdpull.Progress) -> None:
            if progress.kind is nbdpull.ProgressKind.DISK_START:
                seen.append(Path("/proc/self/net/tcp").read_text(encoding="ascii"))
                seen.append(str(vm.qmp("qom-list", path="/objects")))

        with caplog.at_level("DEBUG"):
            for level in ("full", "incremental"):
                vm.qemu_io("vda", f"write -P {len(level)} 1M 3M")
                result = keeper.backup(vm.uri, level, tls=tls, progress=told)
                assert result.disks[0].level == level
                compare(keeper.restore(result.backup)["vda"], disk.path, other_format="qcow2")
        assert not any(vm.leftovers().values())
        assert "-tls'" not in str(vm.qmp("qom-list", path="/objects"))
    assert "-tls'" in seen[1]
    if kind == "psk":
        key = (tmp_path / "psk" / "keys.psk").read_text(encoding="ascii").strip().split(":")[1]
        assert key not in caplog.text


@pytest.mark.parametrize("kind", ["x509", "psk", "none"])
def test_a_client_with_the_wrong_secret_is_refused(
    keeper: Keeper, servers: Servers, authority: Authority, tmp_path: Path, kind: str
) -> None:
    image = tmp_path / "image"
    image.write_bytes(bytes(1 << 20))
    tls = secrets("x509" if kind == "none" else kind, authority, tmp_path)
    creds = f"tls-creds-x509,id=t,endpoint=server,dir={tls},verify-peer=on"
    if kind == "psk":
        creds = f"tls-creds-psk,id=t,endpoint=server,dir={tls.parent}"
    line = ["qemu-nbd", "-r", "-t", "-e", "9", "-f", "raw", "-x", "vda", "--object", creds]
    line += ["--tls-creds", "t", "-b", "127.0.0.1", "-p", "PORT", str(image)]
    plain = servers.start(*line, export="vda")
    uri = plain.replace("nbd:", "nbds:")
    if kind == "none":
        with pytest.raises(nbdpull.NbdError, match=r"can't connect to nbd://.*TLS"):
            keeper.backup(plain, vm="web")
        with pytest.raises(nbdpull.UsageError, match="has no TLS, and --tls is given"):
            keeper.backup(plain, vm="web", tls=tls)
        return
    assert keeper.backup(uri, vm="web", tls=tls).disks[0].name == "vda"
    wrong = (
        make_psk(tmp_path / "wrong" / "keys.psk")
        if kind == "psk"
        else Authority(tmp_path / "other").issue(tmp_path / "wrong", "client")
    )
    with pytest.raises(nbdpull.NbdError, match=r"can't connect to nbds://") as caught:
        keeper.backup(uri, vm="web", tls=wrong)
    assert re.search(r"gnutls|TLS|certificate", str(caught.value))
    assert len(nbdpull.list_backups(keeper.repository)) == 1


def test_a_restore_writes_over_tls(
    keeper: Keeper, servers: Servers, authority: Authority, tmp_path: Path
) -> None:
    disk = create_disk(tmp_path, "vda")
    with Vm([disk]) as vm:
        vm.qemu_io("vda", "write -P 1 1M 3M")
        result = keeper.backup(vm.uri)
        tls = secrets("x509", authority, tmp_path)
        target = create_disk(tmp_path, "target", format="raw")
        creds = f"tls-creds-x509,id=t,endpoint=server,dir={tls},verify-peer=on"
        line = ["qemu-nbd", "-t", "-e", "9", "-f", "raw", "-x", "out", "--object", creds]
        line += ["--tls-creds", "t", "-b", "127.0.0.1", "-p", "PORT", str(target.path)]
        uri = servers.start(*line, export="out").replace("nbd:", "nbds:")
        nbdpull.restore(keeper.repository, result.backup, uri, tls=tls)
        compare(target.path, disk.path, other_format="qcow2")
        with pytest.raises(nbdpull.UsageError, match="--tls is about NBD exports"):
            nbdpull.restore(keeper.repository, result.backup, tmp_path / "out", tls=tls)


def test_what_is_missing_is_said_before_the_vm_is_touched(
    keeper: Keeper, authority: Authority, tmp_path: Path
) -> None:
    client = authority.issue(tmp_path / "client", "client")
    for path, words in (
        (client, "has no server-cert.pem"),
        (tmp_path / "none", "neither a folder of certificates nor a readable file"),
        (make_psk(tmp_path / "mine.psk"), "to be called keys.psk"),
    ):
        with pytest.raises(nbdpull.UsageError, match=words):
            keeper.backup("qmp:/nowhere", tls=path)


@pytest.mark.parametrize("qemu_tools", [QEMU_72], ids=["qemu-7.2"])
def test_what_a_killed_run_left_is_cleaned_up(
    qemu_tools: QemuTools, keeper: Keeper, disk: Disk, authority: Authority, tmp_path: Path
) -> None:
    tls = secrets("x509", authority, tmp_path)
    with Vm([disk], tools=qemu_tools) as vm:
        assert kill_in_the_middle(keeper, vm, tls) == -9
        cleaned = keeper.cleanup(vm.uri)
        assert [line for line in cleaned.removed if line.startswith(("NBD server", "object np-"))]
        assert not any(vm.leftovers().values())
        assert "-tls'" not in str(vm.qmp("qom-list", path="/objects"))
        assert keeper.backup(vm.uri, tls=tls).disks[0].level == "full"


@pytest.mark.parametrize("qemu_tools", [QEMU_72], ids=["qemu-7.2"])
@pytest.mark.parametrize("kind", ["x509", "psk"])
def test_a_killed_run_is_gone_on_with_through_the_same_server(
    qemu_tools: QemuTools,
    keeper: Keeper,
    disk: Disk,
    authority: Authority,
    tmp_path: Path,
    kind: str,
) -> None:
    tls = secrets(kind, authority, tmp_path)
    with Vm([disk], tools=qemu_tools) as vm:
        assert kill_in_the_middle(keeper, vm, tls) == -9
        result = keeper.backup(vm.uri, tls=tls)
        assert result.resumed
        assert not any(vm.leftovers().values())
        assert "-tls'" not in str(vm.qmp("qom-list", path="/objects"))
        compare(keeper.restore(result.backup)["vda"], disk.path, other_format="qcow2")
        # Without --tls its exports can't be reached.
        assert kill_in_the_middle(keeper, vm, tls) == -9
        assert not keeper.backup(vm.uri).resumed
        assert not any(vm.leftovers().values())


KILLED = """
import os, signal, sys
import nbdpull

def told(progress):
    if progress.kind is nbdpull.ProgressKind.DISK_START:
        os.kill(os.getpid(), signal.SIGKILL)

nbdpull.backup(sys.argv[1], sys.argv[2], scratch=sys.argv[3], tls=sys.argv[4], progress=told)
"""


def kill_in_the_middle(keeper: Keeper, vm: Vm, tls: Path) -> int:
    line = [sys.executable, "-c", KILLED, vm.uri, keeper.repository, keeper.scratch, tls]
    return subprocess.run(list(map(str, line)), check=False, capture_output=True).returncode


def listening(pid: int) -> set[str]:
    """Addresses on which a process listens over TCP."""
    opened = {
        str(file.readlink()) for file in Path(f"/proc/{pid}/fd").iterdir() if file.is_symlink()
    }
    lines = Path("/proc/net/tcp").read_text(encoding="ascii").splitlines()[1:]
    rows = [line.split() for line in lines]
    return {row[1] for row in rows if row[3] == "0A" and f"socket:[{row[9]}]" in opened}


def free_port(host: str) -> int:
    with socket.socket() as probe:
        probe.bind((host, 0))
        return int(probe.getsockname()[1])


def untrusting(pki: Path, other: Path, folder: Path) -> Path:
    """A client that the server takes, and that takes no such server: its authority is another one."""
    folder.mkdir()
    for name in ("client-cert.pem", "client-key.pem"):
        shutil.copy(pki / name, folder)
    shutil.copy(other / "ca-cert.pem", folder)
    return folder


@pytest.mark.parametrize("kind", ["x509", "psk"])
def test_qemu_listens_where_the_user_says(
    qemu_tools: QemuTools,
    keeper: Keeper,
    disk: Disk,
    authority: Authority,
    tmp_path: Path,
    kind: str,
) -> None:
    tls = secrets(kind, authority, tmp_path)
    port = free_port("127.0.0.2")
    address = f"nbds://127.0.0.2:{port}"
    seen: list[set[str]] = []
    with Vm([disk], tools=qemu_tools) as vm:

        def told(progress: nbdpull.Progress) -> None:
            if progress.kind is nbdpull.ProgressKind.DISK_START:
                seen.append(listening(vm.process.pid))

        for level in ("full", "incremental"):
            vm.qemu_io("vda", f"write -P {len(level)} 1M 3M")
            result = keeper.backup(vm.uri, level, tls=tls, nbd_address=address, progress=told)
            compare(keeper.restore(result.backup)["vda"], disk.path, other_format="qcow2")
            assert not any(vm.leftovers().values())
            assert "-tls'" not in str(vm.qmp("qom-list", path="/objects"))
        assert seen == [{f"0200007F:{port:04X}"}] * 2
        assert listening(vm.process.pid) == set()
        with pytest.raises(nbdpull.CommandError, match=r"Failed to find an available port|bind"):
            keeper.backup(vm.uri, tls=tls, nbd_address="nbds://192.0.2.1:10809")
        assert not any(vm.leftovers().values())


@pytest.mark.parametrize("kind", ["x509", "psk"])
def test_a_server_that_qemu_runs_with_tls_is_used_and_left(
    qemu_tools: QemuTools,
    keeper: Keeper,
    disk: Disk,
    authority: Authority,
    tmp_path: Path,
    kind: str,
) -> None:
    tls = secrets(kind, authority, tmp_path)
    port = free_port("127.0.0.1")
    address = f"nbds://127.0.0.1:{port}"
    other = Authority(tmp_path / "other").issue(tmp_path / "wrong", "client")
    wrong = [other, untrusting(tls, other, tmp_path / "half")] if kind == "x509" else []
    wrong += [make_psk(tmp_path / "wrong-psk" / "keys.psk")] if kind == "psk" else []
    with Vm([disk], tools=qemu_tools) as vm:
        vm.qemu_io("vda", "write -P 1 1M 3M")
        creds = {"qom_type": f"tls-creds-{kind}", "id": "t", "endpoint": "server"}
        folder = tls if kind == "x509" else tls.parent
        more = {"verify_peer": True} if kind == "x509" else {}
        vm.qmp("object-add", **creds, dir=str(folder), **more)
        inet = {"type": "inet", "data": {"host": "127.0.0.1", "port": str(port)}}
        vm.qmp("nbd-server-start", addr=inet, tls_creds="t")
        for other_secret in wrong:
            with pytest.raises(nbdpull.NbdError, match=r"can't connect to nbds://"):
                keeper.backup(vm.uri, tls=other_secret, nbd_address=address)
            assert not any(vm.leftovers().values())
        with pytest.raises(nbdpull.NbdError, match="can't connect to nbd://"):
            keeper.backup(vm.uri, nbd_address=address.replace("nbds", "nbd"))
        result = keeper.backup(vm.uri, tls=tls, nbd_address=address)
        compare(keeper.restore(result.backup)["vda"], disk.path, other_format="qcow2")
        assert not any(vm.leftovers().values())
        assert listening(vm.process.pid) == {f"0100007F:{port:04X}"}
        assert "-tls'" not in str(vm.qmp("qom-list", path="/objects"))


def test_over_a_unix_socket_keys_are_checked_and_certificates_refused(
    keeper: Keeper, servers: Servers, authority: Authority, tmp_path: Path
) -> None:
    image = tmp_path / "image"
    image.write_bytes(bytes(1 << 20))
    tls = make_psk(tmp_path / "psk" / "keys.psk")
    creds = f"tls-creds-psk,id=t,endpoint=server,dir={tls.parent}"
    line = ["qemu-nbd", "-r", "-t", "-e", "9", "-f", "raw", "-x", "vda", "--object", creds]
    plain = servers.start(*line, "--tls-creds", "t", "-k", "SOCKET", image, export="vda")
    uri = plain.replace("nbd+unix", "nbds+unix")
    assert keeper.backup(uri, vm="web", tls=tls).disks[0].name == "vda"
    wrong = make_psk(tmp_path / "wrong" / "keys.psk")
    with pytest.raises(nbdpull.NbdError, match=r"can't connect to nbds\+unix://.*TLS|gnutls"):
        keeper.backup(uri, vm="web", tls=wrong)
    with pytest.raises(nbdpull.NbdError, match="can't connect to nbd"):
        keeper.backup(plain, vm="web")
    # libnbd would take any server's certificate: whoever can put a socket there could read or answer.
    pki = authority.issue(tmp_path / "pki", "client")
    with pytest.raises(nbdpull.UsageError, match="no certificate can be checked"):
        keeper.backup(uri, vm="web", tls=pki)
    with pytest.raises(nbdpull.UsageError, match="no certificate can be checked"):
        keeper.backup(f"{uri}&tls-certificates={pki}", vm="web")


def test_qemus_server_with_shared_keys_over_a_unix_socket(
    qemu_tools: QemuTools, keeper: Keeper, disk: Disk, tmp_path: Path
) -> None:
    tls = make_psk(tmp_path / "psk" / "keys.psk")
    path = tmp_path / "nbd"
    with Vm([disk], tools=qemu_tools) as vm:
        vm.qemu_io("vda", "write -P 1 1M 3M")
        folder = str(tls.parent)
        vm.qmp("object-add", qom_type="tls-creds-psk", id="t", endpoint="server", dir=folder)
        unix = {"type": "unix", "data": {"path": str(path)}}
        vm.qmp("nbd-server-start", addr=unix, tls_creds="t")
        address = f"nbds+unix:///?socket={path}"
        result = keeper.backup(vm.uri, tls=tls, nbd_address=address)
        compare(keeper.restore(result.backup)["vda"], disk.path, other_format="qcow2")
        wrong = make_psk(tmp_path / "wrong" / "keys.psk")
        with pytest.raises(nbdpull.NbdError, match=r"can't connect to nbds\+unix://"):
            keeper.backup(vm.uri, tls=wrong, nbd_address=address)
        assert not any(vm.leftovers().values())
        assert path.is_socket()
