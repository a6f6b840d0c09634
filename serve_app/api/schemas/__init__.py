"""The shapes on the wire: strict for what comes in, documented for what goes out."""
