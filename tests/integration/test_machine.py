"""What is needed to start a VM elsewhere: definitions, the TPM's state, UEFI variables, what QMP tells."""

from __future__ import annotations

import json
import subprocess
import sys
import tarfile
from pathlib import Path
from typing import Any

import pytest

import nbdpull
from tests.integration.conftest import Keeper
from tests.repo.helpers import PASSWORD
from tests.support.disk import Disk, create_disk
from tests.support.tools import QemuTools
from tests.support.vm import Vm

MIB = 1 << 20
DEFINITION = "<domain type='qemu'><name>web</name></domain>\n"
READER = Path(__file__).parents[2] / "scripts" / "rescue_reader.py"


@pytest.fixture
def disk(tmp_path: Path, qemu_tools: QemuTools) -> Disk:
    return create_disk(tmp_path, "vda", tools=qemu_tools)


@pytest.fixture
def kept(tmp_path: Path) -> dict[str, Any]:
    """Options of a backup that keeps everything; the TPM's folder is as swtpm leaves it."""
    definition = tmp_path / "web vm.xml"
    definition.write_text(DEFINITION)
    tpm = tmp_path / "tpm"
    (tpm / "tpm2").mkdir(parents=True)
    (tpm / "tpm2" / "tpm2-00.permall").write_bytes(b"TPM" * 2000)
    (tpm / "tpm2" / ".lock").touch()
    return {"definitions": [definition], "tpm_state": tpm}


def objects(keeper: Keeper, kind: str) -> int:
    return sum(1 for path in (Path(keeper.repository) / kind).rglob("*") if path.is_file())


def test_everything_is_kept_and_given_back(
    qemu_tools: QemuTools,
    keeper: Keeper,
    disk: Disk,
    kept: dict[str, Any],
    tmp_path: Path,
) -> None:
    secret = ["-object", "secret,id=s0,data=geheim", "-device", "virtio-net-pci,id=net0"]
    with Vm([disk], tools=qemu_tools, paused=True, arguments=secret) as vm:
        vm.qemu_io("vda", "write -P 1 0 1M")
        first = keeper.backup(vm.uri, **kept)
        packs = objects(keeper, "d")
        second = keeper.backup(vm.uri, **kept)
        # The disk's session has none either: what did not change is not stored again.
        assert objects(keeper, "d") == packs
        (kept["tpm_state"] / "tpm2" / "tpm2-00.permall").write_bytes(b"tpm" * 2001)
        third = keeper.backup(vm.uri, **kept)
        fourth = keeper.backup(vm.uri)
    assert [disk.name for disk in first.disks] == ["vda"]
    shown = nbdpull.show(keeper.repository, first.backup).backup
    assert [disk.name for disk in shown.disks] == ["vda"]
    names = ["definition/1-web_vm.xml", "tpm/tpm2/tpm2-00.permall", "qemu.json"]
    assert [name for name, _ in shown.machine] == names
    assert nbdpull.show(keeper.repository, fourth.backup).backup.machine == ()
    folder = tmp_path
    for backup, state in ((second, b"TPM" * 2000), (third, b"tpm" * 2001)):
        folder = tmp_path / "out" / backup.backup
        result = nbdpull.restore(keeper.repository, backup.backup, folder)
        assert sorted(result.machine) == sorted(str(folder / "machine" / name) for name in names)
        assert (folder / "machine" / names[0]).read_text() == DEFINITION
        assert (folder / "machine" / names[1]).read_bytes() == state
        assert (folder / "vda.raw").is_file()
    told = json.loads((folder / "machine" / "qemu.json").read_text())
    assert told["query-version"]["qemu"]["major"] == qemu_tools.version[0]
    assert told["machine"]["type"].startswith("pc-")
    assert told["/machine/peripheral"]["net0"]["mac"].startswith("52:54:00")
    assert told["/objects"]["s0"] == {"type": "secret"}
    assert "geheim" not in json.dumps(told)
    (folder / "vda.raw").unlink()
    with pytest.raises(nbdpull.UsageError, match=r"machine' exists; give --force"):
        nbdpull.restore(keeper.repository, third.backup, folder)
    assert not (folder / "vda.raw").exists()
    nbdpull.restore(keeper.repository, third.backup, folder, force=True)
    assert nbdpull.verify(keeper.repository).ok
    # Without nbdpull: the state is a disk that is a tar.
    tar = tmp_path / "state.tar"
    argv = [sys.executable, str(READER), keeper.repository, first.backup, "(machine)", str(tar)]
    subprocess.run(argv, check=True, capture_output=True)
    with tarfile.open(tar) as archive:
        assert archive.getnames() == names


def test_what_is_damaged_is_told_and_not_given_back(
    keeper: Keeper, disk: Disk, kept: dict[str, Any], qemu_tools: QemuTools, tmp_path: Path
) -> None:
    with Vm([disk], tools=qemu_tools) as vm:
        done = keeper.backup(vm.uri, **kept)
    # The empty disk has no pack: the only one is of the state.
    (pack,) = (path for path in (Path(keeper.repository) / "d").rglob("*") if path.is_file())
    raw = bytearray(pack.read_bytes())
    raw[300] ^= 0xFF
    pack.write_bytes(raw)
    with pytest.raises(nbdpull.DamagedError):
        nbdpull.restore(keeper.repository, done.backup, tmp_path / "out")
    assert not (tmp_path / "out" / "machine").exists()
    (damage,) = nbdpull.verify(keeper.repository).damaged
    assert damage.disk == "(machine)"
    # The next backup stores it anew.
    with Vm([disk], tools=qemu_tools) as vm:
        again = keeper.backup(vm.uri, **kept)
    nbdpull.restore(keeper.repository, again.backup, tmp_path / "again")
    assert (tmp_path / "again" / "machine" / "definition" / "1-web_vm.xml").is_file()


