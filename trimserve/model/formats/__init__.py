"""How quantized checkpoints store a linear layer; one file a format, and `table.py` to tell them apart."""
