"""A transformers model, block by block: its layers, its experts, what a block is called with."""
