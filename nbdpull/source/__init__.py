"""The VM's side: its monitor, its disks, and how a point in time of them is frozen."""
