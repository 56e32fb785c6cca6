"""A model of writers and collectors in one repository, and a search of all its interleavings.

The steps are those of docs/internals/collection.md and of the code:

    writer      W0 it chooses what to build on         W1 Repository.begin: create s/
                W2 Repository.is_alive: m/, then t/
                W3 Session.put: a pack                 W5 Session.commit
                WA Adoption._claim: create m/, then t/   WL PackListing.sizes
    collector   C1 Collector._end_undo, tombstones     C2 _list_objects     C3 _list_sessions, _revoke
                C4 _list_registers, _pass_over_ended,
                _read_manifests                        C4A _adopted, _lives: s/, then m/
                C5 the end of _look
                C6 _delete_objects                     C7 _delete_manifests, _delete_marks

Every call of the store is a step of its own, and a listing is one step for each key: it is no instant.
A process may stall between any two steps, for ever too. What clocks decide in the code is decided by
nobody here: any collector may end any undo window, and take any session for idle, at any time.

Manifest and session 0 is a backup that is there in the beginning, 1 and 2 are the writers'. Each wrote one
pack of its own and refers to those of its pin. Bit i of a mask is that of session i.

Where adoption is searched a writer may take any earlier session for dead that has an intent, at any time, and
with it those that this one wanted: whether that is so is decided by a register alone, which then holds
ADOPTED plus who did it. It refers to the packs that it sees of those that are its own in the end.

Where damage is searched one intent may turn out to be damaged, at any time: whoever reads it then knows no more
than that it is there.

Lost is what the search looks for: a manifest without a tombstone that refers to a pack that is gone.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from enum import Enum
from typing import NamedTuple

__all__ = ["Config", "Mutant", "Searched", "search"]

NONE, MANIFEST, REVOKED, ADOPTED = 0, 1, 2, 3
"""What a register holds; adopted by session i: ADOPTED + i."""
NO_PIN = -1


class Mutant(Enum):
    """A rule that is left out."""

    NO_REGISTER = "an idle session is taken for dead without creating its register"
    NO_RECHECK = "a writer does not look for its pin's tombstone"
    NO_T_SET = "what is doomed is read only when deleting, not before the listings"
    MANIFESTS_BEFORE_SESSIONS = "manifests are listed before sessions"
    PACKS_AFTER_SESSIONS = "packs are listed after sessions"
    NO_SECOND_LOOK = "tombstones are not listed again after the manifests"
    NO_REGISTER_LOOK = "a session whose pin is missing is not looked at again"
    PINNED_GO = "manifests go although a live session pins them"
    TOMBSTONES_GO = "tombstones go together with their manifests"
    ADOPTS_WITHOUT_REGISTER = "a session is taken over without creating its register"
    ADOPTED_IS_ENDED = "what an adopted session stored is spared for nobody"
    NO_LOOK_FOR_ADOPTER = "an adopter that was not listed is taken for ended"
    DAMAGED_IS_ENDED = (
        "a session whose intent is damaged is taken for ended without looking for its register"
    )
    NO_REGISTER_LOOK_FOR_ADOPTER = "an adopter whose intent is gone is taken for ended"


ADOPTION = frozenset(
    {
        Mutant.ADOPTS_WITHOUT_REGISTER,
        Mutant.ADOPTED_IS_ENDED,
        Mutant.NO_LOOK_FOR_ADOPTER,
        Mutant.NO_REGISTER_LOOK_FOR_ADOPTER,
    }
)
"""These are about adoption."""


class Writer(NamedTuple):
    """A writer.

    `at`: the next step; `pin`: in its intent; `ok`: it may refer to what its pin refers to; `adopts`: in its
    intent; `left`: of these, not asked for yet; `owners`: whose each one was found to be; `got`: packs of
    theirs that it refers to.
    """

    at: str = "W0"
    pin: int = NO_PIN
    ok: bool = True
    adopts: int = 0
    left: int = 0
    owners: tuple[int, ...] = ()
    got: int = 0


class Collector(NamedTuple):
    """A collector: the next step, and what it has seen."""

    at: str = "C1"
    key: int = 0  # how far a listing is
    doomed: int = 0
    known: int = 0  # tombstones that were read together with T
    packs: int = 0
    sessions: int = 0
    registers: tuple[int, ...] = ()
    left: int = 0  # rounds
    adopted: int = 0
    begun: bool = False
    unread: int = 0  # sessions whose intents are damaged


class State(NamedTuple):
    """Everything."""

    packs: int
    intents: int
    registers: tuple[int, ...]
    tombstones: int
    writers: tuple[Writer, ...]
    collectors: tuple[Collector, ...]
    damaged: int = 0  # intents that can't be read any more


@dataclass(frozen=True, slots=True, kw_only=True)
class Config:
    """What is searched.

    Attributes:
        writers: 1 to 3; each may build on the earlier ones' backups.
        collectors: any number.
        rounds: of each collector.
        tombstones: most that are made in all.
        order: in which a listing of manifests comes to them.
        adoption: writers may take over earlier sessions.
        pins: writers may build on earlier backups.
        idle: collectors may take any session for idle.
        damage: an intent may be damaged.
        young: a collector may leave tombstones out of T: whose undo window is not over by its own.
    """

    writers: int
    collectors: int
    rounds: int = 1
    tombstones: int = 3
    order: tuple[int, ...] = (1, 2, 0)
    adoption: bool = False
    pins: bool = True
    idle: bool = True
    damage: bool = False
    young: bool = False
    mutant: Mutant | None = None


@dataclass(frozen=True, slots=True)
class Searched:
    """What was found.

    Attributes:
        states: how many there are.
        trace: the steps to a loss, empty when there is none.
        deletions: states in which a pack is gone: the search is not about nothing.
    """

    states: int
    trace: tuple[str, ...]
    deletions: int


_Step = tuple[str, State]


class _Model:
    def __init__(self, config: Config) -> None:
        self._mutant = config.mutant
        self._order = config.order
        self._tombstones = config.tombstones
        self._adoption = config.adoption
        self._pins = config.pins
        self._idle = config.idle
        self._damage = config.damage
        self._young = config.young
        self._steps = ["C1", "C1T", "C2", "C3", "C3R", "C4", "C4L", "C5", "C6", "C7", "C7S"]
        if self._mutant is Mutant.MANIFESTS_BEFORE_SESSIONS:
            self._steps = ["C1", "C1T", "C2", "C4", "C3", "C3R", "C4L", "C5", "C6", "C7", "C7S"]
        elif self._mutant is Mutant.PACKS_AFTER_SESSIONS:
            self._steps = ["C1", "C1T", "C3", "C3R", "C2", "C4", "C4L", "C5", "C6", "C7", "C7S"]
        if self._adoption:
            self._steps.insert(self._steps.index("C4L") + 1, "C4A")
        self._after = dict(zip(self._steps, [*self._steps[1:], "end"], strict=True))
        self._numbers = range(1, max(2, config.writers) + 1)
        nothing = tuple(NONE for _ in self._numbers)
        self.start = State(
            packs=1,
            intents=0,
            registers=(MANIFEST, *nothing),
            tombstones=0,
            writers=(Writer(),) * config.writers,
            collectors=(_fresh(config.rounds, len(nothing) + 1),) * config.collectors,
        )

    def lost(self, state: State) -> bool:
        return any(
            kind == MANIFEST
            and not state.tombstones >> i & 1
            and self.needs(state, i) & ~state.packs
            for i, kind in enumerate(state.registers)
        )

    def needs(self, state: State, i: int) -> int:
        """The packs that manifest i refers to."""
        mask = 1 << i
        if i:
            writer = state.writers[i - 1]
            mask |= writer.got
            if writer.ok and writer.pin != NO_PIN:
                mask |= self.needs(state, writer.pin)
        return mask

    def steps(self, state: State) -> Iterator[_Step]:
        for i in self._numbers if self._damage and not state.damaged else ():
            if state.intents >> i & 1:
                yield f"intent {i} is damaged", state._replace(damaged=1 << i)
        for i, writer in enumerate(state.writers, 1):
            for label, after, new in self._write(state, i, writer):
                writers = (*after.writers[: i - 1], new, *after.writers[i:])
                yield f"writer {i}: {label}", after._replace(writers=writers)
        for n, collector in enumerate(state.collectors):
            if n and state.collectors[n - 1] == collector:
                continue  # they are alike
            for label, after, one in self._collect(state, collector):
                # The order of collectors does not matter: fewer states.
                others = (*after.collectors[:n], *after.collectors[n + 1 :], one)
                yield f"collector: {label}", after._replace(collectors=tuple(sorted(others)))

    # -- a writer --------------------------------------------------------------------------------

    def _write(  # noqa: C901, PLR0912 - a case is a step
        self, state: State, i: int, writer: Writer
    ) -> Iterator[tuple[str, State, Writer]]:
        match writer.at:
            case "W0":
                for adopts in self._adoptable(state, i):
                    over = f", takes {adopts:b} over" if adopts else ""
                    yield f"W0 builds on nothing{over}", state, Writer("W1", adopts=adopts)
                    for pin in range(i) if self._pins else ():
                        if state.registers[pin] == MANIFEST and not state.tombstones >> pin & 1:
                            yield (
                                f"W0 builds on {pin}{over}",
                                state,
                                Writer("W1", pin, adopts=adopts),
                            )
            case "W1":
                made = state._replace(intents=state.intents | 1 << i)
                begun = writer._replace(at="W2M", left=writer.adopts)
                yield "W1 intent", made, begun if writer.pin != NO_PIN else _looked(begun)
            case "W2M":
                there = state.registers[writer.pin] == MANIFEST
                if not there:
                    yield "W2 the pin is gone", state, _looked(writer._replace(ok=False))
                elif self._mutant is Mutant.NO_RECHECK:
                    yield "W2 the pin's manifest is there", state, _looked(writer)
                else:
                    yield "W2 the pin's manifest is there", state, writer._replace(at="W2T")
            case "W2T":
                doomed = bool(state.tombstones >> writer.pin & 1)
                yield f"W2 tombstone: {doomed}", state, _looked(writer._replace(ok=not doomed))
            case "WA" | "WAT" | "WL":
                yield from self._adopt(state, i, writer)
            case "W3":
                yield (
                    "W3 pack",
                    state._replace(packs=state.packs | 1 << i),
                    writer._replace(at="W5"),
                )
            case "W5":
                if state.registers[i] == NONE:
                    yield "W5 commit", _register(state, i, MANIFEST), writer._replace(at="end")
                elif self._mutant is not Mutant.NO_REGISTER:
                    yield "W5 revoked", state, writer._replace(at="end", ok=False)
            case _:
                pass

    def _adoptable(self, state: State, i: int) -> Iterator[int]:
        yield 0
        for j in range(1, i) if self._adoption else ():
            if state.intents & ~state.damaged & 1 << j and state.registers[j] == NONE:
                yield 1 << j | state.writers[j - 1].adopts

    def _adopt(self, state: State, i: int, writer: Writer) -> Iterator[tuple[str, State, Writer]]:
        """WA: create the next one's register, WAT: look for its tombstone. WL: list all packs of its own."""
        bit = writer.left & -writer.left
        j = bit.bit_length() - 1
        match writer.at:
            case "WA":
                kind = state.registers[j]
                if self._mutant is Mutant.ADOPTS_WITHOUT_REGISTER:
                    yield f"WA takes {j}", state, _claimed(writer, j, i)
                elif kind != NONE:
                    owner = kind - ADOPTED if kind > ADOPTED else 0
                    yield f"WA {j} is {owner}'s", state, _claimed(writer, j, owner)
                else:
                    new = writer._replace(at="WAT")
                    yield f"WA adopts {j}", _register(state, j, ADOPTED + i), new
            case "WAT":
                owner = 0 if state.tombstones & bit else i
                yield f"WA {j} is {owner}'s", state, _claimed(writer, j, owner)
            case _:
                mine = 0
                owners = dict(zip(writer.owners[::2], writer.owners[1::2], strict=True))
                for one in owners:
                    owner = one
                    while owner and owner != i:
                        owner = owners.get(owner, 0)
                    mine |= 1 << one if owner == i else 0
                # What it wanted does not matter any more, but for who takes it over in turn.
                new = writer._replace(at="W3", owners=(), got=state.packs & mine)
                yield "WL lists their packs", state, new

    # -- a collector -----------------------------------------------------------------------------

    def _collect(  # noqa: C901, PLR0912 - a case is a step
        self, state: State, one: Collector
    ) -> Iterator[tuple[str, State, Collector]]:
        following = one._replace(at=self._after.get(one.at, "end"), key=0)
        match one.at:
            case "C1":
                yield "C1 ends no undo window", state, following
                if state.tombstones.bit_count() < self._tombstones:
                    for i, kind in enumerate(state.registers):
                        if kind == MANIFEST and not state.tombstones >> i & 1:
                            made = state._replace(tombstones=state.tombstones | 1 << i)
                            yield f"C1 tombstone of {i}", made, following
            case "C1T":
                known = following._replace(known=state.tombstones)
                yield "C1 reads T", state, known._replace(doomed=state.tombstones)
                left_out = state.tombstones if self._young else 0
                while left_out:
                    doomed = state.tombstones & ~left_out
                    yield f"C1 reads T, {left_out:b} is young", state, known._replace(doomed=doomed)
                    left_out = (left_out - 1) & state.tombstones
            case "C2":
                yield "C2 lists packs", state, following._replace(packs=state.packs)
            case "C3":
                # A session that has no intent yet, or no more, is not seen.
                for i in range(one.key + 1, len(state.writers) + 1):
                    seen = state.intents & 1 << i
                    last = i == len(state.writers)
                    new = following if last else one._replace(key=i)
                    yield (
                        f"C3 lists session {i}",
                        state,
                        new._replace(
                            sessions=one.sessions | seen & ~state.damaged,
                            unread=one.unread | seen & state.damaged,
                        ),
                    )
                    break
            case "C3R":
                yield from self._revoke(state, one, following)
            case "C4":
                i = self._order[one.key]
                seen_all = _set(one.registers, i, state.registers[i])
                last = one.key == len(self._order) - 1
                new = following if last else one._replace(key=one.key + 1)
                yield f"C4 lists register {i}", state, new._replace(registers=seen_all)
            case "C4L":
                yield from self._look_again(state, one, following)
            case "C4A":
                yield from self._follow(state, one, following)
            case "C5":
                fresh = state.tombstones & ~one.known
                if self._mutant is Mutant.NO_T_SET:
                    new = following._replace(doomed=state.tombstones)
                    yield "C5 reads what is doomed only now", state, self._decide(state, new)
                elif fresh and self._mutant is not Mutant.NO_SECOND_LOOK:
                    yield "C5 a new tombstone: begins again", state, _again(one)
                else:
                    yield "C5 no new tombstone", state, self._decide(state, following)
            case "C6":
                yield from self._delete(state, one, following)
            case "C7":
                yield from self._delete_manifests(state, one, following)
            case "C7S":
                ended = sum(1 << i for i in self._numbers if one.registers[i] != NONE)
                after = state._replace(intents=state.intents & ~ended)
                yield "C7 deletes intents", after, _again(one)
            case _:
                pass

    def _revoke(
        self, state: State, one: Collector, following: Collector
    ) -> Iterator[tuple[str, State, Collector]]:
        for i in range(one.key + 1, len(state.writers) + 1):
            new = following if i == len(state.writers) else one._replace(key=i)
            yield f"C3 session {i} is not idle", state, new
            if self._idle and one.sessions >> i & 1 and state.registers[i] == NONE:
                if self._mutant is Mutant.NO_REGISTER:
                    dead = new._replace(sessions=new.sessions & ~(1 << i))
                    yield f"C3 takes {i} for dead", state, dead
                else:
                    yield f"C3 revokes {i}", _register(state, i, REVOKED), new
            return

    def _live(self, one: Collector) -> list[int]:
        return [i for i in self._numbers if one.sessions >> i & 1 and one.registers[i] == NONE]

    def _follow(  # noqa: C901 - a case is a step
        self, state: State, one: Collector, following: Collector
    ) -> Iterator[tuple[str, State, Collector]]:
        """Whose packs an adopted session's are: a step looks at no more than one object."""
        for j in self._numbers[one.key :]:
            owner = j
            while one.registers[owner] > ADOPTED:
                owner = one.registers[owner] - ADOPTED
            if owner == j or not one.packs >> j & 1 or one.registers[owner] != NONE:
                continue
            if self._mutant is Mutant.ADOPTED_IS_ENDED:
                continue
            spared = one._replace(key=j, adopted=one.adopted | 1 << j, begun=False)
            if one.sessions >> owner & 1:
                yield f"C4 {j} is {owner}'s, which is live", state, spared
            elif self._mutant is Mutant.NO_LOOK_FOR_ADOPTER:
                continue
            elif not one.begun and state.intents >> owner & 1:
                yield f"C4 {owner} has an intent", state, one._replace(key=j - 1, begun=True)
            elif not one.begun and self._mutant is Mutant.NO_REGISTER_LOOK_FOR_ADOPTER:
                yield f"C4 {owner} has no intent", state, one._replace(key=j)
            elif state.registers[owner] != NONE:
                yield f"C4 {owner} has ended meanwhile: begins again", state, _again(one)
            elif one.begun:
                yield f"C4 {j} is {owner}'s, which lives", state, spared
            else:
                yield f"C4 {owner} is no more", state, one._replace(key=j)
            return
        yield "C4 all are followed", state, following._replace(begun=False)

    def _look_again(
        self, state: State, one: Collector, following: Collector
    ) -> Iterator[tuple[str, State, Collector]]:
        if self._mutant is not Mutant.DAMAGED_IS_ENDED and any(
            one.unread >> i & 1 and one.registers[i] == NONE for i in self._numbers
        ):
            yield "C4 an intent is damaged: it ends", state, Collector("end")
            return
        for i in self._live(one):
            if i <= one.key:
                continue
            pin = state.writers[i - 1].pin
            missing = pin != NO_PIN and one.registers[pin] == NONE
            if not missing or self._mutant is Mutant.NO_REGISTER_LOOK:
                continue
            if state.registers[i] != NONE:
                yield f"C4 session {i} has committed meanwhile: begins again", state, _again(one)
            else:
                yield f"C4 session {i} looks for its pin in vain", state, one._replace(key=i)
            return
        yield "C4 is done", state, following

    def _decide(self, state: State, one: Collector) -> Collector:
        """What to delete: from here on `packs` and `doomed` are that."""
        live = self._live(one)
        spared = sum(1 << i for i in live) | one.adopted
        pinned = 0
        for i in live:
            pin = state.writers[i - 1].pin
            if pin != NO_PIN and one.registers[pin] == MANIFEST:
                spared |= self.needs(state, pin)
                pinned |= 1 << pin
        for i, kind in enumerate(one.registers):
            if kind == MANIFEST and not one.doomed >> i & 1:
                spared |= self.needs(state, i)
        # A mark goes too, where there is a tombstone beside it.
        there = sum(
            1 << i
            for i, kind in enumerate(one.registers)
            if kind == MANIFEST or (self._adoption and kind != NONE)
        )
        doomed = one.doomed & there
        if self._mutant is not Mutant.PINNED_GO:
            doomed &= ~pinned
        return one._replace(packs=one.packs & ~spared, doomed=doomed)

    @staticmethod
    def _delete(
        state: State, one: Collector, following: Collector
    ) -> Iterator[tuple[str, State, Collector]]:
        if not one.packs:
            yield "C6 is done", state, following
            return
        pack = one.packs & -one.packs
        after = state._replace(packs=state.packs & ~pack)
        label = f"C6 deletes pack {pack.bit_length() - 1}"
        yield label, after, one._replace(packs=one.packs & ~pack)

    def _delete_manifests(
        self, state: State, one: Collector, following: Collector
    ) -> Iterator[tuple[str, State, Collector]]:
        if not one.doomed:
            yield "C7 is done", state, following
            return
        bit = one.doomed & -one.doomed
        i = bit.bit_length() - 1
        after = state
        if state.registers[i] == MANIFEST or (self._adoption and state.registers[i] != NONE):
            after = _register(state, i, NONE)
            if self._mutant is Mutant.TOMBSTONES_GO:
                after = after._replace(tombstones=after.tombstones & ~bit)
        yield f"C7 deletes manifest {i}", after, one._replace(doomed=one.doomed & ~bit)


