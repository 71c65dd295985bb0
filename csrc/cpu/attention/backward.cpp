// The backward pass of spae_attention: one task is keys of one sequence and one key head, and the
// queries that see them. Scores are computed again from the saved log-sum-exp, a block of keys
// times a block of queries at a time. Built once for each instruction set.
#include "cpu/attention/bias.h"
#include "cpu/attention/prefetch.h"
#include "cpu/attention/tasks.h"
#include "cpu/common/tile_packing.h"
#include "cpu/common/tile_product.h"

namespace speeder {
namespace SPEEDER_ISA {
namespace {

// How a block's weights and score gradients are kept for the products that sum over queries: as the
// register tiles read them. Floats stay where the first products put them, ...
struct FloatScores {
  FloatScores(const BackwardScratch& at, int64_t ld) : at_(at), ld_(ld) {}
  float* tile_weights(int64_t r) const { return at_.weights + r * ld_; }
  float* tile_grads(int64_t r) const { return at_.grad_scores + r * ld_; }
  void keep(int64_t, int64_t, int64_t) const {}
  const float* weights() const { return at_.weights; }
  const float* grads() const { return at_.grad_scores; }
  const float* grad_rows(int64_t r) const { return tile_grads(r); }
  const float* queries() const { return at_.q; }
  const float* query_grads() const { return at_.grad; }
  void turn_queries(int64_t, int64_t, int64_t) const {}

 private:
  const BackwardScratch& at_;
  const int64_t ld_;
};

#if defined(__AVX512BF16__)
// ... bfloat16 in pairs: of two rows for sums over queries, of two keys for sums over keys.
struct PairScores {
  PairScores(const BackwardScratch& at, int64_t ld) : at_(at), ld_(ld) {}
  float* tile_weights(int64_t) const { return at_.tile_weights; }
  float* tile_grads(int64_t) const { return at_.tile_grads; }
  void keep(int64_t r, int64_t tile, int64_t vecs) const {
    static_assert(kTileRows % 2 == 0, "a pair of rows lies in one tile");
    for (int64_t n = 0; n < tile; n += 2) {
      Pair* weights = reinterpret_cast<Pair*>(at_.weights) + (r + n) / 2 * ld_;
      Pair* grads = reinterpret_cast<Pair*>(at_.grad_scores) + (r + n) / 2 * ld_;
      interleave_rows(at_.tile_weights + n * ld_, n + 1 < tile, vecs, weights);
      interleave_rows(at_.tile_grads + n * ld_, n + 1 < tile, vecs, grads);
    }
    for (int64_t n = 0; n < tile; ++n) {
      BFloat16* to = reinterpret_cast<BFloat16*>(at_.grad_rows) + n * ld_;
      for (int64_t v = 0; v < vecs; ++v) {
        store(to + v * kWidth, load(at_.tile_grads + n * ld_ + v * kWidth));
      }
    }
  }
  const Pair* weights() const { return reinterpret_cast<const Pair*>(at_.weights); }
  const Pair* grads() const { return reinterpret_cast<const Pair*>(at_.grad_scores); }
  const Pair* grad_rows(int64_t) const { return reinterpret_cast<const Pair*>(at_.grad_rows); }
  const Pair* queries() const { return reinterpret_cast<const Pair*>(at_.q_depth); }
  const Pair* query_grads() const { return reinterpret_cast<const Pair*>(at_.grad_depth); }
  void turn_queries(int64_t rows, int64_t size, int64_t width) const {
    pack_depth(reinterpret_cast<const BFloat16*>(at_.q), width, rows, size,
               reinterpret_cast<Pair*>(at_.q_depth), width);
    pack_depth(reinterpret_cast<const BFloat16*>(at_.grad), width, rows, size,
               reinterpret_cast<Pair*>(at_.grad_depth), width);
  }

 private:
  void interleave_rows(const float* rows, bool both, int64_t vecs, Pair* out) const {
    for (int64_t v = 0; v < vecs; ++v) {
      const float* at = rows + v * kWidth;
      store_lanes(out + v * kWidth, interleave(load(at), both ? load(at + ld_) : Vec{}));
    }
  }

  const BackwardScratch& at_;
  const int64_t ld_;
};

template <typename T>
using Scores = PairScores;
#else
template <typename T>
using Scores = FloatScores;
#endif

template <typename T>
class Backward {
  using P = Packed<T>;

