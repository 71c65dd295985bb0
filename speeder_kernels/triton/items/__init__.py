"""The four ops on items in Triton: packing, compressing, scoring and ranking them, a file an op."""
