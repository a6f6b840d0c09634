"""LoRAs on a replica: files, conversion to low-rank factors, cache on host and device, batched
computation."""
