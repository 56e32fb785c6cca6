"""Restores out of repositories written here, compared by programs that are not ours."""

from __future__ import annotations

import asyncio
import os
import random
import stat
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from nbdpull.errors import (
    BackupNotFoundError,
    DamagedError,
    RepositoryError,
    TargetError,
    UsageError,
)
from nbdpull.model.frame import HEADER_SIZE
from nbdpull.model.grain import GRAIN, SEGMENT
from nbdpull.model.outcomes import RestoreResult
from nbdpull.model.results import Progress, ProgressKind
from nbdpull.ops.restore import RestoreOptions, restore
from nbdpull.repo.local import LocalStore
from nbdpull.repo.repository import Repository
from nbdpull.target.base import Buffer
from nbdpull.target.rawfile import RawFile
from tests.ops.builder import Disk, add_backup
from tests.target.helpers import MIB, allocated, disk_bytes, names, same

SIZES = {"virtio0": 5 * MIB + 4096 + 77, "scsi/1": 3 * MIB}


@pytest.fixture
def repository(tmp_path: Path) -> Repository:
    return Repository.create(str(tmp_path / "repo"))


@pytest.fixture
def disks() -> dict[str, Disk]:
    return {
        name: Disk.of(disk_bytes(size, seed)) for seed, (name, size) in enumerate(SIZES.items())
    }


@pytest.fixture
def backup(repository: Repository, disks: dict[str, Disk]) -> str:
    manifests = add_backup(repository, disks)
    return manifests["virtio0"].summary.backup


@pytest.fixture
def out(tmp_path: Path) -> Path:
    path = tmp_path / "out"
    path.mkdir()
    return path


def run(repository: Repository, backup: str, to: object, **more: object) -> RestoreResult:
    options = RestoreOptions(
        repository=repository.location,
        backup=backup,
        to=str(to),
        **more,  # type: ignore[arg-type]
    )
    return asyncio.run(restore(options))


def packs(repository: Repository) -> list[Path]:
    return sorted(path for path in (Path(repository.location) / "d").rglob("*") if path.is_file())


def flip(path: Path, at: int) -> None:
    path.chmod(0o600)
    with path.open("r+b") as file:
        file.seek(at)
        byte = file.read(1)[0]
        file.seek(at)
        file.write(bytes([byte ^ 0x10]))


def test_each_disk_becomes_a_raw_file(
    repository: Repository, backup: str, disks: dict[str, Disk], out: Path
) -> None:
    result = run(repository, backup, out)
    assert names(out) == ["scsi%2F1.raw", "virtio0.raw"]
    assert (out / "virtio0.raw").read_bytes() == disks["virtio0"].content()
    assert (out / "scsi%2F1.raw").read_bytes() == disks["scsi/1"].content()
    assert result.backup == backup
    assert {disk.name: disk.size for disk in result.disks} == SIZES
    assert all(0 < disk.written_bytes < disk.size for disk in result.disks)
    assert {disk.target for disk in result.disks} == {str(out / name) for name in names(out)}


def test_folder_is_made(repository: Repository, backup: str, out: Path) -> None:
    run(repository, backup, out / "a" / "b")
    assert len(names(out / "a" / "b")) == 2


def test_qcow2_compares_equal(
    repository: Repository, backup: str, disks: dict[str, Disk], out: Path, tmp_path: Path
) -> None:
    run(repository, backup, out, format="qcow2")
    assert names(out) == ["scsi%2F1.qcow2", "virtio0.qcow2"]
    for name, file in (("virtio0", "virtio0.qcow2"), ("scsi/1", "scsi%2F1.qcow2")):
        want = disks[name].write_to(tmp_path / "want")
        assert same(want, out / file)


def test_only_the_chosen_disk(repository: Repository, backup: str, out: Path) -> None:
    run(repository, backup, out, disk="scsi/1")
    assert names(out) == ["scsi%2F1.raw"]


def test_unknown_disk_names_those_there(repository: Repository, backup: str, out: Path) -> None:
    with pytest.raises(UsageError, match=r"no disk 'x'.*'virtio0'"):
        run(repository, backup, out, disk="x")


def test_unknown_backup(repository: Repository, backup: str, out: Path) -> None:
    with pytest.raises(BackupNotFoundError):
        run(repository, "0" * 16 if not backup.startswith("0") else "f" * 16, out)