 public:
  Backward(const AttentionBackward& call, const BiasTables& tables, const BackwardTask& task,
           const BackwardTask* next, const BiasSums& sums, float* scratch)
      : call_(call),
        args_(call.args),
        at_(call.args, 0, scratch),
        bias_(call.args, tables),
        group_(args_.heads / args_.kv_heads),
        head_(task.kv_head * group_),
        kv_head_(task.kv_head),
        width_(padded(args_.size)),
        q_ld_(width_ / kInLane<P>),
        depth_(lanes_of<P>(args_.size)),
        size_vecs_(round_up(args_.size, kWidth) / kWidth),
        factor_(args_.scale * kLog2E),
        q0_(args_.cu_q[task.sequence]),
        k0_(args_.cu_k[task.sequence]),
        queries_(args_.cu_q[task.sequence + 1] - q0_),
        keys_(args_.cu_k[task.sequence + 1] - k0_),
        first_(task.first),
        end_(task.first + task.count),
        grad_q_(task.shared_grad_q ? task.shared_grad_q : at_.grad_q),
        before_(task.before),
        done_(task.done),
        step_(args_.causal ? 1 : 0),
        reach_(args_.causal ? keys_ - queries_ + 1 : keys_) {
    if (sums.relative != nullptr) relative_ = sums.relative + head_ * relative_stride(args_);
    if (sums.absolute != nullptr) absolute_ = sums.absolute + head_ * args_.positions;
    need_scores_ = call.grad_q || call.grad_k || relative_ || absolute_;
    if (next != nullptr) prepare_prefetch(*next);
  }

  void run() {
    if (first_ == end_) return write_no_grad_q();
    const int64_t block = key_block(args_);
    one_block_ = keys_ <= block;
    for (int64_t first = first_; first < end_; first += block) {
      key_block_pass(first, smaller(block, end_ - first));
    }
    if (call_.grad_q == nullptr || grad_q_ != at_.grad_q) return;
    for (int64_t r = 0; r < queries_ * group_; ++r) {
      const int64_t row = (q0_ + r / group_) * args_.heads + head_ + r % group_;
      store_row(static_cast<T*>(call_.grad_q) + row * args_.size, at_.grad_q + r * width_,
                args_.size, args_.scale);
    }
  }

 private:
  // Where there are no keys. Not by way of scratch memory, which has no room for it.
  void write_no_grad_q() const {
    T* out = static_cast<T*>(call_.grad_q) + (q0_ * args_.heads + head_) * args_.size;
    for (int64_t i = 0; call_.grad_q != nullptr && i < queries_; ++i) {
      for (int64_t d = 0; d < group_ * args_.size; ++d) {
        out[i * args_.heads * args_.size + d] = from_float<T>(0.0f);
      }
    }
  }

  void prepare_prefetch(const BackwardTask& next) {
    const int64_t q = args_.cu_q[next.sequence], queries = args_.cu_q[next.sequence + 1] - q;
    const int64_t k = args_.cu_k[next.sequence] + next.first, keys = next.count;
    const int64_t head = next.kv_head * group_, size = args_.size;
    const TokenView grad_q{call_.grad_q, args_.heads * size, size};
    prefetch_.add<T>(args_.q, q, queries, head, group_, size);
    prefetch_.add<T>(call_.grad, q, queries, head, group_, size);
    prefetch_.add<T>(grad_q, q, queries, head, group_, size);
    prefetch_.add<T>(args_.k, k, keys, next.kv_head, 1, size);
    prefetch_.add<T>(args_.v, k, keys, next.kv_head, 1, size);
    void* const grads[2] = {call_.grad_k, call_.grad_v};
    for (void* grad : grads) {
      const TokenView view{grad, args_.kv_heads * size, size};
      prefetch_.add<T>(view, k, keys, next.kv_head, 1, size);
    }
  }

  static void zero(float* p, int64_t count) { __builtin_memset(p, 0, count * sizeof(float)); }

  static const T* row(const TokenView& view, int64_t token, int64_t head) {
    return static_cast<const T*>(view.data) + token * view.token_stride + head * view.head_stride;
  }

