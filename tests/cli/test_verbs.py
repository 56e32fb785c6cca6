"""What each verb passes on, and what it prints, as JSON and for people."""

from __future__ import annotations

import dataclasses
import json
import re
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import nbdpull
from nbdpull import api
from nbdpull.cli.tables import short_ids
from tests.cli.conftest import Cli, disk, info, result

Replace = Callable[[str, Any], list[tuple[tuple[Any, ...], dict[str, Any]]]]


@pytest.fixture
def replace(monkeypatch: pytest.MonkeyPatch) -> Replace:
    """Let a function of the API return a value; yields the arguments of its calls."""

    def put(name: str, value: Any) -> list[tuple[tuple[Any, ...], dict[str, Any]]]:
        calls: list[tuple[tuple[Any, ...], dict[str, Any]]] = []

        def fake(*args: Any, **kwargs: Any) -> Any:
            # Whatever opens a repository must be able to ask for its password.
            assert kwargs.pop("keys").ask is not None
            calls.append((args, kwargs))
            return value

        monkeypatch.setattr(api, name, fake)
        return calls

    return put


# -- backup ------------------------------------------------------------------------------------------


def test_backup_passes_every_option_on(cli: Cli, replace: Replace) -> None:
    calls = replace("backup", result())
    line = (
        "backup qmp:/s -r repo -l diff -i a --include b -x c --exclude d --chain other --vm web"
        " --guest-first --nbd-address nbd://localhost --scratch /tmp/x --force --compression-level 3"
        " --rate 1.5M --max-guest-delay 7 --audit 9 --bitmap a=qemu:dirty-bitmap:b --since 12"
        " --quiesce --agent /a --tls /t"
        " --tag gold --tag old -q"
        " --base latest --digest-cache /tmp/c"
        " --trim-scratch --machine --definition vm.xml --definition start.sh --tpm-state /tpm"
        " --resume-within 2d"
    )
    assert cli(*line.split()).exit_code == 0
    assert calls == [
        (
            (("qmp:/s",), "repo"),
            {
                "level": "differential",
                "include": ("a", "b"),
                "exclude": ("c", "d"),
                "chain": "other",
                "vm": "web",
                "guest_first": True,
                "nbd_address": "nbd://localhost",
                "scratch": "/tmp/x",
                "force": True,
                "compression_level": 3,
                "rate": 3 << 19,
                "max_guest_delay_s": 7,
                "audit": 9,
                "bitmaps": ("a=qemu:dirty-bitmap:b",),
                "since": "12",
                "quiesce": True,
                "agent": "/a",
                "tls": "/t",
                "tags": ("gold", "old"),
                "base": "latest",
                "digest_cache": "/tmp/c",
                "trim_scratch": True,
                "machine": True,
                "definitions": ("vm.xml", "start.sh"),
                "tpm_state": "/tpm",
                "resume_within_s": 172800.0,
                "progress": None,
            },
        )
    ]


@pytest.mark.parametrize(
    ("given", "level"),
    [
        ([], "auto"),
        (["-l", "auto"], "auto"),
        (["-l", "full"], "full"),
        (["-l", "FULL"], "full"),
        (["--level", "inc"], "incremental"),
        (["--level", "incremental"], "incremental"),
        (["-ldiff"], "differential"),
        (["--level=differential"], "differential"),
        (["-l", "copy"], "copy"),
    ],
)
def test_backup_levels_and_their_short_forms(
    cli: Cli, replace: Replace, given: list[str], level: str
) -> None:
    calls = replace("backup", result())
    assert cli("backup", "qmp:/s", "-r", "x", *given).exit_code == 0
    assert calls[0][1]["level"] == level


