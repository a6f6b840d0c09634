"""From a request to a call of a diffusers pipeline: its class, noise scheduler, arguments and callbacks."""
