"""Authentication, rate limits, quota and request validation: all checks before a job is accepted."""
