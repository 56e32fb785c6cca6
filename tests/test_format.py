"""What was written once restores for ever, by nbdpull and by a reader that shares no code with it."""

from __future__ import annotations

import asyncio
import hashlib
import json
import os
import random
import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import zstandard

import nbdpull
from nbdpull.errors import UnsupportedFormatError
from nbdpull.model.frame import ENTRY, Codec, FrameKind
from nbdpull.model.grain import GRAIN, SEGMENT
from nbdpull.model.keysource import KeySource
from nbdpull.model.results import Level
from nbdpull.ops.restore import RestoreOptions, restore
from nbdpull.ops.verify import VerifyOptions, verify
from nbdpull.repo.repository import Repository
from tests.ops.builder import Disk, add_backup
from tests.ops.healing import make_history
from tests.ops.retained import retained
from tests.ops.test_restore import flip, packs
from tests.target.helpers import MIB, disk_bytes

ROOT = Path(__file__).parents[1]
FIXTURES = ROOT / "tests" / "fixtures"
RESCUE = ROOT / "scripts" / "rescue_reader.py"
EXPECTED: dict[str, dict[str, list[object]]] = json.loads(
    (FIXTURES / "format-1" / "expected.json").read_text()
)


@pytest.fixture
def fixture(tmp_path: Path) -> Path:
    """A copy: nothing may write to the original."""
    return Path(shutil.copytree(FIXTURES / "format-1" / "repository", tmp_path / "format-1"))


def data(path: Path) -> Iterator[tuple[int, bytes]]:
    """(number, bytes) of the grains of a file that are not zero, without reading its holes."""
    size = path.stat().st_size
    with path.open("rb") as file:
        end = 0
        while end < size:
            try:
                start = os.lseek(file.fileno(), end, os.SEEK_DATA) // GRAIN * GRAIN
            except OSError:
                return
            end = -(-os.lseek(file.fileno(), start, os.SEEK_HOLE) // GRAIN) * GRAIN
            for at in range(start, min(end, size), GRAIN):
                file.seek(at)
                raw = file.read(GRAIN)
                if any(raw):
                    yield at // GRAIN, raw


def described(path: Path) -> list[object]:
    """What `expected.json` says of a disk."""
    digest = hashlib.sha256()
    for number, raw in data(path):
        digest.update(number.to_bytes(8, "little") + raw)
    return [path.stat().st_size, digest.hexdigest()]


def rescue(
    *arguments: object, python: tuple[str, ...] = (sys.executable,), folder: Path | None = None
) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*python, str(RESCUE), *map(str, arguments)],
        capture_output=True,
        text=True,
        check=False,
        cwd=folder,
        env={"PYTHONIOENCODING": "utf-8"} | ({"PYTHONPATH": str(folder)} if folder else {}),
    )


@pytest.fixture
def bare(tmp_path: Path) -> Path:
    """A folder with no other module than zstandard."""
    folder = tmp_path / "modules"
    folder.mkdir()
    package = zstandard.__file__
    assert package is not None
    (folder / "zstandard").symlink_to(Path(package).parent)
    return folder


@pytest.mark.parametrize("backup", EXPECTED)
def test_what_format_1_wrote_restores(fixture: Path, tmp_path: Path, backup: str) -> None:
    out = tmp_path / "out"
    asyncio.run(restore(RestoreOptions(repository=str(fixture), backup=backup, to=str(out))))
    assert {path.stem: described(path) for path in out.iterdir()} == EXPECTED[backup]


def test_what_format_1_wrote_verifies(fixture: Path) -> None:
    result = asyncio.run(verify(VerifyOptions(repository=str(fixture))))
    assert result.ok
    assert result.backups == tuple(EXPECTED)


ENCRYPTED = FIXTURES / "format-1-encrypted"
ENCRYPTED_EXPECTED = json.loads((ENCRYPTED / "expected.json").read_text())


@pytest.mark.parametrize("backup", ENCRYPTED_EXPECTED)
def test_what_format_1_encrypted_restores_with_the_exported_key(
    tmp_path: Path, backup: str
) -> None:
    out, keys = tmp_path / "out", KeySource(key_file=str(ENCRYPTED / "recovery.key"))
    nbdpull.restore(ENCRYPTED / "repository", backup, out, keys=keys)
    assert {path.stem: described(path) for path in out.iterdir()} == ENCRYPTED_EXPECTED[backup]


