// How spae_attention is cut into blocks: tile sizes, grids, and what lies where in the working
// memory. Elements have two bytes: float32 is not compiled. No device code: the launchers and the
// tests that run the kernels on the host share it.
//
// A warp owns rows of 16 x kRowTiles, and the block's warps lie one below the other; the loop goes
// over tiles of kColumns. Sizes are bounded by registers (sums of a row are spread over four lanes)
// and by the 163 KiB of shared memory that a block may have on sm_80. sm_86, sm_89 and sm_120 give
// a block 99 KiB: each shape that takes more has a small one beside it, which is launched there.
#pragma once

#include <algorithm>
#include <cstdint>

#include "cuda/attention/attention.h"
#include "cuda/common/dispatch.h"

namespace speeder {
namespace cuda {

constexpr int kLargestHead = 256;
constexpr int64_t kSharedLeast = 99 * 1024;  // that a block has on every GPU, if it asks for it

template <int kWarpCount, int kTiles, int kColumnCount, int kBlocks>
struct TileShape {
  static constexpr int kWarps = kWarpCount;
  static constexpr int kRowTiles = kTiles;
  static constexpr int kRows = 16 * kTiles * kWarpCount;
  static constexpr int kColumns = kColumnCount;
  static constexpr int kThreads = 32 * kWarpCount;
  static constexpr int kMinBlocks = kBlocks;  // that a multiprocessor is to hold at once
};

// Rows are queries, columns keys. kSize: of a head, padded.
template <int kSize>
struct ForwardShape : TileShape<4, 2, 32, 2> {};
template <>
struct ForwardShape<128> : TileShape<8, 1, 64, 1> {};
template <>
struct ForwardShape<256> : TileShape<8, 1, 32, 1> {};

template <int kSize>
struct SmallForwardShape;
template <>
struct SmallForwardShape<128> : TileShape<8, 1, 48, 1> {};
template <>
struct SmallForwardShape<256> : TileShape<6, 1, 16, 1> {};

// Rows are queries, columns keys.
template <int kSize>
struct GradQShape : TileShape<4, 1, 64, 2> {};
template <>
struct GradQShape<96> : TileShape<4, 1, 32, 2> {};
template <>
struct GradQShape<128> : TileShape<4, 1, 32, 2> {};
template <>
struct GradQShape<256> : TileShape<4, 1, 16, 1> {};

template <int kSize>
struct SmallGradQShape;
template <>
struct SmallGradQShape<256> : TileShape<3, 1, 16, 1> {};

// The fewest that a tile has on any GPU, so that the working memory is the same on all.
constexpr int64_t grad_q_rows(int64_t size) {
  return size > 128 ? SmallGradQShape<256>::kRows : GradQShape<64>::kRows;
}

// Rows are keys, columns queries.
template <int kSize>
struct GradKVShape : TileShape<4, 1, 64, 2> {};
template <>
struct GradKVShape<96> : TileShape<4, 1, 32, 2> {};
template <>
struct GradKVShape<128> : TileShape<4, 1, 32, 2> {};
template <>
struct GradKVShape<256> : TileShape<4, 1, 32, 1> {};

template <int kSize>
struct SmallGradKVShape;
template <>
struct SmallGradKVShape<256> : TileShape<3, 1, 16, 1> {};

// The sums of both gradients of 256 values do not fit in registers: they take a pass each.
template <int kSize>
constexpr bool kGradKVTogether = kSize <= 128;

// Rows are the queries of a sequence times the heads of a group, and fit in one tile; each warp has
// keys of its own.
constexpr int kDecodeRows = 16;
template <int kSize>
struct DecodeShape : TileShape<4, 1, (kSize > 128 ? 16 : 32), 1> {};

template <int kSize>
struct SmallDecodeShape : TileShape<(kSize > 128 ? 2 : 4), 1, 16, 1> {};

// Or where there is no sequence: SpaeCombine then has the tokens behind it.
inline bool decodes(const AttentionArgs& args, const Extents& extents) {
  return args.sequences == 0 || extents.longest_q * (args.heads / args.kv_heads) <= kDecodeRows;
}

// What the keys of a sequence are shared among, so that few sequences fill a GPU: every warp of a
// decode block sums its share and leaves it in the working memory.
struct DecodePlan {
  static constexpr int kKeysLeast = 256;  // of a block
  static constexpr int64_t kBlocksWanted = 528, kSplitsMost = 64;

  DecodePlan(const AttentionArgs& args, const Extents& extents)
      : rows(extents.longest_q * (args.heads / args.kv_heads)),
        pairs(args.sequences * args.kv_heads),
        splits(std::min({kSplitsMost, kBlocksWanted / std::clamp<int64_t>(pairs, 1, kBlocksWanted),
                         std::max<int64_t>(divide_up(extents.longest_k, kKeysLeast), 1)})) {}

  // Each share has, row by row, `size` weighted values, the largest score and the sum of weights.
  int64_t floats(int64_t size) const { return pairs * splits * kWarpsMost * rows * (size + 2); }

  static constexpr int kWarpsMost = 4;
  int64_t rows;
  int64_t pairs;  // of a sequence and a key head
  int64_t splits;
};

// Gradients of the tables: shares of the work that have sums of their own, added up in order.
struct TablePlan {
  static constexpr int64_t kFloatsMost = int64_t{1} << 24;  // of all shares of one table
  static constexpr int kKeys = 1024;                        // of a share of the absolute table's

  static int64_t shares(int64_t wanted, int64_t table_floats) {
    return std::max<int64_t>(std::min(wanted, kFloatsMost / table_floats), 1);
  }
};

struct BackwardPlan {
  BackwardPlan(const AttentionBackward& call, const Extents& extents) {
    const AttentionArgs& args = call.args;
    const int64_t rows = grad_q_rows(args.size);
    query_tiles = divide_up(extents.longest_q, rows) * args.sequences;
    relative_shares = call.grad_relative ? TablePlan::shares(query_tiles, args.heads * args.buckets)
                                         : std::max<int64_t>(query_tiles, 1);
    absolute_shares = TablePlan::shares(divide_up(extents.tokens_k, TablePlan::kKeys),
                                        args.heads * std::max<int64_t>(args.positions, 1));
    delta = take(extents.tokens_q * args.heads);
    key_sums = take(call.grad_absolute ? extents.tokens_k * args.heads : 0);
    relative = take(call.grad_relative ? relative_shares * args.heads * args.buckets : 0);
    absolute = take(call.grad_absolute ? absolute_shares * args.heads * args.positions : 0);
  }

  // Of SpaeGradQ, or more: of all sequences, as if all were as long as the longest.
  int64_t query_tiles;
  int64_t relative_shares, absolute_shares;
  // Places in the working memory.
  int64_t delta;     // (tokens_q, heads): out . grad
  int64_t key_sums;  // (heads, tokens_k): a key's score gradients, summed over the queries
  int64_t relative;  // (shares, heads, buckets)
  int64_t absolute;  // (shares, heads, positions)
  int64_t floats = 0;

 private:
  int64_t take(int64_t count) {
    const int64_t at = floats;
    floats += count;
    return at;
  }
};

}  // namespace cuda
}  // namespace speeder
