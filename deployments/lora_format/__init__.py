"""Reading and checking LoRA files; used by both layers."""
