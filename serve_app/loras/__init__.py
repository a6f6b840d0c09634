"""LoRAs that callers own or bring along: the register, where their files come from, and what goes when."""
