"""The inference layer: weights, engine and media. It knows no HTTP, Redis or S3."""

import os

# Read by diffusers at its first import, which is after this line: no code of a model's repository runs in our
# processes.
os.environ["DIFFUSERS_DISABLE_REMOTE_CODE"] = "1"

__version__ = "0.1.0"
