"""A request and a model card to a resolved request, or the reason for its refusal. Pure; loads no torch.

Used by both layers: serve_app before it accepts a job, and deployments again for every request, because a
call by Serve handle does not pass HTTP.
"""
