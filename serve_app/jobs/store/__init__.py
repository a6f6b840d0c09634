"""The durable job store in Redis: state transitions, fair queue, cache keys, outbox, wake-ups."""
