"""The same backup into an object store and into a local folder, and back."""

from __future__ import annotations

import os
import shutil
from dataclasses import replace
from pathlib import Path

from scripts.benchlib.domain import Domain
from scripts.benchlib.measure import Usage, measure, run, warm
from scripts.benchlib.rows import Pair, Results, Side
from scripts.benchlib.setting import NBDPULL, Setting, backup, fresh_repository, say
from tests.support.stores import SeaweedFs, seaweedfs

__all__ = ["stores"]


class _Stores:
    def __init__(self, setting: Setting, domain: Domain, server: SeaweedFs) -> None:
        self.setting = setting
        self.domain = domain
        self.server = server
        self.local = setting.folder / "repository"
        self.remote = ""

    def into_local(self) -> Usage:
        self.local = fresh_repository(self.setting, "repository")
        return backup(self.domain.uri, self.local, "copy", server=self.domain.pid)[0]

    def into_s3(self) -> Usage:
        self.remote = f"s3://{self.server.bucket()}/bench"
        run([NBDPULL, "init", "-r", self.remote])
        line: list[str | Path] = [NBDPULL, "backup", self.domain.uri, "-r", self.remote]
        line += ["-l", "copy", "-q"]
        return measure(line, server=(self.domain.pid, self.server.process.pid))[0]

    def _restore(self, repository: Path | str, name: str, server: int | None = None) -> Usage:
        target = self.setting.fresh(name)
        line: list[str | Path] = [NBDPULL, "restore", "latest", "-r", repository, "-q"]
        usage, _ = measure([*line, "--to", target], server=server)
        (image,) = target.glob("*.raw")
        self.setting.same(image, "raw")
        return replace(usage, stored=image.stat().st_blocks * 512)

    def from_local(self) -> Usage:
        return self._restore(self.local, "restored")

    def from_s3(self) -> Usage:
        return self._restore(self.remote, "converted", self.server.process.pid)


def stores(setting: Setting, results: Results) -> None:
    """Measure a full backup into S3, and its restore, against the same with a local folder."""
    disk = setting.folder / "vm.qcow2"
    shutil.copyfile(setting.disk, disk)
    before = dict(os.environ)
    pairs: list[Pair] = []
    try:
        with (
            seaweedfs() as server,
            Domain("bench", disk, setting.folder / "domain") as domain,
        ):
            os.environ.update(server.env)
            warm(disk)
            work = _Stores(setting, domain, server)
            for key, what, sides, least in (
                ("s3-full", "full backup", (work.into_s3, work.into_local), 0.6),
                ("s3-restore", "restore to a raw file", (work.from_s3, work.from_local), None),
            ):
                say(f"s3: {what}, SeaweedFS and a local folder")
                own, theirs = setting.alternate(*sides)
                pairs.append(
                    Pair(
                        key=key,
                        what=f"{what}, S3 (SeaweedFS on this machine)",
                        ours=Side("nbdpull, S3 (server: QEMU and SeaweedFS)", own),
                        peer=Side("nbdpull, a local folder", theirs),
                        least=least,
                    )
                )
                say(f"s3: with a local folder it takes {pairs[-1].ratio:.2f} times as long")
    finally:
        os.environ.clear()
        os.environ.update(before)
    disk.unlink()
    for name in ("repository", "restored", "converted"):
        shutil.rmtree(setting.folder / name, ignore_errors=True)
    results.pairs["s3"] = pairs
