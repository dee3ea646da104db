#include "ops.h"

#include <algorithm>
#include <limits>

namespace fastbert {

namespace {

bool can_hold(at::ScalarType dtype, int64_t value) {
  if (dtype == at::kBool) {
    return value == 0 || value == 1;
  }
  const bool is_signed = at::isSignedType(dtype);
  const int value_bits = 8 * static_cast<int>(at::elementSize(dtype)) - (is_signed ? 1 : 0);
  const int64_t excess = value >> std::min(value_bits, 63);
  return excess == 0 || (is_signed && excess == -1);
}

}  // namespace

void check_compact(
    const at::Tensor& values, int64_t ignore_index, std::optional<int64_t> capacity) {
  TORCH_CHECK_VALUE(
      values.dim() == 2,
      "compact: expected values of shape (batch, seqlen), got shape ", values.sizes());
  TORCH_CHECK_VALUE(
      at::isIntegralType(values.scalar_type(), /*includeBool=*/true),
      "compact: expected values of an integer dtype or bool, got ", values.scalar_type());
  TORCH_CHECK_VALUE(
      can_hold(values.scalar_type(), ignore_index),
      "compact: expected an ignore_index that ", values.scalar_type(), " can hold, got ",
      ignore_index);
  TORCH_CHECK_VALUE(
      values.numel() <= std::numeric_limits<int32_t>::max(),
      "compact: expected at most 2^31 - 1 values, got ", values.numel());
  TORCH_CHECK_VALUE(
      !capacity || *capacity >= 0,
      "compact: expected a capacity of at least 0, got ", capacity.value_or(0));
}

void check_gather_rows(
    const at::Tensor& src, const at::Tensor& index, const at::Tensor& inverse) {
  TORCH_CHECK_VALUE(
      src.dim() == 2, "gather_rows: expected src of shape (rows, hidden), got shape ", src.sizes());
  TORCH_CHECK_VALUE(
      index.dim() == 1 && index.scalar_type() == at::kInt,
      "gather_rows: expected index of shape (M,) and dtype int32, got shape ", index.sizes(), " ",
      index.scalar_type());
  TORCH_CHECK_VALUE(
      inverse.dim() == 1 && inverse.size(0) == src.size(0) && inverse.scalar_type() == at::kInt,
      "gather_rows: expected inverse of shape (rows,) = (", src.size(0),
      ",) and dtype int32, got shape ", inverse.sizes(), " ", inverse.scalar_type());
  TORCH_CHECK_VALUE(
      index.device() == src.device() && inverse.device() == src.device(),
      "gather_rows: expected index and inverse on ", src.device(), ", got ", index.device(),
      " and ", inverse.device());
}

}  // namespace fastbert
