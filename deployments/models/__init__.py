"""Models: where their weights are, how they are loaded, and what is kept with them on the device."""