def test_what_format_1_encrypted_opens_with_its_password_and_lists_for_a_writer() -> None:
    for keys in (
        KeySource(password="fixture"),
        KeySource(key_file=str(ENCRYPTED / "writer.key")),
    ):
        listed = nbdpull.list_backups(ENCRYPTED / "repository", keys=keys)
        assert [info.backup for info in listed] == list(ENCRYPTED_EXPECTED)
        assert {info.vm for info in listed} == {"vm ü"}


def test_rescue_reader_says_that_it_reads_nothing_encrypted() -> None:
    done = rescue(ENCRYPTED / "repository")
    assert done.returncode == 1
    assert "of a kind not known here" in done.stderr


def test_the_fixture_has_every_case_of_the_format(fixture: Path) -> None:
    repository = Repository.open(str(fixture))
    cases: Counter[object] = Counter()
    for path in packs(repository):
        raw = path.read_bytes()
        at = int.from_bytes(raw[-56:-48], "little")
        directory = np.frombuffer(raw[at:-64], dtype=ENTRY)
        cases.update((int(row["codec"]), int(row["kind"])) for row in directory)
        cases["later pack"] += path.name != "00000000"
    for summary in repository.summaries():
        manifest = repository.manifest(summary)
        reader = repository.reader(manifest)
        cases[summary.disk_level] += 1
        cases["session nobody needs"] += any(not ref.sid for ref in manifest.sessions)
        for index, ref in enumerate(manifest.segments):
            intervals = list(reader.segment(index))
            cases["zero segment"] += ref is None
            cases["shared frame"] += any(one.n < one.flen for one in intervals)
            cases["shared later"] += any(one.skip > 0 for one in intervals)
            cases["whole frame"] += any(one.n == one.flen == 16 for one in intervals)
            cases["packs of several sessions"] += (
                ref is not None and len({session for session, _ in ref.packs}) > 1
            )
            cases["second segment"] += index > 0
            cases["short last grain"] += any(
                index * SEGMENT + (one.start + one.n) * GRAIN > summary.size for one in intervals
            )
    # A map always packs: most of its bytes are zero.
    wanted = {(codec, FrameKind.DATA) for codec in Codec} | {(Codec.ZSTD, FrameKind.MAP), *Level}
    named = {key for key, count in cases.items() if isinstance(key, str) and count}
    assert wanted <= {key for key, count in cases.items() if count}
    assert {
        "later pack",
        "session nobody needs",
        "zero segment",
        "shared frame",
        "shared later",
        "whole frame",
        "packs of several sessions",
        "second segment",
        "short last grain",
    } <= named


def test_an_unknown_mandatory_feature_is_refused(tmp_path: Path) -> None:
    folder = Path(shutil.copytree(FIXTURES / "unknown-feature", tmp_path / "unknown"))
    for write in (False, True):
        with pytest.raises(UnsupportedFormatError, match=r"read feature 'tape_robot'.*newer"):
            Repository.open(str(folder), write=write)
    assert "of a kind not known here" in rescue(folder).stderr


# -- the reader that shares no code ------------------------------------------------------------------


@pytest.mark.parametrize("backup", EXPECTED)
def test_rescue_reader_restores_format_1(fixture: Path, tmp_path: Path, backup: str) -> None:
    for disk, expected in EXPECTED[backup].items():
        done = rescue(fixture, backup, disk, tmp_path / disk)
        assert (done.returncode, done.stdout) == (0, "")
        assert done.stderr.endswith("0 bytes are lost; every BLAKE3 was checked\n")
        assert described(tmp_path / disk) == expected


def test_rescue_reader_needs_zstandard_alone(fixture: Path, tmp_path: Path, bare: Path) -> None:
    backup = list(EXPECTED)[-1]
    script = f"import sys, runpy; sys.argv[1:] = {['-', str(fixture), backup, 'vda', str(tmp_path / 'out')]!r}[1:]"
    script += f"\ntry: runpy.run_path({str(RESCUE)!r}, run_name='__main__')"
    script += "\nexcept SystemExit as exc: code = exc.code"
    script += "\nprint(code, *sorted({name.partition('.')[0] for name in sys.modules}))"
    done = subprocess.run(
        ["/usr/bin/python3", "-S", "-c", script],
        capture_output=True,
        text=True,
        check=True,
        env={"PYTHONPATH": str(bare)},
    )
    code, *modules = done.stdout.split()
    assert code == "0"
    assert "zstandard" in modules
    assert not {"nbdpull", "blake3", "numpy", "cbor2"} & set(modules)
    assert "without the module blake3" in done.stderr
    assert described(tmp_path / "out") == EXPECTED[backup]["vda"]


