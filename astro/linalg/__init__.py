"""Linear algebra on tensors side by side: tiles, factors, inverses, products, compiled loops."""
