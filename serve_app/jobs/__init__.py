"""Jobs: accepted durably, run under a lease by any worker, ended exactly once, followed from any process."""
