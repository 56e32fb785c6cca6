"""Where a password or a key file comes from, and that it goes nowhere else."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from nbdpull.errors import UsageError, WrongKeyError
from nbdpull.model.keysource import KeySource
from nbdpull.repo.password import NEW_PASSWORD, password_of, ring_of, wants_key
from tests.repo.helpers import encrypted


@pytest.fixture(autouse=True)
def clean(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in list(os.environ):
        if name.startswith("NBDPULL_"):
            monkeypatch.delenv(name)


ENV = KeySource()


def test_each_variable_gives_the_password(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    path = tmp_path / "password"
    path.write_bytes("grün \n second line\n".encode())
    for name, value in (
        ("NBDPULL_PASSWORD", "grün "),
        ("NBDPULL_PASSWORD_FILE", str(path)),
        ("NBDPULL_PASSWORD_COMMAND", f"head -c 100 '{path}'"),
    ):
        assert password_of(ENV) is None
        assert not wants_key(ENV)
        monkeypatch.setenv(name, value)
        assert password_of(ENV) == "grün ".encode()
        assert wants_key(ENV)
        assert password_of(KeySource(environment=False)) is None
        assert not wants_key(KeySource(environment=False))
        monkeypatch.delenv(name)


def test_what_the_caller_gives_goes_before_the_environment_and_asking_comes_last(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    assert password_of(KeySource(ask=lambda: "asked")) == b"asked"
    monkeypatch.setenv("NBDPULL_PASSWORD", "set")
    assert password_of(KeySource(ask=lambda: "asked")) == b"set"
    assert password_of(KeySource(password="given")) == b"given"
    assert password_of(KeySource(password=lambda: "called")) == b"called"
    assert password_of(KeySource(), NEW_PASSWORD) is None
    monkeypatch.setenv("NBDPULL_NEW_PASSWORD", "new")
    assert password_of(KeySource(), NEW_PASSWORD) == b"new"


def test_two_variables_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NBDPULL_PASSWORD", "x")
    monkeypatch.setenv("NBDPULL_PASSWORD_COMMAND", "true")
    with pytest.raises(UsageError, match="NBDPULL_PASSWORD and NBDPULL_PASSWORD_COMMAND are set"):
        password_of(ENV)


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("FILE", "/nowhere", "can't read the password file /nowhere: No such file"),
        ("FILE", "/dev/null", "the password is empty"),
        ("COMMAND", "true", "the password is empty"),
        ("COMMAND", "false", "the password command ended with 1"),
        ("COMMAND", "/nowhere", "the password command can't be run"),
        ("COMMAND", "'", "the password command can't be run"),
        ("COMMAND", " ", "the password command is empty"),
        # No shell: else what is in a password store's path could be run.
        ("COMMAND", "echo x; false", None),
    ],
)
def test_a_password_that_cannot_be_had_is_one_clear_error(
    monkeypatch: pytest.MonkeyPatch, name: str, value: str, message: str | None
) -> None:
    monkeypatch.setenv(f"NBDPULL_PASSWORD_{name}", value)
    if message is None:
        assert password_of(ENV) == b"x; false"
        return
    with pytest.raises(WrongKeyError, match=message):
        password_of(ENV)


def test_a_command_that_has_no_words_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NBDPULL_PASSWORD_COMMAND", "''")
    with pytest.raises(WrongKeyError, match="can't be run"):
        password_of(ENV)


def test_no_password_shows_in_a_repr() -> None:
    assert "hunter2" not in repr(KeySource(password="hunter2"))


def test_a_key_file_with_any_digit_changed_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    repository = encrypted(tmp_path / "repo")
    assert repository.vault is not None
    ring = repository.vault.ring
    path = tmp_path / "key"
    monkeypatch.setenv("NBDPULL_KEY_FILE", str(path))
    for one in (ring, ring.for_writers(), ring.rotated(bytes(32), bytes(32))):
        path.write_bytes(one.encode())
        assert ring_of(ENV) == one
    raw = ring.encode()
    secret = ring.generations[0].secret or b""
    # Blanks may be others, digits and letters not.
    for at in [at for at, byte in enumerate(raw) if bytes([byte]).strip()][::2]:
        path.write_bytes(raw[:at] + bytes([raw[at] ^ 1]) + raw[at + 1 :])
        with pytest.raises(WrongKeyError, match="can't be used") as caught:
            ring_of(ENV)
        assert secret.hex()[:8] not in str(caught.value)
    for bad in (b"", b"\xff", b"[]", b"{}", b"x" * (65 << 10)):
        path.write_bytes(bad)
        with pytest.raises(WrongKeyError, match="the key file"):
            ring_of(ENV)
    path.unlink()
    with pytest.raises(WrongKeyError, match="can't read the key file"):
        ring_of(ENV)
