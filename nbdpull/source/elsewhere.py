"""A host that is reached by SSH: run folders there, by small scripts for its shell.

A run's folder is as one of this host (`rundir`), so that whoever is there finds it too, and can go on with it.
Scratch images are made before the folder is given to QEMU's user. From then on nothing in it is written to by
name: QEMU, which its guest may have taken over, could have put a link there. See `recordelsewhere`.
"""

from __future__ import annotations

import itertools
import json
import logging
import re
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from nbdpull.errors import MonitorError, SourceError, UsageError
from nbdpull.source.journal import Journal
from nbdpull.source.recordelsewhere import (
    JournalElsewhere,
    hold,
    let_go,
    put_record,
    read_record,
    remove_record,
    take_over,
)
from nbdpull.source.rundir import FULL, SOCKET_PATH_MAX, FoundRun
from nbdpull.source.ssh import ScriptError, SshLink, quoted
from nbdpull.source.unfinished import Unfinished

__all__ = ["Elsewhere", "RunDirElsewhere", "look_at_socket"]

log = logging.getLogger(__name__)

_HELD_KIB: Final = 64 << 10
_FASTEST: Final = 4 << 30
"""Bytes in a second that scratch is taken to grow at most: so often its room is looked at."""
_PACE_S: Final = (0.05, 1.0)
_DF: Final = "df -Pk . | tail -n 1"
_FREE: Final = re.compile(r"\s(\d+)\s+\d+%\s")
_RUN: Final = re.compile(r"nbdpull-[0-9a-f]{8}")
_JSON_MAX: Final = 4096

# Bytes and text of `df -Pk` (POSIX): blocks of 1024 bytes, one line, the free ones before the percentage.
_CREATE: Final = r"""
base={base}
dir=${{base%/}}/{name}
mkdir -m 700 -- "$dir" || exit 3
make() {{
    cd -- "$dir" && : >lock && printf '%s' {description} >run.json || return 1
    free=$(df -Pk . | sed -n '$s/.* \([0-9][0-9]*\)  *[0-9]*% .*/\1/p')
    held=$((free / 4))
    [ "$held" -le {held} ] || held={held}
    [ "$free" -lt 1024 ] || fallocate -l "${{held}}K" held 2>/dev/null ||
        dd if=/dev/zero of=held bs=1024 count="$held" 2>/dev/null
    {images}
}}
if make; then
    printf '\n%s\n' "$dir"
else
    rm -rf -- "$dir"
    exit 4
fi
"""

_FIND: Final = r"""
me=$(id -u)
for dir in {folders}; do
    [ -d "$dir" ] && [ ! -h "$dir" ] && [ -f "$dir/lock" ] && [ ! -h "$dir/lock" ] || continue
    set -- $(ls -ldn -- "$dir/lock")
    [ "$3" = 0 ] || [ "$3" = "$me" ] || continue
    held=0 paused=0 server=0 said=
    if command -v flock >/dev/null; then
        flock -n "$dir/lock" true
        [ $? != 1 ] || held=1
    fi
    [ ! -e "$dir/paused" ] || paused=1
    [ ! -S "$dir/nbd.sock" ] && [ ! -e "$dir/server" ] || server=1
    if [ -f "$dir/run.json" ] && [ ! -h "$dir/run.json" ]; then
        said=$(head -c {most} -- "$dir/run.json" | tr -d '\000\n')
    fi
    printf '\nrun %s %s %s %s\n%s\n' $held $paused $server "$dir" "$said"
done
:
"""


def look_at_socket(link: SshLink, path: str) -> tuple[int, int] | None:
    """User and group of the QMP socket at `path` there, which are QEMU's; None where that is not told.

    Raises:
        MonitorError: there is none, or no permission for it.
    """
    script = f"""
        p={quoted(path)}
        if [ ! -e "$p" ]; then echo none
        elif [ ! -S "$p" ]; then echo other
        elif [ ! -r "$p" ] || [ ! -w "$p" ]; then echo denied
        else ls -ldn -- "$p"
        fi"""
    found = link.run(script).split()
    if found == ["none"]:
        raise MonitorError(
            f"no QMP socket at {path} on {link.host} that its user may see; start QEMU with -qmp"
            f" unix:{path},server=on,wait=off"
        )
    if found == ["other"]:
        raise MonitorError(
            f"{path} on {link.host} is no socket; expected the path of QEMU's -qmp unix:PATH"
        )
    if found == ["denied"]:
        raise MonitorError(
            f"no permission for {path} on {link.host}; log in as the user that QEMU runs as, or root"
        )
    with suppress(ValueError, IndexError):
        return int(found[2]), int(found[3])
    return None


