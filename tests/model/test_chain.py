"""What is read of a disk, and which bitmaps go: every branch, and that no choice can lose a write."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nbdpull.model.chain import Base, BitmapState, choose, obsolete
from nbdpull.model.results import Level

SIZE = 1 << 30
FULL, INCREMENTAL = Level.FULL, Level.INCREMENTAL
DIFFERENTIAL, COPY = Level.DIFFERENTIAL, Level.COPY


def bitmap(name: str, **more: bool) -> BitmapState:
    sound = {"recording": True, "busy": False, "persistent": True}
    return BitmapState(name=name, granularity=65536, **{**sound, **more})


def bitmaps(*states: BitmapState) -> dict[str, BitmapState]:
    return {state.name: state for state in states}


def base(
    backup: str,
    level: Level = INCREMENTAL,
    *,
    size: int = SIZE,
    checkpoint: str | None = "",
) -> Base:
    """A backup whose bitmap is called as it is, unless another name or None is given."""
    return Base(
        backup=backup, level=level, size=size, checkpoint=backup if checkpoint == "" else checkpoint
    )


HISTORY = [base("c"), base("b", DIFFERENTIAL), base("a", FULL)]
ALL = bitmaps(bitmap("a"), bitmap("b"), bitmap("c"))


@pytest.mark.parametrize("level", [FULL, COPY])
def test_full_and_copy_are_what_was_asked_for_whatever_there_is(level: Level) -> None:
    decision = choose(level, size=SIZE, bitmaps=ALL, history=HISTORY)
    assert (decision.level, decision.base) == (level, None)
    assert decision.reason == f"{level} was asked for"


@pytest.mark.parametrize("wanted", [None, INCREMENTAL])
def test_incremental_counts_from_the_newest(wanted: Level | None) -> None:
    decision = choose(wanted, size=SIZE, bitmaps=ALL, history=HISTORY)
    assert (decision.level, decision.base) == (INCREMENTAL, HISTORY[0])
    assert decision.reason == "changes since the last backup"


def test_differential_counts_from_the_newest_full() -> None:
    history = [*HISTORY, base("z", INCREMENTAL), base("y", FULL)]
    decision = choose(DIFFERENTIAL, size=SIZE, bitmaps=ALL, history=history)
    assert (decision.level, decision.base) == (DIFFERENTIAL, HISTORY[2])
    assert decision.reason == "changes since the last full"


def test_differential_does_not_reach_behind_a_full_that_is_no_base() -> None:
    """An older full would be correct, but not what anybody calls a differential."""
    history = [base("a", FULL), base("y", FULL)]
    decision = choose(DIFFERENTIAL, size=SIZE, bitmaps=bitmaps(bitmap("y")), history=history)
    assert (decision.level, decision.base) == (FULL, None)


@pytest.mark.parametrize("wanted", [None, INCREMENTAL, DIFFERENTIAL])
def test_first_backup_of_a_disk_is_a_full(wanted: Level | None) -> None:
    decision = choose(wanted, size=SIZE, bitmaps={}, history=[])
    assert (decision.level, decision.base) == (FULL, None)
    assert decision.reason == "this chain has no earlier backup of the disk"


def test_differential_without_a_full_of_the_disk_is_a_full() -> None:
    decision = choose(DIFFERENTIAL, size=SIZE, bitmaps=ALL, history=HISTORY[:2])
    assert decision.level is FULL


@pytest.mark.parametrize(
    ("newest", "state", "words"),
    [
        (base("c", checkpoint=None), None, "it kept no checkpoint"),
        (base("c"), None, "its bitmap 'c' is missing"),
        (base("c"), bitmap("c", inconsistent=True, recording=False), "'c' is inconsistent"),
        (base("c"), bitmap("c", recording=False), "'c' is not recording"),
        (base("c"), bitmap("c", busy=True), "'c' is busy"),
        (base("c", size=SIZE - 512), bitmap("c"), f"the disk had {SIZE - 512} bytes then"),
    ],
    ids=["no-checkpoint", "missing", "inconsistent", "disabled", "busy", "resized"],
)
def test_bad_base_gives_way_to_an_older_sound_one_and_else_to_a_full(
    newest: Base, state: BitmapState | None, words: str
) -> None:
    states = bitmaps(bitmap("a"), *([state] if state else []))
    older = choose(None, size=SIZE, bitmaps=states, history=[newest, base("a", FULL)])
    assert older.base is not None
    assert (older.level, older.base.backup) == (INCREMENTAL, "a")
    assert older.reason.startswith("changes since backup a, because backup c can't be built on")
    assert words in older.reason
    alone = choose(None, size=SIZE, bitmaps=states, history=[newest])
    assert (alone.level, alone.base) == (FULL, None)
    assert words in alone.reason


def test_reason_names_the_nearest_base_that_failed() -> None:
    decision = choose(None, size=SIZE, bitmaps={}, history=HISTORY)
    assert decision.level is FULL
    assert "backup c" in decision.reason
    assert "backup a" not in decision.reason


def test_stored_data_that_can_not_be_read_disqualifies_a_base() -> None:
    asked: list[str] = []

    def unreadable(one: Base) -> str | None:
        asked.append(one.backup)
        return "pack 7 is gone" if one.backup == "c" else None

    decision = choose(
        None,
        size=SIZE,
        bitmaps=bitmaps(bitmap("c"), bitmap("a")),
        history=HISTORY,
        unreadable=unreadable,
    )
    assert decision.base is not None
    assert decision.base.backup == "a"
    assert "pack 7 is gone" in decision.reason
    # It costs reading, so a base that is out already ("b" has no bitmap) is not looked at.
    assert asked == ["c", "a"]


def test_obsolete_keeps_the_newest_and_the_fulls_bitmap() -> None:
    owned = ["f", "i1", "i2", "i3"]
    assert obsolete(owned, newest="i3", full="f") == ("i1", "i2")
    assert obsolete(owned, newest="i3", full="i3") == ("f", "i1", "i2")
    assert obsolete(owned, newest=None, full=None) == tuple(owned)
    assert obsolete([], newest="i3", full="f") == ()
    assert obsolete(["i3"], newest="i3", full="gone") == ()


# -- a model of a disk: no decision may lose a write -----------------------------------------------

STEPS = st.one_of(
    st.tuples(st.just("write"), st.integers(0, 15)),
    st.tuples(st.just("backup"), st.sampled_from([None, FULL, INCREMENTAL, DIFFERENTIAL, COPY])),
    st.tuples(st.just("lose"), st.integers(0, 5)),
    st.tuples(st.just("break"), st.integers(0, 5)),
)


class Model:
    """A disk of 16 blocks, QEMU's bitmaps on it, and the backups that were made."""

    def __init__(self) -> None:
        self.disk = [0] * 16
        self.clock = 0
        self.dirty: dict[str, set[int]] = {}
        self.broken: set[str] = set()
        self.history: list[Base] = []
        self.stored: dict[str, list[int]] = {}

    def states(self) -> dict[str, BitmapState]:
        return bitmaps(
            *(
                bitmap(name, inconsistent=name in self.broken, recording=name not in self.broken)
                for name in self.dirty
            )
        )

    def write(self, block: int) -> None:
        self.clock += 1
        self.disk[block] = self.clock
        for name, blocks in self.dirty.items():
            if name not in self.broken:
                blocks.add(block)

    def backup(self, wanted: Level | None) -> None:
        decision = choose(wanted, size=SIZE, bitmaps=self.states(), history=self.history)
        self.clock += 1
        name = f"b{self.clock}"
        if decision.base is None:
            image = list(self.disk)
        else:
            assert decision.base.checkpoint is not None
            image = list(self.stored[decision.base.backup])
            for block in self.dirty[decision.base.checkpoint]:
                image[block] = self.disk[block]
        assert image == self.disk
        self.stored[name] = image
        if decision.level is COPY:
            return
        self.dirty[name] = set()
        self.history.insert(0, base(name, decision.level))
        full = next(one.checkpoint for one in self.history if one.level is FULL)
        for gone in obsolete(list(self.dirty), newest=name, full=full):
            del self.dirty[gone]
            self.broken.discard(gone)
        assert len(self.dirty) <= 2

    def hurt(self, number: int, how: Callable[[str], object]) -> None:
        names = sorted(self.dirty)
        if number < len(names):
            how(names[number])


@given(st.lists(STEPS, max_size=40))
def test_whatever_happens_every_backup_is_the_disk(
    steps: list[tuple[str, int | Level | None]],
) -> None:
    model = Model()
    for step, value in steps:
        match step, value:
            case "write", int(block):
                model.write(block)
            case "lose", int(number):
                model.hurt(number, model.dirty.pop)
            case "break", int(number):
                model.hurt(number, model.broken.add)
            case "backup", (None | Level()) as level:
                model.backup(level)
            case _:
                raise AssertionError(step)