  // How many keys of the block that begins at `first` query i sees.
  int64_t seen(int64_t i, int64_t first, int64_t count) const {
    return clamp(reach_ + step_ * i - first, 0, count);
  }

  void key_block_pass(int64_t first, int64_t count) {
    const int64_t ld = padded(count);
    const T* k = row(args_.k, k0_ + first, kv_head_);
    const T* v = row(args_.v, k0_ + first, kv_head_);
    pack_columns(k, args_.k.token_stride, count, args_.size, packed(at_.k_turned), ld);
    if (call_.grad_q != nullptr) {
      pack_depth(k, args_.k.token_stride, count, args_.size, packed(at_.k), width_);
    }
    if (need_scores_) {
      pack_columns(v, args_.v.token_stride, count, args_.size, packed(at_.v_turned), ld);
    }
    bias_.prepare(args_.rank_k + k0_ + first, count);
    if (absolute_ != nullptr) zero(at_.absolute_sums, group_ * ld);

    // The first query that sees this block, and equal blocks of queries from there.
    const int64_t from = args_.causal ? clamp(first - reach_ + 1, 0, queries_) : 0;
    const int64_t most = query_block(kBackwardRows, args_);
    const int64_t blocks = (queries_ - from + most - 1) / most;
    // The first products set the queries' gradient, but for queries that see none of it. The only
    // block of queries sets the keys' gradients: its last query sees all of them.
    add_q_ = first > first_ || before_ != nullptr;
    add_k_ = blocks != 1;
    if (call_.grad_q != nullptr && !add_q_) zero(grad_q_, from * group_ * width_);
    if (call_.grad_k != nullptr && add_k_) zero(at_.grad_k, count * width_);
    if (call_.grad_v != nullptr && add_k_) zero(at_.grad_v, count * width_);
    // From the last block to the first: all blocks of keys are seen by the last queries, so the
    // tasks that take turns there are soon all under way.
    for (int64_t b = blocks - 1; b >= 0; --b) {
      const int64_t i = from + (queries_ - from) * b / blocks;
      query_block_pass(first, count, ld, i, from + (queries_ - from) * (b + 1) / blocks - i);
    }

    for (int64_t g = 0; absolute_ != nullptr && g < group_; ++g) {
      bias_.add_absolute(count, at_.absolute_sums + g * ld, absolute_ + g * args_.positions);
    }
    for (int64_t j = 0; j < count; ++j) {
      const int64_t out = ((k0_ + first + j) * args_.kv_heads + kv_head_) * args_.size;
      if (call_.grad_k != nullptr) {
        store_row(static_cast<T*>(call_.grad_k) + out, at_.grad_k + j * width_, args_.size,
                  args_.scale);
      }
      if (call_.grad_v != nullptr) {
        store_row(static_cast<T*>(call_.grad_v) + out, at_.grad_v + j * width_, args_.size, 1.0f);
      }
    }
  }

