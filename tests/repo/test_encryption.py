"""An encrypted repository: who can read what, what the store learns, and that it can change nothing."""

from __future__ import annotations

import itertools
import json
import random
import zlib
from pathlib import Path

import pytest
from blake3 import blake3

from nbdpull.errors import DamagedError, UnsupportedFormatError, WrongKeyError
from nbdpull.model.frame import FormatError
from nbdpull.model.grain import GRAIN
from nbdpull.model.keysource import KeySource
from nbdpull.model.manifest import Manifest
from nbdpull.repo.repository import Repository
from nbdpull.repo.slots import Slots
from nbdpull.repo.vault import Vault
from tests.repo.helpers import (
    CHEAP,
    PASSWORD,
    backup,
    encrypted,
    grain,
    restore,
    small_history,
    summary_for,
)
from tests.repo.tampering import DAMAGES, Tiny, objects_of, read_all, readable

KEYS = KeySource(password=PASSWORD.decode(), environment=False)
SIZE = 64 * GRAIN


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Tiny:
    return Tiny.make(tmp_path_factory.mktemp("tiny") / "repo")


def as_writer(repository: Repository) -> Repository:
    """The same repository, opened with what a writer's key file holds."""
    assert repository.vault is not None
    ring = repository.vault.ring.for_writers()
    again = type(ring).decode(ring.encode())
    assert all(one.secret is None for one in again.generations)
    return Repository(repository._store, repository.location, repository.config, Vault(again))


# -- reading what was written ----------------------------------------------------------------------


def test_every_backup_restores_with_the_password(tmp_path: Path) -> None:
    history = small_history(encrypted(tmp_path / "repo"))
    repository = Repository.open(str(tmp_path / "repo"), keys=KEYS)
    assert repository.scan()[1] == []
    assert len(repository.backups()) == 3
    for manifest, content in zip(history.manifests, history.contents, strict=True):
        reader = repository.reader(repository.manifest(manifest.summary))
        assert restore(reader) == content
        assert reader.missing_packs() == []
        for session, seq in reader.packs():
            reader.check_pack(session, seq)


@pytest.mark.parametrize("password", ["wrong", PASSWORD.decode() + "\n", "CORRECT HORSE"])
def test_a_wrong_password_is_told_as_one(tmp_path: Path, password: str) -> None:
    encrypted(tmp_path / "repo")
    with pytest.raises(WrongKeyError, match="opens none of the key slots"):
        Repository.open(
            str(tmp_path / "repo"), keys=KeySource(password=password, environment=False)
        )


def test_no_password_is_told_with_where_to_put_one(tmp_path: Path) -> None:
    encrypted(tmp_path / "repo")
    with pytest.raises(WrongKeyError, match="NBDPULL_PASSWORD_FILE"):
        Repository.open(str(tmp_path / "repo"), keys=KeySource(environment=False))


def test_a_key_for_a_repository_that_is_not_encrypted_is_refused(tmp_path: Path) -> None:
    Repository.create(str(tmp_path / "repo"))
    with pytest.raises(WrongKeyError, match="is not encrypted"):
        Repository.open(str(tmp_path / "repo"), keys=KEYS)


def test_settings_that_deny_the_encryption_are_found_out(tmp_path: Path) -> None:
    encrypted(tmp_path / "repo")
    path = tmp_path / "repo" / "nbdpull.json"
    settings = json.loads(path.read_bytes())
    settings["suites"] = {"digest": "blake3-256", "cipher": "none"}
    path.chmod(0o600)
    path.write_text(json.dumps(settings))
    with pytest.raises(UnsupportedFormatError, match="suite"):
        Repository.open(str(tmp_path / "repo"), keys=KEYS)
    settings["features"]["read"] = []
    path.write_text(json.dumps(settings))
    with pytest.raises(WrongKeyError, match="is not encrypted"):
        Repository.open(str(tmp_path / "repo"), write=True, keys=KEYS)


# -- what the store learns -------------------------------------------------------------------------


