"""How a model runs on a device: dtype, place and form of every part, and the bytes of it. Pure: no torch."""
