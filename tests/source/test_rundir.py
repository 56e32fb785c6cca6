"""The folder of one run: locked while it lives, and nothing that only looks like one is touched."""

from __future__ import annotations

import fcntl
import json
import os
import signal
import socket
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from blake3 import blake3

from nbdpull.errors import InUseError, SourceError, UsageError
from nbdpull.source.rundir import RunDir, find_run, find_runs
from nbdpull.source.unfinished import Unfinished
from tests.source.test_unfinished import RECORD

RUN = "0123abcd"


def create(parent: Path, run: str = RUN, *, owner: tuple[int, int] | None = None) -> RunDir:
    return RunDir.create(str(parent), run, source="qmp:/x", chain="c" * 12, owner=owner)


def test_a_run_is_found_alive_with_all_that_it_says(tmp_path: Path) -> None:
    made = create(tmp_path)
    (found,) = find_runs(str(tmp_path))
    assert found.path == tmp_path / f"nbdpull-{RUN}"
    assert found.alive
    assert (found.source, found.chain, found.pid) == ("qmp:/x", "c" * 12, os.getpid())
    assert not found.paused
    assert not found.server
    made.mark_paused(paused=True)
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(made.socket)
        (found,) = find_runs(str(tmp_path))
    assert found.paused
    assert found.server
    made.mark_paused(paused=False)
    made.mark_paused(paused=False)
    (found,) = find_runs(str(tmp_path))
    assert not found.paused
    made.close()
    assert list(tmp_path.iterdir()) == []


def test_only_its_user_may_look_inside(tmp_path: Path) -> None:
    made = create(tmp_path)
    assert made.path.stat().st_mode & 0o777 == 0o700
    assert (made.path / "lock").stat().st_mode & 0o777 == 0o600
    made.close()


HOLDER = """
import sys, time
from nbdpull.source.rundir import RunDir
RunDir.create(sys.argv[1], "0123abcd", source="qmp:/x", chain="c", owner=None)
print("made", flush=True)
time.sleep(600)
"""


def test_a_stopped_run_lives_and_a_killed_one_does_not(tmp_path: Path) -> None:
    with subprocess.Popen(
        [sys.executable, "-c", HOLDER, tmp_path], stdout=subprocess.PIPE
    ) as process:
        try:
            assert process.stdout is not None
            assert process.stdout.readline() == b"made\n"
            process.send_signal(signal.SIGSTOP)
            (found,) = find_runs(str(tmp_path))
            assert found.alive
            assert found.pid == process.pid
        finally:
            process.kill()
        process.wait()
    (found,) = find_runs(str(tmp_path))
    assert not found.alive
    found.remove()
    assert list(find_runs(str(tmp_path))) == []