def test_the_store_sees_neither_names_nor_data_nor_digests(tmp_path: Path) -> None:
    repository = encrypted(tmp_path / "repo")
    assert repository.vault is not None
    ring = repository.vault.ring
    session = repository.begin(vm="secret-vm", disk="secret-disk", parent=None)
    text = grain(7)
    rows = [session.put(text), session.put(random.Random(1).randbytes(GRAIN))]
    assert rows[1].clen == GRAIN  # stored without compression
    session.commit(
        summary_for(session, size=SIZE, vm="secret-vm", disk="secret-disk", reason="secret-reason")
    )
    everything = b"".join(key.encode() + raw for key, raw in objects_of(tmp_path / "repo").items())
    hidden = [
        b"secret-",
        text[:16],
        random.Random(1).randbytes(64)[:16],
        blake3(text).digest(),
        blake3(text, key=ring.digest_key).digest(),
        ring.digest_key,
        *(one.public for one in ring.generations),
        *(one.writer for one in ring.generations),
        *(one.secret or b"" for one in ring.generations),
        PASSWORD,
    ]
    assert [
        part for part in hidden if part in everything or part.hex().encode() in everything
    ] == []


def test_the_same_content_is_stored_as_other_bytes_each_time(tmp_path: Path) -> None:
    repository = encrypted(tmp_path / "repo")
    first = backup(repository, SIZE, {1: grain(1), 9: grain(1)})
    second = backup(repository, SIZE, {1: grain(1), 9: grain(1)})
    packs = [
        repository._store.get(f"d/{one.summary.session}/00000000", limit=1 << 20)
        for one in (first, second)
    ]
    payload = len(packs[0]) // 4
    parts = {raw[at : at + 16] for raw in packs for at in range(192, payload, 16)}
    assert len(parts) == 2 * len(range(192, payload, 16))


def test_a_disk_has_another_name_in_each_repository(tmp_path: Path) -> None:
    one = encrypted(tmp_path / "one").begin(vm="vm", disk="vda", parent=None)
    two = encrypted(tmp_path / "two").begin(vm="vm", disk="vda", parent=None)
    assert one.disk_id != two.disk_id


# -- a writer --------------------------------------------------------------------------------------


def test_a_writer_builds_on_a_parent_and_reads_no_data(tmp_path: Path) -> None:
    repository = encrypted(tmp_path / "repo")
    first = backup(repository, SIZE, {3: grain(1), 4: grain(2)})
    writer = as_writer(repository)
    assert [found.vm for found in writer.backups()] == ["vm"]
    parent = writer.manifest(first.summary)
    assert writer.reader(parent).missing_packs() == []
    second = backup(writer, SIZE, {4: grain(3)}, parent)
    # Its own backup, and the older one: neither can be read back.
    for manifest in (first, second):
        reader = writer.reader(writer.manifest(manifest.summary))
        for one in reader.segment(0):
            with pytest.raises(WrongKeyError, match="writer's key"):
                reader.read(one)
    with pytest.raises(WrongKeyError, match="writer's"):
        writer.check_restorable()
    repository.check_restorable()
    content = restore(repository.reader(repository.manifest(second.summary)))
    assert content[3 * GRAIN : 5 * GRAIN] == grain(1) + grain(3)


def test_a_writer_of_an_older_generation_goes_on_and_the_new_keys_read_it(tmp_path: Path) -> None:
    repository = encrypted(tmp_path / "repo")
    assert repository.vault is not None
    old = as_writer(repository)
    ring = repository.vault.ring.rotated(bytes(range(32)), b"w" * 32)
    rotated = Repository(repository._store, "", repository.config, Vault(ring))
    newer = backup(rotated, SIZE, {1: grain(5)})
    by_old = backup(old, SIZE, {1: grain(6)})
    assert restore(rotated.reader(rotated.manifest(by_old.summary)))[GRAIN:][:GRAIN] == grain(6)
    # What was written with the new keys is closed to the old ones, and is not taken for absent.
    found, closed = old.scan()
    assert [summary.session for summary in found] == [by_old.summary.session]
    assert [one.key for one in closed] == [f"m/{newer.summary.disk_id}/{newer.summary.session}"]
    assert "another key" in str(closed[0].error)
    with pytest.raises(WrongKeyError):
        old.manifest(newer.summary)


# -- slots -----------------------------------------------------------------------------------------


