"""Domains of a real libvirtd: its checkpoints, its backup job, and what others do with them."""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import libvirt
import pytest

import nbdpull
from nbdpull import FindingKind, Level
from nbdpull.source import libvirtjob
from tests.integration.conftest import Keeper
from tests.support.disk import Disk, compare, create_disk, to_raw
from tests.support.libvirtd import Domain, Libvirtd
from tests.support.linuxguest import KERNEL_LINE, check_filesystem, create_ext4_disk, initramfs
from tests.support.process import run
from tests.support.tools import QEMU_72, QemuTools, cache_folder

MIB = 1 << 20


@pytest.fixture(scope="module")
def libvirtd() -> Iterator[Libvirtd]:
    """One for all tests here: each has a domain of its own."""
    with Libvirtd() as daemon:
        yield daemon


def disks(folder: Path, tools: QemuTools = QEMU_72, *, size: int = 64 * MIB) -> list[Disk]:
    return [create_disk(folder, name, size=size, tools=tools) for name in ("vda", "vdb")]


@pytest.fixture
def domain(libvirtd: Libvirtd, tmp_path: Path) -> Iterator[Domain]:
    """Two disks with something on them, on QEMU 7.2; nobody but the test writes."""
    made = libvirtd.domain(tmp_path.name, disks(tmp_path))
    made.write("vda", "write -P 1 0 3M", "write -P 2 40M 100k")
    made.write("vdb", "write -P 3 63M 1M")
    yield made
    made.kill()


def levels(result: nbdpull.BackupResult) -> dict[str, Level]:
    return {disk.name: disk.level for disk in result.disks}


def restores(keeper: Keeper, domain: Domain, result: nbdpull.BackupResult) -> None:
    """What the backup restores is what the domain's disks hold now."""
    restored = keeper.restore(result.backup)
    assert set(restored) == {disk.name for disk in domain.disks}
    for disk in domain.disks:
        # QEMU has flushed it; it writes on only when the test does.
        truth = to_raw(
            disk.path,
            keeper.restored / f"{result.backup}-{disk.name}.raw",
            format=disk.format,
            tools=domain.tools,
        )
        compare(restored[disk.name], truth, tools=domain.tools)


def clean(keeper: Keeper, domain: Domain, *checkpoints: str) -> None:
    """Nothing is left but these checkpoints, in libvirt and in QEMU."""
    assert domain.job() is None
    assert domain.checkpoints() == set(checkpoints)
    for disk in domain.disks:
        if disk.format == "qcow2":
            assert domain.bitmaps(disk.name) <= set(checkpoints)
    assert list(keeper.scratch.iterdir()) == []


def checkpoint(domain: Domain, result: nbdpull.BackupResult) -> str:
    return next(name for name in domain.checkpoints() if name.endswith(result.backup))


def abort(domain: Domain) -> None:
    """End the backup job, whosever it is."""
    domain.handle.abortJob()
    while domain.job() is not None:
        time.sleep(0.02)


def foreign_backup(domain: Domain, folder: Path) -> None:
    """Another tool's backup job, in pull mode."""
    named = "".join(f"<disk name='{disk.name}' backup='no'/>" for disk in domain.disks[1:])
    domain.handle.backupBegin(
        f"<domainbackup mode='pull'><server transport='unix' socket='{folder}/other.sock'/><disks>"
        f"<disk name='{domain.disks[0].name}' backup='yes' type='file' backupmode='full'>"
        f"<scratch file='{folder}/other.scratch'/></disk>{named}</disks></domainbackup>",
        None,
        0,
    )


# -- levels ----------------------------------------------------------------------------------------


