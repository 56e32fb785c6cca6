"""forget, undo, protect, unprotect, gc and repack from the command line, on real repositories."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from tests.cli.conftest import Cli
from tests.ops.retained import Retained, retained


@pytest.fixture
def repo(tmp_path: Path) -> Retained:
    return retained(tmp_path / "repo", 4)


def test_forget_shows_what_it_keeps_and_drops_and_why(cli: Cli, repo: Retained) -> None:
    done = cli("forget", "-r", repo.path, "--keep-last", "1", "--min-keep", "2", "-n")
    assert done.exit_code == 0
    lines = done.stdout.splitlines()
    assert lines[0].split() == ["backup", "stored", "vm", "chain", "level", "why"]
    assert [line.split()[:2] for line in lines[1:5]] == [
        ["keep", repo.ids[2]],
        ["keep", repo.ids[3]],
        ["drop", repo.ids[0]],
        ["drop", repo.ids[1]],
    ]
    assert lines[2].endswith("keep-last=1, the next incremental is counted from it, min-keep=2")
    assert lines[3].endswith("no rule keeps it")
    assert lines[5] == "would forget 2 backups"
    assert cli("list", "-r", repo.path).stdout.count("vm1") == 4


def test_the_whole_way_from_forget_to_gc(cli: Cli, repo: Retained) -> None:
    done = cli("forget", "-r", repo.path, "--keep-within", "0s", "--json")
    result = json.loads(done.stdout)
    assert [one["backup"] for one in result["dropped"]] == repo.ids[:1]
    assert re.fullmatch(r"20..-..-..T..:..:..\....Z", result["dropped"][0]["stored_time"])
    assert cli("list", "-r", repo.path).stdout.count("vm1") == 3
    assert ", forgotten" in cli("list", "-r", repo.path, "--forgotten").stdout.replace(
        "complete, forgotten", ", forgotten"
    )
    assert cli("undo", repo.ids[0], "-r", repo.path).stdout == f"backup {repo.ids[0]} is back\n"
    again = cli("undo", repo.ids[0], "-r", repo.path)
    assert again.stdout == f"backup {repo.ids[0]} was not forgotten\n"
    assert cli("protect", repo.ids[0], "-r", repo.path).exit_code == 0
    refused = cli("forget", repo.ids[0], "-r", repo.path)
    assert refused.exit_code == 1
    assert f"backup {repo.ids[0]} is protected" in refused.stderr
    assert "complete, protected" in cli("list", "-r", repo.path).stdout
    assert cli("unprotect", repo.ids[0], "-r", repo.path).exit_code == 0
    assert cli("forget", repo.ids[0], "-r", repo.path).stdout.endswith(
        "forgot 1 backup; 'undo' brings them back until 'gc' deletes them\n"
    )
    assert "(0 packs, 0 manifests)" in cli("gc", "-r", repo.path, "-n").stdout
    told = cli("gc", "-r", repo.path, "--undo-window", "0s", "--json")
    assert json.loads(told.stdout)["manifests"] >= 2
    assert cli("undo", repo.ids[0], "-r", repo.path).exit_code == 1


def test_repack_tells_what_it_did(cli: Cli, repo: Retained) -> None:
    cli("forget", repo.ids[0], "-r", repo.path)
    cli("gc", "-r", repo.path, "--undo-window", "0s")
    told = cli("repack", "-r", repo.path, "--ratio", "1", "-n")
    assert re.match(r"would rewrite \d+ sparse packs, .*, and 3 backups", told.stdout)
    done = cli("repack", "-r", repo.path, "--ratio", "1")
    assert re.match(r"rewrote \d+ sparse packs, .* as .*, and 3 backups, in", done.stdout)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("forget", "name either the backups to forget, or what to keep of all"),
        ("forget x --keep-last 1", "name either"),
        ("forget --keep-within 7", "'7' is no duration"),
        ("gc --undo-window soon", "'soon' is no duration"),
    ],
)
def test_lines_that_cannot_be_are_usage_errors(
    cli: Cli, repo: Retained, line: str, message: str
) -> None:
    done = cli(*line.split(), "-r", repo.path)
    assert done.exit_code == 2
    assert message in done.stderr


def test_backups_that_were_copied_here_end_with_3(cli: Cli, tmp_path: Path) -> None:
    old = retained(tmp_path / "old", 0)
    for _ in range(4):
        old.add(taken=1000.0)
    done = cli("forget", "-r", old.path, "--keep-last", "1")
    assert done.exit_code == 3
    assert "--trust-store-time" in done.stderr
