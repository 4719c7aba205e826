"""Regularization, grids, GPTQ and refinement: from weights and Hessians to integers and scales."""
