"""From a request to a diffusers pipeline call: class, noise scheduler, arguments."""
