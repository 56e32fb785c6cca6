"""A short torture of a real guest; scripts/torture machine makes long ones."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.support.tools import QemuTools
from tests.support.torture import Torture


@pytest.mark.slow
def test_whatever_happens_to_a_guest_its_backups_restore_exactly(
    qemu_tools: QemuTools, tmp_path: Path
) -> None:
    torture = Torture(tmp_path, qemu_tools, seed=20261125)
    torture.run(4)
    assert sum(n for what, n in torture.done.items() if what.startswith("backups")) == 4
