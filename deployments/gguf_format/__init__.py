"""GGUF files, llama.cpp's format of quantised weights: its checked header, and the bytes of its tensors."""
