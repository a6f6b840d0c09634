"""Who calls, and what may be asked: everything decided before a job is accepted."""
