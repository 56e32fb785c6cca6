"""A client of a libvirt domain that died: the next backup goes on at the point in time of libvirt's job."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import libvirt
import pytest

import nbdpull
from nbdpull import Level
from nbdpull.source.libvirtapi import LibvirtDomain
from tests.integration.conftest import Keeper
from tests.integration.test_kills import noisy, running_backup
from tests.integration.test_libvirt import abort
from tests.integration.test_resume import (
    NOISE,
    cancelled_at_take_over,
    check,
    kill_in_the_middle,
    read_bytes,
)
from tests.support.bootwriter import BootWriter
from tests.support.disk import MIB, create_disk, to_raw
from tests.support.libvirtd import Domain, Libvirtd
from tests.support.process import run
from tests.support.tools import QEMU_72, QemuTools

ON_72 = pytest.mark.parametrize("qemu_tools", [QEMU_72], ids=["qemu-7.2"])


@pytest.fixture
def domain(qemu_tools: QemuTools, tmp_path: Path) -> Iterator[Domain]:
    """Two disks that begin with noise; nobody but the test writes."""
    with Libvirtd(tools=qemu_tools) as libvirtd:
        yield libvirtd.domain("vm", noisy(tmp_path, qemu_tools, noise=NOISE, size=256 * MIB))


def held(domain: Domain, folder: Path) -> dict[str, Path]:
    """What the disks hold now."""
    folder.mkdir()
    return {
        disk.name: to_raw(disk.path, folder / disk.name, format=disk.format, tools=domain.tools)
        for disk in domain.disks
    }


def write_noise(domain: Domain, file: Path) -> None:
    """Write 70 MiB of each disk anew, from 130 MiB on; `file` is in between."""
    for disk in domain.disks:
        file.write_bytes(os.urandom(70 * MIB))
        domain.write(disk.name, f"write -q -s {file} {130 * MIB} {70 * MIB}")


def overwrite(domain: Domain) -> None:
    """What a guest does to places that are read and to others: written, zeroed, trimmed."""
    for disk in domain.disks:
        domain.write(
            disk.name,
            *(f"write -q -P 9 {place}M 64k" for place in (1, 40, 62, 135, 190)),
            "write -q -z 30M 4M",
            "discard -q 58M 4M",
        )


def begin_in(folder: Path, domain: Domain) -> None:
    """A backup job whose socket is in a run's folder, and its scratch images not quite where the run's are."""
    disks = "".join(
        f"<disk name='{disk.name}' backup='yes' type='file' backupmode='full'>"
        f"<scratch file='{folder}/{disk.name}'/></disk>"
        for disk in domain.disks
    )
    domain.handle.backupBegin(
        f"<domainbackup mode='pull'><server transport='unix' socket='{folder}/nbd.sock'/>"
        f"<disks>{disks}</disks></domainbackup>",
        None,
        0,
    )


@contextmanager
def scratch_of(tmp_path: Path, size: str) -> Iterator[Path]:
    """A folder with little room; a libvirtd must be started after it, whose mounts are those of then."""
    small = tmp_path / "small"
    small.mkdir()
    run(["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", small])
    try:
        yield small
    finally:
        run(["umount", small])


def wait_until_written(domain: Domain) -> None:
    """Until there is enough for a backup that takes a while."""
    deadline = time.monotonic() + 60
    while any(disk.path.stat().st_blocks * 512 < 4 * MIB for disk in domain.disks):
        assert time.monotonic() < deadline, [disk.path.stat().st_blocks for disk in domain.disks]
        time.sleep(0.1)


def wait_for_state(domain: Domain, state: int) -> None:
    deadline = time.monotonic() + 60
    while domain.handle.state()[0] != state:
        assert time.monotonic() < deadline, domain.handle.state()
        time.sleep(0.1)


def clean(keeper: Keeper, domain: Domain) -> None:
    """No job is left, no scratch, and of checkpoints what the next levels need."""
    assert domain.job() is None
    assert list(keeper.scratch.iterdir()) == []
    known = domain.checkpoints()
    assert len(known) <= 2
    assert all(domain.bitmaps(disk.name) <= known for disk in domain.disks)


def test_what_a_killed_client_began_is_finished_at_its_point_in_time(
    keeper: Keeper, domain: Domain, tmp_path: Path
) -> None:
    tools = domain.tools
    told: list[str] = []
    truth = held(domain, tmp_path / "full")
    kill_in_the_middle(domain, keeper)
    killed = time.time()
    overwrite(domain)
    # libvirt, too, is another one by then.
    domain.libvirtd.kill()
    domain.libvirtd.start()
    # It goes on, is killed as well, and the third ends it.
    with running_backup(domain, keeper, "--rate", "4M") as client:
        client.send_signal(signal.SIGKILL)
        client.wait()
    result = keeper.backup(domain.uri, progress=lambda event: told.append(event.text or ""))
    assert result.resumed
    assert result.time < killed
    assert any("goes on with the backup of" in text for text in told)
    assert 0 < read_bytes(result) < 2 * NOISE - 32 * MIB
    check(keeper, result, truth, tools)
    clean(keeper, domain)

    write_noise(domain, tmp_path / "noise")
    truth = held(domain, tmp_path / "incremental")
    kill_in_the_middle(domain, keeper, stored=1)
    overwrite(domain)
    result = keeper.backup(domain.uri)
    assert result.resumed
    assert [disk.level for disk in result.disks] == [Level.INCREMENTAL] * 2
    # From the full's point in time on: what was overwritten after it, and the noise.
    assert 0 < read_bytes(result) < 2 * 80 * MIB - 8 * MIB
    check(keeper, result, truth, tools)
    clean(keeper, domain)

    last = keeper.backup(domain.uri)
    assert not last.resumed
    assert [disk.level for disk in last.disks] == [Level.INCREMENTAL] * 2
    assert last.parent == result.backup
    check(keeper, last, held(domain, tmp_path / "last"), tools)
    clean(keeper, domain)
    assert nbdpull.verify(keeper.repository).damaged == ()


@ON_72
@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"resume_within_s": 0}, "--resume-within"),
        ({"level": "copy"}, "copy is asked for"),
        ({"exclude": ["vdb"]}, "other disks"),
        ({"machine": True}, "--machine"),
    ],
)
def test_a_point_in_time_that_is_not_what_is_asked_for_is_given_up_and_the_reason_told(
    keeper: Keeper, domain: Domain, options: dict[str, Any], reason: str
) -> None:
    kill_in_the_middle(domain, keeper, stored=1)
    told: list[str] = []
    result = keeper.backup(
        domain.uri, progress=lambda event: told.append(event.text or ""), **options
    )
    assert not result.resumed
    [why] = [text for text in told if "can't be gone on with" in text]
    assert reason in why
    clean(keeper, domain)


@ON_72
def test_a_point_in_time_that_is_not_quiesced_is_given_up(keeper: Keeper, domain: Domain) -> None:
    kill_in_the_middle(domain, keeper, stored=1)
    told: list[str] = []
    with pytest.raises(nbdpull.SourceError, match="agent"):  # it has none
        keeper.backup(
            domain.uri, quiesce=True, progress=lambda event: told.append(event.text or "")
        )
    assert any("--quiesce" in text for text in told)
    clean(keeper, domain)


@ON_72
@pytest.mark.parametrize(
    ("how", "reason"),
    [
        ("restart", "its backup job is gone"),
        ("job", "its backup job is gone"),
        ("another", "its backup job is not as it was made"),
        ("checkpoint", "does not record"),
        ("record", "damaged"),
    ],
)
def test_a_point_in_time_that_is_not_whole_is_given_up_and_the_reason_told(
    keeper: Keeper, domain: Domain, tmp_path: Path, how: str, reason: str
) -> None:
    base = keeper.backup(domain.uri)
    write_noise(domain, tmp_path / "noise")
    kill_in_the_middle(domain, keeper, stored=1)
    [folder] = keeper.scratch.glob("nbdpull-*")
    if how == "restart":
        domain.crash()
        domain.start()
    elif how == "checkpoint":
        [mine] = [name for name in domain.checkpoints() if not name.endswith(base.backup)]
        domain.handle.checkpointLookupByName(mine).delete()
    elif how == "record":
        raw = bytearray((folder / "resume").read_bytes())
        raw[-10] ^= 1
        (folder / "resume").write_bytes(raw)
    else:
        abort(domain)
        if how == "another":
            # Of a later moment, at the same socket.
            domain.write("vda", "write -q -P 3 131M 64k")
            begin_in(folder, domain)
    told: list[str] = []
    overwrite(domain)
    result = keeper.backup(domain.uri, progress=lambda event: told.append(event.text or ""))
    [why] = [text for text in told if "can't be gone on with" in text]
    assert reason in why
    assert not result.resumed
    check(keeper, result, held(domain, tmp_path / "truth"), domain.tools)
    clean(keeper, domain)


@ON_72
def test_a_point_in_time_for_which_there_is_no_room_any_more_is_given_up(
    keeper: Keeper, qemu_tools: QemuTools, tmp_path: Path
) -> None:
    with scratch_of(tmp_path, "80m") as small, Libvirtd(tools=qemu_tools) as libvirtd:
        domain = libvirtd.domain("vm", noisy(tmp_path, qemu_tools, noise=NOISE, size=256 * MIB))
        kill_in_the_middle(domain, keeper, "--scratch", str(small), stored=1)
        overwrite(domain)
        # What the dead run held back would be room enough.
        [held_back] = small.glob("nbdpull-*/held")
        held_back.unlink()
        state = os.statvfs(small)
        (small / "other").write_bytes(bytes(state.f_bavail * state.f_frsize - MIB // 2))
        told: list[str] = []
        result = nbdpull.backup(
            domain.uri,
            keeper.repository,
            scratch=small,
            progress=lambda event: told.append(event.text or ""),
        )
        [why] = [text for text in told if "can't be gone on with" in text]
        assert "expected at least" in why
        assert not result.resumed
        check(keeper, result, held(domain, tmp_path / "truth"), qemu_tools)
        assert [path.name for path in small.iterdir()] == ["other"]
        clean(keeper, domain)


@ON_72
def test_a_guest_that_waits_for_room_in_the_scratch_of_a_dead_run_goes_on(
    keeper: Keeper, qemu_tools: QemuTools, tmp_path: Path
) -> None:
    writer = BootWriter(pause_us=0)
    (tmp_path / "floppy").write_bytes(writer.floppy())
    with scratch_of(tmp_path, "4m") as small, Libvirtd(tools=qemu_tools) as libvirtd:
        domain = libvirtd.domain(
            "vm",
            [create_disk(tmp_path, name, tools=qemu_tools) for name in ("vda", "vdb")],
            floppy=tmp_path / "floppy",
        )
        wait_until_written(domain)
        with running_backup(
            domain, keeper, "--rate", "1M", "--scratch", str(small), "-l", "full"
        ) as client:
            client.kill()
            client.wait()
        wait_for_state(domain, libvirt.VIR_DOMAIN_PAUSED)
        told: list[str] = []
        result = keeper.backup(domain.uri, progress=lambda event: told.append(event.text or ""))
        assert not result.resumed
        assert any("pause of the guest" in text for text in told)
        wait_for_state(domain, libvirt.VIR_DOMAIN_RUNNING)
        assert list(small.iterdir()) == []
        clean(keeper, domain)


@ON_72
@pytest.mark.parametrize("name", ["block_size", "paused_by_error"])
def test_a_libvirt_that_fails_sweeps_nothing(
    keeper: Keeper, domain: Domain, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """While the plan is made anew, and while the job is looked at."""
    kill_in_the_middle(domain, keeper, stored=1)

    def fail(*_: Any) -> Any:
        raise nbdpull.LibvirtError("libvirt is away", code=0)

    monkeypatch.setattr(LibvirtDomain, name, fail)
    with pytest.raises(nbdpull.LibvirtError, match="is away"):
        keeper.backup(domain.uri)
    monkeypatch.undo()
    assert domain.job() is not None
    assert keeper.backup(domain.uri).resumed
    clean(keeper, domain)


@ON_72
def test_who_is_cancelled_as_he_takes_over_leaves_it_to_the_next(
    keeper: Keeper, domain: Domain, tmp_path: Path
) -> None:
    truth = held(domain, tmp_path / "truth")
    kill_in_the_middle(domain, keeper, stored=1)
    overwrite(domain)
    cancelled_at_take_over(keeper, domain.uri)
    result = keeper.backup(domain.uri)
    assert result.resumed
    check(keeper, result, truth, domain.tools)
    clean(keeper, domain)


@ON_72
def test_files_that_are_kept_are_of_the_point_in_time(
    keeper: Keeper, domain: Domain, tmp_path: Path
) -> None:
    then = domain.handle.XMLDesc()
    kill_in_the_middle(domain, keeper, "--machine", stored=1)
    domain.handle.setMetadata(0, "another day", None, None, 1)
    assert domain.handle.XMLDesc() != then
    result = keeper.backup(domain.uri, machine=True)
    assert result.resumed
    nbdpull.restore(keeper.repository, result.backup, tmp_path / "all")
    [kept] = (tmp_path / "all").rglob("domain.xml")
    assert kept.read_text() == then
