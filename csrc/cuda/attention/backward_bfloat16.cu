// The backward pass of spae_attention for bfloat16.
#include "cuda/attention/by_dtype.cuh"

template const char* speeder::cuda::spae_backward_of<speeder::BFloat16>(const AttentionBackward&,
                                                                        const Extents&,
                                                                        const BackwardPlan&, float*,
                                                                        void*);
