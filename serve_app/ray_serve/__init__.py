"""Everything of the serving layer that knows Ray Serve."""
