from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nbdpull.model.config import Config, Lock
from nbdpull.model.frame import FormatError
from tests.model.samples import damaged

CONFIG = Config(id="0123456789abcdef" * 2, capabilities={"ranges": True})


def with_(**changes: object) -> bytes:
    return json.dumps(json.loads(CONFIG.encode()) | changes).encode()


def test_settings_come_back_and_need_nothing_unknown() -> None:
    again = Config.decode(CONFIG.encode())
    assert again == CONFIG
    assert all(again.unknown(use) is None for use in ("read", "write", "gc"))


def test_keys_of_a_later_version_are_passed_over() -> None:
    assert Config.decode(with_(motto="later")) == CONFIG


@pytest.mark.parametrize(
    ("features", "refused"),
    [
        ({"read": ["holes"]}, {"read", "write", "gc"}),
        ({"write": ["holes"]}, {"write"}),
        ({"gc": ["holes"]}, {"gc"}),
        ({"write": ["single_writer"]}, set()),
    ],
)
def test_an_unknown_feature_stops_just_what_it_concerns(
    features: dict[str, list[str]], refused: set[str]
) -> None:
    config = Config.decode(with_(features={"read": [], "write": [], "gc": []} | features))
    for use in ("read", "write", "gc"):
        unknown = config.unknown(use)
        assert (unknown is not None) == (use in refused)
        assert unknown is None or "'holes'" in unknown


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"format": 2}, "format 2"),
        ({"suites": {"digest": "blake3-256", "cipher": "aes"}}, "cipher suite 'aes'"),
        ({"suites": {"digest": "md5", "cipher": "none"}}, "digest suite 'md5'"),
        ({"suites": {"digest": "blake3-256", "cipher": "none", "signature": "x"}}, "signature"),
        ({"suites": {}}, "digest suite"),
    ],
)
def test_an_unknown_format_or_suite_is_named(changes: dict[str, object], named: str) -> None:
    assert named in str(Config.decode(with_(**changes)).unknown("read"))


@pytest.mark.parametrize(
    "changes",
    [
        {"nbdpull": "else"},
        {"id": "00" * 16},
        {"id": None},
        {"format": "1"},
        {"format": True},
        {"features": []},
        {"features": {"read": []}},
        {"features": {"read": "x", "write": [], "gc": []}},
        {"features": {"read": [1], "write": [], "gc": []}},
        {"suites": None},
        {"capabilities": {"ranges": 1}},
    ],
)
def test_settings_that_cannot_be_are_refused(changes: dict[str, object]) -> None:
    with pytest.raises(FormatError):
        Config.decode(with_(**changes))


def test_damage_is_refused_or_changes_nothing_that_matters() -> None:
    for bad in damaged(CONFIG.encode()):
        try:
            config = Config.decode(bad)
        except FormatError:
            continue
        if config.unknown("read") is None:
            # White space, and the names of what the probe found.
            assert (config.id, config.features, config.suites) == (
                CONFIG.id,
                CONFIG.features,
                CONFIG.suites,
            )


@given(st.binary(max_size=100))
def test_no_bytes_crash_the_decoder(raw: bytes) -> None:
    with pytest.raises(FormatError):
        Config.decode(raw)


def test_a_lock_is_read_back_and_unknown_to_who_can_not_keep_it() -> None:
    lock = Lock(mode="compliance", duration_s=86400)
    made = Config.new("0f" * 16, {"create_only": True}, encrypted=False, lock=lock)
    assert Config.decode(made.encode()).lock == lock
    assert made.features["write"] == ("lock",)
    for bad in (b'"seconds": 0', b'"seconds": -1', b'"seconds": "1"', b'"seconds": 9999999999'):
        with pytest.raises(FormatError, match="lock"):
            Config.decode(made.encode().replace(b'"seconds": 86400', bad))
    with pytest.raises(FormatError, match="lock"):
        Config.decode(made.encode().replace(b'"compliance"', b'"other"'))
