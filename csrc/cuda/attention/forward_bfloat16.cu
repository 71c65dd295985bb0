// The forward pass of spae_attention for bfloat16.
#include "cuda/attention/by_dtype.cuh"

template const char* speeder::cuda::spae_forward_of<speeder::BFloat16>(const AttentionForward&,
                                                                       const Extents&, float*,
                                                                       void*);
