"""Real servers for the tests, and other implementations to check with.

Nothing here imports the product. What it offers:

- Fixture `qemu_tools` (tests/conftest.py): each test that takes it runs on ``qemu-7.2`` and on
  ``qemu-10``. It is a `tools.QemuTools`: `qemu_system`, `qemu_img`, `qemu_nbd`, `qemu_io`,
  `storage_daemon` (paths), `version`. `QEMU_72` and `QEMU_10` are the two by name.
- `disk.create_disk(folder, "vda", size=64 << 20, format="qcow2", tools=...)` makes an empty image
  and returns a `Disk` (device id `vda`, format node `node-vda`, file node `file-vda`). More
  keywords: `device` (virtio-blk-pci, scsi-hd, ide-hd, nvme), `iothread`, `throttled`, `read_only`.
- `vm.Vm(disks, tools=..., writer=BootWriter(), paused=..., name=...)` in a `with` block: a VM with
  a monitor for the product (`vm.socket`, `vm.uri` = ``qmp:...``) and another one for the test:
  `vm.qmp(command, key=value)`, `vm.events`, `vm.wait_event(name)`. Without a `writer` it starts
  paused. `qemu_io("vda", "write -P 1 0 64k")` writes as the guest would. `pause`, `cont`,
  `halted()`, `status`, `kill` (SIGKILL), `terminate`, `quit`, `restart`, `hot_add`, `hot_remove`,
  `block_resize`, `bitmaps("vda")`, `leftovers()` (what is in QEMU that the harness did not put
  there), `written()`, `wait_written(rounds)`, `process.pid`, `stderr()`.
- `vm.StorageDaemon(disks, tools=..., nbd_server=False)`: the same for qemu-storage-daemon;
  its guest is a writable FUSE or NBD export behind `qemu_io`.
- `bootwriter.BootWriter`: a guest of 512 bytes that writes to all its disks all the time, and
  `check(raw)` / `check_together([a, b])`: every byte of restored disks against what that guest
  had written at one point in time. No pause is needed to know the truth.
- `vm.copy_disks(folder)` inside `with vm.halted()`: the disks as raw files, by name.
- `disk.compare(a, b, one_format=..., other_format=...)`: same size and bytes, by `qemu-img
  compare`; `identical` returns it instead; `to_raw`, `image_info`.
- `linuxguest.LinuxGuest`: Debian's kernel writing numbered records to two ext4 disks.
- `ceph.Ceph`: a monitor and an OSD, for disks in RBD. `firmware.pflash`, `tpm.tpm_of_a_vm`: OVMF and swtpm for a `Vm`.
- `process.spawn`, `stop`, `run`: children that die with the test run. `vm.pid_alive(pid)`.
"""
