// The forward pass of spae_attention for float32.
#include "cuda/attention/by_dtype.cuh"

template const char* speeder::cuda::spae_forward_of<float>(const AttentionForward&, const Extents&,
                                                           float*, void*);