  // Queries first_query .. + queries - 1 against the packed block of keys.
  void query_block_pass(int64_t first, int64_t count, int64_t ld, int64_t first_query,
                        int64_t queries) {
    const Scores<T> scores(at_, ld);
    const int64_t rows = queries * group_;
    pack_queries(first_query, queries);
    scores.turn_queries(rows, args_.size, width_);
    if (before_ != nullptr) wait_for(before_, first_query);
    for (int64_t r = 0; r < rows; r += kTileRows) {
      const int64_t tile = smaller(kTileRows, rows - r);
      const int64_t most = seen(first_query + (r + tile - 1) / group_, first, count);
      if (most == 0) continue;
      if (first + count == end_) prefetch_.advance((tile + group_ - 1) / group_);
      const int64_t vecs = round_up(most, kWidth) / kWidth;
      // The products over queries take a tile's keys at a time, which may reach past the last one
      // seen.
      static_assert(kTileRows <= 2 * kMaxWidth, "two more vectors hold a tile's keys");
      const int64_t filled = smaller(vecs + 2, ld / kWidth);
      float* weights = scores.tile_weights(r);
      float* grads = scores.tile_grads(r);
      product<false>(registers_, tile, vecs, depth_, packed(at_.q) + r * q_ld_, q_ld_,
                     packed(at_.k_turned), ld, weights, ld, false);
      if (need_scores_) {
        product<false>(registers_, tile, vecs, depth_, packed(at_.grad) + r * q_ld_, q_ld_,
                       packed(at_.v_turned), ld, grads, ld, false);
      }
      int64_t i = first_query + r / group_, g = r % group_;
      for (int64_t n = 0; n < tile; ++n, ++g) {
        if (g == group_) {
          g = 0;
          ++i;
        }
        const int64_t rank = args_.rank_q[q0_ + i], keys = seen(i, first, count);
        float *p = weights + n * ld, *dp = grads + n * ld, *by_key = at_.absolute_sums + g * ld;
        const float lse = at_.lse[r + n], delta = at_.delta[r + n];
        if (rank < 0 || !bias_.any()) {
          score_row(p, dp, keys, filled, TextRow{}, lse, delta);
        } else if (bias_.ranks() == Ranks::kConsecutive) {
          score_row(p, dp, keys, filled, item_row<Ranks::kConsecutive>(g, rank, by_key), lse,
                    delta);
        } else if (bias_.ranks() == Ranks::kRising) {
          score_row(p, dp, keys, filled, item_row<Ranks::kRising>(g, rank, by_key), lse, delta);
        } else {
          score_row(p, dp, keys, filled, item_row<Ranks::kAny>(g, rank, by_key), lse, delta);
        }
      }
      scores.keep(r, tile, filled);
      if (call_.grad_q != nullptr) {
        product<false>(registers_, tile, size_vecs_, lanes_of<P>(most), scores.grad_rows(r),
                       ld / kInLane<P>, packed(at_.k), width_,
                       grad_q_ + (first_query * group_ + r) * width_, width_, add_q_);
      }
    }
    if (done_ != nullptr) lower(done_, first_query);
    for (int64_t j = 0; j < count; j += kTileRows) {
      const int64_t tile = smaller(kTileRows, count - j);
      // Rows from the first query that sees key j; a pair of rows may begin with one that does not.
      const int64_t unseen =
          args_.causal ? clamp(first + j - reach_ + 1 - first_query, 0, queries) * group_ : 0;
      if (unseen == rows) break;
      const int64_t skip = unseen / kInLane<P>, depth = lanes_of<P>(rows) - skip;
      if (call_.grad_v != nullptr) {
        product<true>(registers_, tile, size_vecs_, depth, scores.weights() + skip * ld + j, ld,
                      scores.query_grads() + skip * width_, width_, at_.grad_v + j * width_, width_,
                      add_k_);
      }
      if (call_.grad_k != nullptr) {
        product<true>(registers_, tile, size_vecs_, depth, scores.grads() + skip * ld + j, ld,
                      scores.queries() + skip * width_, width_, at_.grad_k + j * width_, width_,
                      add_k_);
      }
    }
  }

  static P* packed(float* memory) { return reinterpret_cast<P*>(memory); }

  void pack_queries(int64_t first_query, int64_t queries) {
    for (int64_t i = 0; i < queries; ++i) {
      const int64_t token = q0_ + first_query + i;
      P* grad = packed(at_.grad) + i * group_ * q_ld_;
      pack_rows(row(args_.q, token, head_), args_.q.head_stride, group_, args_.size,
                packed(at_.q) + i * group_ * q_ld_, q_ld_);
      pack_rows(row(call_.grad, token, head_), call_.grad.head_stride, group_, args_.size, grad,
                q_ld_);
      for (int64_t g = 0; g < group_; ++g) {
        const int64_t at = token * args_.heads + head_ + g;
        at_.lse[i * group_ + g] = call_.lse[at] * kLog2E;
        if (!one_block_ && need_scores_) {
          const T* out = static_cast<const T*>(call_.out) + at * args_.size;
          at_.delta[i * group_ + g] = dot(out, row(call_.grad, token, head_ + g));
        }
      }
    }
  }

  float dot(const T* a, const T* b) const {
    const int64_t whole = args_.size / kWidth * kWidth;
    Vec total = {};
    for (int64_t d = 0; d < whole; d += kWidth) total += load(a + d) * load(b + d);
    if (whole < args_.size) {
      const int64_t left = args_.size - whole;
      total += load_part(a + whole, left) * load_part(b + whole, left);
    }
    return sum(total);
  }