class RunDirElsewhere:
    """A folder made for this run; `close` removes it. See `RunDir`."""

    here = False

    def __init__(self, link: SshLink, path: Path, *, taken_over: bool = False) -> None:
        self._link = link
        self._keep = False
        self._held = taken_over
        self._taken_over = taken_over
        self.path = path

    def give(self, owner: str) -> None:
        """Open what this run writes to, and give the folder and its images to QEMU's user.

        Args:
            owner: user and group as `chown` is told them; empty where they are this user's.

        Raises:
            ScriptError: it can't be given.
        """
        mine = quoted(self.path)
        then = f'[ "$(id -u)" != 0 ] || chown {owner} {mine}/disk*.raw {mine}' if owner else ":"
        self._held = hold(self._link, self.path, then)

    @property
    def socket(self) -> str:
        """Where QEMU's NBD server is to listen."""
        return str(self.path / "nbd.sock")

    @property
    def life(self) -> str:
        """Where QEMU is to listen for the run's lifeline."""
        return str(self.path / "life")

    def make_scratch(self, index: int, size: int) -> str:  # noqa: ARG002 - made with the folder
        """The path of a scratch image."""
        return str(self.path / f"disk{index}.raw")

    def room(self) -> tuple[int, int]:
        """Bytes that are free for scratch images, and that they take now.

        Raises:
            SourceError: it can't be looked at.
        """
        script = f"cd -- {quoted(self.path)} && {_DF} && du -k disk*.raw"
        first, _, rest = self._link.run(script).lstrip("\n").partition("\n")
        free = _FREE.search(first)
        used = [line.split()[0] for line in rest.splitlines() if line.strip()]
        if free is None or not all(map(str.isdecimal, used)):
            raise SourceError(f"'df' and 'du' on {self._link.host} say what is not understood")
        return int(free[1]) * 1024, sum(map(int, used)) * 1024

    def pace_s(self, spare: int) -> float:
        """Seconds until the room must be looked at again, with `spare` bytes left."""
        least, most = _PACE_S
        return min(most, max(least, spare / _FASTEST))

    def hold_back(self, size: int) -> None:
        """Nothing: the room is held since the folder was made."""

    def let_go(self) -> None:
        """Give back what is held; never raises."""
        self._try(f"rm -f -- {quoted(self.path / 'held')}")

    def mark_server(self) -> None:
        """Note that this run starts an NBD server that has no socket there."""
        self._try(f"mkdir -- {quoted(self.path / 'server')}")

    def mark_paused(self, *, paused: bool) -> None:
        """Note that this run has stopped the guest, for whoever cleans up after a crash.

        A folder, because making one never goes through a link.
        """
        self._try(f"{'mkdir' if paused else 'rmdir'} -- {quoted(self.path / 'paused')}")

    def keep_record(self, record: Unfinished, machine: bytes | None) -> bool:
        """Leave on record what another process needs to go on; False, and never an error, where it can't be.

        Not with files that are kept, for which no file is open there, nor where what is read is trimmed: nobody waits
        until the journal there is written.
        """
        if not self._held or self._taken_over:
            return self._taken_over
        if machine is not None or record.trims:
            return False
        try:
            put_record(self._link, record.encode())
        except MonitorError as exc:
            log.debug("nobody could go on with this run: %s", exc)
            return False
        return True

    def replace_record(self, record: Unfinished) -> None:
        """Put a new record in the place of the old one, of which nobody may go on any more.

        Raises:
            SourceError: the old one is still there.
        """
        try:
            if not self._taken_over:
                put_record(self._link, record.encode(), anew=True)
                return
        except ScriptError as exc:
            log.debug("nobody could go on with this run from here on: %s", exc)
        # Of a run that is taken over no such file is open.
        remove_record(self._link, self.path)

    def journal(self, backup: str) -> Journal | None:
        """The run's journal; None where that can't be."""
        if not self._held:
            return None
        try:
            return Journal(JournalElsewhere(self._link, taken_over=self._taken_over), backup)
        except (MonitorError, ValueError) as exc:
            log.debug("what is read is not noted: %s", exc)
        return None

    def leave(self) -> None:
        """Let the lock go and nothing else, as if this run had died; never raises."""
        self._let_go_of_files()

    def keep(self) -> None:
        """Leave the folder and what is in it when this run ends: QEMU may still use it."""
        self._keep = True

    def remove_scratch(self) -> None:
        """Remove the scratch images, once QEMU has let them go; never raises."""
        if not self._keep:
            self._try(f"cd -- {quoted(self.path)} && rm -f held disk*.raw")

    def close(self) -> None:
        """Remove the folder, unless it is kept; never raises."""
        if not self._keep:
            self._try(f"rm -rf -- {quoted(self.path)}")
        self._let_go_of_files()

    def _let_go_of_files(self) -> None:
        held, self._held = self._held, False
        if held:
            with suppress(MonitorError):
                let_go(self._link)

    def _try(self, script: str) -> None:
        try:
            self._link.run(script)
        except MonitorError as exc:
            log.debug("%s", exc)


