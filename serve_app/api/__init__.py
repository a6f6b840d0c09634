"""HTTP API: one folder per dialect, each of which turns its request bodies into one GenerationRequest."""
