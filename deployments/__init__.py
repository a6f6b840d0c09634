"""The workshop: holds weights and makes pixels. Knows no HTTP and no Redis."""

import os

# Read by diffusers when it is first imported, which nobody here does before this line: whatever a model's
# repository holds, none of its code ever runs in our processes.
os.environ["DIFFUSERS_DISABLE_REMOTE_CODE"] = "1"

__version__ = "0.1.0"
