"""Files of jobs, downloads from addresses of callers, and digests of model weights."""
