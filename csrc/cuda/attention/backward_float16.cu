// The backward pass of spae_attention for float16.
#include "cuda/attention/by_dtype.cuh"

template const char* speeder::cuda::spae_backward_of<speeder::Half>(const AttentionBackward&,
                                                                    const Extents&,
                                                                    const BackwardPlan&, float*,
                                                                    void*);