def test_rescue_reader_is_short_and_lists_what_there_is(fixture: Path) -> None:
    assert len(RESCUE.read_text().splitlines()) < 300
    assert "nbdpull." not in "".join(
        line for line in RESCUE.read_text().splitlines() if "import" in line
    )
    done = rescue(fixture)
    assert done.returncode == 0
    lines = [line.split()[0] for line in done.stdout.splitlines()]
    assert lines == [backup for backup in EXPECTED for _ in range(2)]


@pytest.fixture
def repository(tmp_path: Path) -> Repository:
    return Repository.create(str(tmp_path / "repo"))


def test_rescue_reader_and_qemu_agree_with_a_raw_image(
    repository: Repository, tmp_path: Path
) -> None:
    state = Disk.of(disk_bytes(9 * MIB + 1536, 3))
    manifests = add_backup(repository, {"d": state})
    for seed in range(3):
        after = state.changed(seed)
        manifests = add_backup(
            repository, {"d": after}, before={"d": state}, parents=manifests, time=2000.0 + seed
        )
        state = after
    backup = manifests["d"].summary.backup
    done = rescue(repository.location, backup, "d", tmp_path / "out")
    assert done.returncode == 0
    want = state.write_to(tmp_path / "want")
    compare = ["qemu-img", "compare", "-f", "raw", "-F", "raw", str(want), str(tmp_path / "out")]
    subprocess.run(compare, check=True, capture_output=True)


def test_rescue_reader_restores_what_was_repacked_or_brought_back(tmp_path: Path) -> None:
    repo = retained(tmp_path / "repo")
    nbdpull.forget(repo.path, [repo.ids[0]])
    nbdpull.undo(repo.path, [repo.ids[0]])
    assert len(nbdpull.repack(repo.path, ratio=1.0).backups) > 0
    # Both sets of manifests are there until a collection ends the undo window; here it is half done.
    repository = Repository.open(str(repo.path), write=True)
    for pin in [listed.key.partition("/")[2] for listed in repository._store.list("f")]:
        repository._store.create(f"t/{pin}", b"")
    listed = rescue(repo.path).stdout.splitlines()
    assert sorted(line.split()[0] for line in listed) == sorted(2 * repo.ids)
    for number, backup in enumerate(repo.ids):
        for disk, state in repo.states[number].items():
            out = tmp_path / f"{number}{disk}"
            assert rescue(repo.path, backup, disk, out).returncode == 0
            assert out.read_bytes() == state.content()


def test_rescue_reader_tells_in_one_line_what_it_can_not(fixture: Path, tmp_path: Path) -> None:
    backup = list(EXPECTED)[-1]
    (tmp_path / "there").touch()
    for arguments in (
        [tmp_path / "nothing"],
        [ENCRYPTED / "repository"],
        [fixture, backup, "vdz", tmp_path / "out"],
        [fixture, backup, "vda", tmp_path / "there"],
    ):
        done = rescue(*arguments)
        assert done.returncode == 1
        assert len(done.stderr.splitlines()) == 1


def test_rescue_reader_without_blake3_leaves_out_a_manifest_that_makes_no_sense(
    fixture: Path, tmp_path: Path, bare: Path
) -> None:
    for path in sorted(fixture.glob("m/*/*")):
        if path.read_bytes()[:8] != b"NBDPMAN1":
            continue
        raw = bytearray(path.read_bytes())
        for at in range(81, 400, 7):
            raw[at] ^= 0xFF
        path.write_bytes(raw)
        break
    done = rescue(fixture, python=("/usr/bin/python3", "-S"), folder=bare)
    assert done.returncode == 0
    assert f"left out: {path}" in done.stderr
    assert len(done.stdout.splitlines()) == 2 * len(EXPECTED) - 1


