"""The header of a checkpoint in one safetensors file, and what it says of the model in it. Loads no torch."""