def test_every_level_restores_what_the_disks_held(
    qemu_tools: QemuTools, keeper: Keeper, tmp_path: Path
) -> None:
    with Libvirtd(tools=qemu_tools) as libvirtd:
        domain = libvirtd.domain("levels", disks(tmp_path, qemu_tools))
        domain.write("vda", "write -P 1 0 3M")
        full = keeper.backup(domain.uri)
        assert levels(full) == {"vda": Level.FULL, "vdb": Level.FULL}
        restores(keeper, domain, full)
        first = checkpoint(domain, full)
        clean(keeper, domain, first)
        assert full.vm == "levels"

        domain.write("vda", "write -P 2 1M 64k", "write -z 2M 128k")
        one = keeper.backup(domain.uri)
        assert levels(one) == {"vda": Level.INCREMENTAL, "vdb": Level.INCREMENTAL}
        assert [disk.changed_bytes for disk in one.disks] == [192 * 1024, 0]
        restores(keeper, domain, one)

        domain.write("vdb", "write -P 3 8M 1M")
        two = keeper.backup(domain.uri)
        restores(keeper, domain, two)
        clean(keeper, domain, first, checkpoint(domain, two))

        # Somebody ends the job in the middle: the base has recorded all along.
        domain.write("vda", "write -P 4 16M 8M")
        with pytest.raises(nbdpull.PointInTimeLostError, match="ended before its disks were read"):
            keeper.backup(domain.uri, rate=2 * MIB, progress=abort_once(domain))
        clean(keeper, domain, first, checkpoint(domain, two))
        domain.write("vdb", "write -P 5 9M 64k")
        after = keeper.backup(domain.uri)
        assert levels(after) == {"vda": Level.INCREMENTAL, "vdb": Level.INCREMENTAL}
        assert [disk.changed_bytes for disk in after.disks] == [8 * MIB, 64 * 1024]
        restores(keeper, domain, after)

        domain.write("vda", "write -P 6 0 64k")
        since_full = keeper.backup(domain.uri, "differential")
        assert levels(since_full) == {"vda": Level.DIFFERENTIAL, "vdb": Level.DIFFERENTIAL}
        restores(keeper, domain, since_full)
        copy = keeper.backup(domain.uri, "copy")
        restores(keeper, domain, copy)
        clean(keeper, domain, first, checkpoint(domain, since_full))
        for older in (one, two, after):
            assert nbdpull.verify(keeper.repository, [older.backup]).ok


def test_what_starts_the_domain_elsewhere_is_kept(
    domain: Domain, keeper: Keeper, tmp_path: Path
) -> None:
    script = tmp_path / "start.sh"
    script.write_text("virsh start it\n")
    result = keeper.backup(domain.uri, machine=True, definitions=[script])
    keeper.restore(result.backup)
    kept = keeper.restored / result.backup / "machine"
    xml = (kept / "domain.xml").read_text()
    assert xml.startswith("<domain")
    assert all(str(disk.path) in xml for disk in domain.disks)
    assert (kept / "definition" / "1-start.sh").read_text() == "virsh start it\n"


@contextmanager
def ended(domain: Domain) -> Iterator[None]:
    try:
        yield
    finally:
        domain.kill()


def abort_once(domain: Domain) -> nbdpull.ProgressCallback:
    """Ends whatever job the domain has, once 3 of 8 MiB of disk vda are read: no connection is made any more.

    What is clean counts as done when it is planned, before any is made; and QEMU 7.2's main loop hangs when
    libvirt has it stop its NBD server while a client is in the handshake: see the limits in
    docs/decisions/0072-libvirts-backup-job.md.
    """
    did: list[int] = []

    def progress(news: nbdpull.Progress) -> None:
        read = news.kind is nbdpull.ProgressKind.DISK and news.disk == "vda"
        if read and news.done > news.total - 5 * MIB and not did:
            did.append(news.done)
            domain.handle.abortJob()

    return progress


def test_a_point_in_time_is_read_whatever_is_written_meanwhile(
    keeper: Keeper, domain: Domain
) -> None:
    domain.write("vda", "write -P 7 0 32M")
    truth = {
        disk.name: to_raw(disk.path, keeper.restored / disk.name, format="qcow2", tools=QEMU_72)
        for disk in domain.disks
    }
    wrote: list[int] = []

    def progress(news: nbdpull.Progress) -> None:
        if news.kind is nbdpull.ProgressKind.DISK and news.done > 0 and len(wrote) < 3:
            # Each third of the disk is overwritten, zeroed and trimmed while it is read.
            at = len(wrote) * 10
            domain.write("vda", f"write -P 9 {at}M 4M", f"write -z {at + 4}M 3M")
            domain.write("vda", f"discard {at + 7}M 3M", "discard 40M 1M")
            wrote.append(at)

    result = keeper.backup(domain.uri, rate=24 * MIB, progress=progress)
    assert wrote
    assert result.cost is not None
    assert result.cost.copied_bytes > 0
    for name, path in keeper.restore(result.backup).items():
        compare(path, truth[name])
    after = keeper.backup(domain.uri)
    assert levels(after)["vda"] is Level.INCREMENTAL
    restores(keeper, domain, after)


