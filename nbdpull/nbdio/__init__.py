"""NBD connections and block status; the only place that knows libnbd."""
