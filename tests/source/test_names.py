"""Names in QEMU: ours are known again, others' never."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nbdpull.source.names import (
    RunNames,
    chain_id,
    checkpoint_name,
    checkpoint_parts,
    run_of,
)

RUN = "0123abcd"
BACKUP = RUN + "00ff00ff"


@given(st.integers(0, 9999))
def test_everything_of_a_run_is_known_as_its_own_and_fits_qemu(index: int) -> None:
    names = RunNames(RUN)
    made = [names.bitmap] + [
        of(index) for of in (names.scratch, names.filter, names.access, names.job, names.export)
    ]
    assert len(set(made)) == len(made)
    for name in made:
        assert run_of(name) == RUN
        assert checkpoint_parts(name) is None
        assert len(name) <= 31


@pytest.mark.parametrize(
    "name",
    [
        "",
        "np-0123abcd",
        "np-0123abcd-",
        "np-0123abcde-scr0",
        "np-0123ABCD-scr0",
        "np-0123abcd-scr0x",
        "np-0123abcd-scr0\n",
        "xnp-0123abcd-scr0",
        "np-scr0",
        "drive-virtio-disk0",
        "#block123",
        "np-\uff10123abc-scr0",
    ],
)
def test_other_names_are_not_ours(name: str) -> None:
    assert run_of(name) is None
    assert checkpoint_parts(name) is None


def test_checkpoint_is_known_by_chain_and_backup() -> None:
    chain = chain_id("repository", "vm", "default")
    name = checkpoint_name(chain, BACKUP, "vda")
    assert checkpoint_parts(name) == (chain, BACKUP)
    assert run_of(name) is None
    for other in (name + "0", name[:-1], name.upper(), "x" + name, name + "\n"):
        assert checkpoint_parts(other) is None


def test_each_disk_has_a_checkpoint_of_its_own() -> None:
    chain = chain_id("repository", "vm", "default")
    assert checkpoint_name(chain, BACKUP, "vda") != checkpoint_name(chain, BACKUP, "vdb")


def test_checkpoints_of_earlier_versions_name_no_disk_and_are_ours() -> None:
    assert checkpoint_parts(f"nbdpull-d3505872658b-{BACKUP}") == ("d3505872658b", BACKUP)


def test_chain_id_is_what_it_was_in_every_version() -> None:
    """It is in the names of bitmaps that are there now: another id would lose every chain."""
    assert chain_id("r", "vm", "default") == "d3505872658b"


@given(*[st.tuples(st.text(max_size=5), st.text(max_size=5), st.text(max_size=5))] * 2)
def test_chains_share_an_id_only_when_they_are_one(
    one: tuple[str, str, str], other: tuple[str, str, str]
) -> None:
    assert (chain_id(*one) == chain_id(*other)) == (one == other)


def test_chain_id_does_not_depend_on_where_one_part_ends() -> None:
    assert chain_id("ab", "c", "d") != chain_id("a", "bc", "d")
    assert chain_id("a", "", "bc") != chain_id("a", "b", "c")
