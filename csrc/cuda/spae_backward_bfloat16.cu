// The backward pass of spae_attention for bfloat16.
#include "cuda/spae_stream.cuh"

template const char* speeder::cuda::spae_backward_of<speeder::BFloat16>(const AttentionBackward&,
                                                                        const Extents&,
                                                                        const BackwardPlan&, float*,
                                                                        void*);
