"""A VM's disks, and looking at images with `qemu-img`."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tests.support.process import run
from tests.support.tools import QEMU_72, QemuTools

__all__ = ["Disk", "compare", "create_disk", "identical", "image_info", "to_raw"]

MIB = 1 << 20


@dataclass(frozen=True, slots=True, kw_only=True)
class Disk:
    """One disk of a VM, or one node of a storage daemon.

    In QEMU its device id is `name`, its format node is `node`, its file node is ``file-NAME``.

    Attributes:
        name: up to 20 letters, digits and ``-``.
        path: the image.
        format: ``raw`` or ``qcow2``.
        size: bytes of the virtual disk.
        device: a QEMU device: ``virtio-blk-pci``, ``scsi-hd``, ``ide-hd`` or ``nvme``.
        read_only: the guest may not write to it.
        iothread: give it an iothread of its own.
        throttled: put a permanent ``throttle`` filter, ``throttle-NAME``, between device and
            format node; ``throttle_bps`` limits its bytes a second (0: no limit).
        block_options: more options of the format node.
        device_options: more options of the device.
    """

    name: str
    path: Path
    size: int
    format: str = "qcow2"
    device: str = "virtio-blk-pci"
    read_only: bool = False
    iothread: bool = False
    throttled: bool = False
    throttle_bps: int = 0
    block_options: Mapping[str, Any] = field(default_factory=dict)
    device_options: Mapping[str, Any] = field(default_factory=dict)

    @property
    def node(self) -> str:
        """Name of the format node."""
        return f"node-{self.name}"

    @property
    def top(self) -> str:
        """Name of the node that the device is given."""
        return f"throttle-{self.name}" if self.throttled else self.node

    def blockdev(self) -> dict[str, Any]:
        """Arguments for ``blockdev-add`` of the format node, its file node included."""
        return {
            "driver": self.format,
            "node-name": self.node,
            "read-only": self.read_only,
            "discard": "unmap",
            "detect-zeroes": "off",
            **self.block_options,
            "file": {
                "driver": "file",
                "node-name": f"file-{self.name}",
                "filename": str(self.path),
                "read-only": self.read_only,
                "discard": "unmap",
            },
        }


def create_disk(
    folder: Path,
    name: str,
    *,
    size: int = 64 * MIB,
    format: str = "qcow2",  # noqa: A002 - qemu-img's own word
    tools: QemuTools = QEMU_72,
    options: str = "",
    **more: Any,
) -> Disk:
    """Make an empty image in `folder` and describe it; `more` goes to `Disk`.

    `options` are qemu-img's ``-o`` for the image.
    """
    path = folder / f"{name}.{format}"
    run(
        [
            tools.qemu_img,
            "create",
            "-q",
            "-f",
            format,
            *(["-o", options] if options else []),
            path,
            str(size),
        ]
    )
    return Disk(name=name, path=path, size=size, format=format, **more)


def identical(
    one: Path,
    other: Path,
    *,
    one_format: str = "raw",
    other_format: str = "raw",
    tools: QemuTools = QEMU_72,
) -> tuple[bool, str]:
    """Whether two images have one size and read the same, and how they differ."""
    sizes = [
        image_info(image, format=of, tools=tools)["virtual-size"]
        for image, of in ((one, one_format), (other, other_format))
    ]
    if sizes[0] != sizes[1]:
        # qemu-img compare alone calls a longer image identical when its tail is zero.
        return False, f"sizes differ: {sizes[0]} and {sizes[1]} bytes"
    done = run(
        [tools.qemu_img, "compare", "-U", "-f", one_format, "-F", other_format, one, other],
        check=False,
    )
    if done.returncode not in {0, 1}:
        raise AssertionError(f"qemu-img compare: {done.stderr}{done.stdout}")
    return done.returncode == 0, done.stdout.strip()


def compare(
    one: Path,
    other: Path,
    *,
    one_format: str = "raw",
    other_format: str = "raw",
    tools: QemuTools = QEMU_72,
) -> None:
    """Assert that two images have one size and the same bytes, by `qemu-img compare`.

    Raises:
        AssertionError: they don't.
    """
    same, words = identical(
        one, other, one_format=one_format, other_format=other_format, tools=tools
    )
    if not same:
        raise AssertionError(f"{one} and {other}: {words}")


def to_raw(
    image: Path,
    raw: Path,
    *,
    format: str = "qcow2",  # noqa: A002 - qemu-img's own word
    tools: QemuTools = QEMU_72,
) -> Path:
    """Copy what `image` reads as to the raw file `raw` and return that, even while QEMU has it open.

    Only sound while nothing writes: pause the VM first.
    """
    run([tools.qemu_img, "convert", "-U", "-f", format, "-O", "raw", image, raw])
    return raw


def image_info(
    image: Path,
    *,
    format: str = "qcow2",  # noqa: A002 - qemu-img's own word
    tools: QemuTools = QEMU_72,
) -> dict[str, Any]:
    """What `qemu-img info` says of `image`."""
    done = run([tools.qemu_img, "info", "-U", "-f", format, "--output=json", image])
    info: dict[str, Any] = json.loads(done.stdout)
    return info