def test_two_chains_of_one_domain_do_not_meet(keeper: Keeper, domain: Domain) -> None:
    keeper.backup(domain.uri)
    keeper.backup(domain.uri, chain="weekly")
    domain.write("vda", "write -P 8 5M 64k")
    daily = keeper.backup(domain.uri)
    domain.write("vda", "write -P 9 6M 64k")
    weekly = keeper.backup(domain.uri, chain="weekly")
    assert [daily.disks[0].changed_bytes, weekly.disks[0].changed_bytes] == [65536, 131072]
    restores(keeper, domain, weekly)


# -- checkpoints that are lost, broken, or somebody else's -------------------------------------------


def test_a_foreign_checkpoint_is_left_alone(keeper: Keeper, domain: Domain) -> None:
    def make(name: str) -> None:
        xml = f"<domaincheckpoint><name>{name}</name></domaincheckpoint>"
        domain.handle.checkpointCreateXML(xml)

    make("other-1")
    keeper.backup(domain.uri)
    make("other-2")
    for number in range(2):
        domain.write("vda", f"write -P 5 {number}M 64k")
        result = keeper.backup(domain.uri)
        assert levels(result) == {"vda": Level.INCREMENTAL, "vdb": Level.INCREMENTAL}
        restores(keeper, domain, result)
    assert {"other-1", "other-2"} <= domain.checkpoints()
    assert {"other-1", "other-2"} <= domain.bitmaps("vda")
    assert len(domain.checkpoints()) == 4
    # Its owner can still do with it what it likes.
    domain.handle.checkpointLookupByName("other-1").delete()
    assert levels(keeper.backup(domain.uri))["vda"] is Level.INCREMENTAL


def test_checkpoints_that_libvirt_lost_are_told_to_it_again(keeper: Keeper, domain: Domain) -> None:
    full = keeper.backup(domain.uri)
    domain.write("vda", "write -P 5 1M 64k")
    last = keeper.backup(domain.uri)
    # While it runs: it becomes transient, then persistent again, without its checkpoints.
    domain.undefine()
    for one in domain.handle.listAllCheckpoints():
        one.delete(libvirt.VIR_DOMAIN_CHECKPOINT_DELETE_METADATA_ONLY)
    domain.define()
    assert domain.checkpoints() == set()
    domain.write("vdb", "write -P 6 1M 64k")
    estimated = nbdpull.estimate(domain.uri, keeper.repository)
    assert "missing" in estimated.disks[0].reason
    assert domain.checkpoints() == set()
    after = keeper.backup(domain.uri)
    assert levels(after) == {"vda": Level.INCREMENTAL, "vdb": Level.INCREMENTAL}
    assert [disk.changed_bytes for disk in after.disks] == [0, 65536]
    assert after.parent == last.backup
    restores(keeper, domain, after)
    since_full = keeper.backup(domain.uri, "differential")
    assert levels(since_full) == {"vda": Level.DIFFERENTIAL, "vdb": Level.DIFFERENTIAL}
    restores(keeper, domain, since_full)
    clean(keeper, domain, checkpoint(domain, full), checkpoint(domain, since_full))


@pytest.mark.parametrize("forgotten", [False, True], ids=["libvirt-knows", "libvirt-forgot"])
def test_a_lost_bitmap_costs_its_disk_a_full(
    keeper: Keeper, domain: Domain, *, forgotten: bool
) -> None:
    result = keeper.backup(domain.uri)
    name = checkpoint(domain, result)
    node = next(
        node["node-name"]
        for node in domain.qmp("query-named-block-nodes", flat=True)
        if node["drv"] == "qcow2" and node["file"] == str(domain.disks[0].path)
    )
    domain.qmp("block-dirty-bitmap-remove", node=node, name=name)
    if forgotten:
        domain.handle.checkpointLookupByName(name).delete(
            libvirt.VIR_DOMAIN_CHECKPOINT_DELETE_METADATA_ONLY
        )
    domain.write("vda", "write -P 5 1M 64k")
    domain.write("vdb", "write -P 6 1M 64k")
    after = keeper.backup(domain.uri)
    assert levels(after) == {"vda": Level.FULL, "vdb": Level.INCREMENTAL}
    assert f"its bitmap '{name}' is missing" in after.disks[0].reason
    restores(keeper, domain, after)
    # The first checkpoint is still vdb's full; vda's is the newest.
    clean(keeper, domain, name, checkpoint(domain, after))
    full = keeper.backup(domain.uri, "full")
    assert levels(full) == {"vda": Level.FULL, "vdb": Level.FULL}
    clean(keeper, domain, checkpoint(domain, full))


