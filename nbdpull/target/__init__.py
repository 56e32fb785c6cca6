"""Where a restore writes: raw files, qcow2 files, block devices, NBD exports, standard output."""