def test_an_image_that_goes_while_it_is_counted_takes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Libvirt removes its own, with the job."""
    made = create(tmp_path)
    gone = made.path / "disk1.qcow2"
    monkeypatch.setattr(Path, "glob", lambda _folder, _pattern: iter([gone]))
    free, used = made.room()
    assert (free > 0, used) == (True, 0)
    monkeypatch.undo()
    made.close()


def test_scratch_is_sparse_and_counted(tmp_path: Path) -> None:
    made = create(tmp_path)
    path = Path(made.make_scratch(0, 1 << 30))
    assert path.stat().st_size == 1 << 30
    assert made.room()[1] == 0
    with path.open("r+b") as file:
        file.write(b"x" * 4096)
        os.fsync(file.fileno())
    assert made.room()[1] >= 4096
    assert made.room()[0] > 0
    made.close()


def test_folder_that_is_too_deep_for_a_socket_is_told(tmp_path: Path) -> None:
    deep = tmp_path / ("d" * 60) / ("e" * 60)
    deep.mkdir(parents=True)
    with pytest.raises(UsageError, match=r"too deep: .* shorter one with --scratch"):
        create(deep)
    assert list(deep.iterdir()) == []


@pytest.mark.parametrize("parent", ["none", "file", "/proc"])
def test_folder_that_can_not_be_used_is_told(tmp_path: Path, parent: str) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UsageError, match="choose a writable folder with --scratch"):
        create(tmp_path / parent)


def test_second_run_of_the_same_name_leaves_the_first_alone(tmp_path: Path) -> None:
    made = create(tmp_path)
    made.make_scratch(0, 4096)
    with pytest.raises(UsageError):
        create(tmp_path)
    assert (made.path / "disk0.raw").exists()
    (found,) = find_runs(str(tmp_path))
    assert found.alive
    made.close()


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give a folder away")
def test_folder_and_scratch_are_given_to_qemus_user(tmp_path: Path) -> None:
    made = create(tmp_path, owner=(65534, 65534))
    path = Path(made.make_scratch(0, 4096))
    assert (made.path.stat().st_uid, path.stat().st_uid) == (65534, 65534)
    assert (made.path / "lock").stat().st_uid == 0
    (found,) = find_runs(str(tmp_path))
    assert found.alive
    made.close()


# -- folders that somebody else made ---------------------------------------------------------------


def hostile(parent: Path, name: str = f"nbdpull-{RUN}") -> Path:
    path = parent / name
    path.mkdir()
    (path / "lock").touch()
    return path


@pytest.mark.parametrize("name", ["nbdpull-0123abc", "nbdpull-0123ABCD", "nbdpull-0123abcd.", "np"])
def test_folder_of_another_name_is_none(tmp_path: Path, name: str) -> None:
    assert find_run(hostile(tmp_path, name)) is None


def test_folder_without_a_lock_is_none(tmp_path: Path) -> None:
    path = hostile(tmp_path)
    (path / "lock").unlink()
    assert find_run(path) is None


def test_file_and_link_are_none(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    real = hostile(tmp_path / "real")
    link = tmp_path / "nbdpull-0123abcd"
    link.symlink_to(real)
    assert find_run(link) is None
    link.unlink()
    link.write_text("")
    assert find_run(link) is None


def test_lock_that_is_a_link_is_not_followed(tmp_path: Path) -> None:
    path = hostile(tmp_path)
    target = tmp_path / "precious"
    target.write_text("kept")
    (path / "lock").unlink()
    (path / "lock").symlink_to(target)
    assert find_run(path) is None
    assert target.read_text() == "kept"


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can make another user's file")
def test_lock_of_another_user_is_none(tmp_path: Path) -> None:
    """Anybody may make a folder in /tmp: it must not be able to hold up or steer a clean-up."""
    path = hostile(tmp_path)
    os.chown(path / "lock", 65534, 65534)
    assert find_run(path) is None


@pytest.mark.parametrize("kind", ["fifo", "socket", "folder"])
def test_lock_of_another_kind_does_not_hold_us_up(tmp_path: Path, kind: str) -> None:
    path = hostile(tmp_path)
    (path / "lock").unlink()
    with socket.socket(socket.AF_UNIX) as made:
        match kind:
            case "fifo":
                os.mkfifo(path / "lock")
            case "socket":
                made.bind(str(path / "lock"))
            case _:
                (path / "lock").mkdir()
        found = find_run(path)
    assert found is None or not found.alive


@pytest.mark.parametrize(
    "text",
    ["", "{", "[]", "null", '"x"', json.dumps({"source": 3, "chain": [], "pid": "x"}), "[" * 9999],
    ids=["empty", "cut", "list", "null", "string", "types", "deep"],
)
def test_run_whose_words_are_nonsense_is_found_without_them(tmp_path: Path, text: str) -> None:
    path = hostile(tmp_path)
    (path / "run.json").write_text(text)
    found = find_run(path)
    assert found is not None
    assert (found.source, found.chain, found.pid) == (None, None, None)


def test_words_in_a_pipe_or_behind_a_link_are_not_read(tmp_path: Path) -> None:
    path = hostile(tmp_path)
    os.mkfifo(path / "run.json")
    found = find_run(path)
    assert found is not None
    assert found.source is None
    (path / "run.json").unlink()
    (tmp_path / "other").write_text('{"source": "qmp:/x"}')
    (path / "run.json").symlink_to(tmp_path / "other")
    found = find_run(path)
    assert found is not None
    assert found.source is None


def test_nothing_is_written_through_a_link_in_the_folder(tmp_path: Path) -> None:
    """The folder may belong to QEMU's user: root must not be led elsewhere."""
    made = create(tmp_path)
    precious = tmp_path / "precious"
    precious.write_text("kept")
    for name in ("disk0.raw", "held", "paused"):
        (made.path / name).symlink_to(precious)
    with pytest.raises(SourceError):
        made.make_scratch(0, 1 << 20)
    with pytest.raises(UsageError):
        made.hold_back(1 << 20)
    made.mark_paused(paused=True)
    assert precious.read_text() == "kept"
    made.close()
    assert precious.read_text() == "kept"


def test_a_held_lock_without_words_still_counts_as_alive(tmp_path: Path) -> None:
    path = hostile(tmp_path)
    with (path / "lock").open() as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        found = find_run(path)
        assert found is not None
        assert found.alive


def test_removing_follows_no_link(tmp_path: Path) -> None:
    path = hostile(tmp_path)
    precious = tmp_path / "precious"
    precious.mkdir()
    (precious / "file").write_text("kept")
    (path / "link").symlink_to(precious)
    found = find_run(path)
    assert found is not None
    found.remove()
    assert not path.exists()
    assert (precious / "file").read_text() == "kept"


# -- going on with a run that died -------------------------------------------------------------------


@pytest.fixture
def dead(tmp_path: Path) -> Path:
    """The folder of a run that left its point in time on record, and died."""
    made = create(tmp_path, RECORD.run)
    assert made.keep_record(RECORD, None)
    made.hold_back(1 << 16)
    journal = made.journal(RECORD.backup)
    assert journal is not None
    journal.note(0, 0, 1 << 16, bytes(32))
    journal.close()
    made.leave()
    return made.path


def record_of(path: Path) -> Unfinished:
    found = find_run(path)
    assert found is not None
    return found.record()


