// The softmax of rows whose scores come tile by tile, and the weighted sum of values, as in flash
// attention: weights are relative to the largest score so far, and sums are rescaled when it grows.
#pragma once

#include "cuda/attention/tile.cuh"

namespace speeder {
namespace cuda {

// Over the four lanes that share a row.
SPEEDER_DEVICE float quad_sum(float x) {
  x += shuffle_xor(x, 1);
  return x + shuffle_xor(x, 2);
}

SPEEDER_DEVICE float quad_max(float x) {
  x = larger(x, shuffle_xor(x, 1));
  return larger(x, shuffle_xor(x, 2));
}

// Scores of keys that a row does not see become -inf. The lane's first row sees the columns below
// `limit`; each row below it sees one more if `causal`, else as many.
template <int kRowTiles, int kColumns>
SPEEDER_DEVICE void hide(SumTile (&scores)[kRowTiles][kColumns / 8], int limit, bool causal) {
  const int room = limit - SumTile::column(0);  // so that a score compares it with a constant
  if (causal) {
    SPEEDER_UNROLL
    for (int n = 0; n < kColumns / 8; ++n) {
      SPEEDER_UNROLL
      for (int r = 0; r < kRowTiles; ++r) {
        SPEEDER_UNROLL
        for (int i = 0; i < 4; ++i) {
          if (8 * n + i % 2 - 16 * r - i / 2 * 8 >= room) scores[r][n].at[i] = -infinity();
        }
      }
    }
    return;
  }
  SPEEDER_UNROLL
  for (int n = 0; n < kColumns / 8; ++n) {
    SPEEDER_UNROLL
    for (int r = 0; r < kRowTiles; ++r) {
      SPEEDER_UNROLL
      for (int i = 0; i < 4; ++i) {
        if (8 * n + i % 2 >= room) scores[r][n].at[i] = -infinity();
      }
    }
  }
}

template <typename T, int kRowTiles, int kColumns, int kSize>
struct OnlineSoftmax {
  SumTile out[kRowTiles][kSize / 8];  // weights times values
  float top[kRowTiles][2];            // largest score, or -inf
  float total[kRowTiles][2] = {};     // sum of weights: of the lane's columns, until finish()

  SPEEDER_DEVICE OnlineSoftmax() {
    SPEEDER_UNROLL
    for (int r = 0; r < kRowTiles; ++r) top[r][0] = top[r][1] = -infinity();
  }

  // Scores become weights.
  SPEEDER_DEVICE void add(SumTile (&scores)[kRowTiles][kColumns / 8], Shared<T> values) {
    SPEEDER_UNROLL
    for (int r = 0; r < kRowTiles; ++r) {
      SPEEDER_UNROLL
      for (int half = 0; half < 2; ++half) {
        float most = top[r][half];
        SPEEDER_UNROLL
        for (int n = 0; n < kColumns / 8; ++n) {
          most = larger(most, larger(scores[r][n].at[2 * half], scores[r][n].at[2 * half + 1]));
        }
        most = quad_max(most);
        // Where no key has been seen, everything is -inf: any finite number serves.
        const float origin = most == -infinity() ? 0.0f : most * kLog2E;
        const float factor = exp2_fast(top[r][half] * kLog2E - origin);
        top[r][half] = most;
        float sum = 0.0f;
        SPEEDER_UNROLL
        for (int n = 0; n < kColumns / 8; ++n) {
          SPEEDER_UNROLL
          for (int c = 0; c < 2; ++c) {
            float& score = scores[r][n].at[2 * half + c];
            score = exp2_fast(score * kLog2E - origin);
            sum += score;
          }
        }
        total[r][half] = total[r][half] * factor + sum;
        SPEEDER_UNROLL
        for (int n = 0; n < kSize / 8; ++n) {
          out[r][n].at[2 * half] *= factor;
          out[r][n].at[2 * half + 1] *= factor;
        }
      }
    }
    add_weighted<T, kRowTiles, kColumns, kSize>(out, scores, values);
  }

  SPEEDER_DEVICE void finish() {
    SPEEDER_UNROLL
    for (int r = 0; r < kRowTiles; ++r) {
      SPEEDER_UNROLL
      for (int half = 0; half < 2; ++half) total[r][half] = quad_sum(total[r][half]);
    }
  }

  // What turns a finished row's sums into its output; 0 where it has seen no key.
  SPEEDER_DEVICE float inverse(int r, int half) const {
    return total[r][half] == 0.0f ? 0.0f : 1.0f / total[r][half];
  }
};

// Natural log-sum-exp of a row; +inf where it has seen no key.
SPEEDER_DEVICE float log_sum_exp(float top, float total) {
  return total == 0.0f ? infinity() : top + logf(total);
}

}  // namespace cuda
}  // namespace speeder
