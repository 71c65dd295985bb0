// The backward pass of spae_attention for float32.
#include "cuda/spae_stream.cuh"

template const char* speeder::cuda::spae_backward_of<float>(const AttentionBackward&,
                                                            const Extents&, const BackwardPlan&,
                                                            float*, void*);