def test_rescue_reader_names_what_is_lost_and_saves_the_rest(
    repository: Repository, tmp_path: Path
) -> None:
    content = bytes(range(1, 256)) * (4 * MIB // 255 + 1)
    disk = Disk.of(content[: 4 * MIB])
    backup = add_backup(repository, {"d": disk})["d"].summary.backup
    (pack,) = packs(repository)
    flip(pack, 128 + 64 + 3)
    done = rescue(repository.location, backup, "d", tmp_path / "out")
    assert done.returncode == 1
    assert f"lost: bytes 0 to {MIB}: " in done.stderr
    assert f"{MIB} bytes are lost" in done.stderr
    assert (tmp_path / "out").read_bytes() == bytes(MIB) + disk.content()[MIB:]


def test_rescue_reader_follows_records_of_healing(tmp_path: Path) -> None:
    rng = random.Random(1)
    history = make_history(tmp_path, seed=2, frames=12, backups=2)
    for place, clen in rng.sample(history.whole_frames(history.manifests[-1]), 4):
        history.damage(place, clen, rng)
    before = rescue(history.repository.location, f"{1:016x}", "vda", tmp_path / "before")
    assert before.returncode == 1
    history.verify()
    assert history.back_up(parent=history.manifests[-1]) == 4
    for number, content in enumerate(history.contents):
        out = tmp_path / str(number)
        assert rescue(history.repository.location, f"{number:016x}", "vda", out).returncode == 0
        assert out.read_bytes() == content


# -- what lies beside backups --------------------------------------------------------------------------

LIFE = FIXTURES / "format-1-life"
LIFE_EXPECTED = json.loads((LIFE / "expected.json").read_text())
LIFE_IDS = [f"{number:016x}" for number in (1, 2, 3, 4)]


@pytest.fixture
def life(tmp_path: Path) -> Path:
    return Path(shutil.copytree(LIFE, tmp_path / "life"))


def restores(repository: Path, backup: str, out: Path) -> bool:
    nbdpull.restore(repository, backup, out)
    return bool({path.stem: described(path) for path in out.iterdir()} == LIFE_EXPECTED[backup])


def test_marks_registers_and_records_of_format_1_mean_what_they_meant(
    life: Path, tmp_path: Path
) -> None:
    repository = life / "repository"
    shown = nbdpull.list_backups(repository)
    assert [one.backup for one in shown] == [LIFE_IDS[0], LIFE_IDS[3]]
    assert [one.protected for one in shown] == [True, False]
    hidden = nbdpull.list_backups(repository, forgotten=True)
    assert [one.backup for one in hidden] == [LIFE_IDS[0], LIFE_IDS[1], LIFE_IDS[3]]
    assert len(Repository.open(str(repository)).damage.lost()) == 1
    nbdpull.undo(repository, [LIFE_IDS[1]])
    for backup in (LIFE_IDS[0], LIFE_IDS[1], LIFE_IDS[3]):
        assert restores(repository, backup, tmp_path / backup)


def test_a_collection_of_format_1_spares_what_is_needed_and_ends_what_was_forgotten(
    life: Path, tmp_path: Path
) -> None:
    repository = life / "repository"
    # Copied just now, all of it is young: nobody's session is dead, and no undo window over.
    assert nbdpull.gc(repository).manifests == 0
    done = nbdpull.gc(repository, undo_window_s=0)
    assert done.manifests == 4
    assert done.packs > 0
    assert not done.refused
    for backup in (LIFE_IDS[0], LIFE_IDS[3]):
        assert restores(repository, backup, tmp_path / backup)
    assert nbdpull.verify(repository).ok


def test_a_backup_is_built_on_one_of_format_1(life: Path, tmp_path: Path) -> None:
    repository = Repository.open(str(life / "repository"), write=True)
    before = repository.manifest(repository.find(LIFE_IDS[3]).disks[1])
    assert before.summary.disk == "vdb"
    base = bytes(before.summary.size)
    after = Disk.of(b"new!" + base[4:])
    made = add_backup(
        repository,
        {"vdb": after},
        before={"vdb": Disk.of(base)},
        parents={"vdb": before},
        time=5000.0,
        vm=before.summary.vm,
    )
    nbdpull.gc(life / "repository", undo_window_s=0)
    nbdpull.restore(life / "repository", made["vdb"].summary.backup, tmp_path / "out")
    assert (tmp_path / "out" / "vdb.raw").read_bytes() == after.content()


def test_a_replica_of_format_1_is_judged_by_its_originals_times(life: Path, tmp_path: Path) -> None:
    replica = life / "replica"
    judged = nbdpull.forget(replica, policy="keep-last=9", trust_store_time=True, dry_run=True)
    assert len(judged.kept) == 2
    times = [one.stored_time for one in judged.kept]
    assert times == sorted(times)
    assert all(1795702400 < time < 1795702500 for time in times)
    for backup in (LIFE_IDS[0], LIFE_IDS[3]):
        assert restores(replica, backup, tmp_path / backup)
    assert nbdpull.copy(life / "repository", replica).forgotten == ()
