// The backward pass of spae_attention: one task is keys of one sequence and one key head, and the
// queries that see them. Scores are computed again from the saved log-sum-exp, a block of keys
// times a block of queries at a time. Built once for each instruction set.
#include "cpu/spae_bias.h"
#include "cpu/spae_prefetch.h"
#include "cpu/spae_tasks.h"
#include "cpu/tile_product.h"

namespace speeder {
namespace SPEEDER_ISA {
namespace {

template <typename T>
class Backward {
 public:
  Backward(const AttentionBackward& call, const BiasTables& tables, const BackwardTask& task,
           const BackwardTask* next, const BiasSums& sums, float* scratch)
      : call_(call),
        args_(call.args),
        at_(call.args, 0, scratch),
        bias_(call.args, tables, task.kv_head, at_.absolute),
        group_(args_.heads / args_.kv_heads),
        head_(task.kv_head * group_),
        kv_head_(task.kv_head),
        width_(padded(args_.size)),
        size_vecs_(round_up(args_.size, kWidth) / kWidth),
        q0_(args_.cu_q[task.sequence]),
        k0_(args_.cu_k[task.sequence]),
        queries_(args_.cu_q[task.sequence + 1] - q0_),
        keys_(args_.cu_k[task.sequence + 1] - k0_),
        first_(task.first),
        end_(task.first + task.count),
        grad_q_(task.shared_grad_q ? task.shared_grad_q : at_.grad_q),
        step_(args_.causal ? 1 : 0),
        reach_(args_.causal ? keys_ - queries_ + 1 : keys_) {
    if (sums.relative != nullptr) relative_ = sums.relative + head_ * relative_stride(args_);
    if (sums.absolute != nullptr) absolute_ = sums.absolute + head_ * args_.positions;
    need_scores_ = call.grad_q || call.grad_k || relative_ || absolute_;
    if (next != nullptr) prepare_prefetch(*next);
  }

  void run() {
    if (call_.grad_q != nullptr && first_ == end_) zero(grad_q_, queries_ * group_ * width_);
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
    pack_transposed(k, args_.k.token_stride, count, args_.size, at_.k_turned, ld);
    if (call_.grad_q != nullptr) {
      pack_rows(k, args_.k.token_stride, count, args_.size, 1.0f, at_.k, width_);
    }
    if (need_scores_) {
      pack_transposed(v, args_.v.token_stride, count, args_.size, at_.v_turned, ld);
    }
    bias_.prepare(args_.rank_k + k0_ + first, count);
    if (absolute_ != nullptr) zero(at_.absolute_sums, group_ * ld);

    // The first query that sees this block, and equal blocks of queries from there.
    const int64_t from = args_.causal ? clamp(first - reach_ + 1, 0, queries_) : 0;
    const int64_t most = query_block(kBackwardRows, args_);
    const int64_t blocks = (queries_ - from + most - 1) / most;
    // The task's first products set the queries' gradient, but for queries that see none of it. The
    // only block of queries sets the keys' gradients: its last query sees all of them.
    add_q_ = first > first_;
    add_k_ = blocks != 1;
    if (call_.grad_q != nullptr && !add_q_) zero(grad_q_, from * group_ * width_);
    if (call_.grad_k != nullptr && add_k_) zero(at_.grad_k, count * width_);
    if (call_.grad_v != nullptr && add_k_) zero(at_.grad_v, count * width_);
    for (int64_t b = 0; b < blocks; ++b) {
      const int64_t i = from + (queries_ - from) * b / blocks;
      query_block_pass(first, count, ld, i, from + (queries_ - from) * (b + 1) / blocks - i);
    }

    if (absolute_ != nullptr) bias_.add_absolute(count, at_.absolute_sums, ld, absolute_);
    for (int64_t j = 0; j < count; ++j) {
      const int64_t out = ((k0_ + first + j) * args_.kv_heads + kv_head_) * args_.size;
      // Queries were packed times scale and log2(e): the first belongs here, the second does not.
      if (call_.grad_k != nullptr) {
        store_row(static_cast<T*>(call_.grad_k) + out, at_.grad_k + j * width_, args_.size, kLn2);
      }
      if (call_.grad_v != nullptr) {
        store_row(static_cast<T*>(call_.grad_v) + out, at_.grad_v + j * width_, args_.size, 1.0f);
      }
    }
  }

  // Queries first_query .. + queries - 1 against the packed block of keys.
  void query_block_pass(int64_t first, int64_t count, int64_t ld, int64_t first_query,
                        int64_t queries) {
    pack_queries(first_query, queries);
    const int64_t rows = queries * group_;
    for (int64_t r = 0; r < rows; r += kTileRows) {
      const int64_t tile = smaller(kTileRows, rows - r);
      const int64_t most = seen(first_query + (r + tile - 1) / group_, first, count);
      if (most == 0) continue;
      if (first + count == end_) prefetch_.advance((tile + group_ - 1) / group_);
      const int64_t vecs = round_up(most, kWidth) / kWidth;
      float* weights = at_.weights + r * ld;
      float* grads = at_.grad_scores + r * ld;
      product<false>(tile, vecs, args_.size, at_.q + r * width_, width_, at_.k_turned, ld, weights,
                     ld, false);
      if (need_scores_) {
        product<false>(tile, vecs, args_.size, at_.grad + r * width_, width_, at_.v_turned, ld,
                       grads, ld, false);
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
        if (rank >= 0 && bias_.any()) {
          const ItemRow row{KeyBias::Row(bias_, g, rank),
                            relative_ ? relative_ + g * relative_stride(args_) : nullptr,
                            absolute_ ? by_key : nullptr};
          score_row(p, dp, keys, ld / kWidth, row, lse, delta);
        } else {
          score_row(p, dp, keys, ld / kWidth, TextRow{}, lse, delta);
        }
      }
      if (call_.grad_q != nullptr) {
        product<false>(tile, size_vecs_, most, grads, ld, at_.k, width_,
                       grad_q_ + (first_query * group_ + r) * width_, width_, add_q_);
      }
    }
    for (int64_t j = 0; j < count; j += kTileRows) {
      const int64_t tile = smaller(kTileRows, count - j);
      // Rows from the first query that sees key j.
      const int64_t skip =
          args_.causal ? clamp(first + j - reach_ + 1 - first_query, 0, queries) * group_ : 0;
      const int64_t depth = rows - skip;
      if (depth == 0) break;
      if (call_.grad_v != nullptr) {
        product<true>(tile, size_vecs_, depth, at_.weights + skip * ld + j, ld,
                      at_.grad + skip * width_, width_, at_.grad_v + j * width_, width_, add_k_);
      }
      if (call_.grad_k != nullptr) {
        product<true>(tile, size_vecs_, depth, at_.grad_scores + skip * ld + j, ld,
                      at_.q + skip * width_, width_, at_.grad_k + j * width_, width_, add_k_);
      }
    }
  }