def test_a_crash_of_qemu_costs_a_full_and_leaves_no_checkpoint_without_a_bitmap(
    keeper: Keeper, domain: Domain
) -> None:
    keeper.backup(domain.uri)
    keeper.backup(domain.uri)
    domain.crash()
    domain.start()
    domain.write("vda", "write -P 5 1M 64k")
    assert len(domain.checkpoints()) == 2
    after = keeper.backup(domain.uri)
    assert levels(after) == {"vda": Level.FULL, "vdb": Level.FULL}
    restores(keeper, domain, after)
    clean(keeper, domain, checkpoint(domain, after))
    assert levels(keeper.backup(domain.uri)) == {"vda": Level.INCREMENTAL, "vdb": Level.INCREMENTAL}


def test_a_chain_goes_on_while_the_domain_is_shut_down(keeper: Keeper, domain: Domain) -> None:
    keeper.backup(domain.uri)
    domain.write("vda", "write -P 5 1M 64k")
    domain.shutdown()
    off = keeper.backup(domain.uri)
    assert off.vm == domain.name
    assert levels(off) == {"vda": Level.INCREMENTAL, "vdb": Level.INCREMENTAL}
    assert off.disks[0].changed_bytes == 65536
    restores(keeper, domain, off)
    off = keeper.backup(domain.uri)
    domain.start()
    domain.write("vda", "write -P 6 2M 64k")
    on = keeper.backup(domain.uri)
    assert levels(on) == {"vda": Level.INCREMENTAL, "vdb": Level.INCREMENTAL}
    assert (on.disks[0].changed_bytes, on.parent) == (65536, off.backup)
    restores(keeper, domain, on)
    since_full = keeper.backup(domain.uri, "differential")
    assert levels(since_full) == {"vda": Level.DIFFERENTIAL, "vdb": Level.DIFFERENTIAL}
    restores(keeper, domain, since_full)


def test_disks_that_have_changed_their_images_are_read_in_full(
    keeper: Keeper, domain: Domain
) -> None:
    keeper.backup(domain.uri)
    domain.shutdown()
    first, second = domain.disks
    domain.disks = [replace(first, path=second.path), replace(second, path=first.path)]
    domain.define()
    domain.start()
    after = keeper.backup(domain.uri)
    assert levels(after) == {"vda": Level.FULL, "vdb": Level.FULL}
    # Not because the audit has found it out, which it does only perhaps.
    assert not any("can't be trusted" in disk.reason for disk in after.disks)
    restores(keeper, domain, after)


def test_a_chain_goes_on_through_an_external_snapshot_and_its_commit(
    keeper: Keeper, domain: Domain, tmp_path: Path
) -> None:
    keeper.backup(domain.uri)
    base = list(domain.disks)
    domain.disks = [replace(disk, path=tmp_path / f"{disk.name}.snapshot") for disk in base]
    named = "".join(
        f"<disk name='{disk.name}' snapshot='external'><source file='{disk.path}'/></disk>"
        for disk in domain.disks
    )
    domain.handle.snapshotCreateXML(
        f"<domainsnapshot><disks>{named}</disks></domainsnapshot>",
        libvirt.VIR_DOMAIN_SNAPSHOT_CREATE_DISK_ONLY
        | libvirt.VIR_DOMAIN_SNAPSHOT_CREATE_NO_METADATA,
    )
    domain.write("vda", "write -P 9 5M 64k")
    above = keeper.backup(domain.uri)
    assert levels(above) == {"vda": Level.INCREMENTAL, "vdb": Level.INCREMENTAL}
    restores(keeper, domain, above)

    for disk in domain.disks:
        commit_active(domain, disk.name)
    domain.disks = base
    domain.write("vda", "write -P 8 6M 64k")
    # What was made of an image that is no more is not counted from; what was made below it is.
    after = keeper.backup(domain.uri)
    assert levels(after) == {"vda": Level.INCREMENTAL, "vdb": Level.INCREMENTAL}
    assert sum(disk.changed_bytes for disk in after.disks) == 128 * 1024
    restores(keeper, domain, after)


