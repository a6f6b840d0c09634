"""LoRAs that callers register or send along: registry, intake of files, lookup for a request, deletion."""