def _looked(writer: Writer) -> Writer:
    """A writer that has looked for its pin."""
    return writer._replace(at="WA" if writer.left else "W3")


def _claimed(writer: Writer, j: int, owner: int) -> Writer:
    """A writer that knows whose session j is."""
    left = writer.left & ~(1 << j)
    owners = (*writer.owners, j, owner)
    return writer._replace(at="WA" if left else "WL", left=left, owners=owners)


def _fresh(rounds: int, registers: int) -> Collector:
    return Collector(left=rounds, registers=(NONE,) * registers)


def _again(one: Collector) -> Collector:
    """The next round; what an ended collector has seen does not matter any more."""
    return _fresh(one.left - 1, len(one.registers)) if one.left > 1 else Collector("end")


def _set(values: tuple[int, ...], i: int, value: int) -> tuple[int, ...]:
    return (*values[:i], value, *values[i + 1 :])


def _register(state: State, i: int, kind: int) -> State:
    return state._replace(registers=_set(state.registers, i, kind))


def search(config: Config) -> Searched:
    """All states that can be reached, or as many as it takes to lose something."""
    model = _Model(config)
    came: dict[State, tuple[State, str] | None] = {model.start: None}
    waiting = [model.start]
    deletions = 0
    while waiting:
        state = waiting.pop()
        for label, after in model.steps(state):
            if after in came:
                continue
            came[after] = (state, label)
            if after.packs < state.packs:
                deletions += 1
            if model.lost(after):
                return Searched(len(came), _trace(came, after), deletions)
            waiting.append(after)
    return Searched(len(came), (), deletions)


def _trace(came: dict[State, tuple[State, str] | None], state: State) -> tuple[str, ...]:
    labels: list[str] = []
    before = came[state]
    while before is not None:
        labels.append(before[1])
        before = came[before[0]]
    return tuple(reversed(labels))
