"""spae_attention in Triton. `ops.py` is the way in; the kernels stand a file each beside it."""
