"""The tiny models that ship with Weft: their drawings, their training and their score."""
