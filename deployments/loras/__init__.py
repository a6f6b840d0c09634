"""LoRAs, LoHas, LoKrs and DoRAs on a replica: files, conversion to factors, cache on host and device,
batched computation."""
