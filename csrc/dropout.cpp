// Dropout masks on the CPU; fastbert/rng.py defines and explains their random bits.

#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>

#include <algorithm>
#include <array>

#include "ops.h"

namespace fastbert {

namespace {

constexpr int kRounds = 7;
constexpr int64_t kGroup = 8;  // columns per Philox call, 16 bits each, of which 12 are compared
constexpr int64_t kBits = 32;  // attention keys per word: one bit for each
constexpr int kCallsPerWord = 3;  // Philox calls per word: 12 words, one for each binary digit
constexpr int64_t kLanes = 64;  // counters computed at once: enough to fill vector registers
constexpr int64_t kVector = 16;  // 32-bit words in the widest vector register

using Words = std::array<std::array<uint32_t, kLanes>, 4>;

// Philox's key and counter for a row, without the place in the row.
struct Row {
  uint64_t seed;
  // position is in the upper half of its word; head also has the dropout's site in the upper half
  uint32_t sequence, position, head, step;
};

Row row_of(int64_t token_key, const int64_t* state, int64_t site, int64_t head) {
  return {
      static_cast<uint64_t>(state[0]),
      static_cast<uint32_t>(token_key >> 32),
      static_cast<uint32_t>(token_key) << 16,
      static_cast<uint32_t>(site << 16 | head),
      static_cast<uint32_t>(state[1])};
}

// One binary serves every CPU: the loader picks the version for the widest vectors it supports.
#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
#define FASTBERT_VECTOR_CLONES __attribute__((target_clones("avx512f", "avx2", "default")))
#else
#define FASTBERT_VECTOR_CLONES
#endif

// Philox4x32-7 at the places first, first + stride, ... of a row; x[w][i] is word w of lane i.
// Only the first `lanes`, in whole vectors, are drawn, because short rows need few.
FASTBERT_VECTOR_CLONES
void philox(const Row& row, uint32_t first, uint32_t stride, int64_t lanes, Words& x) {
  const int64_t count = std::min((lanes + kVector - 1) / kVector * kVector, kLanes);
  for (uint32_t i = 0; i < count; ++i) {
    x[0][i] = row.sequence;
    x[1][i] = row.position | (first + stride * i);
    x[2][i] = row.head;
    x[3][i] = row.step;
  }
  auto k0 = static_cast<uint32_t>(row.seed), k1 = static_cast<uint32_t>(row.seed >> 32);
  for (int round = 0; round < kRounds; ++round) {
    for (int64_t i = 0; i < count; ++i) {
      const uint64_t p0 = uint64_t{0xD2511F53} * x[0][i], p1 = uint64_t{0xCD9E8D57} * x[2][i];
      x[0][i] = static_cast<uint32_t>(p1 >> 32) ^ x[1][i] ^ k0;
      x[2][i] = static_cast<uint32_t>(p0 >> 32) ^ x[3][i] ^ k1;
      x[1][i] = static_cast<uint32_t>(p1);
      x[3][i] = static_cast<uint32_t>(p0);
    }
    k0 += 0x9E3779B9;
    k1 += 0xBB67AE85;
  }
}

// Sets kept[j] to 1 if bit j of the word is clear, else to 0.
FASTBERT_VECTOR_CLONES
void kept_of(uint32_t word, std::array<uint8_t, kBits>& kept) {
  for (uint32_t j = 0; j < kBits; ++j) {
    kept[j] = ~word >> j & 1;
  }
}

void check(const char* op, const at::Tensor& token_key, const at::Tensor& state) {
  TORCH_CHECK_VALUE(
      token_key.dim() == 1 && token_key.scalar_type() == at::kLong,
      op, ": expected token_key of shape (tokens,) and dtype int64, got ", token_key.sizes(), " ",
      token_key.scalar_type());
  TORCH_CHECK_VALUE(
      state.dim() == 1 && state.size(0) == 2 && state.scalar_type() == at::kLong,
      op, ": expected state of shape (2,) and dtype int64, got ", state.sizes(), " ",
      state.scalar_type());
}

}  // namespace

at::Tensor hidden_keep_mask_cpu(
    const at::Tensor& token_key, const at::Tensor& state, int64_t site, int64_t num_cols,
    int64_t threshold) {
  check("hidden_keep_mask", token_key, state);
  const at::Tensor keys = token_key.contiguous(), start = state.contiguous();
  at::Tensor keep = at::empty({keys.size(0), num_cols}, keys.options().dtype(at::kBool));
  bool* const out = keep.mutable_data_ptr<bool>();
  const auto* key = keys.const_data_ptr<int64_t>();
  const auto* seed_and_step = start.const_data_ptr<int64_t>();
  const auto limit = static_cast<uint32_t>(threshold);

  at::parallel_for(0, keys.size(0), 16, [&](int64_t begin, int64_t end) {
    Words x;
    std::array<bool, kLanes * kGroup> block;
    for (int64_t t = begin; t < end; ++t) {
      const Row row = row_of(key[t], seed_and_step, site, 0);
      for (int64_t col = 0; col < num_cols; col += kLanes * kGroup) {
        const int64_t count = std::min<int64_t>(kLanes * kGroup, num_cols - col);
        const int64_t lanes = (count + kGroup - 1) / kGroup;
        philox(row, static_cast<uint32_t>(col / kGroup), 1, lanes, x);
        for (int64_t i = 0; i < lanes; ++i) {
          for (int64_t w = 0; w < 4; ++w) {
            block[i * kGroup + 2 * w] = (x[w][i] & 0xFFFF) >> 4 >= limit;
            block[i * kGroup + 2 * w + 1] = x[w][i] >> 20 >= limit;
          }
        }
        std::copy_n(block.data(), count, out + t * num_cols + col);
      }
    }
  });
  return keep;
}

at::Tensor attention_keep_mask_cpu(
    const at::Tensor& token_key, const at::Tensor& state, int64_t site, int64_t num_heads,
    int64_t num_keys, int64_t threshold) {
  check("attention_keep_mask", token_key, state);
  const at::Tensor keys = token_key.contiguous(), start = state.contiguous();
  const int64_t tokens = keys.size(0);
  at::Tensor keep = at::empty({num_heads, tokens, num_keys}, keys.options().dtype(at::kBool));
  bool* const out = keep.mutable_data_ptr<bool>();
  const auto* key = keys.const_data_ptr<int64_t>();
  const auto* seed_and_step = start.const_data_ptr<int64_t>();

  at::parallel_for(0, num_heads * tokens, 16, [&](int64_t begin, int64_t end) {
    Words digits;
    // Bit j is set if the word's key j is dropped, that is if its random 12-bit number, whose
    // inverted binary digits are in 12 words, is below the threshold.
    std::array<uint32_t, kLanes> below;
    std::array<uint8_t, kBits> kept;
    for (int64_t r = begin; r < end; ++r) {
      const Row row = row_of(key[r % tokens], seed_and_step, site, r / tokens);
      for (int64_t first = 0; first < num_keys; first += kLanes * kBits) {
        const int64_t count = std::min<int64_t>(kLanes * kBits, num_keys - first);
        const int64_t words = (count + kBits - 1) / kBits;
        below.fill(0);
        for (int call = 0; call < kCallsPerWord; ++call) {
          philox(row, static_cast<uint32_t>(first / kBits * 4 + call), 4, words, digits);
          for (int w = 0; w < 4; ++w) {
            const bool is_set = threshold >> (4 * call + w) & 1;
            for (int64_t i = 0; i < words; ++i) {
              below[i] = is_set ? digits[w][i] | below[i] : digits[w][i] & below[i];
            }
          }
        }
        for (int64_t word = 0; word < words; ++word) {
          kept_of(below[word], kept);
          const int64_t size = std::min(kBits, count - word * kBits);
          std::copy_n(kept.data(), size, out + r * num_keys + first + word * kBits);
        }
      }
    }
  });
  return keep;
}

}  // namespace fastbert
