// The extension's operators on each device. fastbert/ops/ documents what they compute, checks their
// arguments, and has their plain PyTorch versions and their shapes for torch.compile. The code is
// C++17, because torch 2.11 compiles extensions as C++17.

#pragma once

#include <ATen/core/Tensor.h>

#include <cstdint>
#include <optional>
#include <tuple>

namespace fastbert {

using Compacted = std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor>;

Compacted compact_cpu(
    const at::Tensor& values, int64_t ignore_index, std::optional<int64_t> capacity);
Compacted compact_cuda(
    const at::Tensor& values, int64_t ignore_index, std::optional<int64_t> capacity);

at::Tensor gather_rows_cpu(
    const at::Tensor& src, const at::Tensor& index, const at::Tensor& inverse);
at::Tensor gather_rows_cuda(
    const at::Tensor& src, const at::Tensor& index, const at::Tensor& inverse);

at::Tensor hidden_keep_mask_cpu(
    const at::Tensor& token_key, const at::Tensor& state, int64_t site, int64_t num_cols,
    int64_t threshold);
at::Tensor attention_keep_mask_cpu(
    const at::Tensor& token_key, const at::Tensor& state, int64_t site, int64_t num_heads,
    int64_t num_keys, int64_t threshold);

// Calls `body` with an unsigned zero of the size of an entry. Compaction only copies entries and
// compares them for equality, so one body serves all dtypes of a size.
template <typename Body>
auto for_entry_size(const at::Tensor& values, const Body& body) {
  // models call the operator without its check in Python; another shape would write out of bounds
  TORCH_CHECK_VALUE(
      values.dim() == 2, "compact: expected values of shape (batch, seqlen), got ", values.sizes());
  switch (values.element_size()) {
    case 1:
      return body(uint8_t{0});
    case 2:
      return body(uint16_t{0});
    case 4:
      return body(uint32_t{0});
    default:
      return body(uint64_t{0});
  }
}

// `src` itself if each row is contiguous (with gaps between rows, as in a slice), else a copy.
inline at::Tensor with_unit_column_stride(const at::Tensor& src) {
  return src.size(1) <= 1 || src.stride(1) == 1 ? src : src.contiguous();
}

constexpr int64_t ceil_div(int64_t a, int64_t b) {
  return (a + b - 1) / b;
}

}  // namespace fastbert
