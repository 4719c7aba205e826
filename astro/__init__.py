"""Arithmetic and files of one process: Hessians, Astro regularization, GPTQ, packing, checkpoints."""

__version__ = "0.5.0"
