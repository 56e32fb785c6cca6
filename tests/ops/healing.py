"""Backups of a qcow2 image with a dirty bitmap, pulled from qemu-nbd; frames damaged on purpose."""

from __future__ import annotations

import asyncio
import random
import shutil
import subprocess
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path

from nbdpull.model.crypto import Kdf, KdfName
from nbdpull.model.damage import Place
from nbdpull.model.grain import GRAIN
from nbdpull.model.ids import BackupId
from nbdpull.model.manifest import Manifest
from nbdpull.model.outcomes import VerifyResult
from nbdpull.model.results import Level
from nbdpull.nbdio.connection import unix_uri
from nbdpull.ops.heal import Healer
from nbdpull.ops.pull import DiskPull, pull
from nbdpull.ops.verify import VerifyOptions, verify
from nbdpull.repo.repository import Repository
from tests.ops.pulling import answers, content, summary_of
from tests.support.process import spawn, stop
from tests.support.tools import QEMU_72

BITMAP = "np"
CONTEXT = f"qemu:dirty-bitmap:{BITMAP}"


@dataclass
class Source:
    """A disk with a bitmap that records since the last backup; `now` is what it holds."""

    image: Path
    now: bytearray

    @classmethod
    def create(cls, folder: Path, size: int) -> Source:
        image = folder / "disk.qcow2"
        _run(QEMU_72.qemu_img, "create", "-q", "-f", "qcow2", image, str(size))
        _run(QEMU_72.qemu_img, "bitmap", "--add", image, BITMAP)
        return cls(image, bytearray(size))

    def write(self, pieces: dict[int, bytes]) -> None:
        """Put bytes at offsets, as a guest would."""
        folder = Path(tempfile.mkdtemp(prefix="np-"))
        commands = []
        for number, (at, raw) in enumerate(pieces.items()):
            (folder / str(number)).write_bytes(raw)
            commands.append(f"write -q -s {folder / str(number)} {at} {len(raw)}\n")
            self.now[at : at + len(raw)] = raw
        subprocess.run(
            [QEMU_72.qemu_io, "-f", "qcow2", self.image],
            input="".join(commands),
            text=True,
            check=True,
            capture_output=True,
        )
        shutil.rmtree(folder)

    @contextmanager
    def served(self) -> Iterator[str]:
        """Yields the URI of an export with the bitmap."""
        folder = Path(tempfile.mkdtemp(prefix="np-"))
        path = folder / "s"
        options = ["-r", "-t", "-e", "16", "-f", "qcow2", "-B", BITMAP]
        server = spawn([QEMU_72.qemu_nbd, *options, "-k", path, self.image], log=folder / "log")
        try:
            deadline = time.monotonic() + 20
            while not answers(path):
                assert server.poll() is None, (folder / "log").read_text()
                assert time.monotonic() < deadline
                time.sleep(0.01)
            yield unix_uri(str(path), "")
        finally:
            stop(server)
            shutil.rmtree(folder)

    def forget_changes(self) -> None:
        """From here on the bitmap records for the next backup."""
        _run(QEMU_72.qemu_img, "bitmap", "--clear", self.image, BITMAP)


def _run(*command: str | Path) -> None:
    subprocess.run(command, check=True, capture_output=True)


