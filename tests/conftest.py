"""Fixtures for all tests."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import pytest
from hypothesis import settings

from tests.support.stores import SeaweedFs, seaweedfs
from tests.support.tools import QEMU_VERSIONS, QemuTools

# Tests run beside QEMU: how long an example takes says nothing of the code. A test that hangs ends by pytest-timeout.
settings.register_profile("nbdpull", deadline=None)
settings.load_profile("nbdpull")


@pytest.fixture(scope="session", params=QEMU_VERSIONS, ids=lambda tools: tools.id)
def qemu_tools(request: pytest.FixtureRequest) -> QemuTools:
    """Each QEMU version in turn.

    A version that is not installed fails the test: a skip would hide that it was never tested.
    """
    tools: QemuTools = request.param
    if not tools.installed:
        pytest.fail(f"{tools.id} is not in {tools.bin}; run scripts/setup")
    return tools


_prefixes = itertools.count()


@pytest.fixture(scope="session")
def weed() -> Iterator[SeaweedFs]:
    """A SeaweedFS for all tests of this process."""
    with seaweedfs() as server:
        yield server


@pytest.fixture
def s3(weed: SeaweedFs, monkeypatch: pytest.MonkeyPatch) -> str:
    """The location of an empty place in it, reachable through the environment.

    A bucket takes several volumes in SeaweedFS, so all share the one that it came up with.
    """
    for name, value in weed.env.items():
        monkeypatch.setenv(name, value)
    return f"s3://bucket0/test/{next(_prefixes)}"
