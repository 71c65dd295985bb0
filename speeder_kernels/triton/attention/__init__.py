"""spae_attention in Triton.

`ops.py` is the way in: it launches the kernels, with arguments from `arguments.py` in the named tuples of `tuples.py`.
The forward pass is `forward.py`, or `decode.py` for few queries. The backward pass begins in `backward_rows.py`, where
its formulas stand; then a file each for the gradients of q, of k and v, and of the two tables, which sum in
`partial_tables.py`. All share `sequences.py` (where tiles lie), `ranks.py` (what a tile's ranks are) and `bias.py`
(scores with their bias).
"""
