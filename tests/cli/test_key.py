"""Encrypted repositories at the command line: passwords, key files, rotation, and exit code 12."""

from __future__ import annotations

import fcntl
import json
import os
import pty
import select
import signal
import stat
import subprocess
import sys
import termios
import time
from pathlib import Path

import pytest

import nbdpull
from nbdpull.repo import slots
from nbdpull.repo.repository import Repository
from tests.cli.conftest import Cli
from tests.ops.builder import Disk, add_backup
from tests.repo.helpers import CHEAP

Env = dict[str, str | None]
A: Env = {"NBDPULL_PASSWORD": "alpha"}
B: Env = {"NBDPULL_PASSWORD": "beta"}


@pytest.fixture(autouse=True)
def cheap(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(slots, "DEFAULT_KDF", CHEAP)
    for name in list(os.environ):
        if name.startswith("NBDPULL_"):
            monkeypatch.delenv(name)


@pytest.fixture
def repo(cli: Cli, tmp_path: Path) -> Path:
    """Encrypted, with one backup in it."""
    path = tmp_path / "repo"
    done = cli("init", "-r", path, "--encrypt", "--json", env=A)
    assert json.loads(done.stdout)["encrypted"] is True
    add(path, "alpha")
    return path


CONTENT = b"nbdpull " * 20_000


def add(path: Path, password: str | None = None, key_file: Path | None = None) -> None:
    keys = nbdpull.KeySource(
        password=password, key_file=None if key_file is None else str(key_file)
    )
    repository = Repository.open(str(path), write=True, keys=keys)
    add_backup(repository, {"vda": Disk.of(CONTENT)})


def restored(cli: Cli, repo: Path, to: Path, env: Env) -> int:
    done = cli("restore", "latest", "-r", repo, "--to", to, env=env)
    if done.exit_code == 0:
        assert (to / "vda.raw").read_bytes() == CONTENT
    else:
        assert not to.exists()
        assert done.stderr.count("\n") == 1
    return done.exit_code


def key_ids(cli: Cli, repo: Path) -> list[str]:
    return [info["key"] for info in json.loads(cli("key", "list", "-r", repo, "--json").stdout)]


VERBS = (
    ("list",),
    ("show", "latest"),
    ("verify",),
    ("restore", "latest", "--to", "/nowhere"),
    ("backup", "qmp:/nowhere"),
    ("key", "add"),
    ("key", "rotate"),
    ("key", "export", "/nowhere/file"),
)


@pytest.mark.parametrize("verb", VERBS, ids=" ".join)
@pytest.mark.parametrize("env", [{}, B, {"NBDPULL_KEY_FILE": "/nowhere"}], ids=["no", "wrong", "f"])
def test_a_missing_or_wrong_key_is_12_and_one_line(
    cli: Cli, repo: Path, verb: tuple[str, ...], env: Env
) -> None:
    done = cli(*verb, "-r", repo, env={**env, "NBDPULL_NEW_PASSWORD": "n"})
    assert done.exit_code == 12
    assert done.stdout == ""
    assert done.stderr.startswith("nbdpull: ")
    assert done.stderr.count("\n") == 1


def test_the_right_password_lists_shows_verifies_and_restores(
    cli: Cli, repo: Path, tmp_path: Path
) -> None:
    assert len(json.loads(cli("list", "-r", repo, "--json", env=A).stdout)) == 1
    assert cli("show", "latest", "-r", repo, env=A).exit_code == 0
    assert cli("verify", "-r", repo, env=A).exit_code == 0
    assert restored(cli, repo, tmp_path / "out", A) == 0


def test_changing_the_password_is_a_new_slot_and_the_removal_of_the_old_one(
    cli: Cli, repo: Path
) -> None:
    (old,) = key_ids(cli, repo)
    env: Env = {**A, "NBDPULL_NEW_PASSWORD": "beta"}
    assert cli("key", "add", "-r", repo, "--label", "the new one", env=env).exit_code == 0
    assert "the new one" in cli("key", "list", "-r", repo).stdout
    assert cli("key", "remove", old[:8], "-r", repo).exit_code == 0
    assert cli("list", "-r", repo, env=A).exit_code == 12
    assert cli("list", "-r", repo, env=B).exit_code == 0


def test_the_last_slot_is_only_removed_by_force_and_the_recovery_key_brings_one_back(
    cli: Cli, repo: Path, tmp_path: Path
) -> None:
    file = tmp_path / "recovery"
    assert cli("key", "export", file, "-r", repo, env=A).exit_code == 0
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    assert cli("key", "export", file, "-r", repo, env=A).exit_code == 2
    (only,) = key_ids(cli, repo)
    refused = cli("key", "remove", only, "-r", repo)
    assert (refused.exit_code, "last one" in refused.stderr) == (2, True)
    assert cli("key", "remove", only, "-r", repo, "--force").exit_code == 0
    assert cli("list", "-r", repo, env=A).exit_code == 12
    assert restored(cli, repo, tmp_path / "out", {"NBDPULL_KEY_FILE": str(file)}) == 0
    done = cli("key", "import", file, "-r", repo, env={"NBDPULL_NEW_PASSWORD": "gamma"})
    assert done.exit_code == 0
    assert cli("list", "-r", repo, env={"NBDPULL_PASSWORD": "gamma"}).exit_code == 0


def test_a_writers_key_adds_backups_and_restores_none(cli: Cli, repo: Path, tmp_path: Path) -> None:
    file = tmp_path / "writer"
    assert cli("key", "export", "--writer", file, "-r", repo, env=A).exit_code == 0
    assert '"secret"' not in file.read_text()
    writer: Env = {"NBDPULL_KEY_FILE": str(file)}
    add(repo, key_file=file)
    assert len(json.loads(cli("list", "-r", repo, "--json", env=writer).stdout)) == 2
    assert restored(cli, repo, tmp_path / "out", writer) == 12
    assert cli("verify", "-r", repo, env=writer).exit_code == 12
    for change in (("add",), ("rotate",), ("export", tmp_path / "no")):
        env = {**writer, "NBDPULL_NEW_PASSWORD": "x"}
        assert cli("key", *change, "-r", repo, env=env).exit_code == 2
    assert cli("key", "import", file, "-r", repo, env={"NBDPULL_NEW_PASSWORD": "x"}).exit_code == 12
    assert restored(cli, repo, tmp_path / "out", A) == 0


def test_rotation_closes_what_comes_then_to_old_keys(cli: Cli, repo: Path, tmp_path: Path) -> None:
    env: Env = {**A, "NBDPULL_NEW_PASSWORD": "beta"}
    assert cli("key", "add", "-r", repo, env=env).exit_code == 0
    old_writer = tmp_path / "writer"
    assert cli("key", "export", "--writer", old_writer, "-r", repo, env=A).exit_code == 0
    done = cli("key", "rotate", "-r", repo, "--json", env=A)
    assert json.loads(done.stdout)["generation"] == 2
    add(repo, "alpha")
    # The same password opens both generations, the other one the older alone.
    assert len(json.loads(cli("list", "-r", repo, "--json", env=A).stdout)) == 2
    seen = cli("list", "-r", repo, "--json", env=B)
    assert len(json.loads(seen.stdout)) == 1
    assert "opens generation 1 of the keys, the newest is 2" in seen.stderr
    assert "another key" in seen.stderr
    assert cli("key", "add", "-r", repo, env={**B, "NBDPULL_NEW_PASSWORD": "x"}).exit_code == 2
    assert cli("verify", "-r", repo, env=A).exit_code == 0
    # What can't be read must not look sound, nor the one before it like the latest.
    for verb in (("verify",), ("show", "latest"), ("restore", "latest", "--to", tmp_path / "old")):
        done = cli(*verb, "-r", repo, env=B)
        assert done.exit_code == 12
        assert "another key" in done.stderr
    # A host that was not told yet still backs up, and the owner reads it.
    add(repo, key_file=old_writer)
    assert len(json.loads(cli("list", "-r", repo, "--json", env=A).stdout)) == 3
    assert restored(cli, repo, tmp_path / "out", A) == 0


def test_rotation_with_a_recovery_key_needs_a_new_password(
    cli: Cli, repo: Path, tmp_path: Path
) -> None:
    file = tmp_path / "recovery"
    assert cli("key", "export", file, "-r", repo, env=A).exit_code == 0
    key: Env = {"NBDPULL_KEY_FILE": str(file)}
    assert cli("key", "rotate", "-r", repo, env=key).exit_code == 2
    env = {**key, "NBDPULL_NEW_PASSWORD": "beta"}
    assert cli("key", "rotate", "-r", repo, env=env).exit_code == 0
    assert restored(cli, repo, tmp_path / "out", B) == 0
    # The file is of the old generation now, and must not found a third one beside the second.
    assert cli("key", "rotate", "-r", repo, env=env).exit_code == 2


def test_a_key_file_of_another_repository_is_refused(cli: Cli, repo: Path, tmp_path: Path) -> None:
    other, file = tmp_path / "other", tmp_path / "key"
    cli("init", "-r", other, "--encrypt", env=A)
    cli("key", "export", file, "-r", other, env=A)
    done = cli("list", "-r", repo, env={"NBDPULL_KEY_FILE": str(file)})
    assert done.exit_code == 12
    assert "the key file is of repository" in done.stderr
    assert cli("key", "import", file, "-r", repo, env={"NBDPULL_NEW_PASSWORD": "x"}).exit_code == 12


def test_a_plain_repository_has_no_keys_and_takes_none(cli: Cli, tmp_path: Path) -> None:
    path = tmp_path / "plain"
    assert cli("init", "-r", path, env=A).exit_code == 2
    assert not path.exists()
    assert cli("init", "-r", path).exit_code == 0
    assert cli("list", "-r", path, env=A).exit_code == 12
    for verb in (["list"], ["add"], ["rotate"], ["remove", "x"], ["export", tmp_path / "file"]):
        done = cli("key", *verb, "-r", path, env={"NBDPULL_NEW_PASSWORD": "x"})
        assert (done.exit_code, "is not encrypted" in done.stderr) == (2, True), verb


def test_no_secret_is_logged(cli: Cli, repo: Path, tmp_path: Path) -> None:
    env: Env = {**A, "NBDPULL_NEW_PASSWORD": "beta-new"}
    file = tmp_path / "recovery"
    seen = ""
    for line in (["key", "add"], ["key", "rotate"], ["key", "export", file], ["verify"]):
        done = cli(*line, "-r", repo, "--debug", "--progress", "json", env=env)
        assert done.exit_code == 0
        seen += done.stdout + done.stderr
    ring = json.loads(file.read_text())
    secrets = [ring["digest_key"], "beta-new"]
    secrets += [value for one in ring["generations"] for value in one.values()]
    assert [secret for secret in secrets if secret in seen] == []


def test_a_mistyped_command_is_one_line_and_2(cli: Cli) -> None:
    done = cli("key", "lst")
    assert (done.exit_code, done.stdout) == (2, "")
    assert done.stderr == (
        "nbdpull: there is no command 'key lst'; did you mean 'list'; see 'nbdpull key --help'\n"
    )
    alone = cli("key")
    assert (alone.exit_code, alone.stdout) == (2, "")
    assert "export" in alone.stderr


# -- at a terminal ---------------------------------------------------------------------------------


class Terminal:
    """The command line with a terminal of its own."""

    def __init__(self, *args: str | Path) -> None:
        self.fd, theirs = pty.openpty()
        self.seen = b""
        code = (
            "from tests.repo.helpers import CHEAP\nfrom nbdpull.repo import slots\n"
            "slots.DEFAULT_KDF = CHEAP\nfrom nbdpull.cli.main import main\nmain()"
        )
        self.process = subprocess.Popen(
            [sys.executable, "-c", code, *map(str, args)],
            stdin=theirs,
            stdout=theirs,
            stderr=theirs,
            start_new_session=True,
            preexec_fn=lambda: fcntl.ioctl(0, termios.TIOCSCTTY, 0),  # noqa: PLW1509 - one call
            cwd=Path(__file__).parents[2],
        )
        os.close(theirs)

    def expect(self, text: bytes) -> None:
        """Wait until it shows."""
        end = time.monotonic() + 60
        while text not in self.seen:
            assert time.monotonic() < end, self.seen
            if select.select([self.fd], [], [], 0.1)[0]:
                try:
                    self.seen += os.read(self.fd, 4096)
                except OSError:
                    break
        assert text in self.seen
        self.seen = self.seen.partition(text)[2]

    def type(self, text: str) -> None:
        os.write(self.fd, text.encode())

    def wait(self) -> int:
        """Read to the end; the exit code."""
        while True:
            try:
                raw = os.read(self.fd, 4096)
            except OSError:
                break
            if not raw:
                break
            self.seen += raw
        os.close(self.fd)
        return self.process.wait(60)


def test_a_password_is_asked_for_at_a_terminal_and_not_shown(tmp_path: Path) -> None:
    terminal = Terminal("init", "-r", tmp_path / "repo", "--encrypt")
    shown = b""
    for question, answer in (
        (b"new password: ", "hunter1"),
        (b"the same again: ", "hunter2"),
        (b"differ", ""),
        (b"new password: ", "hunter2"),
        (b"the same again: ", "hunter2"),
    ):
        terminal.expect(question)
        shown += terminal.seen
        if answer:
            terminal.type(f"{answer}\n")
    assert terminal.wait() == 0
    assert b"created encrypted repository" in terminal.seen
    assert b"hunter" not in shown + terminal.seen
    terminal = Terminal("list", "-r", tmp_path / "repo")
    terminal.expect(b"password: ")
    terminal.type("hunter2\n")
    assert terminal.wait() == 0
    assert b"no backups" in terminal.seen


def test_ctrl_c_at_the_question_ends_it_and_leaves_the_terminal_as_it_was(repo: Path) -> None:
    terminal = Terminal("list", "-r", repo)
    before = termios.tcgetattr(terminal.fd)[3]
    terminal.expect(b"password: ")
    terminal.type("\x03")
    os.set_blocking(terminal.fd, True)
    assert terminal.process.wait(60) == 128 + signal.SIGINT
    assert termios.tcgetattr(terminal.fd)[3] == before | termios.ECHO
    terminal.wait()
    assert b"ended by SIGINT" in terminal.seen


def test_a_password_may_go_through_scrypt(cli: Cli, tmp_path: Path) -> None:
    repo = tmp_path / "repo"
    assert cli("init", "-r", repo, "--encrypt", "--kdf", "scrypt", env=A).exit_code == 0
    env: Env = {**A, "NBDPULL_NEW_PASSWORD": "beta"}
    assert cli("key", "add", "-r", repo, "--kdf", "scrypt", env=env).exit_code == 0
    listed = json.loads(cli("key", "list", "-r", repo, "--json").stdout)
    assert [one["kdf"] for one in listed] == ["scrypt", "scrypt"]
    for own in (A, B):
        assert cli("list", "-r", repo, env=own).exit_code == 0
    assert cli("list", "-r", repo, env={"NBDPULL_PASSWORD": "gamma"}).exit_code == 12
    done = cli("list", "-r", repo, env={"NBDPULL_PASSWORD_COMMAND": " "})
    assert done.exit_code == 12
    assert "the password command is empty" in done.stderr
    assert cli("init", "-r", tmp_path / "x", "--encrypt", "--kdf", "md5", env=A).exit_code == 2
    with pytest.raises(nbdpull.UsageError, match="key derivation is 'md5'; expected argon2id or"):
        nbdpull.init(tmp_path / "x", encrypt=True, kdf="md5")  # type: ignore[arg-type]
