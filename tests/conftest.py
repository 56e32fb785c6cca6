"""Fixtures for all tests."""

from __future__ import annotations

import pytest

from tests.support.tools import QEMU_VERSIONS, QemuTools


@pytest.fixture(scope="session", params=QEMU_VERSIONS, ids=lambda tools: tools.id)
def qemu_tools(request: pytest.FixtureRequest) -> QemuTools:
    """Each QEMU version in turn.

    A version that is not installed fails the test: a skip would hide that it was never tested.
    """
    tools: QemuTools = request.param
    if not tools.installed:
        pytest.fail(f"{tools.id} is not in {tools.bin}; run scripts/setup")
    return tools
