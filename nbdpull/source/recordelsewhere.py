"""The record, the journal and the lock of a run on another host: files that the shell there holds open.

    9    lock, locked as long as the shell lives: of two runs that want to go on with a dead one, one can
    8    journal, to append to
    7    resume, to write to; of a run that is taken over, journal, to read

They are written to by these numbers, never by name, and opened while nobody else can change a name in the folder:
before it is given to QEMU's user, or while it is taken back from him. QEMU, which its guest may have taken over,
could else put a link there for root to write through.
"""

from __future__ import annotations

import base64
import binascii
import errno
from pathlib import Path
from typing import Final

from nbdpull.errors import InUseError, MonitorError, SourceError
from nbdpull.source.journal import JOURNAL_MAX
from nbdpull.source.ssh import ScriptError, SshLink, quoted

__all__ = [
    "JournalElsewhere",
    "hold",
    "let_go",
    "put_record",
    "read_record",
    "remove_record",
    "take_over",
]

_PIECE: Final = 512 << 10
"""Bytes in one answer: in base64, less than the shell's answers may have."""

_HOLD: Final = r"""
d={folder}
if (exec 7>>"$d/resume" 8>>"$d/journal" 9>>"$d/lock" && flock -n 9) 2>/dev/null; then
    exec 7>>"$d/resume" 8>>"$d/journal" 9>>"$d/lock"
    flock -n 9 && echo held
fi
{then}
"""
# Tried in a shell of its own first, because one whose 'exec' fails ends.

_ENTER: Final = r"""
me=$(id -u)
ours() {{
    set -- $(ls -ldn -- "$1" 2>/dev/null)
    case $1 in -????-??-?*) ;; *) return 1 ;; esac
    [ "$2" = 1 ] && {{ [ "$3" = 0 ] || [ "$3" = "$me" ]; }}
}}
enter() {{
    cd -P -- {folder} && [ "${{PWD##*/}}" = {name} ] || return 1
    set -- $(ls -ldn .)
    owner=$3:$4
    case $1 in drwx--[-S]---*) ;; *) return 1 ;; esac
    ours lock && chown "$me" .
}}
leave() {{
    [ "$me" != 0 ] || chown "$owner" .
}}
"""
# From `enter` to `leave` the folder is this user's, so that a name in it stays what it was found to be.
# Its set-group-id bit is its parent's. A file is ours if it is a plain one of this user or root that has one
# name and that nobody else may write to.

_READ: Final = r"""
enter 2>/dev/null || {{ printf '\nfolder\n'; exit; }}
if [ ! -e resume ] && [ ! -h resume ]; then printf '\nnone\n'
elif ours resume; then printf '\nrecord\n' && head -c {piece} resume | base64
else printf '\nfile\n'
fi
leave
"""

_REMOVE: Final = r"""
if enter; then
    rm -f resume
    leave
    [ ! -e resume ] && [ ! -h resume ]
else
    false
fi
"""

_TAKE: Final = r"""
take() {{
    enter || {{ printf '\nfolder\n'; return; }}
    [ -e journal ] || [ -h journal ] || : >journal
    if ! ours journal; then printf '\nfile\n'
    elif ! (exec 7<journal 8>>journal 9>>lock && flock -w 1 9); then printf '\nlock\n'
    else
        exec 7<journal 8>>journal 9>>lock
        flock -w 1 9 && rm -f run.json && printf '%s' {described} >run.json && printf '\ntaken\n'
    fi
    leave
}}
take
cd /
"""


def hold(link: SshLink, folder: Path, then: str) -> bool:
    """Open the files of a new run, before anything else can, and run `then`.

    Returns:
        Whether they are open; not where the shell there can't lock, for want of `flock`.

    Raises:
        ScriptError: `then` failed.
        MonitorError: the connection is lost.
    """
    script = _HOLD.format(folder=quoted(folder), then=then)
    return "held" in link.run(script, here=True).split()


def take_over(link: SshLink, folder: Path, *, described: str) -> None:
    """Open the files of a run that died, and say whose it is now.

    Raises:
        InUseError: somebody holds it.
        SourceError: it is no more, or is not ours.
        MonitorError: the connection is lost.
    """
    said = link.run(
        _enter(folder) + _TAKE.format(described=quoted(described)), here=True
    ).splitlines()
    if "taken" in said:
        return
    let_go(link)
    if "lock" in said:
        raise InUseError(f"scratch folder {folder} is held by another process")
    raise SourceError(f"scratch folder {folder} is not ours, or was just removed")