@dataclass(frozen=True, slots=True)
class _FoundElsewhere(FoundRun):
    """The folder of some run, as found there."""

    link: SshLink

    def full(self) -> bool:
        with suppress(MonitorError):
            free = _FREE.search(self.link.run(f"cd -- {quoted(self.path)} && {_DF}"))
            return free is not None and int(free[1]) * 1024 < FULL
        return False

    def remove(self) -> None:
        with suppress(MonitorError):
            self.link.run(f"rm -rf -- {quoted(self.path)}")

    def _read_record(self) -> bytes:
        return read_record(self.link, self.path)

    def machine(self, digest: str) -> bytes:  # noqa: ARG002 - as `FoundRun.machine`
        raise ValueError(
            "the files that it was to keep are on its host, and are not taken over ssh"
        )


class Elsewhere:
    """The host at the other end of `link`. See `Place`."""

    def __init__(self, link: SshLink) -> None:
        self._link = link

    def create(
        self,
        parent: str | None,
        run: str,
        *,
        source: str,
        chain: str,
        owner: tuple[int, int] | None,
        sizes: Sequence[int],
    ) -> RunDirElsewhere:
        """See `Place.create`."""
        images = [
            # Nothing is copied: this makes a file of that size, all of it a hole.
            f"dd if=/dev/zero of=disk{index}.raw bs=1 count=0 seek={size} || return 1"
            for index, size in enumerate(sizes)
        ]
        script = _CREATE.format(
            base=_base(parent),
            name=f"nbdpull-{run}",
            description=quoted(_description(source, chain)),
            held=_HELD_KIB,
            images="\n    ".join(images) or ":",
        )
        host = self._link.host
        try:
            output = self._link.run(script)
            made = RunDirElsewhere(self._link, Path(output.rstrip("\n").rpartition("\n")[2]))
            self._give(made, owner)
        except ScriptError as exc:
            said = (str(exc).splitlines() or [""])[-1]
            raise UsageError(
                f"can't use {parent or 'the folder for temporary files'} on {host} for scratch images:"
                f" {said}; choose a writable folder there with --scratch"
            ) from exc
        if len(made.socket.encode()) > SOCKET_PATH_MAX:
            made.close()
            raise UsageError(
                f"scratch folder {made.path.parent} on {host} is too deep: a socket's path has at most"
                f" {SOCKET_PATH_MAX} bytes; choose a shorter one with --scratch"
            )
        return made

    def _give(self, made: RunDirElsewhere, owner: tuple[int, int] | None) -> None:
        try:
            made.give(f"{owner[0]}:{owner[1]}" if owner is not None and owner[0] else "")
        except ScriptError:
            made.close()
            raise

    def take_over(self, path: Path, *, source: str, chain: str) -> RunDirElsewhere:
        """See `Place.take_over`."""
        take_over(self._link, path, described=_description(source, chain))
        return RunDirElsewhere(self._link, path, taken_over=True)

    def find(self, path: Path) -> FoundRun | None:
        """See `Place.find`."""
        return next(iter(self._find(quoted(path))), None) if _RUN.fullmatch(path.name) else None

    def find_all(self, parent: str | None) -> Iterable[FoundRun]:
        """See `Place.find_all`."""
        return self._find(f"{_base(parent)}/nbdpull-????????")

    def _find(self, folders: str) -> list[FoundRun]:
        output = self._link.run(_FIND.format(folders=folders, most=_JSON_MAX))
        found: list[FoundRun] = []
        lines = output.splitlines()
        for line, said in itertools.pairwise(lines):
            flags = re.fullmatch(r"run ([01]) ([01]) ([01]) (/.*)", line)
            if flags is None or not _RUN.fullmatch(Path(flags[4]).name):
                continue
            described = _described(said)
            source, chain, pid = (described.get(name) for name in ("source", "chain", "pid"))
            found.append(
                _FoundElsewhere(
                    path=Path(flags[4]),
                    alive=flags[1] == "1",
                    paused=flags[2] == "1",
                    server=flags[3] == "1",
                    source=source if isinstance(source, str) else None,
                    chain=chain if isinstance(chain, str) else None,
                    pid=pid if isinstance(pid, int) else None,
                    link=self._link,
                )
            )
        return found

    async def reach(self, path: str) -> str:
        """See `Place.reach`."""
        return await self._link.forward(path)

    async def lost(self) -> MonitorError:
        """See `Place.lost`."""
        return await self._link.lost()


def _base(parent: str | None) -> str:
    """A scratch folder as a word of a script."""
    if parent is None:
        return '"${TMPDIR:-/tmp}"'
    if not parent.startswith("/") or "\n" in parent:
        raise UsageError(
            f"scratch folder '{parent}' is on the host that QEMU runs on: expected an absolute path"
        )
    return quoted(parent)


def _description(source: str, chain: str) -> str:
    """What `run.json` says; no process id: it would be taken for one there."""
    return json.dumps({"source": source, "chain": chain, "pid": None})


def _described(said: str) -> dict[str, Any]:
    try:
        loaded = json.loads(said)
    except (ValueError, RecursionError):
        return {}
    return loaded if isinstance(loaded, dict) else {}