def test_backup_as_json(cli: Cli, replace: Replace) -> None:
    replace("backup", result())
    for more in ([], ["-q"]):
        done = cli("backup", "qmp:/s", "-r", "x", "--json", *more)
        assert done.exit_code == 0
        assert json.loads(done.stdout) == {
            "backup": "aa" * 8,
            "vm": "web",
            "chain": "default",
            "level": "incremental",
            "parent": "bb" * 8,
            "time": "2025-01-01T10:00:00.250Z",
            "duration_s": 4.2,
            "disks": [
                {
                    "name": "vda",
                    "size": 1 << 30,
                    "level": "incremental",
                    "reason": "changes since the last backup",
                    "changed_bytes": 3 << 20,
                    "read_bytes": 2 << 20,
                    "stored_bytes": 1 << 20,
                    "reused_bytes": 0,
                },
                {
                    "name": "vdb",
                    "size": 1 << 30,
                    "level": "full",
                    "reason": "it is new",
                    "changed_bytes": 3 << 20,
                    "read_bytes": 2 << 20,
                    "stored_bytes": 1 << 20,
                    "reused_bytes": 0,
                },
            ],
            "cost": None,
            "quiesced": None,
            "resumed": False,
            "profile": {
                "workers": 4,
                "status_s": 0.125,
                "idle_s": 0.25,
                "source_s": 3.5,
                "hash_s": 0.5,
                "compress_s": 10.0,
                "encrypt_s": 0.0,
                "store_s": 1.75,
                "requests": 1600,
            },
            "warnings": [],
        }


def test_backup_tells_where_its_time_went(cli: Cli, replace: Replace) -> None:
    replace("backup", result())
    done = cli("backup", "qmp:/s", "-r", "x", "--profile")
    assert done.exit_code == 0
    shares = {
        line.split(":")[0]: line.split()[-2:] for line in done.stdout.splitlines() if "%" in line
    }
    assert shares == {
        "waiting for the disks": ["22", "%"],
        "hashing": ["3", "%"],
        "compressing": ["62", "%"],
        "encrypting": ["0", "%"],
        "writing to the repository": ["11", "%"],
        "waiting for what changed": ["2", "%"],
    }
    assert "%" not in cli("backup", "qmp:/s", "-r", "x").stdout


def test_backup_for_people_says_why(cli: Cli, replace: Replace) -> None:
    replace("backup", result())
    done = cli("backup", "qmp:/s", "-r", "x")
    assert done.stdout.splitlines() == [
        "backup aaaaaaaaaaaaaaaa of web: incremental, 2 disks, 4.2 s",
        "disk      size  level         changed      read    stored  reused  why",
        "vda   1.00 GiB  incremental  3.00 MiB  2.00 MiB  1.00 MiB     0 B  changes since the last backup",
        "vdb   1.00 GiB  full         3.00 MiB  2.00 MiB  1.00 MiB     0 B  it is new",
    ]
    assert cli("backup", "qmp:/s", "-r", "x", "-q").stdout == ""


def test_backup_with_warnings_ends_with_3(cli: Cli, replace: Replace) -> None:
    replace("backup", result(warnings=("bitmap a stays", "bitmap b\nstays")))
    done = cli("backup", "qmp:/s", "-r", "x", "--json")
    assert done.exit_code == 3
    assert json.loads(done.stdout)["warnings"] == ["bitmap a stays", "bitmap b\nstays"]
    assert done.stderr == ("nbdpull: warning: bitmap a stays\nnbdpull: warning: bitmap b stays\n")
    quiet = cli("backup", "qmp:/s", "-r", "x", "-q")
    assert (quiet.exit_code, quiet.stdout, quiet.stderr) == (3, "", done.stderr)


# -- restore -----------------------------------------------------------------------------------------


def restored(target: str = "out/vda.raw") -> nbdpull.RestoreResult:
    one = nbdpull.RestoredDisk(name="vda", size=1 << 30, target=target, written_bytes=5 << 20)
    return nbdpull.RestoreResult(backup="aa" * 8, vm="web", duration_s=1.5, disks=(one,))


