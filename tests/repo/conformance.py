"""What every store must do. Subclass it with a `store` fixture that gives an empty store."""

from __future__ import annotations

import random
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest

from nbdpull.errors import StoreError
from nbdpull.repo.probe import probe
from nbdpull.repo.store import KeyExistsError, KeyMissingError, Store

SID = "0f" * 16


class StoreConformance:
    """One suite for every kind of store."""

    def test_an_object_comes_back_whole_and_in_ranges(self, store: Store) -> None:
        store.create(f"x/{SID}/0", b"0123456789")
        assert store.get(f"x/{SID}/0", limit=10) == b"0123456789"
        assert store.get_range(f"x/{SID}/0", 3, 4) == b"3456"
        assert store.get_range(f"x/{SID}/0", 8, 4) == b"89"
        assert store.get_range(f"x/{SID}/0", 10, 4) == b""
        assert store.get_range(f"x/{SID}/0", 11, 1 << 60) == b""

    @pytest.mark.parametrize("size", [1, 4096, 1_100_000])
    def test_a_range_at_any_edge_has_just_the_bytes_that_are_there(
        self, store: Store, size: int
    ) -> None:
        data = random.Random(size).randbytes(size)
        store.create("d/a/b", data)
        edges = sorted({0, 1, size // 2, size - 1, size, size + 1, 2 * size})
        for start in edges:
            for length in edges:
                assert store.get_range("d/a/b", start, length) == data[start : start + length]

    def test_a_range_of_an_empty_object_is_empty(self, store: Store) -> None:
        store.create("s/empty", b"")
        for start, length in ((0, 0), (0, 1), (1, 1), (0, 1 << 40)):
            assert store.get_range("s/empty", start, length) == b""

    def test_a_pack_of_full_size_comes_back(self, store: Store) -> None:
        data = random.Random(1).randbytes(33 << 20) + b"end"
        upload = store.begin("d/ab/0")
        for start in range(0, len(data), 1 << 20):
            upload.write(start, memoryview(data)[start : start + (1 << 20)])
        upload.commit()
        assert store.get("d/ab/0", limit=len(data)) == data
        assert store.get_range("d/ab/0", 20 << 20, 1 << 20) == data[20 << 20 : 21 << 20]
        assert [entry.size for entry in store.list("d")] == [len(data)]

    def test_an_object_larger_than_the_limit_is_refused(self, store: Store) -> None:
        store.create("nbdpull.json", b"0123456789")
        with pytest.raises(StoreError, match="9"):
            store.get("nbdpull.json", limit=9)

    def test_an_empty_object_is_an_object(self, store: Store) -> None:
        store.create("s/empty", b"")
        assert store.get("s/empty", limit=0) == b""
        assert [entry.size for entry in store.list("s")] == [0]

    def test_a_taken_key_is_refused_and_its_object_untouched(self, store: Store) -> None:
        store.create("m/a/b", b"first")
        with pytest.raises(KeyExistsError):
            store.create("m/a/b", b"second")
        upload = store.begin("m/a/b")
        upload.write(0, b"third")
        with pytest.raises(KeyExistsError):
            upload.commit()
        upload.abort()
        assert store.get("m/a/b", limit=9) == b"first"

    def test_of_many_writers_just_one_makes_the_object(self, store: Store) -> None:
        for round_ in range(10):
            start = threading.Barrier(8)

            def write(who: int, key: str, start: threading.Barrier) -> int | None:
                start.wait()
                try:
                    store.create(key, b"%d" % who)
                except KeyExistsError:
                    return None
                return who

            with ThreadPoolExecutor(8) as pool:
                tries = [pool.submit(write, who, f"m/d{round_}/s", start) for who in range(8)]
            won = [who for done in tries if (who := done.result()) is not None]
            assert len(won) == 1
            assert store.get(f"m/d{round_}/s", limit=9) == b"%d" % won[0]

    def test_of_many_uploads_just_one_makes_the_object(self, store: Store) -> None:
        uploads = [store.begin("d/ab/0") for _ in range(8)]
        for who, upload in enumerate(uploads):
            upload.write(0, b"%d" % who)

        def commit(who: int) -> int | None:
            try:
                uploads[who].commit()
            except KeyExistsError:
                return None
            return who

        with ThreadPoolExecutor(8) as pool:
            won = [who for who in pool.map(commit, range(8)) if who is not None]
        assert len(won) == 1
        assert store.get("d/ab/0", limit=9) == b"%d" % won[0]

    def test_what_is_missing_is_told_as_missing(self, store: Store) -> None:
        store.create("m/a/b", b"x")
        for key in ("m/a/c", "m/b/c", "n/a/b", "m/a", "m/a/b/c"):
            with pytest.raises(KeyMissingError):
                store.get(key, limit=9)
            with pytest.raises(KeyMissingError):
                store.get_range(key, 0, 1)
            with pytest.raises(KeyMissingError):
                store.stat(key)
            store.delete(key)
        assert store.get("m/a/b", limit=9) == b"x"

    def test_stat_says_what_a_listing_says(self, store: Store) -> None:
        store.create("m/a/b", b"abc")
        assert [store.stat("m/a/b")] == list(store.list("m/a"))
        assert store.stat("m/a/b").modified > 1e9

    def test_a_listing_has_just_what_is_below(self, store: Store) -> None:
        for key in ("d/ab/00000000", "d/ab/00000001", "d/abc/00000000", "d/a", "e/ab/0"):
            store.create(key, key.encode())
        assert {entry.key: entry.size for entry in store.list("d/ab")} == {
            "d/ab/00000000": 13,
            "d/ab/00000001": 13,
        }
        assert len(list(store.list("d"))) == 4
        assert len(list(store.list(""))) == 5
        assert list(store.list("d/ab/00000000")) == []
        assert list(store.list("nothing/there")) == []

    def test_a_listing_is_whole_however_long_it_is(self, store: Store) -> None:
        keys = {f"d/{number % 3}/{number:08x}" for number in range(1100)}
        with ThreadPoolExecutor(16) as pool:
            list(pool.map(lambda key: store.create(key, key.encode()), keys))
        listed = list(store.list(""))
        assert {entry.key for entry in listed} == keys
        assert len(listed) == len(keys)
        assert {entry.size for entry in listed} == {12}
        one = [key for key in keys if key.startswith("d/1/")]
        assert sorted(entry.key for entry in store.list("d/1")) == sorted(one)

    def test_a_deleted_object_is_gone_and_may_be_made_again(self, store: Store) -> None:
        store.create("m/a/b", b"abc")
        store.delete("m/a/b")
        store.delete("m/a/b")
        assert list(store.list("")) == []
        store.create("m/a/b", b"def")
        assert store.get("m/a/b", limit=9) == b"def"

    def test_an_upload_appears_whole_when_it_is_committed(self, store: Store) -> None:
        upload = store.begin("d/ab/0")
        upload.write(4, b"45", bytearray(b"67"), memoryview(b"89"))
        upload.write(0, b"0123")
        assert list(store.list("")) == []
        upload.commit()
        upload.abort()
        assert store.get("d/ab/0", limit=99) == b"0123456789"

    def test_an_aborted_upload_leaves_nothing(self, store: Store) -> None:
        upload = store.begin("d/ab/0")
        upload.write(0, b"x" * 100_000)
        upload.abort()
        upload.abort()
        assert list(store.list("")) == []
        store.create("d/ab/0", b"other")

    def test_threads_may_write_one_upload_at_once(self, store: Store) -> None:
        upload = store.begin("d/ab/0")
        parts = [bytes([n]) * (1000 + n) for n in range(64)]
        offsets = [sum(map(len, parts[:n])) for n in range(64)]
        with ThreadPoolExecutor(8) as pool:
            list(pool.map(upload.write, reversed(offsets), reversed(parts)))
        upload.commit()
        assert store.get("d/ab/0", limit=1 << 20) == b"".join(parts)

    @pytest.mark.parametrize(
        "key", ["", "..", "m/../x", "/etc", "m//a", "m/", "A", "m/a b", "m\n", "é"]
    )
    def test_a_key_of_no_kind_of_ours_is_a_bug(self, store: Store, key: str) -> None:
        with pytest.raises(ValueError, match="key"):
            store.create(key, b"")
        with pytest.raises(ValueError, match="key"):
            store.get(key, limit=1)

    def test_the_probe_finds_it_good_and_leaves_nothing(self, store: Store) -> None:
        probed = probe(store, keys=10)
        assert all(probed.capabilities.values())
        assert probed.warnings == ()
        assert list(store.list("")) == []