def test_a_dead_run_is_taken_over_with_all_that_it_noted(dead: Path) -> None:
    assert record_of(dead) == RECORD
    taken = RunDir.take_over(dead, source="qmp:/y", chain="d" * 12)
    found = find_run(dead)
    assert found is not None
    assert found.alive
    assert (found.source, found.chain, found.pid) == ("qmp:/y", "d" * 12, os.getpid())
    assert not (dead / "held").exists()
    taken.hold_back(1 << 16)
    journal = taken.journal(RECORD.backup)
    assert journal is not None
    assert journal.disk(0, 1 << 30).nbytes == 1 << 16
    journal.close()
    taken.close()
    assert not dead.exists()


def test_a_run_that_is_held_is_not_taken_over(dead: Path) -> None:
    taken = RunDir.take_over(dead, source="qmp:/y", chain="c" * 12)
    with pytest.raises(InUseError, match="held by another process"):
        RunDir.take_over(dead, source="qmp:/y", chain="c" * 12)
    taken.leave()
    RunDir.take_over(dead, source="qmp:/y", chain="c" * 12).close()


def test_a_folder_that_is_gone_is_not_taken_over(dead: Path) -> None:
    RunDir.take_over(dead, source="qmp:/y", chain="c" * 12).close()
    with pytest.raises(SourceError, match="can't be taken over"):
        RunDir.take_over(dead, source="qmp:/y", chain="c" * 12)


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give a file away")
def test_a_record_that_somebody_else_may_have_written_is_not_believed(
    dead: Path, tmp_path: Path
) -> None:
    """The folder is QEMU's user's where root backs up."""
    file = dead / "resume"
    file.chmod(0o620)
    with pytest.raises(ValueError, match="not a file of ours"):
        record_of(dead)
    file.chmod(0o600)
    (tmp_path / "link").hardlink_to(file)
    with pytest.raises(ValueError, match="not a file of ours"):
        record_of(dead)
    (tmp_path / "link").unlink()
    assert record_of(dead) == RECORD
    os.chown(file, 65534, 65534)
    with pytest.raises(ValueError, match="not a file of ours"):
        record_of(dead)
    file.rename(tmp_path / "moved")
    file.symlink_to(tmp_path / "moved")
    with pytest.raises(ValueError, match="can't be read"):
        record_of(dead)
    file.unlink()
    os.mkfifo(file)
    with pytest.raises(ValueError, match="not a file of ours"):
        record_of(dead)
    file.unlink()
    with pytest.raises(ValueError, match="nothing on record"):
        record_of(dead)


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give a file away")
def test_a_journal_that_somebody_else_may_have_written_is_not_read(dead: Path) -> None:
    os.chown(dead / "journal", 65534, 65534)
    taken = RunDir.take_over(dead, source="qmp:/y", chain="c" * 12)
    assert taken.journal(RECORD.backup) is None
    taken.close()


def test_a_record_of_another_run_is_not_believed(tmp_path: Path) -> None:
    made = create(tmp_path)
    assert made.keep_record(replace(RECORD, backup="f" * 16), None)
    made.leave()
    with pytest.raises(ValueError, match="of another run"):
        record_of(made.path)


def test_files_that_are_to_be_kept_are_believed_with_their_digest_only(tmp_path: Path) -> None:
    made = create(tmp_path, RECORD.run)
    digest = blake3(b"files").hexdigest()
    assert made.keep_record(replace(RECORD, machine=digest), b"files")
    made.leave()
    found = find_run(made.path)
    assert found is not None
    assert found.machine(digest) == b"files"
    file = made.path / "machine"
    assert file.stat().st_mode & 0o777 == 0o600
    for raw in (b"filed", b"files ", b""):
        file.write_bytes(raw)
        with pytest.raises(ValueError, match="damaged"):
            found.machine(digest)
    file.unlink()
    with pytest.raises(ValueError, match="can't be read"):
        found.machine(digest)


def test_a_record_is_replaced_or_is_there_no_more(dead: Path) -> None:
    taken = RunDir.take_over(dead, source="qmp:/y", chain="c" * 12)
    told = RECORD.with_lie("vda", "bytes 0 to 5 changed")
    taken.replace_record(told)
    assert record_of(dead).disks[0].lie == "bytes 0 to 5 changed"
    assert record_of(dead).disks[1].lie is None
    (dead / "resume.new").mkdir()  # as QEMU's user could
    taken.replace_record(RECORD)
    with pytest.raises(ValueError, match="nothing on record"):
        record_of(dead)
    taken.close()


def test_nobody_goes_on_with_a_run_whose_journal_is_given_up(dead: Path) -> None:
    taken = RunDir.take_over(dead, source="qmp:/y", chain="c" * 12)
    journal = taken.journal(RECORD.backup)
    assert journal is not None
    assert journal.kept
    assert journal.flush()
    assert journal.room() > 0
    journal.give_up("a test")
    journal.give_up("again")
    assert not journal.kept
    assert not journal.flush()
    assert journal.room() == 0
    with pytest.raises(ValueError, match="nothing on record"):
        record_of(dead)
    taken.close()


def test_a_record_is_written_once(tmp_path: Path) -> None:
    made = create(tmp_path, RECORD.run)
    assert made.keep_record(RECORD, None)
    assert not made.keep_record(RECORD, None)
    made.close()