def commit_active(domain: Domain, target: str) -> None:
    """Commit a disk's snapshot into the image below, and go on with that."""
    domain.handle.blockCommit(target, None, None, 0, libvirt.VIR_DOMAIN_BLOCK_COMMIT_ACTIVE)
    deadline = time.monotonic() + 60
    while True:
        try:
            domain.handle.blockJobAbort(target, libvirt.VIR_DOMAIN_BLOCK_JOB_ABORT_PIVOT)
        except libvirt.libvirtError:
            assert time.monotonic() < deadline  # it is not ready yet
            time.sleep(0.05)
        else:
            return


def test_a_raw_disk_beside_is_read_in_full_each_time(
    libvirtd: Libvirtd, keeper: Keeper, tmp_path: Path
) -> None:
    vda, _ = disks(tmp_path)
    domain = libvirtd.domain(
        "mixed", [vda, create_disk(tmp_path, "vdb", size=16 * MIB, format="raw")]
    )
    with ended(domain):
        keeper.backup(domain.uri)
        domain.write("vdb", "write -P 5 1M 64k")
        after = keeper.backup(domain.uri)
        assert levels(after) == {"vda": Level.INCREMENTAL, "vdb": Level.FULL}
        restores(keeper, domain, after)
        only = keeper.backup(domain.uri, include=["vdb"])
        assert levels(only) == {"vdb": Level.FULL}


# -- clients that die, others that are there ---------------------------------------------------------


@contextmanager
def running_backup(
    domain: Domain, keeper: Keeper, *options: str
) -> Iterator[subprocess.Popen[bytes]]:
    """A backup by the command line, in the middle of its pull."""
    command = [sys.executable, "-m", "nbdpull", "backup", domain.uri, "-r", keeper.repository]
    command += ["--scratch", str(keeper.scratch), "--progress", "json", "--json"]
    command += ["--rate", "1M", *options]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as client:
        assert client.stderr is not None
        try:
            planned: dict[str, int] = {}
            for line in client.stderr:
                event: dict[str, Any] = json.loads(line)
                done = event.get("done", 0)
                # What is zero counts as done when it is planned; more is read, by connections that stand (`abort_once`).
                if done and planned.setdefault(event["disk"], done) < done < event["total"]:
                    break
            else:
                pytest.fail("the backup ended before it could be caught")
            yield client
        finally:
            if client.poll() is None:
                client.kill()


@pytest.mark.parametrize("by", ["cleanup", "backup"])
def test_what_a_killed_client_left_is_removed(keeper: Keeper, domain: Domain, by: str) -> None:
    name = checkpoint(domain, keeper.backup(domain.uri))
    with running_backup(domain, keeper, "-l", "full") as client:
        client.kill()
        client.wait()
    domain.write("vda", "write -P 5 1M 64k")
    assert domain.job() is not None
    assert len(domain.checkpoints()) == 2
    if by == "cleanup":
        removed = " ".join(keeper.cleanup(domain.uri).removed)
        assert "backup job of run" in removed
        assert "checkpoint nbdpull-" in removed
        clean(keeper, domain, name)
        assert keeper.cleanup(domain.uri).removed == ()
    # That it may go on where the dead one was is another matter, see test_libvirt_resume.
    after = keeper.backup(domain.uri, resume_within_s=0)
    assert levels(after) == {"vda": Level.INCREMENTAL, "vdb": Level.INCREMENTAL}
    restores(keeper, domain, after)
    clean(keeper, domain, name, checkpoint(domain, after))


