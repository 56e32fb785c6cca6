#!/usr/bin/env python3
"""Restore a disk from an unencrypted nbdpull repository without nbdpull.

    rescue_reader.py REPOSITORY                          list what is there
    rescue_reader.py REPOSITORY BACKUP DISK FILE         restore one disk as a raw file

It is written from docs/internals/format.md alone and shares no code with nbdpull: what is left when the
project is gone. It needs Python 3.11 and the module `zstandard`; the BLAKE3 hashes are checked only with
the module `blake3`, and it says so. What is lost is left as a hole, each range is named, and it ends with 1.
"""

from __future__ import annotations

import json
import struct
import sys
import zlib
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import zstandard

HASHES = find_spec("blake3") is not None
if HASHES:
    from blake3 import blake3

GRAIN, SEGMENT, MAP = 64 << 10, 1 << 30, 1
FRAME = "<4sIIBBHI32sI"
HEAL = "<16sIIII32s16sII"
Place = tuple[str, int, int]  # session, pack, offset of a frame


class Lost(Exception):
    """Stored bytes are missing or not what was written."""


BAD = (Lost, LookupError, ValueError, OSError, struct.error)


def need(good: object, what: str) -> None:
    """Raise `Lost` unless `good`."""
    if not good:
        raise Lost(what)


def check_hash(raw: bytes, digest: bytes, what: str) -> None:
    """Compare the BLAKE3 where that module is there."""
    need(not HASHES or blake3(raw).digest() == digest, f"{what} has another hash")


def cbor(raw: bytes, at: int = 0, depth: int = 0) -> tuple[Any, int]:
    """One CBOR item at `at`, and where the next one is: the few kinds that a manifest has."""
    need(at < len(raw) and depth < 5, "manifest is no CBOR")
    kind, short = raw[at] >> 5, raw[at] & 31
    size = {24: 1, 25: 2, 26: 4, 27: 8}.get(short, 0)
    need(short < 28 and at + size < len(raw), "manifest is no CBOR")
    value = int.from_bytes(raw[at + 1 : at + 1 + size], "big") if size else short
    at += 1 + size
    if kind in (0, 1):
        return (-1 - value if kind else value), at
    if kind in (2, 3):
        need(at + value <= len(raw), "manifest is cut")
        part = raw[at : at + value]
        return (part if kind == 2 else part.decode("utf-8", "surrogatepass")), at + value
    if kind in (4, 5):
        need(value <= len(raw), "manifest is no CBOR")
        items = []
        for _ in range(value * (kind - 3)):
            item, at = cbor(raw, at, depth + 1)
            items.append(item)
        return (items if kind == 4 else dict(zip(items[::2], items[1::2], strict=True))), at
    need(kind == 7 and short in (20, 21, 22, 27), "manifest is no CBOR")
    if short == 27:
        return struct.unpack(">d", value.to_bytes(8, "big"))[0], at
    return {20: False, 21: True, 22: None}[short], at


def columns(raw: bytes, width: int) -> list[list[int]]:
    """The columns of a table of u32: of each first all lowest bytes; numbers are differences."""
    need(len(raw) % (4 * width) == 0, "a table has another length")
    rows = len(raw) // (4 * width)
    table = []
    for column in range(width):
        base = 4 * rows * column
        planes = [raw[base + rows * plane : base + rows * (plane + 1)] for plane in range(4)]
        value, numbers = 0, []
        for number in zip(*planes, strict=True):
            value = (value + int.from_bytes(number, "little")) & 0xFFFFFFFF
            numbers.append(value)
        table.append(numbers)
    return table


def unzstd(payload: bytes, size: int) -> bytes:
    """Decompress, when it claims to be of that size."""
    try:
        need(zstandard.frame_content_size(payload) == size, "it unpacks to another size")
        return zstandard.ZstdDecompressor().decompress(payload, max_output_size=size)
    except zstandard.ZstdError as exc:
        raise Lost(f"it does not unpack ({exc})") from exc


def read(path: Path, start: int, length: int) -> bytes:
    """So many bytes of a file; `Lost` when it has less."""
    try:
        with path.open("rb") as file:
            file.seek(start)
            raw = file.read(length)
    except OSError as exc:
        raise Lost(f"{path}: {exc.strerror}") from exc
    need(len(raw) == length, f"{path} is cut")
    return raw


