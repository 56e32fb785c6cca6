"""What a backup does before it reads: the block status of a whole disk; a program of its own.

Usage: python -m scripts.benchlib.planner URI CONTEXT
"""

from __future__ import annotations

import json
import sys

from nbdpull.model.grain import SEGMENT, segment_count
from nbdpull.nbdio.connection import Connection
from nbdpull.nbdio.status import Dirty, dirty_reader


def main() -> None:
    """Count the extents that are dirty."""
    uri, context = sys.argv[1:]
    extents = length = 0
    with Connection.open(uri, contexts=(context,)) as connection:
        reader = dirty_reader(connection, context)
        for index in range(segment_count(connection.size)):
            base = index * SEGMENT
            starts, ends, flags = reader.read(base, min(base + SEGMENT, connection.size))
            dirty = (flags & Dirty.DIRTY) != 0
            extents += int(dirty.sum())
            length += int((ends - starts)[dirty].sum())
        counted = {"extents": extents, "bytes": length, "requests": connection.requests}
        print(json.dumps(counted))


if __name__ == "__main__":
    main()
