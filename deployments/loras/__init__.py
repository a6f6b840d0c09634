"""LoRAs: read from checked files, kept on disk, in memory and on the device, and mixed within one batch."""
