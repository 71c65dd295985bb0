// Launches the kernels of spae_attention by a launcher: a stream's, or that of the tests, which run
// them on the host.
#pragma once

#include <type_traits>

#include "cuda/attention/decode.cuh"
#include "cuda/attention/grad_kv.cuh"
#include "cuda/attention/grad_q.cuh"
#include "cuda/attention/tables.cuh"
#include "cuda/common/dispatch.h"
#include "cuda/common/sum_parts.cuh"

namespace speeder {
namespace cuda {

// Whether load_rows may copy 16 bytes at a time.
template <typename T>
bool rows_are_aligned(const TokenView& view) {
  return aligned(view.data) && view.token_stride % kVector<T> == 0 &&
         view.head_stride % kVector<T> == 0;
}

template <typename T>
bool rows_are_aligned(const AttentionArgs& args, const void* out) {
  return args.size % kVector<T> == 0 && aligned(out) && rows_are_aligned<T>(args.q) &&
         rows_are_aligned<T>(args.k) && rows_are_aligned<T>(args.v);
}

// Calls `launch` with a null pointer of the kernel to launch: Large, or Small where a block has
// less shared memory than Large takes. Small is compiled only if there are such GPUs.
template <typename Large, typename Small, typename Launcher, typename F>
void with_fitting(Launcher& launcher, F&& launch) {
  constexpr int64_t kBytes = typename Large::Memory().layout.bytes();
  if constexpr (kBytes > kSharedLeast) {
    if (launcher.shared_most() < kBytes) return launch(static_cast<Small*>(nullptr));
  }
  launch(static_cast<Large*>(nullptr));
}

// Blocks of a kernel that also fills what lies behind the last sequence: that may be everything.
inline int64_t at_least_one(int64_t blocks) { return std::max<int64_t>(blocks, 1); }

template <typename T, typename Decode, typename Launcher>
void launch_spae_decode(const AttentionForward& call, const Extents& extents, float* scratch,
                        Launcher& launcher) {
  const AttentionArgs& args = call.args;
  const DecodePlan plan(args, extents);
  const int rows = static_cast<int>(plan.rows), splits = static_cast<int>(plan.splits);
  const Decode decode{call, scratch, splits, rows, rows_are_aligned<T>(args, call.out)};
  const typename Decode::Memory memory;
  launcher.launch({plan.pairs * splits, 1, 1, Decode::kThreads, memory.layout.bytes()}, decode);
  using Combine = SpaeCombine<T>;
  const Combine combine{call, scratch, extents.tokens_q, splits * Decode::kWarps, rows};
  const int64_t blocks = divide_up(plan.pairs * rows, Combine::kThreads / kWarp);
  launcher.launch({at_least_one(blocks), 1, 1, Combine::kThreads, 0}, combine);
}

template <typename T, typename Kernel, typename Launcher>
void launch_spae_prefill(const AttentionForward& call, const Extents& extents, Launcher& launcher) {
  const AttentionArgs& args = call.args;
  const int64_t tiles = divide_up(extents.longest_q, Kernel::kRows);
  const bool vectorized = rows_are_aligned<T>(args, call.out);
  const Kernel kernel{call, extents.tokens_q, static_cast<int>(tiles), vectorized};
  const typename Kernel::Memory memory;
  const int64_t blocks = args.sequences * tiles * args.heads;
  launcher.launch({blocks, 1, 1, Kernel::kThreads, memory.layout.bytes()}, kernel);
}

// kSize, here and below: the head size to compile for, args.size or more.
template <typename T, int kSize, typename Launcher>
void launch_spae_forward(const AttentionForward& call, const Extents& extents, float* scratch,
                         Launcher& launcher) {
  if (decodes(call.args, extents)) {
    with_fitting<SpaeDecode<T, kSize>, SpaeSmallDecode<T, kSize>>(launcher, [&](auto* kernel) {
      launch_spae_decode<T, std::decay_t<decltype(*kernel)>>(call, extents, scratch, launcher);
    });
  } else {
    with_fitting<SpaeForward<T, kSize>, SpaeSmallForward<T, kSize>>(launcher, [&](auto* kernel) {
      launch_spae_prefill<T, std::decay_t<decltype(*kernel)>>(call, extents, launcher);
    });
  }
}

template <typename T, int kSize, bool kGradK, bool kGradV, typename Launcher>
void launch_spae_grad_kv(const AttentionBackward& call, const Extents& extents, const float* delta,
                         float* key_sums, bool vectorized, Launcher& launcher) {
  using Large = SpaeGradKV<T, kSize, kGradK, kGradV>;
  using Small = SpaeSmallGradKV<T, kSize, kGradK, kGradV>;
  with_fitting<Large, Small>(launcher, [&](auto* fitting) {
    using Kernel = std::decay_t<decltype(*fitting)>;
    const AttentionArgs& args = call.args;
    const int64_t tiles = divide_up(extents.longest_k, Kernel::kRows);
    const Kernel kernel{call,      delta, key_sums, extents.tokens_k, static_cast<int>(tiles),
                        vectorized};
    const typename Kernel::Memory memory;
    const int64_t blocks = at_least_one(args.sequences * tiles * args.kv_heads);
    launcher.launch({blocks, 1, 1, Kernel::kThreads, memory.layout.bytes()}, kernel);
  });
}

// SpaeDelta, or SpaeGradQ where that finds delta itself.
template <typename T, int kSize, typename Launcher>
void launch_spae_grad_q(const AttentionBackward& call, const Extents& extents,
                        const BackwardPlan& plan, float* scratch, bool vectorized,
                        Launcher& launcher) {
  const AttentionArgs& args = call.args;
  const bool find_delta = call.grad_relative != nullptr || call.grad_absolute != nullptr;
  float* delta = scratch + plan.delta;
  if (!find_delta) {
    using Delta = SpaeDelta<T>;
    const int64_t blocks = divide_up(extents.tokens_q * args.heads, Delta::kThreads / kWarp);
    launcher.launch({blocks, 1, 1, Delta::kThreads, 0}, Delta{call, delta, extents.tokens_q});
    if (call.grad_q == nullptr && call.grad_relative == nullptr) return;
  }
  float* tables = call.grad_relative != nullptr ? scratch + plan.relative : nullptr;
  const int shares = static_cast<int>(plan.relative_shares);
  with_fitting<SpaeGradQ<T, kSize>, SpaeSmallGradQ<T, kSize>>(launcher, [&](auto* fitting) {
    using Kernel = std::decay_t<decltype(*fitting)>;
    static_assert(Kernel::kRows >= grad_q_rows(kSize), "the plan counts these tiles");
    const int64_t tiles = divide_up(extents.longest_q, Kernel::kRows);
    const Kernel kernel{
        call,   delta,     find_delta, tables, extents.tokens_q, static_cast<int>(tiles),
        shares, vectorized};
    const typename Kernel::Memory memory;
    const int64_t bytes = tables != nullptr ? memory.layout.bytes() : memory.bytes_without_table;
    launcher.launch({shares * args.heads, 1, 1, Kernel::kThreads, bytes}, kernel);
  });
}

template <typename T, int kSize, typename Launcher>
void launch_spae_grads(const AttentionBackward& call, const Extents& extents,
                       const BackwardPlan& plan, float* scratch, Launcher& launcher) {
  const AttentionArgs& args = call.args;
  const bool vectorized = rows_are_aligned<T>(args, call.grad_q) &&
                          rows_are_aligned<T>(call.grad) && aligned(call.grad_k) &&
                          aligned(call.grad_v);
  launch_spae_grad_q<T, kSize>(call, extents, plan, scratch, vectorized, launcher);
  const float* delta = scratch + plan.delta;
  float* key_sums = call.grad_absolute != nullptr ? scratch + plan.key_sums : nullptr;
  const bool score_grads = call.grad_k != nullptr || key_sums != nullptr;
  if constexpr (kGradKVTogether<kSize>) {
    if (score_grads || call.grad_v != nullptr) {
      launch_spae_grad_kv<T, kSize, true, true>(call, extents, delta, key_sums, vectorized,
                                                launcher);
    }
  } else {
    if (score_grads) {
      launch_spae_grad_kv<T, kSize, true, false>(call, extents, delta, key_sums, vectorized,
                                                 launcher);
    }
    if (call.grad_v != nullptr) {
      launch_spae_grad_kv<T, kSize, false, true>(call, extents, delta, nullptr, vectorized,
                                                 launcher);
    }
  }
}

// What turns the partial sums of a backward pass into the tables' gradients; for any element type.
template <typename Launcher>
void launch_spae_tables(const AttentionBackward& call, const Extents& extents,
                        const BackwardPlan& plan, float* scratch, Launcher& launcher) {
  const AttentionArgs& args = call.args;
  if (call.grad_relative != nullptr) {
    launch_sum_parts(scratch + plan.relative, call.grad_relative, plan.relative_shares,
                     args.heads * args.buckets, launcher);
  }
  if (call.grad_absolute == nullptr) return;
  const SpaeAbsoluteSums sums{
      scratch + plan.key_sums, args.rank_k,         args.cu_k + args.sequences,
      scratch + plan.absolute, extents.tokens_k,    args.heads,
      args.positions,          plan.absolute_shares};
  launcher.launch({plan.absolute_shares * args.heads, 1, 1, SpaeAbsoluteSums::kThreads, 0}, sums);
  launch_sum_parts(scratch + plan.absolute, call.grad_absolute, plan.absolute_shares,
                   args.heads * args.positions, launcher);
}

}  // namespace cuda
}  // namespace speeder
