"""Libvirt, behind calls that say what a backup needs: the only module that imports its binding.

Every call blocks, so it belongs into a thread. One that finds the connection broken, because libvirtd was
restarted, connects again: a backup job, its NBD server and its exports live in QEMU and go on meanwhile.
"""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable
from typing import Any, Final, TypeVar

from nbdpull.errors import InUseError, LibvirtError, UsageError
from nbdpull.source.address import DomainAddress, check_libvirt_uri

__all__ = ["LibvirtDomain"]

_T = TypeVar("_T")

_AGAIN_S: Final = 15.0
"""How long a libvirtd that was there may be away: an upgrade restarts it in a second or two."""
_AGAIN_POLL_S: Final = 0.2
_AGENT_S: Final = 30
_RPC: Final = 7
"""libvirt's VIR_FROM_RPC: errors of the connection, not of what was asked."""


def _binding() -> tuple[Any, Any]:
    """The modules `libvirt` and `libvirt_qemu`.

    Raises:
        UsageError: they are not installed.
    """
    try:
        import libvirt  # noqa: PLC0415 - an optional extra
        import libvirt_qemu  # noqa: PLC0415
    except ImportError as exc:
        raise UsageError(
            "libvirt's Python module is not installed, which libvirt: needs; install it with"
            " 'apt install python3-libvirt' for the system's Python, else with"
            " 'pip install nbdpull[libvirt]'"
        ) from exc
    # It prints each error, too, unless told otherwise.
    libvirt.registerErrorHandler(lambda _context, _error: None, None)
    return libvirt, libvirt_qemu


