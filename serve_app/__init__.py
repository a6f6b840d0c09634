"""The serving layer: HTTP API, jobs, accounts and storage. It imports no torch."""
