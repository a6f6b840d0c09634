"""What runs jobs: claims them, iterates over a model's events, stores artifacts, commits, cleans up."""