  void pack_queries(int64_t first_query, int64_t queries) {
    for (int64_t i = 0; i < queries; ++i) {
      const int64_t token = q0_ + first_query + i;
      float* grad = at_.grad + i * group_ * width_;
      pack_rows(row(args_.q, token, head_), args_.q.head_stride, group_, args_.size,
                args_.scale * kLog2E, at_.q + i * group_ * width_, width_);
      pack_rows(row(call_.grad, token, head_), call_.grad.head_stride, group_, args_.size, 1.0f,
                grad, width_);
      for (int64_t g = 0; g < group_; ++g) {
        const int64_t at = token * args_.heads + head_ + g;
        at_.lse[i * group_ + g] = call_.lse[at] * kLog2E;
        if (!one_block_ && need_scores_) {
          const T* out = static_cast<const T*>(call_.out) + at * args_.size;
          at_.delta[i * group_ + g] = dot(out, grad + g * width_);
        }
      }
    }
  }

  float dot(const T* a, const float* b) const {
    const int64_t whole = args_.size / kWidth * kWidth;
    Vec total = {};
    for (int64_t d = 0; d < whole; d += kWidth) total += load(a + d) * load(b + d);
    if (whole < args_.size) total += load_part(a + whole, args_.size - whole) * load(b + whole);
    return sum(total);
  }

  // A query that is an item: its bias, and where the bias's gradients go (null: nowhere).
  struct ItemRow {
    KeyBias::Row row;
    float* relative;  // the head's sums in a turned table
    float* absolute;  // the head's sums by key
    Vec bias(int64_t v) const { return row(v); }
    void add_gradient(int64_t v, Vec grad) const {
      if (relative != nullptr) row.add_gradient(v, grad, relative);
      if (absolute != nullptr) store(absolute + v * kWidth, load(absolute + v * kWidth) + grad);
    }
  };

  struct TextRow {
    Vec bias(int64_t) const { return Vec{}; }
    void add_gradient(int64_t, Vec) const {}
  };

  // One row: scores become weights p, and the weights' gradient dp becomes the scores' gradient
  // p * (dp - sum of p dp). Where the row has one block of keys the sum is taken here; else it is
  // `delta`, out . grad, which is the same but for out's rounding. Zero past the keys seen.
  template <typename Row>
  void score_row(float* weights, float* grads, int64_t seen, int64_t vecs, const Row& row,
                 float lse, float delta) {
    const int64_t whole = seen / kWidth, used = (seen + kWidth - 1) / kWidth;
    Vec total = {};
    for (int64_t v = 0; v < whole; ++v) {
      const Vec weight = exp2(load(weights + v * kWidth) + row.bias(v) - lse);
      store(weights + v * kWidth, weight);
      if (one_block_) total += weight * load(grads + v * kWidth);
    }
    if (used > whole) {
      const Ints left = lanes() < static_cast<int32_t>(seen - whole * kWidth);
      const Vec score = load(weights + whole * kWidth) + row.bias(whole) - lse;
      const Vec weight = left ? exp2(score) : Vec{};
      const Vec grad = left ? load(grads + whole * kWidth) : Vec{};
      store(weights + whole * kWidth, weight);
      store(grads + whole * kWidth, grad);
      total += weight * grad;
    }
    // A tile of keys may reach past the last that is seen.
    for (int64_t v = used; v < vecs && v < used + 2; ++v) {
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
  const int64_t group_, head_, kv_head_, width_, size_vecs_, q0_, k0_, queries_, keys_;
  const int64_t first_, end_;   // of the task's keys
  float* const grad_q_;         // (queries, group, width): sums
  const int64_t step_, reach_;  // query i sees reach + step * i keys
  float* relative_ = nullptr;   // the group's rows of this thread's sums
  float* absolute_ = nullptr;
  bool need_scores_ = false;
  bool one_block_ = false;
  bool add_q_ = false, add_k_ = false;  // whether products add to the gradients or set them
};

template <typename T>
void backward(const AttentionBackward& call, const BiasTables& tables, const BackwardTask& task,
              const BackwardTask* next, const BiasSums& sums, float* scratch) {
  Backward<T>(call, tables, task, next, sums, scratch).run();
}

}  // namespace

const BackwardKernel kBackward[3] = {backward<float>, backward<BFloat16>, backward<Half>};

}  // namespace SPEEDER_ISA
}  // namespace speeder