@dataclass
class History:
    """Backups of one disk, and what it held at each."""

    repository: Repository
    source: Source
    manifests: list[Manifest] = field(default_factory=list)
    contents: list[bytes] = field(default_factory=list)

    def back_up(self, *, parent: Manifest | None, audit: int = 0) -> int:
        """An incremental since `parent`, or a full; how many damaged frames it healed."""
        # Opened anew, as each run of the program does.
        repository = Repository.open(self.repository.location, write=True)
        size = len(self.source.now)
        like = self.manifests[-1] if self.manifests and parent is None else None
        session = repository.begin(vm="vm1", disk="vda", parent=parent, like=like)
        reader = repository.reader(parent) if parent else None
        healer = Healer(repository, session, reader, size=size)
        with self.source.served() as uri:
            one = DiskPull(
                name="vda",
                size=size,
                uri=uri,
                context=CONTEXT if parent else None,
                parent=reader,
                session=session,
                healer=healer,
                audit=audit,
            )
            asyncio.run(pull([one]))
        session.seal()
        healed = healer.record()
        number = len(self.manifests)
        summary = summary_of(session, size, vm="vm1", disk="vda", time=1000.0 + number)
        level = Level.INCREMENTAL if parent else Level.FULL
        summary = replace(summary, backup=BackupId(f"{number:016x}"), disk_level=level)
        self.manifests.append(session.commit(summary))
        self.contents.append(bytes(self.source.now))
        self.source.forget_changes()
        return healed

    def wrong(self) -> list[int]:
        """Numbers of the backups that do not restore as they were."""
        repository = Repository.open(self.repository.location)
        return [
            number
            for number, (manifest, expected) in enumerate(
                zip(self.manifests, self.contents, strict=True)
            )
            if content(repository, manifest) != expected
        ]

    def verify(self, **options: object) -> VerifyResult:
        wanted = VerifyOptions(repository=self.repository.location, **options)  # type: ignore[arg-type]
        return asyncio.run(verify(wanted))

    def whole_frames(self, manifest: Manifest) -> list[tuple[Place, int]]:
        """Places and stored bytes of the data frames that a backup shows from first to last grain."""
        reader = self.repository.reader(manifest)
        sids = [session.sid for session in manifest.sessions]
        return sorted(
            {
                (Place(sids[one.session], one.seq, one.offset), one.clen)
                for index in range(len(manifest.segments))
                for one in reader.segment(index)
                if one.n == one.flen
            }
        )

    def path(self, place: Place) -> Path:
        return Path(self.repository.location) / "d" / place.session / f"{place.seq:08x}"

    def damage(self, place: Place, clen: int, rng: random.Random) -> None:
        """Change one bit of a frame, in its header or in its payload."""
        path = self.path(place)
        path.chmod(0o600)
        # Not the header's last bytes, of which a reader makes nothing but a complaint too.
        at = place.offset + rng.choice([rng.randrange(64), 64 + rng.randrange(clen)])
        with path.open("r+b") as file:
            file.seek(at)
            byte = file.read(1)[0] ^ (1 << rng.randrange(8))
            file.seek(at)
            file.write(bytes([byte]))


def noise(rng: random.Random, grains: int) -> bytes:
    """Data that packs to about a half, none of it zero."""
    return bytes(byte | 0x0F for byte in rng.randbytes(grains * GRAIN))


def make_history(
    folder: Path, *, seed: int, frames: int, backups: int, password: bytes | None = None
) -> History:
    """A full of so many frames apart from each other, and increments that overwrite a tenth of them each."""
    rng = random.Random(seed)
    kdf = None if password is None else Kdf(KdfName.ARGON2ID, 64, 1, 1)
    Repository.create(str(folder / "repo"), password=password, kdf=kdf)
    repository = Repository.open(str(folder / "repo"), write=True)
    spans = [(number * 3, rng.randrange(1, 3)) for number in range(frames)]
    source = Source.create(folder, frames * 3 * GRAIN + 12_800)
    source.write({at * GRAIN: noise(rng, n) for at, n in spans})
    history = History(repository, source)
    history.back_up(parent=None)
    for _ in range(backups - 1):
        source.write(
            {at * GRAIN: noise(rng, 1) for at, _ in rng.sample(spans, max(1, frames // 10))}
        )
        history.back_up(parent=history.manifests[-1])
    return history


def campaign(
    folder: Path, *, seed: int, frames: int, backups: int, password: bytes | None = None
) -> dict[str, object]:
    """Damage so many frames of a history; the next backup must heal them all in every older one."""
    rng = random.Random(seed)
    history = make_history(
        folder, seed=seed, frames=frames * 5 // 4, backups=backups, password=password
    )
    candidates = history.whole_frames(history.manifests[-1])
    damaged: Sequence[tuple[Place, int]] = rng.sample(candidates, frames)
    for place, clen in damaged:
        history.damage(place, clen, rng)
    before = history.verify()
    healed = history.back_up(parent=history.manifests[-1])
    after = history.verify()
    stored = sum(
        entry.stat().st_size
        for entry in (
            Path(history.repository.location) / "d" / history.manifests[-1].summary.session
        ).iterdir()
    )
    return {
        "seed": seed,
        "backups": backups,
        "disk_bytes": len(history.source.now),
        "frames_of_newest": len(candidates),
        "damaged": len(damaged),
        "recorded": before.recorded,
        "found_by_verify": not before.ok,
        "healed": healed,
        "read_from_copies": after.healed,
        "verify_ok_after": after.ok,
        "wrong_backups_after": history.wrong(),
        "healing_stored_bytes": stored,
        "record_bytes": sum(
            path.stat().st_size for path in Path(history.repository.location).glob("b/*/*")
        ),
    }
