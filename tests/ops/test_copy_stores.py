"""Copying between folders and object stores; killed in the middle, and gone on with."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import nbdpull
from nbdpull.repo import location as location_module
from tests.ops.copying import World
from tests.support.process import run
from tests.support.proxy import Fault, Request, proxy
from tests.support.stores import SeaweedFs

NBDPULL = Path(sys.executable).with_name("nbdpull")


@pytest.fixture(params=["local to s3", "s3 to local", "s3 to s3"])
def world(
    request: pytest.FixtureRequest, s3: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> World:
    """A repository in one store, and a place for its copy in another."""
    monkeypatch.setattr(location_module, "LISTED", 0)  # the trial listing has tests of its own
    source, _, target = str(request.param).partition(" to ")
    return World(
        tmp_path,
        source=f"{s3}/one" if source == "s3" else None,
        target=f"{s3}/two" if target == "s3" else None,
    )


def test_a_copy_that_is_killed_goes_on_where_it_ended(
    world: World, weed: SeaweedFs, tmp_path: Path
) -> None:
    """Killed when it asks the store for its fourth object: some are there by then, and some are not."""
    child: list[subprocess.Popen[bytes]] = []
    method = "PUT" if world.target.startswith("s3:") else "GET"
    count = 0

    def kill(request: Request) -> Fault | None:
        nonlocal count
        if request.method != method or not any(f"/{one}/" in request.path for one in "dx"):
            return None
        count += 1
        if count < 4:
            return None
        child[0].kill()
        return Fault.BEFORE_CLOSE

    with proxy(weed.endpoint) as front:
        front.plan = kill
        child.append(
            subprocess.Popen(
                [NBDPULL, "copy", world.source, world.target],
                env={**os.environ, "AWS_ENDPOINT_URL": front.endpoint},
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
            )
        )
        assert child[0].wait(timeout=120) < 0
    listed = [backup.backup for backup in nbdpull.list_backups(world.target)]
    assert len(listed) < 3
    done = json.loads(run([NBDPULL, "copy", world.source, world.target, "--json"]).stdout)
    assert sorted(done["copied"] + done["present"]) == sorted(world.ids)
    assert world.objects(world.target) == world.objects(world.source)
    again = nbdpull.copy(world.source, world.target)
    assert (again.objects, list(again.present)) == (0, world.ids)
    for backup in world.ids:
        world.check(backup, tmp_path / backup)