  // A query that is an item: its bias, and where the bias's gradients go (null: nowhere).
  template <Ranks kRanks>
  struct ItemRow {
    KeyBias::Row<kRanks> row;
    float* relative;  // the head's sums in a turned table
    float* absolute;  // the head's sums by key
    Vec bias(int64_t v) const { return row(v); }
    void add_gradient(int64_t v, Vec grad) const {
      if (relative != nullptr) row.add_gradient(v, grad, relative);
      if (absolute != nullptr) store(absolute + v * kWidth, load(absolute + v * kWidth) + grad);
    }
  };

  template <Ranks kRanks>
  ItemRow<kRanks> item_row(int64_t g, int64_t rank, float* by_key) const {
    float* relative = relative_ ? relative_ + g * relative_stride(args_) : nullptr;
    return {KeyBias::Row<kRanks>(bias_, head_ + g, rank), relative, absolute_ ? by_key : nullptr};
  }

  struct TextRow {
    Vec bias(int64_t) const { return Vec{}; }
    void add_gradient(int64_t, Vec) const {}
  };

  // One row: scores become weights p, and the weights' gradient dp becomes the scores' gradient
  // p * (dp - sum of p dp). Where the row has one block of keys the sum is taken here; else it is
  // `delta`, out . grad, which is the same but for out's rounding. Zero past the keys seen.
  template <typename Row>
  void score_row(float* weights, float* grads, int64_t seen, int64_t filled, const Row& row,
                 float lse, float delta) {
    const int64_t whole = seen / kWidth, used = (seen + kWidth - 1) / kWidth;
    Vec total = {};
    for (int64_t v = 0; v < whole; ++v) {
      const Vec weight = exp2(load(weights + v * kWidth) * factor_ + row.bias(v) - lse);
      store(weights + v * kWidth, weight);
      if (one_block_) total += weight * load(grads + v * kWidth);
    }
    if (used > whole) {
      const Ints left = lanes() < static_cast<int32_t>(seen - whole * kWidth);
      const Vec score = load(weights + whole * kWidth) * factor_ + row.bias(whole) - lse;
      const Vec weight = left ? exp2(score) : Vec{};
      const Vec grad = left ? load(grads + whole * kWidth) : Vec{};
      store(weights + whole * kWidth, weight);
      store(grads + whole * kWidth, grad);
      total += weight * grad;
    }
    for (int64_t v = used; v < filled; ++v) {
      store(weights + v * kWidth, Vec{});
      store(grads + v * kWidth, Vec{});
    }
    if (!need_scores_) return;
    if (one_block_) delta = sum(total);
    for (int64_t v = 0; v < used; ++v) {
      const Vec grad = load(weights + v * kWidth) * (load(grads + v * kWidth) - delta);
      store(grads + v * kWidth, grad);
      row.add_gradient(v, grad);
    }
  }

  const AttentionBackward& call_;
  const AttentionArgs& args_;
  const BackwardScratch at_;
  Prefetch prefetch_;
  KeyBias bias_;
  const int64_t group_, head_, kv_head_;
  const int64_t width_, q_ld_;  // of a packed row: in elements, in lanes
  const int64_t depth_, size_vecs_;
  const float factor_;  // what a product of q and k is multiplied with, in units of log2
  const int64_t q0_, k0_, queries_, keys_;
  const int64_t first_, end_;    // of the task's keys
  float* const grad_q_;          // (queries, group, width): sums
  const int64_t* const before_;  // see BackwardTask
  int64_t* const done_;
  const int64_t step_, reach_;  // query i sees reach + step * i keys
  float* relative_ = nullptr;   // the group's rows of this thread's sums
  float* absolute_ = nullptr;
  bool need_scores_ = false;
  bool one_block_ = false;
  TileRegisters registers_;
  bool add_q_ = false, add_k_ = false;  // whether products add to the gradients or set them
};

template <typename T>
void backward(const AttentionBackward& call, const BiasTables& tables, const BackwardTask& task,
              const BackwardTask* next, const BiasSums& sums, float* scratch) {
  Backward<T>(call, tables, task, next, sums, scratch).run();
}

}  // namespace

#if defined(__AVX512BF16__)
const BackwardKernel kBackward[3] = {nullptr, backward<BFloat16>, nullptr};
#else
const BackwardKernel kBackward[3] = {backward<float>, backward<BFloat16>, backward<Half>};
#endif

}  // namespace SPEEDER_ISA
}  // namespace speeder
