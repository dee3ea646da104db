// Gathers rows on the CPU, with one memcpy or memset for each row, for all dtypes.

#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>

#include <algorithm>
#include <cstring>

#include "ops.h"

namespace fastbert {

namespace {

constexpr int64_t kMinBytes = 32768;  // below this, waking a thread costs more than it saves

}  // namespace

at::Tensor gather_rows_cpu(
    const at::Tensor& src, const at::Tensor& index, const at::Tensor& inverse) {
  const at::Tensor source = with_unit_column_stride(src);
  const at::Tensor indices = index.contiguous();
  const int64_t rows = indices.size(0), source_rows = source.size(0);
  const int64_t row_bytes = source.size(1) * source.element_size();
  const int64_t source_stride = source.stride(0) * source.element_size();

  at::Tensor out = at::empty({rows, source.size(1)}, source.options());
  const auto* from = static_cast<const char*>(source.const_data_ptr());
  auto* to = static_cast<char*>(out.mutable_data_ptr());
  const auto* row_index = indices.const_data_ptr<int32_t>();

  const int64_t grain = std::max<int64_t>(1, kMinBytes / std::max<int64_t>(1, row_bytes));
  at::parallel_for(0, rows, grain, [&](int64_t first, int64_t last) {
    for (int64_t i = first; i < last; ++i) {
      const int64_t r = row_index[i];
      TORCH_CHECK_INDEX(
          r >= -1 && r < source_rows,
          "gather_rows: expected entries of index in [-1, ", source_rows, "), got ", r);
      if (row_bytes == 0) {
        continue;  // memcpy and memset do not allow null pointers, even for 0 bytes
      }
      if (r < 0) {
        std::memset(to + i * row_bytes, 0, row_bytes);
      } else {
        std::memcpy(to + i * row_bytes, from + r * source_stride, row_bytes);
      }
    }
  });
  return out;
}

}  // namespace fastbert