def test_a_job_that_ends_with_the_last_read_is_noticed(
    keeper: Keeper, domain: Domain, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Once QEMU's job is gone, and until libvirt stops its server, an export shows the disk of now."""
    name = checkpoint(domain, keeper.backup(domain.uri))
    domain.write("vda", "write -P 5 1M 64k")
    end_job = libvirtjob.end_job

    async def ended_before(found: Any, socket: str) -> bool:
        await asyncio.to_thread(abort, domain)
        return await end_job(found, socket)

    monkeypatch.setattr(libvirtjob, "end_job", ended_before)
    with pytest.raises(nbdpull.PointInTimeLostError, match="ended before its disks were read"):
        keeper.backup(domain.uri)
    monkeypatch.undo()
    assert len(nbdpull.list_backups(keeper.repository)) == 1
    clean(keeper, domain, name)
    restores(keeper, domain, keeper.backup(domain.uri))


def test_a_run_that_lives_is_left_alone(keeper: Keeper, domain: Domain) -> None:
    keeper.backup(domain.uri)
    with running_backup(domain, keeper, "-l", "full") as client:
        client.send_signal(signal.SIGSTOP)
        assert keeper.cleanup(domain.uri).removed == ()
        with pytest.raises(nbdpull.InUseError, match="right now"):
            keeper.backup(domain.uri)
        with pytest.raises(nbdpull.InUseError, match="one backup job a domain"):
            keeper.backup(domain.uri, chain="weekly")
        problems = nbdpull.doctor(domain.uri, scratch=keeper.scratch).findings
        assert any("right now" in found.text for found in problems)
        assert domain.job() is not None
        assert "backup job" in " ".join(keeper.cleanup(domain.uri, force=True).removed)
        client.send_signal(signal.SIGCONT)
        assert client.wait() != 0
    restores(keeper, domain, keeper.backup(domain.uri))


def test_a_signal_ends_the_job_before_the_exit(keeper: Keeper, domain: Domain) -> None:
    name = checkpoint(domain, keeper.backup(domain.uri))
    with running_backup(domain, keeper, "-l", "full") as client:
        client.send_signal(signal.SIGTERM)
        assert client.wait() != 0
        clean(keeper, domain, name)


def test_another_tools_job_is_told_and_left_alone(
    keeper: Keeper, domain: Domain, tmp_path: Path
) -> None:
    name = checkpoint(domain, keeper.backup(domain.uri))
    foreign_backup(domain, tmp_path)
    began = time.monotonic()
    with pytest.raises(nbdpull.InUseError, match=r"other\.sock.*virsh domjobabort") as caught:
        keeper.backup(domain.uri)
    # libvirt itself would wait half a minute, and then name a lock.
    assert time.monotonic() - began < 25
    assert caught.value.exit_code == 11
    assert keeper.cleanup(domain.uri, force=True).removed == ()
    found = nbdpull.doctor(domain.uri, scratch=keeper.scratch)
    assert not found.ok
    assert any("another tool's backup job" in finding.text for finding in found.findings)
    job = domain.job()
    assert job is not None
    assert "other.sock" in job
    abort(domain)
    clean(keeper, domain, name)


def test_a_libvirtd_that_is_restarted_in_the_middle_is_no_matter(
    keeper: Keeper, tmp_path: Path
) -> None:
    with Libvirtd() as libvirtd:
        domain = libvirtd.domain("restarted", disks(tmp_path))
        domain.write("vda", "write -P 1 0 8M")
        did: list[int] = []

        def restart(news: nbdpull.Progress) -> None:
            if news.kind is nbdpull.ProgressKind.DISK and news.done > 5 * MIB and not did:
                did.append(news.done)
                libvirtd.kill()
                libvirtd.start()

        result = keeper.backup(domain.uri, rate=4 * MIB, progress=restart)
        assert did
        restores(keeper, domain, result)
        clean(keeper, domain, checkpoint(domain, result))


# -- what is told before anything is touched ---------------------------------------------------------


def test_a_name_that_libvirt_does_not_know(keeper: Keeper, domain: Domain) -> None:
    with pytest.raises(nbdpull.UsageError, match=f"no domain 'wbe' at .*it has: .*{domain.name}"):
        keeper.backup(domain.uri.partition("#")[0] + "#wbe")


def test_a_domain_goes_by_its_uuid_too(keeper: Keeper, domain: Domain) -> None:
    keeper.backup(domain.uri)
    uuid = domain.handle.UUIDString()
    after = keeper.backup(domain.uri.partition("#")[0] + f"#{uuid}")
    assert (after.vm, after.level) == (domain.name, Level.INCREMENTAL)


def test_no_libvirtd(keeper: Keeper, tmp_path: Path) -> None:
    uri = f"libvirt+qemu+unix:///system?socket={tmp_path}/none#web"
    with pytest.raises(nbdpull.LibvirtError, match=r"can't be reached.*is libvirtd .* running"):
        keeper.backup(uri)
    assert not nbdpull.doctor(uri).ok


def test_without_its_module_libvirt_says_what_to_install(tmp_path: Path) -> None:
    (tmp_path / "libvirt.py").write_text("raise ImportError('not here')\n", encoding="ascii")
    done = subprocess.run(
        [sys.executable, "-m", "nbdpull", "cleanup", "libvirt:web"],
        env={**os.environ, "PYTHONPATH": f"{tmp_path}{os.pathsep}{Path.cwd()}"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 2
    assert "python3-libvirt" in done.stderr
    assert "nbdpull[libvirt]" in done.stderr


@pytest.mark.parametrize(
    ("option", "value"),
    [("guest_first", True), ("nbd_address", "nbd://localhost"), ("agent", "/run/qga")],
)
def test_options_of_another_kind_of_source_are_refused(
    keeper: Keeper, option: str, value: Any
) -> None:
    with pytest.raises(nbdpull.UsageError, match="--" + option.replace("_", "-")):
        keeper.backup("libvirt:web", quiesce=option == "agent", **{option: value})


def test_an_iothread_is_refused_before_anything_is_touched(
    libvirtd: Libvirtd, keeper: Keeper, tmp_path: Path
) -> None:
    head = "<iothreads>1</iothreads>"
    domain = libvirtd.domain("threaded", disks(tmp_path), head=head, driver="iothread='1'")
    with ended(domain):
        with pytest.raises(nbdpull.SourceError, match=r"'vda' runs in iothread 1 and QEMU 7\.2"):
            keeper.backup(domain.uri)
        clean(keeper, domain)
        found = nbdpull.doctor(domain.uri, scratch=keeper.scratch)
        kinds = {one.subject: one.kind for one in found.findings}
        assert kinds["disk vda"] is FindingKind.PROBLEM


def test_doctor_and_estimate_tell_what_comes(keeper: Keeper, domain: Domain) -> None:
    keeper.backup(domain.uri)
    domain.write("vda", "write -P 5 1M 64k")
    before = domain.checkpoints()
    estimated = nbdpull.estimate(domain.uri, keeper.repository)
    assert [(disk.level, disk.changed_bytes) for disk in estimated.disks] == [
        (Level.INCREMENTAL, 65536),
        (Level.INCREMENTAL, 0),
    ]
    found = nbdpull.doctor(domain.uri, keeper.repository, scratch=keeper.scratch)
    assert found.ok
    assert any("incremental, about 65536 bytes" in finding.text for finding in found.findings)
    clean(keeper, domain, *before)


# -- rights and room -------------------------------------------------------------------------------


def test_a_qemu_of_another_user_may_use_the_runs_folder(libvirtd: Libvirtd, keeper: Keeper) -> None:
    folder = Path(tempfile.mkdtemp(prefix="np-"))
    folder.chmod(0o755)
    label = "<label>+65534:+65534</label>"
    head = f"<seclabel type='static' model='dac' relabel='yes'>{label}</seclabel>"
    try:
        domain = libvirtd.domain("nobodys", disks(folder), head=head)
        with ended(domain):
            assert domain.disks[0].path.stat().st_uid == 65534
            for number in range(2):
                domain.write("vda", f"write -P 5 {number}M 64k")
                result = nbdpull.backup(domain.uri, keeper.repository, scratch=folder)
                assert result.disks[0].changed_bytes == 65536 or not number
                restores(keeper, domain, result)
            assert {path.name for path in folder.iterdir()} == {"vda.qcow2", "vdb.qcow2"}
            # A folder that its QEMU can't reach is told with what to do.
            with pytest.raises(nbdpull.SourceError, match=r"Permission denied.*--scratch"):
                keeper.backup(domain.uri)
            assert list(keeper.scratch.iterdir()) == []
    finally:
        shutil.rmtree(folder)


def test_full_scratch_ends_the_backup_and_not_the_guest(keeper: Keeper, tmp_path: Path) -> None:
    small = tmp_path / "small"
    small.mkdir()
    run(["mount", "-t", "tmpfs", "-o", "size=8m", "tmpfs", small])
    try:
        # It keeps the mounts that were there when it was started.
        with Libvirtd() as libvirtd:
            domain = libvirtd.domain("full", disks(tmp_path))
            domain.write("vda", "write -P 7 0 32M")
            keeper.backup(domain.uri)
            at = 0

            def fill(news: nbdpull.Progress) -> None:
                nonlocal at
                if news.kind is nbdpull.ProgressKind.DISK and news.done > 0 and at < 24:
                    domain.write("vda", f"write -P 8 {at}M 1M")
                    at += 1

            with pytest.raises(nbdpull.ScratchFullError, match="--scratch") as caught:
                nbdpull.backup(
                    domain.uri,
                    keeper.repository,
                    level="full",
                    scratch=small,
                    rate=2 * MIB,
                    progress=fill,
                )
            assert caught.value.exit_code == 13
            assert domain.handle.state()[0] == libvirt.VIR_DOMAIN_RUNNING
            assert list(small.iterdir()) == []
            after = keeper.backup(domain.uri)
            assert levels(after) == {"vda": Level.INCREMENTAL, "vdb": Level.INCREMENTAL}
            restores(keeper, domain, after)
    finally:
        run(["umount", small])


# -- the guest's agent -------------------------------------------------------------------------------


def test_a_quiesced_backup_needs_no_journal_replay_and_a_dead_client_thaws(
    libvirtd: Libvirtd, keeper: Keeper, tmp_path: Path
) -> None:
    folder = cache_folder() / "linux-guest-2"
    (tmp_path / "initramfs").write_bytes(initramfs())
    made = [create_ext4_disk(tmp_path, name, size=64 * MIB) for name in ("vda", "vdb")]
    domain = libvirtd.domain(
        "linux",
        made,
        memory=256,
        boot=f"<kernel>{folder}/vmlinuz</kernel><initrd>{tmp_path}/initramfs</initrd>"
        f"<cmdline>{KERNEL_LINE}</cmdline>",
        devices=f"<serial type='file'><source path='{tmp_path}/console'/></serial><channel type='unix'>"
        "<target type='virtio' name='org.qemu.guest_agent.0'/></channel>",
    )
    with ended(domain):
        wait_for_agent(domain)
        result = keeper.backup(domain.uri, quiesce=True)
        assert result.quiesced is not None
        assert result.quiesced.filesystems == 2
        assert set(result.quiesced.mountpoints) >= {"/a", "/b"}
        assert 0 < result.quiesced.frozen_s < 10
        wrote = (tmp_path / "console").stat().st_size
        for path in keeper.restore(result.backup).values():
            assert not check_filesystem(path, tmp_path).replayed

        # Whoever asked for the freeze is killed: its input ends, and the guest writes on.
        command = [sys.executable, "-m", "nbdpull.source.freezer", domain.uri, "60"]
        with subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        ) as freezer:
            assert freezer.stdin is not None
            assert freezer.stdout is not None
            assert json.loads(freezer.stdout.readline()) == {"ready": True}
            freezer.stdin.write("freeze\n")
            freezer.stdin.flush()
            assert json.loads(freezer.stdout.readline())["filesystems"] == 2
            # Somebody else's freeze is not ended by a backup.
            with pytest.raises(nbdpull.SourceError, match="frozen already"):
                keeper.backup(domain.uri, quiesce=True)
            freezer.stdin.close()
            assert json.loads(freezer.stdout.readline())["thawed"] == 2
        assert domain.handle.fsInfo()
        deadline = time.monotonic() + 60
        while (tmp_path / "console").stat().st_size <= wrote:
            assert time.monotonic() < deadline, "the guest writes no more"
            time.sleep(0.1)
        crash = keeper.backup(domain.uri)
        assert crash.quiesced is None
        assert check_filesystem(keeper.restore(crash.backup)["vda"], tmp_path).replayed


def wait_for_agent(domain: Domain) -> None:
    deadline = time.monotonic() + 120
    while True:
        try:
            if domain.handle.fsInfo():
                return
        except libvirt.libvirtError:
            if time.monotonic() > deadline:
                raise
        time.sleep(0.5)


def test_no_agent_is_told_and_nothing_is_left(keeper: Keeper, domain: Domain) -> None:
    with pytest.raises(nbdpull.SourceError, match="back up without --quiesce"):
        keeper.backup(domain.uri, quiesce=True)
    clean(keeper, domain)
