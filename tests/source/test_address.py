"""SOURCE, parsed: what is understood, and what is told of what is not."""

from __future__ import annotations

from pathlib import Path

import pytest

from nbdpull.errors import UsageError
from nbdpull.source.address import (
    DomainAddress,
    ImageAddress,
    MonitorAddress,
    SshHost,
    parse_source,
)


@pytest.mark.parametrize(
    ("source", "address"),
    [
        ("qmp:/run/web.qmp", MonitorAddress(path="/run/web.qmp")),
        ("qmp:///run/web.qmp", MonitorAddress(path="/run/web.qmp")),
        ("qmp:relative/sock", MonitorAddress(path="relative/sock")),
        ("qmp:/a%20b%3Fc", MonitorAddress(path="/a b?c")),
        ("qmp+ssh://web/run/q", MonitorAddress(path="/run/q", ssh=SshHost(destination="web"))),
        (
            "qmp+ssh://Me@Web-1.example:2222/run/a%20b",
            MonitorAddress(path="/run/a b", ssh=SshHost(destination="Me@Web-1.example", port=2222)),
        ),
        ("qmp+ssh://[::1]/q", MonitorAddress(path="/q", ssh=SshHost(destination="::1"))),
        ("qmp+tcp://localhost:4444", MonitorAddress(host="localhost", port=4444)),
        ("qmp+tcp://127.0.0.1:4444/", MonitorAddress(host="127.0.0.1", port=4444)),
        ("qmp+tcp://127.3.2.1:1", MonitorAddress(host="127.3.2.1", port=1)),
        ("qmp+tcp://[::1]:4444", MonitorAddress(host="::1", port=4444)),
        ("libvirt:web", DomainAddress(domain="web")),
        ("libvirt:a:b#c %20", DomainAddress(domain="a:b#c %20")),
        (
            "libvirt+qemu:///session#web",
            DomainAddress(domain="web", uri="qemu:///session"),
        ),
        (
            "libvirt+qemu+unix:///system?socket=/run/x#a#b",
            DomainAddress(domain="a#b", uri="qemu+unix:///system?socket=/run/x"),
        ),
        (
            "libvirt+qemu://localhost/system#web",
            DomainAddress(domain="web", uri="qemu://localhost/system"),
        ),
    ],
)
def test_understood(source: str, address: MonitorAddress | DomainAddress) -> None:
    assert parse_source([source]) == address


@pytest.mark.parametrize(
    "source",
    ["qmp:/run/web.qmp", "qmp+tcp://localhost:4444", "libvirt:web", "libvirt+qemu:///system#web"],
)
def test_address_is_printed_as_it_was_given(source: str) -> None:
    assert str(parse_source([source])) == source


@pytest.mark.parametrize(
    ("source", "words"),
    [
        ("/run/web.qmp", r"has no scheme; write 'qmp:/run/web\.qmp'"),
        ("./web.qmp", r"write 'qmp:\./web\.qmp'"),
        ("web", "expected qmp:/path/to/socket"),
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
        ("disk:rbd:pool/web", r"no file; .* 'qemu-nbd --read-only .* rbd:pool/web'"),
        ("disk:vda=rbd:pool/web:conf=/etc/ceph/b.conf", "NAME=nbd"),
        ("libvirt:", r"expected libvirt:DOMAIN or libvirt\+URI#DOMAIN"),
        ("libvirt+qemu:///system", r"expected libvirt:DOMAIN or libvirt\+URI#DOMAIN"),
        ("libvirt+qemu:///system#", r"expected libvirt:DOMAIN or libvirt\+URI#DOMAIN"),
        ("libvirt+web#web", r"expected libvirt:DOMAIN or libvirt\+URI#DOMAIN"),
        ("libvirt+qemu+ssh://root@host.example.com/system#web", "of another machine"),
        ("libvirt+qemu://[::1/system#web", "is no URI"),
    ],
)
def test_refused_with_what_to_do(source: str, words: str) -> None:
    with pytest.raises(UsageError, match=words) as caught:
        parse_source([source])
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("source", "path", "image_format", "name"),
    [
        ("disk:/a/b.qcow2", "/a/b.qcow2", None, None),
        ("disk:vda=/a/b.qcow2", "/a/b.qcow2", None, "vda"),
        ("disk+raw:vda=/dev/vg/lv", "/dev/vg/lv", "raw", "vda"),
        ("disk:/a/b=c.qcow2", "/a/b=c.qcow2", None, None),
        ("disk:vda=/a/b=c.qcow2", "/a/b=c.qcow2", None, "vda"),
        ("disk:b.raw", str(Path.cwd() / "b.raw"), None, None),
        ("disk:json:{}", str(Path.cwd() / "json:{}"), None, None),
    ],
)
def test_an_image(source: str, path: str, image_format: str | None, name: str | None) -> None:
    wanted = ImageAddress(path=path, format=image_format, name=name)
    assert parse_source([source]) == (wanted,)


@pytest.mark.parametrize(
    ("sources", "words"),
    [
        ([], "no source is given"),
        (["/run/a.raw"], "'disk:/run/a.raw' for a disk image"),
        (["qmp:/a", "qmp:/b"], "2 sources are given"),
        (["qmp:/a", "disk:/b"], "2 sources are given"),
        (["disk:"], "expected disk:"),
        (["disk:=/a"], "expected disk:"),
        (["disk+luks:/a"], "format 'luks'; expected one of"),
        (["disk:vda=/a", "disk:vda=/b"], "disk 'vda' is given 2 times"),
        (["disk:a=/x", "disk:b=/x"], "image '/x' is given 2 times"),
    ],
)
def test_what_makes_no_vm_is_refused(sources: list[str], words: str) -> None:
    with pytest.raises(UsageError, match=words):
        parse_source(sources)


@pytest.mark.parametrize(
    "source",
    [
        "qmp+ssh://-oProxyCommand=x/q",
        "qmp+ssh://-l@host/q",
        "qmp+ssh://me:secret@host/q",
        "qmp+ssh://host",
        "qmp+ssh://host/",
        "qmp+ssh:///q",
        "qmp+ssh://ho st/q",
        "qmp+ssh://host:x/q",
        "qmp+ssh://host/q\n",
    ],
)
def test_what_is_no_host_for_ssh_is_refused_without_repeating_it(source: str) -> None:
    with pytest.raises(UsageError) as caught:
        parse_source([source])
    assert "secret" not in str(caught.value)
    assert "expected" in str(caught.value)