def let_go(link: SshLink) -> None:
    """Close the files, and with them let the lock go.

    Raises:
        MonitorError: the connection is lost, and they are closed.
    """
    link.run("exec 7>&- 8>&- 9>&-", here=True)


def read_record(link: SshLink, folder: Path) -> bytes:
    """The record of a run, as it is written; empty where there is none.

    Raises:
        ValueError: nothing that can be believed.
        MonitorError: the connection is lost.
    """
    try:
        output = link.run(_enter(folder) + _READ.format(piece=_PIECE))
    except ScriptError as exc:
        raise ValueError(f"its record can't be read: {exc}") from exc
    for word, why in (
        ("folder", "its scratch folder is not as a run of ours makes it"),
        ("file", "its record is not a file of ours"),
    ):
        if f"\n{word}\n" in output:
            raise ValueError(why)
    return _decoded(output.partition("\nrecord\n")[2])


def put_record(link: SshLink, raw: bytes, *, anew: bool = False) -> None:
    """Write the record of a new run, `anew` in the place of the one that is there.

    Raises:
        ScriptError: there is no room.
        MonitorError: the connection is lost.
    """
    # Opened once more by its number: the file that is held open, whatever its name is now.
    cut = ": >/proc/self/fd/7 && " if anew else ""
    link.run(f"{cut}printf '{_octal(raw)}' >&7")


def remove_record(link: SshLink, folder: Path) -> None:
    """Take the record of a run away, so that nobody goes on with it.

    Raises:
        ScriptError: it is still there.
        MonitorError: the connection is lost.
    """
    link.run(_enter(folder) + _REMOVE)


class JournalElsewhere:
    """See `JournalFile`. Nobody waits for what is appended: a tail that is lost is read again."""

    def __init__(self, link: SshLink, *, taken_over: bool) -> None:
        """Read what is there.

        Raises:
            ValueError: what the shell there answers is not what it was asked for.
            MonitorError: the connection is lost.
        """
        self._link = link
        self._there = b"".join(self._pieces()) if taken_over else b""

    def _pieces(self) -> list[bytes]:
        pieces: list[bytes] = []
        while len(pieces) * _PIECE < JOURNAL_MAX:
            piece = _decoded(self._link.run(f"dd bs={_PIECE} count=1 <&7 2>/dev/null | base64"))
            pieces.append(piece)
            if len(piece) < _PIECE:
                break
        return pieces

    def read(self, at: int, length: int) -> bytes:
        """See `JournalFile.read`."""
        return self._there[at : at + length]

    def cut(self, length: int) -> None:
        """See `JournalFile.cut`."""
        there, self._there = len(self._there), b""
        if there == length:
            return
        # Opened anew by its number: the file that is held open, whatever its name is now.
        script = f"dd of=/proc/self/fd/8 bs=1 count=0 seek={length} 2>/dev/null"
        try:
            self._link.run(script)
        except MonitorError as exc:
            raise OSError(errno.EIO, str(exc)) from exc

    def append(self, raw: bytes) -> None:
        """See `JournalFile.append`; that there is no room is not told, and then what follows does not count."""
        try:
            self._link.post(f"printf '{_octal(raw)}' >&8")
        except MonitorError as exc:
            raise OSError(errno.EIO, str(exc)) from exc

    def room(self) -> int:
        """See `JournalFile.room`: not told."""
        return 0

    def close(self) -> None:
        """See `JournalFile.close`: it ends with the run's folder, see `let_go`."""


def _enter(folder: Path) -> str:
    return _ENTER.format(folder=quoted(folder), name=quoted(folder.name))


def _octal(raw: bytes) -> str:
    """Bytes as the shell's printf is told them."""
    return "".join(f"\\{byte:03o}" for byte in raw)


def _decoded(text: str) -> bytes:
    try:
        return base64.b64decode(text)
    except binascii.Error as exc:
        raise ValueError("what 'base64' says there is not what it should") from exc
