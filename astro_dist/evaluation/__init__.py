"""The judging of models, quantized or not: perplexity, tasks, continuations, and runs beside each other."""
