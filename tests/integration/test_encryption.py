"""The main job with an encrypted repository and a host that must not read what it backs up."""

from __future__ import annotations

from pathlib import Path

import pytest

import nbdpull
from nbdpull import KeySource, Level
from nbdpull.repo import slots
from tests.repo.helpers import CHEAP
from tests.support.disk import MIB, compare, create_disk
from tests.support.tools import QemuTools
from tests.support.vm import Vm

OWNER = KeySource(password="owner", environment=False)


def test_a_host_with_a_writers_key_backs_up_incrementally_and_restores_nothing(
    qemu_tools: QemuTools, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(slots, "DEFAULT_KDF", CHEAP)
    repository, key, scratch = tmp_path / "repo", tmp_path / "writer.key", tmp_path / "s"
    scratch.mkdir()
    nbdpull.init(repository, encrypt=True, keys=OWNER)
    nbdpull.key_export(repository, key, writer=True, keys=OWNER)
    host = KeySource(key_file=str(key), environment=False)
    disk = create_disk(tmp_path, "vda", tools=qemu_tools)
    with Vm([disk], tools=qemu_tools) as vm:
        for number in range(3):
            vm.qemu_io("vda", f"write -P {number + 1} {number}M 1M")
        full = nbdpull.backup(vm.uri, repository, scratch=scratch, keys=host)
        vm.qemu_io("vda", "write -P 9 1M 64k")
        vm.qemu_io("vda", "write -z 2M 128k")
        second = nbdpull.backup(vm.uri, repository, scratch=scratch, keys=host)
        assert (full.level, second.level) == (Level.FULL, Level.INCREMENTAL)
        assert second.parent == full.backup
        assert second.disks[0].read_bytes < MIB
        vm.qemu_io("vda", "flush")
        with pytest.raises(nbdpull.WrongKeyError, match="writer's"):
            nbdpull.restore(repository, second.backup, tmp_path / "no", keys=host)
        assert not (tmp_path / "no").exists()
        nbdpull.restore(repository, second.backup, tmp_path / "out", keys=OWNER)
        compare(tmp_path / "out" / "vda.raw", disk.path, other_format="qcow2", tools=qemu_tools)
        # Nothing of the VM is left, and the chain goes on with the owner's key too.
        assert not any(vm.leftovers().values())
        third = nbdpull.backup(vm.uri, repository, scratch=scratch, keys=OWNER)
        assert third.parent == second.backup
    assert nbdpull.verify(repository, keys=OWNER).ok
