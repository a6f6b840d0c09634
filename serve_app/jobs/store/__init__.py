"""The durable job store on Valkey: records, queues, leases, result cache, webhook outbox and wake-ups."""