class LibvirtDomain:
    """A domain, by its name or UUID.

    Attributes:
        address: where it was found.
        name, uuid: its own.
    """

    def __init__(self, address: DomainAddress) -> None:
        """Connect and look it up.

        Raises:
            UsageError: the binding is missing, there is no such domain, or libvirtd is elsewhere.
            LibvirtError: libvirtd can't be reached.
        """
        self._libvirt, self._libvirt_qemu = _binding()
        self.address = address
        self._lock = threading.Lock()
        self._connection: Any = None
        self._handle: Any = None
        self.uuid = ""
        self.name = ""
        connection = self._connect()
        try:
            check_libvirt_uri(str(connection.getURI()))
            handle = self._look_up(connection)
            self.uuid, self.name = str(handle.UUIDString()), str(handle.name())
        except BaseException:
            connection.close()
            raise
        self._connection, self._handle = connection, handle

    def close(self) -> None:
        """Let the connection go; never raises."""
        with self._lock:
            connection, self._connection, self._handle = self._connection, None, None
        if connection is not None:
            try:
                connection.close()
            except self._libvirt.libvirtError:
                return

    # -- the connection ----------------------------------------------------------------------------

    def _connect(self) -> Any:
        try:
            return self._libvirt.open(self.address.uri)
        except self._libvirt.libvirtError as exc:
            where = self.address.uri or "its default URI"
            raise LibvirtError(
                f"libvirt can't be reached at {where}: {_said(exc)}; is libvirtd (or virtqemud) running, and"
                " may this user use it? Another libvirtd is named as libvirt+URI#DOMAIN",
                code=exc.get_error_code(),
            ) from exc

    def _look_up(self, connection: Any) -> Any:
        libvirt = self._libvirt
        wanted = self.address.domain
        for find in (connection.lookupByName, connection.lookupByUUIDString):
            try:
                return find(wanted)
            except libvirt.libvirtError as exc:
                if exc.get_error_code() not in {
                    libvirt.VIR_ERR_NO_DOMAIN,
                    libvirt.VIR_ERR_INVALID_ARG,
                }:
                    raise self._error("look up the domain", exc) from exc
        names = sorted(str(one.name()) for one in connection.listAllDomains())
        raise UsageError(
            f"libvirt has no domain '{wanted}' at {connection.getURI()}; it has:"
            f" {', '.join(names) or 'none'}"
        )

    def _ask(self, what: str, function: Callable[[Any], _T], *, again: bool = True) -> _T:
        """What `function` returns, called with libvirt's handle of the domain.

        Args:
            what: the call in words, for messages.
            function: the call.
            again: it may be made twice, when the connection broke in the middle.
        """
        deadline = time.monotonic() + _AGAIN_S
        while True:
            try:
                return function(self._domain())
            except self._libvirt.libvirtError as exc:
                if exc.get_error_domain() != _RPC:
                    raise self._error(what, exc) from exc
                self.close()
                if not again or time.monotonic() > deadline:
                    raise self._error(what, exc) from exc
            except LibvirtError:
                if time.monotonic() > deadline:
                    raise
            time.sleep(_AGAIN_POLL_S)

    def _domain(self) -> Any:
        with self._lock:
            if self._handle is None or not self._connection.isAlive():
                self._connection = self._connect()
                self._handle = self._connection.lookupByUUIDString(self.uuid)
            return self._handle

    def _error(self, what: str, exc: Any) -> LibvirtError | InUseError:
        code = exc.get_error_code()
        if code == self._libvirt.VIR_ERR_OPERATION_TIMEOUT and "state change lock" in str(exc):
            return InUseError(
                f"domain '{self.name or self.address.domain}' is busy with another job of libvirt"
                f" ({_said(exc)}); wait for it, see 'virsh domjobinfo'"
            )
        return LibvirtError(f"libvirt can't {what}: {_said(exc)}", code=code)

    # -- what it says of the domain ----------------------------------------------------------------

    def xml(self) -> str:
        """The domain's XML: as it runs, else as it would be started."""
        return str(self._ask("describe the domain", lambda one: one.XMLDesc()))

    def active(self) -> bool:
        """Whether it runs (also paused)."""
        return bool(self._ask("tell whether the domain runs", lambda one: one.isActive()))

    def paused_by_error(self) -> bool:
        """Whether QEMU paused it because of a write that failed."""
        libvirt = self._libvirt
        state = self._ask("tell the domain's state", lambda one: one.state())
        return bool(state == [libvirt.VIR_DOMAIN_PAUSED, libvirt.VIR_DOMAIN_PAUSED_IOERROR])

    def resume(self) -> None:
        """Let it go on."""
        self._ask("resume the domain", lambda one: one.resume())

    def block_size(self, target: str) -> tuple[int, int]:
        """A disk's size, and what its image takes on the host, in bytes."""
        size, allocated, _ = self._ask(
            f"tell the size of disk '{target}'", lambda one: one.blockInfo(target)
        )
        return int(size), int(allocated)

    def version(self) -> tuple[int, int, int]:
        """Of the QEMU that runs the domain.

        libvirt's own `getVersion` is of the program that is installed, which may be newer than the one
        that runs; so QEMU is asked. libvirt then calls the domain tainted in its log.
        """
        command = json.dumps({"execute": "query-version"})
        said = self._ask(
            "ask QEMU for its version",
            lambda one: self._libvirt_qemu.qemuMonitorCommand(one, command, 0),
        )
        found = json.loads(said)["return"]["qemu"]
        return int(found["major"]), int(found["minor"]), int(found["micro"])

    # -- checkpoints -------------------------------------------------------------------------------

    def checkpoints(self) -> list[str]:
        """Names of all, foreign ones too."""
        return [
            str(one.getName())
            for one in self._ask("list checkpoints", lambda one: one.listAllCheckpoints())
        ]

    def checkpoint_xml(self, name: str) -> str:
        """A checkpoint's XML, with the domain's of then, and the size of each sound bitmap of one that runs."""
        flags = self._libvirt.VIR_DOMAIN_CHECKPOINT_XML_SIZE
        return str(
            self._ask(
                f"describe checkpoint '{name}'",
                lambda one: one.checkpointLookupByName(name).getXMLDesc(flags),
            )
        )

    def redefine(self, xml: str, *, validate: bool) -> bool:
        """Make a checkpoint known again that libvirt lost; nothing is changed in QEMU.

        Args:
            xml: of the checkpoint.
            validate: only if its bitmaps are there, and sound.

        Returns:
            Whether it was done; False when a bitmap is not as it should be.
        """
        libvirt = self._libvirt
        flags = libvirt.VIR_DOMAIN_CHECKPOINT_CREATE_REDEFINE
        if validate:
            flags |= libvirt.VIR_DOMAIN_CHECKPOINT_CREATE_REDEFINE_VALIDATE
        try:
            self._ask("redefine a checkpoint", lambda one: one.checkpointCreateXML(xml, flags))
        except LibvirtError as exc:
            if exc.code != libvirt.VIR_ERR_CHECKPOINT_INCONSISTENT:
                raise
            return False
        return True

    def delete_checkpoint(self, name: str, *, metadata_only: bool = False) -> None:
        """Remove a checkpoint and its bitmaps; one that is not there is no error.

        Args:
            name: its name.
            metadata_only: have libvirt forget it, and leave QEMU as it is.
        """
        libvirt = self._libvirt
        flags = libvirt.VIR_DOMAIN_CHECKPOINT_DELETE_METADATA_ONLY if metadata_only else 0
        try:
            self._ask(
                f"delete checkpoint '{name}'",
                lambda one: one.checkpointLookupByName(name).delete(flags),
            )
        except LibvirtError as exc:
            if exc.code != libvirt.VIR_ERR_NO_DOMAIN_CHECKPOINT:
                raise

    # -- the backup job: libvirt has at most one a domain -------------------------------------------

    def begin(self, backup: str, checkpoint: str | None) -> None:
        """Freeze, serve, and begin to record, all in one transaction of QEMU."""
        self._ask(
            "begin the backup", lambda one: one.backupBegin(backup, checkpoint, 0), again=False
        )

    def job(self) -> str | None:
        """The backup job's XML, None when there is none."""
        try:
            return str(self._ask("describe the backup job", lambda one: one.backupGetXMLDesc()))
        except LibvirtError as exc:
            if exc.code != self._libvirt.VIR_ERR_NO_DOMAIN_BACKUP:
                raise
            return None

    def other_job(self) -> bool:
        """Whether a job of another kind keeps the domain busy: a migration, a save, a dump."""
        info = self._ask("tell the domain's job", lambda one: one.jobInfo())
        return bool(info[0] != self._libvirt.VIR_DOMAIN_JOB_NONE)

    def copied(self) -> int:
        """Bytes that the job has copied because the guest overwrote them."""
        stats = self._ask("tell the backup job's figures", lambda one: one.jobStats())
        return int(stats.get("disk_temp_used", 0))

    def abort_job(self) -> None:
        """End the job that runs, whoever began it; one that has just ended is no error."""
        try:
            self._ask("end the backup job", lambda one: one.abortJob())
        except LibvirtError as exc:
            if exc.code != self._libvirt.VIR_ERR_OPERATION_INVALID:
                raise

    # -- the guest's agent -------------------------------------------------------------------------

    def filesystems(self) -> list[str]:
        """Where the guest's file systems are mounted; agents refuse to tell while these are frozen."""
        self._ask(
            "bound the wait for the guest's agent",
            lambda one: one.agentSetResponseTimeout(_AGENT_S, 0),
        )
        found = self._ask("ask the guest's agent", lambda one: one.fsInfo())
        return sorted(str(entry[0]) for entry in found)

    def freeze_filesystems(self) -> int:
        """Freeze all of them, and return how many."""
        return int(
            self._ask("freeze the guest's file systems", lambda one: one.fsFreeze(), again=False)
        )

    def thaw_filesystems(self) -> int:
        """Thaw them, and return how many."""
        return int(self._ask("thaw the guest's file systems", lambda one: one.fsThaw()))


def _said(exc: Any) -> str:
    """Libvirt's own words, on one line."""
    return " ".join(str(exc).split())