def test_it_outlives_copies_collections_and_what_is_undone(
    keeper: Keeper, disk: Disk, kept: dict[str, Any], tmp_path: Path
) -> None:
    with Vm([disk]) as vm:
        backups = []
        for number in range(3):
            vm.qemu_io("vda", f"write -P {number + 1} 0 1M")
            (kept["tpm_state"] / "tpm2" / "tpm2-00.permall").write_bytes(bytes([number]) * 300_000)
            backups.append(keeper.backup(vm.uri, **kept).backup)
    replica = tmp_path / "replica"
    nbdpull.copy(keeper.repository, replica)
    nbdpull.forget(keeper.repository, [backups[0]])
    nbdpull.forget(keeper.repository, [backups[2]])
    nbdpull.undo(keeper.repository, [backups[2]])
    nbdpull.gc(keeper.repository, undo_window_s=0)
    nbdpull.repack(keeper.repository, ratio=1.0)
    nbdpull.gc(keeper.repository, undo_window_s=0)
    assert nbdpull.verify(keeper.repository).ok
    for where, numbers in ((keeper.repository, (1, 2)), (replica, (0, 1, 2))):
        for number in numbers:
            folder = tmp_path / f"{Path(where).name}-{number}"
            nbdpull.restore(where, backups[number], folder)
            state = folder / "machine" / "tpm" / "tpm2" / "tpm2-00.permall"
            assert state.read_bytes() == bytes([number]) * 300_000


def test_an_encrypted_repository_keeps_it_secret(
    tmp_path: Path, disk: Disk, kept: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("NBDPULL_PASSWORD", PASSWORD.decode())
    repository = tmp_path / "repo"
    nbdpull.init(repository, encrypt=True)
    (tmp_path / "web vm.xml").write_text(DEFINITION * 40)
    with Vm([disk]) as vm:
        done = nbdpull.backup(vm.uri, repository, scratch=tmp_path, **kept)
    stored = b"".join(path.read_bytes() for path in repository.rglob("*") if path.is_file())
    assert b"domain type" not in stored
    assert b"permall" not in stored
    nbdpull.restore(repository, done.backup, tmp_path / "out")
    restored = tmp_path / "out" / "machine" / "definition" / "1-web_vm.xml"
    assert restored.read_text() == DEFINITION * 40


@pytest.mark.parametrize("way", ["blockdev", "drive"])
@pytest.mark.parametrize("guest_first", [False, True], ids=["mode-b", "mode-c"])
def test_uefi_variables_are_a_disk_of_the_point_in_time(
    qemu_tools: QemuTools,
    keeper: Keeper,
    disk: Disk,
    tmp_path: Path,
    way: str,
    *,
    guest_first: bool,
) -> None:
    """Pflash unit 1 is where UEFI firmware writes; unit 0, the code, is read-only."""
    code, variables = tmp_path / "code.fd", tmp_path / "vars.fd"
    code.write_bytes(b"\xcc" * (256 << 10))
    variables.write_bytes(b"\x5a" * (528 << 10))
    if way == "drive":
        arguments = [
            *("-drive", f"if=pflash,unit=0,format=raw,readonly=on,file={code}"),
            *("-drive", f"if=pflash,unit=1,format=raw,file={variables}"),
        ]
        name, top = "pflash1", "pflash1"
    else:
        arguments = [
            *(
                "-blockdev",
                f"raw,node-name=code,read-only=on,file.driver=file,file.filename={code}",
            ),
            *("-blockdev", f"raw,node-name=vars,file.driver=file,file.filename={variables}"),
            *("-machine", "pflash0=code,pflash1=vars"),
        ]
        name = top = "vars"
    with Vm([disk], tools=qemu_tools, paused=True, arguments=arguments) as vm:
        first = keeper.backup(vm.uri, guest_first=guest_first, machine=True)
        assert [one.name for one in first.disks] == sorted([name, "vda"])
        vm.qmp("human-monitor-command", command_line=f'qemu-io {top} "write -P 7 64k 4k"')
        second = keeper.backup(vm.uri, guest_first=guest_first, machine=True)
        assert {str(one.level) for one in second.disks} == {"incremental"}
    expected = bytearray(b"\x5a" * (528 << 10))
    assert keeper.restore(first.backup)[name].read_bytes() == expected
    expected[64 << 10 : 68 << 10] = b"\7" * 4096
    assert keeper.restore(second.backup)[name].read_bytes() == expected


def test_what_is_no_state_is_refused_before_anything_is_touched(
    keeper: Keeper, disk: Disk, tmp_path: Path
) -> None:
    tpm = tmp_path / "tpm"
    tpm.mkdir()
    with Vm([disk]) as vm:
        with pytest.raises(nbdpull.UsageError, match=r"--definition: can't open"):
            keeper.backup(vm.uri, definitions=[tmp_path / "none"])
        with pytest.raises(nbdpull.UsageError, match=r"--definition: .* is no regular file"):
            keeper.backup(vm.uri, definitions=["/dev/null"])
        with pytest.raises(nbdpull.SourceError, match="has no files"):
            keeper.backup(vm.uri, tpm_state=tpm)
        (tpm / "link").symlink_to("/etc/passwd")
        with pytest.raises(nbdpull.SourceError, match="links are not followed"):
            keeper.backup(vm.uri, tpm_state=tpm)
        (tpm / "link").unlink()
        (tpm / "a b").touch()
        with pytest.raises(nbdpull.SourceError, match="is no name of a TPM's state"):
            keeper.backup(vm.uri, tpm_state=tpm)
        assert vm.bitmaps("vda") == {}
    assert nbdpull.list_backups(keeper.repository, incomplete=True) == ()
