// The forward pass of spae_attention for float32.
#include "cuda/spae_stream.cuh"

template const char* speeder::cuda::spae_forward_of<float>(const AttentionForward&, const Extents&,
                                                           float*, void*);
