"""The ops in Triton, a file an op, each imported when its op first runs on this backend.

Inside these files `import triton` is the real Triton: this package is only ever `speeder_kernels.triton`.
"""
