"""Reading of LoRA files by their safetensors header alone. Loads no torch and reads no tensor.

Used by both layers: serve_app when a LoRA is registered, deployments when it is loaded.
"""
