"""On-disk layouts of quantized linear layers, one module each."""
