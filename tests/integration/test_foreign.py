"""Other tools work with the same QEMU: a clean-up takes away ours, all of it, and nothing else."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from tests.integration.conftest import Keeper
from tests.support.disk import create_disk
from tests.support.process import run
from tests.support.tools import QemuTools
from tests.support.vm import Vm

MIB = 1 << 20


def state(vm: Vm) -> dict[str, Any]:
    """All jobs, exports and nodes, and every bitmap on every node."""
    nodes = vm.qmp("query-named-block-nodes", flat=True)
    return {
        "jobs": sorted(job["id"] for job in vm.qmp("query-jobs")),
        "exports": sorted(export["id"] for export in vm.qmp("query-block-exports")),
        "nodes": sorted(node["node-name"] for node in nodes),
        "bitmaps": sorted(
            (node["node-name"], bitmap["name"])
            for node in nodes
            for bitmap in node.get("dirty-bitmaps", [])
            if bitmap.get("name")
        ),
    }


def test_cleanup_leaves_what_others_made(
    qemu_tools: QemuTools, keeper: Keeper, tmp_path: Path
) -> None:
    disk = create_disk(tmp_path, "vda", size=256 * MIB, tools=qemu_tools)
    spare = create_disk(tmp_path, "vdb", tools=qemu_tools)
    server = tmp_path / "nbd"
    address = f"nbd+unix:///?socket={server}"
    with Vm([disk, spare], tools=qemu_tools) as vm:
        vm.qemu_io("vda", "write -P 1 0 64M")
        keeper.backup(vm.uri, include=("vda",))
        # Another tool's: a server, an export, a bitmap, a node, a job, and names that look like ours.
        vm.qmp("nbd-server-start", addr={"type": "unix", "data": {"path": str(server)}})
        vm.qmp("block-export-add", type="nbd", id="other", node_name=spare.node, name="other")
        for name in ("other", "np-other", "nbdpull-other", "np-0123abcd-", "nbdpull-x-exp"):
            vm.qmp("block-dirty-bitmap-add", node=disk.node, name=name)
        target = tmp_path / "target"
        run([qemu_tools.qemu_img, "create", "-q", "-f", "raw", target, str(64 * MIB)])
        vm.qmp("blockdev-add", driver="file", node_name="np-target", filename=str(target))
        vm.qmp(
            "blockdev-backup", job_id="np-job", device=spare.node, target="np-target", sync="none"
        )
        theirs = state(vm)
        command = [sys.executable, "-m", "nbdpull", "backup", vm.uri, "-r", keeper.repository]
        command += ["--scratch", str(keeper.scratch), "--nbd-address", address, "-l", "full"]
        command += ["-i", "vda", "--rate", "4M", "--progress", "json"]
        with subprocess.Popen(command, stderr=subprocess.PIPE) as client:
            assert client.stderr is not None
            for line in client.stderr:
                if json.loads(line).get("read_bytes", 0) > 0:
                    break
            client.kill()
        assert state(vm) != theirs
        cleaned = keeper.cleanup(vm.uri)
        assert cleaned.removed
        assert cleaned.kept == ()
        assert state(vm) == theirs
        assert server.is_socket()
        assert keeper.cleanup(vm.uri).removed == ()
        assert state(vm) == theirs
        # And the chain goes on.
        vm.qemu_io("vda", "write -P 2 0 64k")
        result = keeper.backup(vm.uri, include=("vda",), nbd_address=address)
        assert result.disks[0].changed_bytes == 65536
        vm.qmp("job-cancel", id="np-job")