def test_every_backup_of_a_chain_restores_from_its_own_manifest(
    repository: Repository, out: Path
) -> None:
    rng = random.Random(5)
    state = {"d": Disk.of(disk_bytes(20 * MIB + 512, 7))}
    manifests = add_backup(repository, state)
    history = [(manifests["d"].summary.backup, state)]
    for number in range(4):
        after = {"d": state["d"].changed(rng.randrange(1 << 30))}
        manifests = add_backup(
            repository, after, before=state, parents=manifests, time=2000.0 + number
        )
        state = after
        history.append((manifests["d"].summary.backup, state))
    for name, content in history:
        run(repository, name, out, force=True)
        assert (out / "d.raw").read_bytes() == content["d"].content()
    run(repository, "latest", out, force=True)
    assert (out / "d.raw").read_bytes() == state["d"].content()


def test_sparse_disk_over_several_segments_stays_sparse(
    repository: Repository, out: Path, tmp_path: Path
) -> None:
    at = [0, 5, SEGMENT // GRAIN - 1, SEGMENT // GRAIN, 3 * SEGMENT // GRAIN + 7]
    disk = Disk(4 * SEGMENT + 3, {number: bytes([number % 251 + 1]) * GRAIN for number in at})
    backup = add_backup(repository, {"d": disk})["d"].summary.backup
    result = run(repository, backup, out)
    assert result.disks[0].written_bytes == len(at) * GRAIN
    want = disk.write_to(tmp_path / "want")
    assert (out / "d.raw").stat().st_size == disk.size
    # Unlike cmp(1), this does not read the holes.
    compare = ["qemu-img", "compare", "-q", "-f", "raw", "-F", "raw", str(want), str(out / "d.raw")]
    subprocess.run(compare, check=True)
    assert allocated(out / "d.raw") <= allocated(want) + 64 * 1024


def test_a_target_is_told_of_each_run_of_data_before_any_of_it_is_written(
    repository: Repository, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    told: list[tuple[int, int]] = []
    early: list[int] = []
    expect, write = RawFile.expect, RawFile.write

    def noted(self: RawFile, offset: int, length: int) -> None:
        told.append((offset, offset + length))
        expect(self, offset, length)

    def checked(self: RawFile, offset: int, data: Buffer) -> int:
        if not any(start <= offset and offset + len(data) <= end for start, end in told):
            early.append(offset)
        return write(self, offset, data)

    monkeypatch.setattr(RawFile, "expect", noted)
    monkeypatch.setattr(RawFile, "write", checked)
    # Two runs, the second one up to the disk's odd end, of several frames each.
    number = SEGMENT // GRAIN
    at = [*range(3, 43), *range(number - 1, number + 39)]
    disk = Disk((number + 38) * GRAIN + 100, {one: bytes([one % 251 + 1]) * GRAIN for one in at})
    disk.grains[at[-1]] = b"e" * 100
    backup = add_backup(repository, {"d": disk})["d"].summary.backup
    run(repository, backup, out)
    assert told == [(3 * GRAIN, 43 * GRAIN), (SEGMENT - GRAIN, SEGMENT), (SEGMENT, disk.size)]
    assert early == []


def test_empty_disk(repository: Repository, out: Path) -> None:
    backup = add_backup(repository, {"d": Disk(0)})["d"].summary.backup
    run(repository, backup, out)
    assert (out / "d.raw").read_bytes() == b""


def test_existing_file_stops_it_before_anything_is_written(
    repository: Repository, backup: str, out: Path
) -> None:
    (out / "scsi%2F1.raw").write_bytes(b"mine")
    with pytest.raises(UsageError, match=r"scsi%2F1\.raw' exists; give --force"):
        run(repository, backup, out)
    assert names(out) == ["scsi%2F1.raw"]
    assert (out / "scsi%2F1.raw").read_bytes() == b"mine"
    run(repository, backup, out, force=True)
    assert (out / "scsi%2F1.raw").stat().st_size == SIZES["scsi/1"]


def test_file_as_folder_is_explained(repository: Repository, backup: str, out: Path) -> None:
    (out / "file").touch()
    with pytest.raises(UsageError, match="is not a folder"):
        run(repository, backup, out / "file")


@pytest.mark.parametrize("to", ["s3://bucket/x", "/dev/there-is-no-such-disk"])
def test_impossible_target_is_explained(repository: Repository, backup: str, to: str) -> None:
    with pytest.raises(UsageError, match="block device"):
        run(repository, backup, to, disk="virtio0")


@pytest.mark.parametrize("to", ["-", "nbd://127.0.0.1:1/x"])
def test_target_for_one_disk_names_the_disks(repository: Repository, backup: str, to: str) -> None:
    with pytest.raises(UsageError, match=r"has 2: .*'scsi/1'.*choose one with --disk"):
        run(repository, backup, to)


def test_format_is_for_folders_only(repository: Repository, backup: str) -> None:
    with pytest.raises(UsageError, match="--format is for folders"):
        run(repository, backup, "-", disk="virtio0", format="qcow2")


@pytest.mark.parametrize(("far", "frames"), [(False, 2), (True, 4)])
def test_frames_side_by_side_are_read_together_and_partly_used_ones_too(
    repository: Repository, out: Path, monkeypatch: pytest.MonkeyPatch, *, far: bool, frames: int
) -> None:
    monkeypatch.setattr("nbdpull.ops.restore.is_far", lambda _location: far)
    noise = random.Random(1).randbytes(24 * MIB)
    first = {"d": Disk.of(noise)}
    before = add_backup(repository, first)
    # A hole inside a frame: its rest is two parts of one frame.
    grains = dict(first["d"].grains)
    grains[100] = b"x" * GRAIN
    second = {"d": Disk(24 * MIB, grains)}
    after = add_backup(repository, second, before=first, parents=before, time=2000.0)
    lengths: list[int] = []
    get_range = LocalStore.get_range

    def noted(self: LocalStore, key: str, start: int, length: int) -> bytes:
        if key.startswith("d/"):
            lengths.append(length)
        return get_range(self, key, start, length)

    monkeypatch.setattr(LocalStore, "get_range", noted)
    run(repository, after["d"].summary.backup, out)
    assert (out / "d.raw").read_bytes() == second["d"].content()
    # So many MiB each, with headers; the grain in between lies in another pack, and the maps are read too.
    assert len(lengths) <= 24 / frames + 3
    assert max(lengths) == frames * (MIB + HEADER_SIZE)


def test_flipped_byte_names_disk_range_and_object_and_leaves_no_file(
    repository: Repository, out: Path
) -> None:
    content = random.Random(1).randbytes(3 * MIB)
    backup = add_backup(repository, {"d": Disk.of(content)})["d"].summary.backup
    (pack,) = packs(repository)
    flip(pack, 128 + 64 + MIB + 64 + 1000)  # in the second frame
    with pytest.raises(DamagedError, match=rf"disk 'd'.*bytes {MIB} to {2 * MIB} are lost") as info:
        run(repository, backup, out)
    assert info.value.key == str(pack.relative_to(repository.location))
    assert info.value.exit_code == 1
    assert names(out) == []


@pytest.mark.parametrize("form", ["raw", "qcow2"])
@pytest.mark.parametrize("cut", [False, True])
def test_missing_or_cut_pack_is_told_before_anything_is_written(
    repository: Repository, backup: str, out: Path, form: str, *, cut: bool
) -> None:
    pack = packs(repository)[0]
    key = str(pack.relative_to(repository.location))
    if cut:
        pack.chmod(0o600)
        os.truncate(pack, pack.stat().st_size // 2)
    else:
        pack.unlink()
    with pytest.raises(
        DamagedError, match=r"1 of its packs .* missing or of the wrong size"
    ) as info:
        run(repository, backup, out, format=form)
    assert info.value.key == key
    assert names(out) == []


def test_a_pack_that_lost_its_end_alone_costs_nothing(
    repository: Repository, backup: str, disks: dict[str, Disk], out: Path
) -> None:
    for pack in packs(repository):
        pack.chmod(0o600)
        os.truncate(pack, pack.stat().st_size - 1)
    run(repository, backup, out)
    assert (out / "virtio0.raw").read_bytes() == disks["virtio0"].content()


def test_incomplete_backup_is_refused_but_for_one_disk_by_force(
    repository: Repository, disks: dict[str, Disk], out: Path
) -> None:
    manifests = add_backup(repository, disks, commit=frozenset({"virtio0"}))
    backup = manifests["virtio0"].summary.backup
    for more in ({}, {"disk": "virtio0"}, {"force": True}):
        with pytest.raises(RepositoryError, match=r"is incomplete.*--disk NAME --force"):
            run(repository, backup, out, **more)
    run(repository, backup, out, disk="virtio0", force=True)
    assert (out / "virtio0.raw").read_bytes() == disks["virtio0"].content()


def test_vanished_server_is_a_target_error(repository: Repository, backup: str) -> None:
    with pytest.raises(TargetError, match="can't connect"):
        run(repository, backup, "nbd+unix:///?socket=/nonexistent/socket", disk="virtio0")


def test_progress_goes_from_nothing_to_all_of_each_disk(
    repository: Repository, backup: str, out: Path
) -> None:
    events: list[Progress] = []
    options = RestoreOptions(repository=repository.location, backup=backup, to=str(out))
    asyncio.run(restore(options, progress=events.append))
    for name, size in SIZES.items():
        mine = [event for event in events if event.disk == name]
        assert mine[0].kind is ProgressKind.DISK_START
        assert (mine[0].done, mine[0].total) == (0, size)
        assert mine[-1].kind is ProgressKind.DISK_END
        assert mine[-1].done == size
        assert all(event.verb == "restore" for event in mine)


@pytest.mark.parametrize("form", ["raw", "qcow2"])
def test_cancelled_restore_leaves_no_file_no_thread_no_process(
    repository: Repository, out: Path, form: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    content = disk_bytes(64 * MIB, 3)
    backup = add_backup(repository, {"d": Disk.of(content)})["d"].summary.backup
    options = RestoreOptions(
        repository=repository.location,
        backup=backup,
        to=str(out),
        format=form,  # type: ignore[arg-type]
    )
    from nbdpull.repo.repository import DiskReader  # noqa: PLC0415 - patched here

    read_into = DiskReader.read_into
    begun = threading.Event()

    def slow(self: DiskReader, *args: object) -> int:
        begun.set()
        time.sleep(0.05)
        return read_into(self, *args)  # type: ignore[arg-type]

    monkeypatch.setattr(DiskReader, "read_into", slow)

    async def cancel_soon() -> None:
        task = asyncio.create_task(restore(options))
        await asyncio.to_thread(begun.wait, 10)
        assert [name for name in names(out) if name.endswith(".part")]
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    began = time.monotonic()
    asyncio.run(cancel_soon())
    assert time.monotonic() - began < 5
    assert names(out) == []
    assert [t.name for t in threading.enumerate() if t.name.startswith("nbdpull")] == []
    children = Path(f"/proc/self/task/{threading.get_native_id()}/children").read_text("ascii")
    assert children == ""


CHILD = """
import asyncio, sys
from nbdpull.ops.restore import RestoreOptions, restore
repository, backup, to, disk = sys.argv[1:]
asyncio.run(restore(RestoreOptions(repository=repository, backup=backup, to=to, disk=disk)))
"""


def test_killed_restore_leaves_nothing_with_a_final_name(repository: Repository, out: Path) -> None:
    backup = add_backup(repository, {"d": Disk.of(disk_bytes(64 * MIB, 3))})["d"].summary.backup
    command = [sys.executable, "-c", CHILD, repository.location, backup, str(out), "d"]
    process = subprocess.Popen(command)
    deadline = time.monotonic() + 20
    while not names(out) and time.monotonic() < deadline and process.poll() is None:
        time.sleep(0.001)
    process.kill()
    process.wait()
    assert process.returncode == -9
    assert "d.raw" not in names(out)


def test_standard_output_gets_the_disk(
    repository: Repository, backup: str, disks: dict[str, Disk], tmp_path: Path
) -> None:
    command = [sys.executable, "-c", CHILD, repository.location, backup, "-", "virtio0"]
    got = subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout
    assert got == disks["virtio0"].content()
    with (tmp_path / "file").open("wb") as file:
        subprocess.run(command, check=True, stdout=file)
    assert (tmp_path / "file").read_bytes() == disks["virtio0"].content()


def test_restored_files_are_private(repository: Repository, backup: str, out: Path) -> None:
    run(repository, backup, out)
    assert {stat.S_IMODE(path.stat().st_mode) for path in out.iterdir()} == {0o600}
