"""The dispatcher's side of jobs: claims, attempts, webhooks, removal of what is out of date."""
