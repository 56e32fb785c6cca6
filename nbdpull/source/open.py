"""SOURCE, the first arguments of a backup, become an open source: one kind for each URI scheme."""
# A kind's modules are loaded when it is asked for.
# ruff: noqa: PLC0415

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import replace
from typing import TYPE_CHECKING

from nbdpull.errors import MonitorError, UsageError
from nbdpull.nbdio.connection import check_uri
from nbdpull.nbdio.tls import with_tls
from nbdpull.source.address import (
    DomainAddress,
    ExportAddress,
    ImageAddress,
    MonitorAddress,
    SourceAddress,
    parse_bitmaps,
    parse_source,
)
from nbdpull.source.base import Known, Recall, Source
from nbdpull.source.fleecing import QemuOptions
from nbdpull.source.qemu import QemuSource
from nbdpull.source.qmp import open_monitor
from nbdpull.source.whole import whole

if TYPE_CHECKING:
    from nbdpull.source.libvirtapi import LibvirtDomain
    from nbdpull.source.libvirtoffline import ShutDownDomain
    from nbdpull.source.libvirtsource import DomainSource

__all__ = ["check_source", "open_source"]


def check_source(sources: Sequence[str], qemu: QemuOptions) -> SourceAddress:
    """What the URIs name, looked at before anything is touched.

    Raises:
        UsageError: they can't be, or the options are for another kind of source.
    """
    address = parse_source(sources)
    exports = (
        [one for one in address if isinstance(one, ExportAddress)]
        if isinstance(address, tuple)
        else []
    )
    if qemu.bitmaps and not exports:
        raise UsageError(
            f"--bitmap is about NBD exports, and the source is '{sources[0]}'; leave it out, bitmaps are"
            " found there"
        )
    parse_bitmaps(qemu.bitmaps, exports)
    _check_trim(qemu)
    if not isinstance(address, MonitorAddress):
        for option, given in (
            ("--guest-first", qemu.guest_first),
            ("--nbd-address", qemu.nbd_address is not None),
            ("--quiesce", qemu.quiesce and not isinstance(address, DomainAddress)),
            ("--trim-scratch", qemu.trim_scratch),
            ("--agent", qemu.agent is not None and isinstance(address, DomainAddress)),
        ):
            if given:
                raise UsageError(
                    f"{option} is about a QEMU that is reached by its monitor, and the source is"
                    f" '{sources[0]}'; leave it out"
                )
    else:
        _check_monitor(address, qemu)
    if isinstance(address, MonitorAddress) and qemu.nbd_address is not None:
        check_uri(qemu.nbd_address)
        if qemu.tls is not None:
            with_tls(qemu.nbd_address, qemu.tls)
    if qemu.tls is not None:
        if not isinstance(address, MonitorAddress) and not exports:
            raise UsageError(
                "--tls is about NBD over TCP, and images and domains of libvirt are read over a private"
                " socket"
            )
        for export in exports:
            with_tls(export.uri, qemu.tls)
    return address


def _check_trim(qemu: QemuOptions) -> None:
    # QEMU below 9.1 aborts when anybody trims what is no multiple of 64 KiB.
    if qemu.trim_scratch and (qemu.nbd_address is not None or qemu.tls is not None):
        raise UsageError(
            "--trim-scratch lets whoever reaches the NBD server trim the point in time, so it is done over a"
            " private socket only; leave --nbd-address and --tls out, or --trim-scratch"
        )


def _check_monitor(address: MonitorAddress, qemu: QemuOptions) -> None:
    if address.ssh is None:
        return
    if qemu.quiesce:
        raise UsageError(
            "--quiesce does not work over ssh: a connection that is lost would leave the guest frozen;"
            " run nbdpull on the host that QEMU runs on for that"
        )
    if qemu.tls is not None and qemu.nbd_address is None:
        raise UsageError(
            "--tls is about NBD over TCP, and over ssh everything is encrypted already"
        )
    if qemu.scratch is not None and not qemu.scratch.startswith("/"):
        raise UsageError(
            f"scratch folder '{qemu.scratch}' is on the host that QEMU runs on: expected an absolute path"
        )


@asynccontextmanager
async def _open_qemu(address: MonitorAddress, qemu: QemuOptions) -> AsyncIterator[Source]:
    async with AsyncExitStack() as stack:
        if address.ssh is None or address.path is None:
            monitor = await stack.enter_async_context(open_monitor(address))
            source = QemuSource(monitor, qemu)
        else:
            from nbdpull.source.elsewhere import Elsewhere, look_at_socket
            from nbdpull.source.ssh import open_link

            link = await stack.enter_async_context(open_link(address.ssh))
            owner = await asyncio.to_thread(look_at_socket, link, address.path)
            reached_at = await link.forward(address.path)
            try:
                monitor = await stack.enter_async_context(
                    open_monitor(address, reached_at=reached_at, owner=owner)
                )
            except MonitorError as exc:
                said = link.last_line()
                hint = (
                    "; is QEMU running, and does the server allow it (AllowStreamLocalForwarding)?"
                    if "open failed" in said
                    else ""
                )
                raise MonitorError(f"{exc}{f'; ssh said: {said}' if said else ''}{hint}") from exc
            source = QemuSource(monitor, qemu, Elsewhere(link))
        try:
            yield source
        finally:
            await source.close()


@asynccontextmanager
async def open_source(
    sources: Sequence[str],
    qemu: QemuOptions,
    *,
    known: Known = lambda _names: (),
    recall: Recall = lambda _vm: (),
) -> AsyncIterator[Source]:
    """Connect to whatever `sources` name, as long as the context lasts.

    Args:
        sources: URIs.
        qemu: how to freeze a point in time, where that is QEMU's business.
        known: which disks of earlier backups checkpoints belong to.
        recall: checkpoints that a source may be told of again when it has forgotten them; none, and nothing
            is changed there.

    Raises:
        UsageError: no such kind of source.
        InUseError, SourceError: it can't be reached.
    """
    address = check_source(sources, qemu)
    if isinstance(address, MonitorAddress):
        async with _open_qemu(address, qemu) as source:
            yield source
        return
    if isinstance(address, DomainAddress):
        from nbdpull.source.libvirtapi import LibvirtDomain

        domain = await whole(LibvirtDomain, address)
        try:
            found = await _of_domain(domain, qemu, known, recall)
        except BaseException:
            await whole(domain.close)
            raise
        try:
            yield found
        finally:
            await found.close()
        return
    exports = [one for one in address if isinstance(one, ExportAddress)]
    if exports:
        from nbdpull.source.exports import ExportSource

        contexts = parse_bitmaps(qemu.bitmaps, exports)
        if qemu.tls is not None:
            tls = qemu.tls
            exports = [replace(export, uri=with_tls(export.uri, tls)) for export in exports]
        yield ExportSource(exports, contexts)
        return
    from nbdpull.source.offline import OfflineSource

    images = [one for one in address if isinstance(one, ImageAddress)]
    offline = OfflineSource(images, scratch=qemu.scratch, known=known)
    try:
        yield offline
    finally:
        await offline.close()


async def _of_domain(
    domain: LibvirtDomain, qemu: QemuOptions, known: Known, recall: Recall
) -> DomainSource | ShutDownDomain:
    from nbdpull.source.libvirtoffline import ShutDownDomain
    from nbdpull.source.libvirtsource import DomainSource

    if await whole(domain.active):
        return DomainSource(domain, qemu, recall)
    return await whole(ShutDownDomain, domain, qemu, known)
