"""SOURCE, parsed: what is understood, and what is told of what is not."""

from __future__ import annotations

import pytest

from nbdpull.errors import UsageError
from nbdpull.source.address import MonitorAddress, parse_source


@pytest.mark.parametrize(
    ("source", "address"),
    [
        ("qmp:/run/web.qmp", MonitorAddress(path="/run/web.qmp")),
        ("qmp:///run/web.qmp", MonitorAddress(path="/run/web.qmp")),
        ("qmp:relative/sock", MonitorAddress(path="relative/sock")),
        ("qmp:/a%20b%3Fc", MonitorAddress(path="/a b?c")),
        ("qmp+tcp://localhost:4444", MonitorAddress(host="localhost", port=4444)),
        ("qmp+tcp://127.0.0.1:4444/", MonitorAddress(host="127.0.0.1", port=4444)),
        ("qmp+tcp://127.3.2.1:1", MonitorAddress(host="127.3.2.1", port=1)),
        ("qmp+tcp://[::1]:4444", MonitorAddress(host="::1", port=4444)),
    ],
)
def test_understood(source: str, address: MonitorAddress) -> None:
    assert parse_source(source) == address


@pytest.mark.parametrize("source", ["qmp:/run/web.qmp", "qmp+tcp://localhost:4444"])
def test_address_is_printed_as_it_was_given(source: str) -> None:
    assert str(parse_source(source)) == source


@pytest.mark.parametrize(
    ("source", "words"),
    [
        ("/run/web.qmp", r"has no scheme; write 'qmp:/run/web\.qmp'"),
        ("./web.qmp", r"write 'qmp:\./web\.qmp'"),
        ("web", "expected qmp:/path/to/socket or qmp"),
        ("", "not understood"),
        ("qmp:", "not understood"),
        ("qmp://host/path", "not understood"),
        ("http://localhost:80", "not understood"),
        ("qmp+tcp://localhost", "not understood"),
        ("qmp+tcp://localhost:0", "not understood"),
        ("qmp+tcp://localhost:4444/path", "not understood"),
        ("qmp+tcp://:4444", "not understood"),
        ("qmp+tcp://localhost:port", "is not a URI"),
        ("qmp+tcp://localhost:99999", "is not a URI"),
        ("qmp+tcp://[::1", "is not a URI"),
        ("qmp+tcp://backup.example.com:4444", "on another machine"),
        ("qmp+tcp://192.0.2.7:4444", "on another machine"),
        ("qmp+tcp://0.0.0.0:4444", "on another machine"),
        ("qmp+tcp://localhost.example.com:4444", "on another machine"),
    ],
)
def test_refused_with_what_to_do(source: str, words: str) -> None:
    with pytest.raises(UsageError, match=words) as caught:
        parse_source(source)
    assert "\n" not in str(caught.value)
