"""scripts/bench: nbdpull and its peers on the same data, alternately, in one run."""