def test_restore_passes_every_option_on(cli: Cli, replace: Replace) -> None:
    calls = replace("restore", restored())
    line = "restore aa -r repo --to out --disk vda --format qcow2 --vm web --force --salvage -q"
    done = cli(*line.split())
    assert (done.exit_code, done.stdout) == (0, "")
    assert calls == [
        (
            ("repo", "aa", "out"),
            {
                "vm": "web",
                "disk": "vda",
                "format": "qcow2",
                "force": True,
                "salvage": True,
                "tls": None,
                "progress": None,
            },
        )
    ]


def test_restore_prints_where_to(cli: Cli, replace: Replace) -> None:
    replace("restore", restored())
    assert cli("restore", "latest", "-r", "x", "--to", "out").stdout.splitlines() == [
        "restored backup aaaaaaaaaaaaaaaa of web in 1.5 s",
        "disk      size      data  to",
        "vda   1.00 GiB  5.00 MiB  out/vda.raw",
    ]
    done = cli("restore", "latest", "-r", "x", "--to", "out", "--json")
    assert json.loads(done.stdout) == {
        "backup": "aa" * 8,
        "vm": "web",
        "duration_s": 1.5,
        "disks": [
            {
                "name": "vda",
                "size": 1 << 30,
                "target": "out/vda.raw",
                "written_bytes": 5 << 20,
                "lost": [],
            }
        ],
        "machine": [],
        "warnings": [],
    }


def test_restore_to_standard_output_prints_nothing_there(cli: Cli, replace: Replace) -> None:
    replace("restore", restored("-"))
    done = cli("restore", "latest", "-r", "x", "--to", "-")
    assert (done.exit_code, done.stdout) == (0, "")
    assert "restored backup aaaaaaaaaaaaaaaa" in done.stderr
    done = cli("restore", "latest", "-r", "x", "--to", "-", "--progress", "json")
    assert done.stdout == ""
    event = json.loads(done.stderr)
    assert (event["event"], event["result"]["disks"][0]["target"]) == ("result", "-")


def test_restore_to_standard_output_as_json_is_refused(cli: Cli, replace: Replace) -> None:
    calls = replace("restore", restored())
    done = cli("restore", "latest", "-r", "x", "--to", "-", "--json")
    assert (done.exit_code, done.stdout, calls) == (2, "", [])
    assert "--to - and --json both want standard output" in done.stderr


# -- init, list, show --------------------------------------------------------------------------------


def test_init_then_list(cli: Cli, tmp_path: Path) -> None:
    repo = tmp_path / "repo"
    created = json.loads(cli("init", "-r", repo, "--json").stdout)
    assert created["repository"] == str(repo)
    assert len(created["id"]) == 32
    again = cli("init", "-r", repo)
    assert again.exit_code == 2
    assert "is a repository already" in again.stderr
    assert cli("list", "-r", repo, "--json").stdout == "[]\n"
    assert cli("list", "-r", repo).stdout == "no backups\n"
    assert cli("init", "-r", tmp_path / "two").stdout.startswith("created repository ")
    assert cli("init", "-r", tmp_path / "three", "-q").stdout == ""
    assert (tmp_path / "three" / "nbdpull.json").exists()


@pytest.mark.parametrize(
    ("line", "code"),
    [("list", 10), ("show latest", 10), ("verify", 10), ("restore latest --to out", 10)],
)
def test_no_repository_is_10(cli: Cli, tmp_path: Path, line: str, code: int) -> None:
    done = cli(*line.split(), "-r", tmp_path / "none", "--json")
    assert (done.exit_code, done.stdout) == (code, "")
    assert f"nbdpull init -r {tmp_path / 'none'}" in done.stderr


