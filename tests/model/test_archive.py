"""The small archive: any tar unpacks it, and nothing else than what it writes is read."""

from __future__ import annotations

import io
import tarfile
from contextlib import suppress

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nbdpull.model.archive import is_name, pack_files, unpack_files
from nbdpull.model.frame import FormatError

NAMES = st.from_regex(r"[A-Za-z0-9_][A-Za-z0-9._-]{0,20}(/[a-z][a-z.]{0,5}){0,2}", fullmatch=True)
FILES = st.dictionaries(NAMES, st.binary(max_size=1500), max_size=4).map(lambda d: list(d.items()))


@given(FILES)
def test_tar_and_we_unpack_the_same(files: list[tuple[str, bytes]]) -> None:
    raw = pack_files(files)
    assert unpack_files(raw) == files
    with tarfile.open(fileobj=io.BytesIO(raw), mode="r:") as tar:
        read = [(one.name, tar.extractfile(one)) for one in tar]
        assert [(name, file and file.read()) for name, file in read] == files
        assert all(one.isreg() and one.mode == 0o600 for one in tar.getmembers())


@pytest.mark.parametrize(
    "name",
    [
        *("", "/etc/passwd", "../x", "a/../b", "a//b", ".x", "a/.b", "a\0", "a b", "\u00e4", "a/"),
        *("x" * 100, "a/b/c/d/e/f", "a\n"),
    ],
)
def test_names_that_could_lead_anywhere_are_none(name: str) -> None:
    assert not is_name(name)
    with pytest.raises(ValueError, match="names can't be"):
        pack_files([(name, b"")])


def test_more_files_than_there_can_be_are_refused_before_they_are_all_read() -> None:
    raw = pack_files([(f"f{number}", b"") for number in range(64)])
    assert len(unpack_files(raw)) == 64
    one = pack_files([("g", b"")])
    with pytest.raises(FormatError, match="more than 64 files"):
        unpack_files(raw[:-1024] + one)
    # Twice the same name, 100,000 times: what is read for each must not grow with what follows.
    with pytest.raises(FormatError, match="more than 64 files"):
        unpack_files(one[:-1024] * 100_000 + one[-1024:])


@given(st.binary(max_size=2000))
def test_any_bytes_are_files_or_an_error(raw: bytes) -> None:
    with suppress(FormatError):
        assert pack_files(unpack_files(raw)) == raw


def test_every_changed_byte_of_a_header_is_noticed() -> None:
    raw = pack_files([("qemu.json", b"{}"), ("tpm/state", b"x" * 600)])
    for at in [*range(512), *range(1024, 1536), *range(len(raw) - 1024, len(raw))]:
        changed = bytearray(raw)
        changed[at] ^= 0x01
        with pytest.raises(FormatError):
            unpack_files(bytes(changed))


def test_a_cut_archive_and_what_follows_one_are_refused() -> None:
    raw = pack_files([("a", b"x" * 600)])
    for bad in (*(raw[:end] for end in range(0, len(raw), 100)), raw + b"\0", raw + raw, b""):
        with pytest.raises(FormatError):
            unpack_files(bad)


@pytest.mark.parametrize("kind", [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.DIRTYPE])
def test_links_and_folders_are_refused(kind: bytes) -> None:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w", format=tarfile.USTAR_FORMAT) as tar:
        member = tarfile.TarInfo("a")
        member.type, member.linkname = kind, "/etc"
        tar.addfile(member)
    with pytest.raises(FormatError):
        unpack_files(out.getvalue())
