"""Train a language model so that its activations can be quantized: text, loop, checkpoints, Ray Train."""
