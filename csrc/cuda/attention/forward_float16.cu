// The forward pass of spae_attention for float16.
#include "cuda/attention/by_dtype.cuh"

template const char* speeder::cuda::spae_forward_of<speeder::Half>(const AttentionForward&,
                                                                   const Extents&, float*, void*);
