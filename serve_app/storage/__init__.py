"""Where finished and given pictures are kept."""