def test_list_as_json(cli: Cli, replace: Replace) -> None:
    calls = replace("list_backups", (info("a1" * 8, parent=None, level=nbdpull.Level.FULL), info()))
    done = cli("list", "-r", "x", "--json", "--vm", "web", "--chain", "default")
    assert calls == [
        (("x",), {"vm": "web", "chain": "default", "incomplete": True, "forgotten": False})
    ]
    listed = json.loads(done.stdout)
    assert [one["backup"] for one in listed] == ["a1" * 8, "aa" * 8]
    assert listed[0]["parent"] is None
    assert listed[0].keys() >= {"backup", "vm", "chain", "level", "parent", "time", "disks"}
    assert listed[1]["time"] == "2025-01-01T10:00:00.250Z"
    assert [one["name"] for one in listed[1]["disks"]] == ["vda", "vdb"]


def test_list_for_people(cli: Cli, replace: Replace, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TZ", "UTC")
    time.tzset()
    full = info("b1" * 8, parent=None, level=nbdpull.Level.FULL)
    child = info("a1" * 8, parent="b1" * 8)
    replace("list_backups", (full, child))
    done = cli("list", "-r", "x")
    when, sizes = "2025-01-01 10:00:00", ["2.00 GiB", "4.00 MiB", "2.00 MiB"]
    monkeypatch.undo()
    time.tzset()
    assert [re.split(r"  +", line) for line in done.stdout.splitlines()] == [
        ["backup", "time", "vm", "chain", "level", "parent", "disks", "size", "read", "stored"],
        ["b1b1b1b1", when, "web", "default", "full", "-", "2", *sizes],
        ["a1a1a1a1", when, "web", "default", "incremental", "b1b1b1b1", "2", *sizes],
    ]


def test_incomplete_backup_is_never_shown_as_a_backup(cli: Cli, replace: Replace) -> None:
    broken = info("cc" * 8, complete=False, missing=("vdb",))
    replace("list_backups", (info(), broken))
    assert [one["backup"] for one in json.loads(cli("list", "-r", "x", "--json").stdout)] == [
        "aa" * 8
    ]
    done = cli("list", "-r", "x")
    assert "cccccccc" not in done.stdout
    assert done.stderr == (
        "nbdpull: 1 more backup lacks a disk and can't be restored as a whole; 'list --all' shows"
        " it\n"
    )
    assert "incomplete, without vdb" in cli("list", "-r", "x", "--all").stdout
    listed = json.loads(cli("list", "-r", "x", "--all", "--json").stdout)
    assert [(one["complete"], one["missing"]) for one in listed] == [(True, []), (False, ["vdb"])]


def test_ids_are_cut_where_they_stay_unique() -> None:
    ids = ["0123456789abcdef", "0123456789abffff", "0123456700000000", "f" * 16]
    assert short_ids(ids) == {
        "0123456789abcdef": "0123456789abc",
        "0123456789abffff": "0123456789abf",
        "0123456700000000": "012345670",
        "f" * 16: "f" * 8,
    }


def shown(**changes: Any) -> nbdpull.ShowResult:
    parent = info("bb" * 8, level=nbdpull.Level.FULL, parent="dd" * 8)
    values: dict[str, Any] = {"backup": info(), "lineage": (parent,), "lineage_end": "dd" * 8}
    return nbdpull.ShowResult(**(values | changes))


def test_show_as_json(cli: Cli, replace: Replace) -> None:
    calls = replace("show", shown())
    done = json.loads(cli("show", "aa", "-r", "x", "--vm", "web", "--json").stdout)
    assert calls == [(("x", "aa"), {"vm": "web"})]
    assert done["backup"] == "aa" * 8
    assert (done["size"], done["changed_bytes"]) == (2 << 30, 6 << 20)
    assert (done["read_bytes"], done["stored_bytes"], done["compression"]) == (
        4 << 20,
        2 << 20,
        2.0,
    )
    assert [one["backup"] for one in done["lineage"]] == ["bb" * 8]
    assert done["lineage_end"] == "dd" * 8
    assert done["locked_until"] is None
    nothing = shown(backup=info(disks=(disk(stored_bytes=0),)), lineage=(), lineage_end=None)
    replace("show", nothing)
    assert json.loads(cli("show", "aa", "-r", "x", "--json").stdout)["compression"] is None


def test_show_for_people(cli: Cli, replace: Replace) -> None:
    replace("show", shown())
    text = cli("show", "aa", "-r", "x").stdout
    for part in (
        "backup       aaaaaaaaaaaaaaaa\n",
        "level        incremental\n",
        "state        complete\n",
        "compression  2.00 to 1 (read to stored)\n",
        "it is new\n",
        "bbbbbbbbbbbbbbbb",
        "dddddddddddddddd came before, and is not in the repository",
    ):
        assert part in text
    assert cli("show", "aa", "-r", "x", "-q").stdout == text
    assert "locked until" not in text
    replace("show", shown(locked_until=1_735_725_600.0))
    assert re.search(
        r"^locked until  202[45]-\d\d-\d\d \d\d:\d\d:00$",
        cli("show", "aa", "-r", "x").stdout,
        re.MULTILINE,
    )


def test_hostile_names_reach_the_terminal_tamed(cli: Cli, replace: Replace) -> None:
    evil = info(vm="a\x1b]0;x\x07\nb", disks=(disk("\x1b[31m[bold]vda"),))
    replace("list_backups", (evil,))
    replace("show", shown(backup=evil))
    for args in (["list", "-r", "x"], ["show", "aa", "-r", "x"]):
        text = cli(*args).stdout
        assert all(char.isprintable() or char == "\n" for char in text)
        assert "a\\x1b]0;x\\x07 b" in text
    assert "\\x1b[31m[bold]vda" in cli("show", "aa", "-r", "x").stdout
    assert json.loads(cli("list", "-r", "x", "--json").stdout)[0]["vm"] == "a\x1b]0;x\x07\nb"


# -- verify, cleanup ---------------------------------------------------------------------------------


def verified(*damaged: nbdpull.Damage) -> nbdpull.VerifyResult:
    return nbdpull.VerifyResult(
        ok=not damaged,
        backups=("aa" * 8,),
        frames=12,
        read_bytes=1 << 20,
        damaged=damaged,
        duration_s=0.5,
    )


def test_verify_without_damage(cli: Cli, replace: Replace) -> None:
    calls = replace("verify", verified())
    done = cli("verify", "aa", "latest", "-r", "x", "--vm", "web", "-q")
    assert (done.exit_code, done.stdout) == (0, "")
    options = {"level": "full", "share": 0.01, "seed": None, "record": True}
    assert calls == [(("x", ("aa", "latest")), {"vm": "web", "progress": None} | options)]
    assert cli("verify", "-r", "x").stdout == (
        "verified 1 backup, 12 frames, 1.00 MiB in 0.5 s: no damage\n"
    )
    assert json.loads(cli("verify", "-r", "x", "--json").stdout) == {
        "ok": True,
        "backups": ["aa" * 8],
        "frames": 12,
        "read_bytes": 1 << 20,
        "damaged": [],
        "duration_s": 0.5,
        "level": "full",
        "healed": 0,
        "recorded": 0,
        "share": None,
        "seed": None,
    }


def test_verify_levels(cli: Cli, replace: Replace) -> None:
    sample = dataclasses.replace(
        verified(), level=nbdpull.VerifyLevel.SAMPLE, share=0.05, seed=7, healed=2, recorded=3
    )
    calls = replace("verify", sample)
    options = ["-q", "--level", "sample", "--share", "5", "--seed", "7", "--no-record"]
    assert cli("verify", "-r", "x", *options).stdout == ""
    assert cli("verify", "-r", "x", "-l", "sample").stdout.splitlines() == [
        "verified 1 backup, 12 frames, 1.00 MiB (a sample of 5.000% of the data, seed 7) in 0.5 s: no damage",
        "2 damaged frames were read from their copies: nothing is lost with them",
        "3 damaged frames were put on record: the next backup heals those that it builds on, a full all that its disks still hold",
    ]
    assert calls[0][1] == {
        "vm": None,
        "progress": None,
        "level": "sample",
        "share": 0.05,
        "seed": 7,
        "record": False,
    }
    replace("verify", dataclasses.replace(verified(), level=nbdpull.VerifyLevel.LIST))
    assert cli("verify", "-r", "x", "-l", "list").stdout == (
        "verified 1 backup, the sizes of their packs in 0.5 s: no damage\n"
    )


@pytest.mark.parametrize(
    "options",
    [
        ["--level", "some"],
        ["--share", "5"],
        ["-l", "list", "--seed", "1"],
        ["-l", "sample", "--share", "0"],
        ["-l", "sample", "--share", "101"],
        ["-l", "sample", "--seed", "-1"],
    ],
)
def test_verify_options_that_cannot_be(cli: Cli, options: list[str]) -> None:
    assert cli("verify", "-r", "x", *options).exit_code == 2


def test_verify_with_damage_ends_with_1_and_tells_what_is_lost(cli: Cli, replace: Replace) -> None:
    damage = nbdpull.Damage(
        key="d/0/1",
        problem="hashes to 9c, expected 41",
        backup="aa" * 8,
        disk="vda",
        ranges=((0, 65536), (131072, 196608)),
    )
    replace("verify", verified(damage, nbdpull.Damage(key="d/0/2", problem="is missing")))
    lost = (
        "damaged: d/0/1: hashes to 9c, expected 41; backup aaaaaaaaaaaaaaaa, disk vda: 128 KiB lost,"
        " bytes 0-65536, 131072-196608"
    )
    for more in ([], ["-q"]):
        done = cli("verify", "-r", "x", *more)
        assert done.exit_code == 1
        assert done.stdout.splitlines() == [
            lost,
            "damaged: d/0/2: is missing",
            "verified 1 backup, 12 frames, 1.00 MiB in 0.5 s: 2 things are damaged",
        ]
    done = cli("verify", "-r", "x", "--json")
    assert done.exit_code == 1
    listed = json.loads(done.stdout)
    assert listed["ok"] is False
    assert listed["damaged"][0] == {
        "key": "d/0/1",
        "problem": "hashes to 9c, expected 41",
        "backup": "aa" * 8,
        "disk": "vda",
        "ranges": [[0, 65536], [131072, 196608]],
    }


def test_cleanup(cli: Cli, replace: Replace) -> None:
    calls = replace("cleanup", nbdpull.CleanupResult(removed=("export e0",), kept=("job j: busy",)))
    done = cli("cleanup", "qmp:/s", "-r", "repo", "--scratch", "/tmp/x", "--force")
    assert done.exit_code == 0
    assert done.stdout == "removed export e0\nkept job j: busy\n"
    (args, options), *_ = calls
    assert args == (("qmp:/s",),)
    assert options.pop("progress") is not None
    assert options == {"repository": "repo", "scratch": "/tmp/x", "force": True}
    assert json.loads(cli("cleanup", "qmp:/s", "--json").stdout) == {
        "removed": ["export e0"],
        "kept": ["job j: busy"],
    }
    assert calls[-1][1]["repository"] is None
    replace("cleanup", nbdpull.CleanupResult())
    assert cli("cleanup", "qmp:/s").stdout == "nothing to clean up\n"


# -- init ---------------------------------------------------------------------------------------------


def test_init_with_a_store_to_be_careful_with_ends_with_3(cli: Cli, replace: Replace) -> None:
    replace("init", nbdpull.InitResult(repository="s3://b/p", id="0f" * 16, warnings=("careful",)))
    done = cli("init", "-r", "s3://b/p")
    assert (done.exit_code, done.stderr) == (3, "nbdpull: warning: careful\n")
    assert done.stdout == f"created repository {'0f' * 16} in s3://b/p\n"
    done = cli("init", "-r", "s3://b/p", "--json")
    assert done.exit_code == 3
    assert json.loads(done.stdout) == {
        "repository": "s3://b/p",
        "id": "0f" * 16,
        "encrypted": False,
        "warnings": ["careful"],
    }
