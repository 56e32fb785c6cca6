"""A session index that is lost or damaged is made again from its packs, to the byte, or not at all."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from blake3 import blake3

from nbdpull.errors import DamagedError
from nbdpull.model.frame import FOOTER_SIZE, HEADER_SIZE, decode_footer, encode_footer
from nbdpull.model.grain import GRAIN, Kind
from nbdpull.model.manifest import Manifest
from nbdpull.repo import session as session_module
from nbdpull.repo.local import LocalStore
from nbdpull.repo.repository import Repository
from tests.repo.helpers import Changes, backup, encrypted, grain, restore

GRAINS = 16
SIZE = GRAINS * GRAIN
# Each in a frame of its own.
FULL: Changes = {number: None if number % 2 else grain(number) for number in range(GRAINS)}
LATER: Changes = {3: grain(103), 7: None, 8: grain(108)}
# After it a whole pack of the full's is not needed any more.
LAST: Changes = {number: grain(number + 200) for number in range(8, GRAINS)}


class Made:
    """A full in several packs and an increment; `content` is of the increment."""

    def __init__(self, repository: Repository) -> None:
        self.repository = repository
        self.full = backup(repository, SIZE, FULL)
        self.last = backup(repository, SIZE, LATER, self.full)
        assert len(self.full.packs()) > 2
        disk = {**FULL, **LATER}
        self.content = b"".join(disk[number] or bytes(GRAIN) for number in range(GRAINS))
        self.store = LocalStore(Path(repository.location))
        self.key = f"x/{self.full.summary.session}/0"
        self.index = self.read(self.key)

    def read(self, key: str) -> bytes:
        return self.store.path(key).read_bytes()

    def write(self, key: str, raw: bytes) -> None:
        self.store.path(key).write_bytes(raw)

    def check(self, manifest: Manifest | None = None) -> None:
        """The increment restores, with the index rebuilt."""
        reader = self.repository.reader(manifest or self.last)
        assert reader.missing_packs() == []
        assert restore(reader) == self.content
        assert [damage.key for damage in reader.rebuilt.values()] == [self.key]
        assert reader.missing_packs(indexes=True) == [self.key]


@pytest.fixture(params=["plain", "encrypted"])
def made(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Made:
    monkeypatch.setattr(session_module, "PACK_SIZE", 60_000)
    if request.param == "encrypted":
        return Made(encrypted(tmp_path / "repo"))
    Repository.create(str(tmp_path / "repo"))
    return Made(Repository.open(str(tmp_path / "repo"), write=True))


def test_a_lost_index_is_read_from_its_packs(made: Made) -> None:
    made.store.delete(made.key)
    made.check()


def test_a_changed_index_is_read_from_its_packs(made: Made) -> None:
    for at in range(0, len(made.index), 29):
        changed = bytearray(made.index)
        changed[at] ^= 16
        made.write(made.key, bytes(changed))
        made.check()
        made.write(made.key, made.index[:at])
        made.check()


def test_what_is_made_is_what_was_written(made: Made) -> None:
    made.store.delete(made.key)
    reader = made.repository.reader(made.last)
    assert reader.index_object(0, 0) == made.index
    assert made.repository.missing(made.last) == []
    assert made.read(made.key) == made.index


def test_an_index_that_is_there_and_damaged_is_not_touched(made: Made) -> None:
    made.write(made.key, made.index[:50])
    assert made.repository.missing(made.last) == [made.key]
    assert made.read(made.key) == made.index[:50]


def lose_a_pack_that_the_last_does_not_need(made: Made) -> None:
    """As a collector does when all but the last backup are forgotten."""
    made.last = backup(made.repository, SIZE, LAST, made.last)
    made.content = made.content[: 8 * GRAIN] + b"".join(LAST[number] or b"" for number in LAST)
    needed = {seq for session, seq in made.last.packs() if session == 0}
    spare = next(seq for session, seq in made.full.packs() if session == 0 and seq not in needed)
    made.store.delete(f"d/{made.full.summary.session}/{spare:08x}")


@pytest.mark.parametrize("cut", [None, 5, 50, 200])
def test_without_a_pack_that_is_not_needed_the_others_speak_for_themselves(
    made: Made, cut: int | None
) -> None:
    lose_a_pack_that_the_last_does_not_need(made)
    made.store.delete(made.key)
    if cut is not None:
        made.store.create(made.key, made.index[:cut])
    reader = made.repository.reader(made.last)
    assert restore(reader) == made.content
    for session, seq in reader.packs():
        reader.check_pack(session, seq)
    # Told, never written, and nothing new rests on it.
    assert [damage.key for damage in reader.rebuilt.values()] == [made.key]
    assert list(reader.partial) == [(0, 0)]
    with pytest.raises(DamagedError, match="can't be made again"):
        reader.index_object(0, 0)
    assert made.repository.missing(made.last) == [made.key]
    assert made.repository.mend(reader) == set()
    began = made.repository.begin(vm="vm", disk="vda", parent=None, like=made.last)
    known = began.known(0, np.full(GRAINS, Kind.DATA, dtype=np.uint8))
    began.abandon()
    assert {one.start for one in known} == {3, 8}  # of the later sessions


def test_without_a_pack_that_is_needed_its_frames_alone_are_lost(made: Made) -> None:
    needed = [seq for session, seq in made.last.packs() if session == 0]
    made.store.delete(made.key)
    lost = f"d/{made.full.summary.session}/{needed[1]:08x}"
    made.store.delete(lost)
    reader = made.repository.reader(made.last)
    assert reader.missing_packs() == [lost]
    read = 0
    for one in reader.segment(0):
        if (one.session, one.seq) == (0, needed[1]):
            with pytest.raises(DamagedError) as caught:
                reader.read(one)
            assert caught.value.key == lost
        else:
            read += one.n
            expected = made.content[one.start * GRAIN : (one.start + one.n) * GRAIN]
            assert reader.read(one) == expected
    assert 0 < read < sum(one.n for one in reader.segment(0))


def test_a_pack_that_is_not_what_its_name_says_does_not_speak(made: Made) -> None:
    lose_a_pack_that_the_last_does_not_need(made)
    made.store.delete(made.key)
    needed = [seq for session, seq in made.last.packs() if session == 0]
    key = f"d/{made.full.summary.session}/{needed[0]:08x}"
    raw = made.read(key)
    for at in (*range(0, 128, 7), *range(-FOOTER_SIZE, 0, 5)):
        changed = bytearray(raw)
        changed[at] ^= 1
        made.write(key, bytes(changed))
        with pytest.raises(DamagedError) as caught:
            restore(made.repository.reader(made.last))
        assert caught.value.key == key


def test_a_pack_in_the_place_of_another_does_not_speak(made: Made) -> None:
    lose_a_pack_that_the_last_does_not_need(made)
    made.store.delete(made.key)
    one, other = [seq for session, seq in made.last.packs() if session == 0][:2]
    keys = [f"d/{made.full.summary.session}/{seq:08x}" for seq in (one, other)]
    made.write(keys[0], made.read(keys[1]))
    reader = made.repository.reader(made.last)
    assert reader.missing_packs() == [keys[0]]
    with pytest.raises(DamagedError, match=keys[0]):
        restore(reader)


def test_a_pack_whose_ends_were_made_to_fit_is_not_believed(made: Made) -> None:
    key = f"d/{made.full.summary.session}/00000000"
    raw = bytearray(made.read(key))
    offset, count, _ = decode_footer(
        bytes(raw[-FOOTER_SIZE:]), len(raw), 0 if made.repository.vault is None else 1
    )
    raw[offset + 20] ^= 1  # in the digest of its first frame
    digest = blake3(raw[offset:-FOOTER_SIZE]).digest()
    raw[-FOOTER_SIZE:] = encode_footer(digest, offset, count)
    made.write(key, bytes(raw))
    made.store.delete(made.key)
    # Its digest is no more what the frame has, or what the session's key sealed.
    with pytest.raises(DamagedError, match=r"frame at|directory of pack"):
        restore(made.repository.reader(made.last))


def test_a_frame_is_still_checked_against_what_is_made(made: Made) -> None:
    key = f"d/{made.full.summary.session}/00000000"
    raw = bytearray(made.read(key))
    raw[128 + HEADER_SIZE + 5] ^= 1
    made.write(key, bytes(raw))
    made.store.delete(made.key)
    with pytest.raises(DamagedError, match=f"frame at {key}"):
        restore(made.repository.reader(made.last))


def test_the_sealed_keys_are_found_in_whatever_is_left(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(session_module, "PACK_SIZE", 60_000)
    made = Made(encrypted(tmp_path / "repo"))
    summary = made.full.summary
    manifest, intent = f"m/{summary.disk_id}/{summary.session}", f"s/{summary.session}"
    made.store.delete(made.key)
    kept = {key: made.read(key) for key in (manifest, intent)}
    for key in kept:
        made.store.delete(key)
    with pytest.raises(DamagedError, match="can't be made again"):
        restore(made.repository.reader(made.last))
    for key, raw in kept.items():
        made.store.create(key, raw)
        made.check()
        made.store.delete(key)