def test_each_of_two_passwords_opens_the_repository(tmp_path: Path) -> None:
    repository = encrypted(tmp_path / "repo")
    assert repository.vault is not None
    slots = Slots(repository._store, repository.id, "")
    slots.add(repository.vault.ring, b"second", label="safe", kdf=CHEAP)
    for password in (PASSWORD.decode(), "second"):
        again = Repository.open(
            str(tmp_path / "repo"), keys=KeySource(password=password, environment=False)
        )
        assert again.vault is not None
        assert again.vault.ring == repository.vault.ring
    assert sorted(slot.label for slot in slots.find()) == [
        "",
        "safe",
    ]


def test_a_slot_with_any_byte_changed_opens_nothing(tmp_path: Path) -> None:
    root = tmp_path / "repo"
    encrypted(root)
    path = next((root / "key").iterdir())
    raw = path.read_bytes()
    for at in range(0, len(raw), 3):
        path.write_bytes(raw[:at] + bytes([raw[at] ^ (1 << at % 7)]) + raw[at + 1 :])
        with pytest.raises((WrongKeyError, DamagedError)):
            Repository.open(str(root), keys=KEYS)
    for length in (0, 1, len(raw) // 2, len(raw) - 1):
        path.write_bytes(raw[:length])
        with pytest.raises(WrongKeyError, match="no usable key slot"):
            Repository.open(str(root), keys=KEYS)
    # Under another name it is not the one that was written.
    path.unlink()
    path.with_name("0" * 32).write_bytes(raw)
    with pytest.raises(DamagedError, match="key slot"):
        Repository.open(str(root), keys=KEYS)


def test_a_damaged_slot_leaves_the_others_usable(tmp_path: Path) -> None:
    root = tmp_path / "repo"
    encrypted(root)
    (root / "key" / ("0" * 32)).write_bytes(b"rubbish")
    (root / "key" / "stray").write_bytes(b"rubbish")
    Repository.open(str(root), keys=KEYS)


def test_a_changed_copy_of_a_slot_does_not_hide_the_slot(tmp_path: Path) -> None:
    root = tmp_path / "repo"
    encrypted(root)
    (path,) = (root / "key").iterdir()
    fields = json.loads(path.read_bytes()) | {"generation": 9}
    (root / "key" / ("f" * 32)).write_text(json.dumps(fields, indent=2) + "\n")
    Repository.open(str(root), keys=KEYS)


def test_what_a_killed_init_left_is_no_obstacle_and_no_key(tmp_path: Path) -> None:
    root = tmp_path / "repo"
    encrypted(root)
    (root / "nbdpull.json").unlink()
    repository = encrypted(root)
    assert len(list((root / "key").iterdir())) == 2
    assert len(Slots(repository._store, repository.id, "").find()) == 1
    Repository.open(str(root), keys=KEYS)


# -- a store that is not honest --------------------------------------------------------------------


def test_the_tiny_repository_is_sound(tiny: Tiny) -> None:
    assert read_all(tiny, tiny.objects) == []
    assert len(readable(tiny.objects)) == 9


def test_every_changed_byte_is_found(tiny: Tiny) -> None:
    for key in readable(tiny.objects):
        raw = tiny.objects[key]
        step = 4 if key.startswith("x/") else 9
        for at in range(zlib.crc32(key.encode()) % step, len(raw), step):
            changed = raw[:at] + bytes([raw[at] ^ (1 << at % 8)]) + raw[at + 1 :]
            assert read_all(tiny, {**tiny.objects, key: changed}), f"{key}:{at}"


def test_every_cut_is_found(tiny: Tiny) -> None:
    for key in readable(tiny.objects):
        for length in {0, 1, *range(5, len(tiny.objects[key]), 23), len(tiny.objects[key]) - 1}:
            cut = tiny.objects[key][:length]
            assert read_all(tiny, {**tiny.objects, key: cut}), f"{key} cut to {length}"
        without = {name: raw for name, raw in tiny.objects.items() if name != key}
        # A manifest that is gone can't be listed; who looks for it is told.
        assert read_all(tiny, without), key


def test_every_two_objects_swapped_are_found(tiny: Tiny) -> None:
    for one, other in itertools.permutations(readable(tiny.objects), 2):
        objects = {**tiny.objects, one: tiny.objects[other]}
        assert read_all(tiny, objects), f"{other} in the place of {one}"


@pytest.mark.parametrize("damage", DAMAGES, ids=lambda damage: damage.__name__)
def test_random_damage_is_found(tiny: Tiny, damage: object) -> None:
    assert callable(damage)
    rng = random.Random(damage.__name__)  # type: ignore[attr-defined]
    for _ in range(60):
        what, objects = damage(tiny.objects, rng)
        if objects != tiny.objects:
            assert read_all(tiny, objects), what


def test_objects_of_another_repository_with_the_same_keys_are_found(
    tiny: Tiny, tmp_path: Path
) -> None:
    # A clone of the key material is the worst case: only the repository's id is another one.
    other = Tiny.make(tmp_path / "other")
    assert other.ring.digest_key != tiny.ring.digest_key
    for mine, theirs in itertools.product(readable(tiny.objects), readable(other.objects)):
        if mine[0] == theirs[0]:
            assert read_all(tiny, {**tiny.objects, mine: other.objects[theirs]})


def test_a_manifest_of_another_disk_is_no_manifest_of_this_one(tmp_path: Path) -> None:
    repository = encrypted(tmp_path / "repo")
    mine = backup(repository, SIZE, {1: grain(1)})
    session = repository.begin(vm="vm", disk="vdb", parent=None)
    theirs = session.commit(summary_for(session, size=SIZE, disk="vdb"))
    store = repository._store
    raw = store.get(f"m/{theirs.summary.disk_id}/{theirs.summary.session}", limit=1 << 20)
    moved = f"m/{mine.summary.disk_id}/{theirs.summary.session}"
    store.create(moved, raw)
    found, damaged = repository.scan()
    assert sorted(one.disk for one in found) == ["vda", "vdb"]
    assert [one.key for one in damaged] == [moved]


def test_plain_objects_in_an_encrypted_repository_are_refused(tmp_path: Path, tiny: Tiny) -> None:
    """Who can write to the store must not be able to put backups of his own there."""
    plain_root = tmp_path / "plain"
    config = tiny.config
    Repository.create(str(plain_root))
    # The same id, as a store would know it.
    plain = Repository(Repository.open(str(plain_root))._store, "", config)
    history = small_history(plain)
    forged = objects_of(plain_root)
    found, damaged = tiny.repository({**tiny.objects, **forged}).scan()
    assert len(found) == 3
    assert len(damaged) == 3
    assert all("is not encrypted" in str(one.error) for one in damaged)
    summary = history.manifests[0].summary
    with pytest.raises(DamagedError, match="is not encrypted"):
        tiny.repository({**tiny.objects, **forged}).manifest(summary)


def test_an_encrypted_manifest_is_not_read_without_keys(tiny: Tiny) -> None:
    for key, raw in tiny.objects.items():
        if key.startswith("m/"):
            with pytest.raises(FormatError, match="is encrypted"):
                Manifest.decode(raw)


# -- nonces ----------------------------------------------------------------------------------------


def test_a_session_that_goes_on_twice_never_seals_two_frames_with_one_key(tmp_path: Path) -> None:
    """As when a host is cloned while it backs up: both have the session's keys and its next number."""
    repository = encrypted(tmp_path / "repo")
    session = repository.begin(vm="vm", disk="vda", parent=None)
    assert session._keys is not None
    salts = set()
    for clone in range(2):
        twin = repository.begin(vm="vm", disk="vda", parent=None)
        twin._keys = session._keys
        twin.put(grain(clone))
        twin.seal()
        raw = repository._store.get(f"d/{twin.id}/00000000", limit=1 << 20)
        salts.add(raw[48:64])
    assert len(salts) == 2


def test_equal_manifests_seal_to_equal_bytes_and_others_with_another_key(tmp_path: Path) -> None:
    repository = encrypted(tmp_path / "repo")
    session = repository.begin(vm="vm", disk="vda", parent=None)
    manifest = session.commit(summary_for(session, size=SIZE))
    keys = session._keys
    assert keys is not None
    raw = manifest.encode(keys)
    assert manifest.encode(keys) == raw
    sealed = [keys.seal(b"summary", text, b"aad") for text in (b"one", b"two")]
    assert sealed[0][:16] != sealed[1][:16]
    assert keys.open(b"summary", sealed[0], b"aad") == b"one"
    for purpose, aad in ((b"index", b"aad"), (b"summary", b"other")):
        with pytest.raises(FormatError, match="bad tag"):
            keys.open(purpose, sealed[0], aad)
