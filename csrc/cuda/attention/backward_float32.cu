// The backward pass of spae_attention for float32.
#include "cuda/attention/by_dtype.cuh"

template const char* speeder::cuda::spae_backward_of<float>(const AttentionBackward&,
                                                            const Extents&, const BackwardPlan&,
                                                            float*, void*);
