"""One module a verb: the only place that wires source, repository and target together."""