class Disk:
    """One manifest, decoded."""

    def __init__(self, root: Path, path: Path) -> None:
        raw = path.read_bytes()
        need(len(raw) > 112 and raw[:8] == b"NBDPMAN1", f"{path} is no manifest")
        version, _, summary, packed, unpacked = struct.unpack_from("<HHIII", raw, 8)
        need(version == 1 and len(raw) == 80 + summary + packed + 32, f"{path} is cut")
        check_hash(raw[:-32], raw[-32:], str(path))
        self.root = root
        self.summary: dict[str, Any] = cbor(raw[80 : 80 + summary])[0]
        self.packed, self.unpacked = raw[80 + summary : -32], unpacked
        self.entries: dict[tuple[int, int], dict[int, bytes]] = {}
        self.heals: dict[Place, list[tuple[Place, int]]] | None = None

    def open(self) -> None:
        """Decode what only a restore needs."""
        body = cbor(unzstd(self.packed, self.unpacked))[0]
        sids, digests = (
            [raw[at : at + size].hex() for at in range(0, len(raw), size)]
            for raw, size in ((body["sids"], 16), (body["index_digests"], 32))
        )
        counts, numbers = (columns(body[f"index_{name}"], 1)[0] for name in ("counts", "numbers"))
        owners = [session for session, count in enumerate(counts) for _ in range(count)]
        self.sids = sids
        self.tables = dict(zip(zip(owners, numbers, strict=True), digests, strict=True))
        maps = iter(zip(*columns(body["maps"], 5), strict=True))
        segments = -(-self.summary["size"] // SEGMENT)
        bits = body["present"]
        self.maps = [
            next(maps)[:4] if bits[n // 8] >> (7 - n % 8) & 1 else None for n in range(segments)
        ]

    def expected(self, session: int, seq: int) -> dict[int, bytes]:
        """The frames of a pack by offset, each as its directory has it, from the session index."""
        key = session, seq
        if key not in self.entries:
            path = self.root / "x" / self.sids[session] / str(seq // 64)
            magic, sid, _, count = struct.unpack("<8s16sII", read(path, 0, 32))
            right = magic == b"NBDPIDX1" and sid.hex() == self.sids[session] and count <= 64
            need(right, f"{path} is another index")
            top = read(path, 0, 32 + 48 * count)
            need((session, seq // 64) in self.tables, f"nothing vouches for {path}")
            check_hash(top, bytes.fromhex(self.tables[session, seq // 64]), str(path))
            at, found = len(top), {}
            for row in range(count):
                own, frames, _, digest = struct.unpack_from("<IIQ32s", top, 32 + 48 * row)
                if own == seq:
                    raw = read(path, at, 48 * frames)
                    check_hash(raw, digest, f"{path}:{at}")
                    parts = [raw[i : i + 48] for i in range(0, len(raw), 48)]
                    found = {int.from_bytes(part[:4], "little"): part[4:] for part in parts}
                at += 48 * frames
            self.entries = dict(list(self.entries.items())[-63:])  # bounds memory
            self.entries[key] = found
        return self.entries[key]

    def frame(self, session: int, seq: int, offset: int, kind: int) -> bytes:
        """The unpacked bytes of a frame, from where a later backup put it when it is damaged."""
        entry = self.expected(session, seq).get(offset, b"")
        need(entry, f"no frame at {offset} of pack {seq}")
        clen, rlen, codec, own, _ = struct.unpack_from("<IIBBH", entry)
        place = self.sids[session], seq, offset
        need(own == kind, "a frame is of another kind")
        try:
            return self.open_frame(place, clen, rlen, kind, codec, entry[12:])
        except Lost:
            for other, length in self.healed().get(place, []):
                try:
                    return self.open_frame(other, length, rlen, kind, None, entry[12:])
                except Lost:
                    continue
            raise

    def open_frame(
        self, place: Place, clen: int, rlen: int, kind: int, codec: int | None, digest: bytes
    ) -> bytes:
        """Read, check and unpack one frame."""
        path = self.root / "d" / place[0] / f"{place[1]:08x}"
        raw = read(path, place[2], 64 + clen)
        magic, *sizes, own, own_kind, _, _, own_digest, crc = struct.unpack_from(FRAME, raw)
        right = (magic, sizes, own_kind, own_digest) == (b"FRM1", [clen, rlen], kind, digest)
        right = right and own in ((0, 1) if codec is None else (codec,)) and rlen <= 1 << 20
        need(right and zlib.crc32(raw[:52]) == crc, f"{path}:{place[2]} is bad")
        data = raw[64:] if own == 0 else unzstd(raw[64:], rlen)
        need(len(data) == rlen, f"{path}:{place[2]} has another length")
        check_hash(data, digest, f"{path}:{place[2]}")
        return data

    def healed(self) -> dict[Place, list[tuple[Place, int]]]:
        """Where later backups stored damaged frames anew; the digest of each is checked when read."""
        if self.heals is None:
            self.heals = {}
            for path in sorted(self.root.glob("b/*/*")):
                raw = path.read_bytes()
                if raw[:8] != b"NBDPHEA1":
                    continue
                for at in range(64, len(raw) - 159, 128):
                    old, seq, offset, clen, _, _, sid, *there = struct.unpack_from(HEAL, raw, at)
                    target = (sid.hex(), there[0], there[1]), clen
                    self.heals.setdefault((old.hex(), seq, offset), []).append(target)
        return self.heals

    def pieces(self) -> Iterator[tuple[int, int, bytes | Lost]]:
        """(start, end, bytes) of all that is not zero; `Lost` in place of what can't be read."""
        size = self.summary["size"]
        for index, ref in enumerate(self.maps):
            base = index * SEGMENT
            if ref is None:
                continue
            try:
                raw = self.frame(ref[0], ref[1], ref[2], MAP)
                need(raw[:8] == b"NPSG\1\0\0\0", "a map has another magic")
                rows = zip(*columns(raw[12:], 8), strict=True)
            except Lost as exc:
                yield base, min(base + SEGMENT, size), exc
                continue
            for start, n, session, seq, offset, _, skip, _ in rows:
                at = base + start * GRAIN
                end = min(at + n * GRAIN, size)
                try:
                    data = self.frame(session, seq, offset, 0)[skip * GRAIN : (skip + n) * GRAIN]
                    need(len(data) == end - at, f"frame at {seq:08x}:{offset} is of another size")
                    yield at, end, data
                except Lost as exc:
                    yield at, end, exc


def disks(root: Path) -> list[Disk]:
    """Every disk of every backup that can be read, oldest first; forgotten ones too."""
    config = json.loads((root / "nbdpull.json").read_bytes())
    known = config["format"] == 1 and not config["features"]["read"]
    need(known and config["suites"]["cipher"] == "none", "it is of a kind not known here")
    found = {}
    # Of a backup that was repacked there are two manifests: any will do that is not being deleted.
    doomed = {path.relative_to(root / "t") for path in root.glob("t/*/*")}
    for path in sorted(root.glob("m/*/*"), key=lambda m: m.relative_to(root / "m") not in doomed):
        try:
            if read(path, 0, 8) in (b"NBDPREV1", b"NBDPADO1"):
                continue
            disk = Disk(root, path)
            found[disk.summary["backup"], disk.summary["disk_id"]] = disk
        except BAD as exc:
            print(f"left out: {path}: {exc}", file=sys.stderr)
    return sorted(found.values(), key=lambda disk: disk.summary["time"])


def main(arguments: list[str]) -> int:
    """Run it; the exit code."""
    if len(arguments) not in (1, 4):
        sys.exit(__doc__)
    found = disks(Path(arguments[0]))
    if len(arguments) == 1:
        for disk in found:
            print(*(disk.summary[key] for key in ("backup", "vm", "disk", "size", "time")))
        return 0
    backup, name, target = arguments[1:]
    found = [disk for disk in found if disk.summary["disk"] == name]
    chosen = [disk for disk in found if disk.summary["backup"].startswith(backup)]
    need(len(chosen) == 1, f"{len(chosen)} disks '{name}' of a backup '{backup}', expected one")
    lost = 0
    with Path(target).open("xb") as file:
        chosen[0].open()
        file.truncate(chosen[0].summary["size"])
        for start, end, piece in chosen[0].pieces():
            if isinstance(piece, Lost):
                print(f"lost: bytes {start} to {end}: {piece}", file=sys.stderr)
                lost += end - start
            else:
                file.seek(start)
                file.write(piece)
    checked = (
        "every BLAKE3 was checked" if HASHES else "without the module blake3: CRC and zstd only"
    )
    print(f"{target}: {lost} bytes are lost; {checked}", file=sys.stderr)
    return 1 if lost else 0


if __name__ == "__main__":
    try:
        sys.exit(main(sys.argv[1:]))
    except BAD as exc:
        sys.exit(f"failed: {exc}")
