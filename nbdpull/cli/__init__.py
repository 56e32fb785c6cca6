"""The command line: one module a verb, over `nbdpull.api` alone."""
