// Stream compaction on the CPU: count each chunk, add up the counts, write each chunk.

#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>

#include <algorithm>
#include <numeric>
#include <vector>

#include "ops.h"

namespace fastbert {

namespace {

constexpr int64_t kMinChunk = 16384;  // below this, waking a thread costs more than it saves

template <typename Entry>
Compacted compact_entries(
    const at::Tensor& values, Entry ignored, std::optional<int64_t> capacity) {
  const int64_t rows = values.size(0), columns = values.size(1), size = values.numel();
  const auto* entry = static_cast<const Entry*>(values.const_data_ptr());

  const int64_t chunk = std::max(kMinChunk, ceil_div(size, at::get_num_threads()));
  const int64_t chunks = ceil_div(size, chunk);
  const auto chunk_end = [&](int64_t c) { return std::min((c + 1) * chunk, size); };

  std::vector<int64_t> kept_before(chunks + 1, 0);
  at::parallel_for(0, chunks, 1, [&](int64_t first, int64_t last) {
    for (int64_t c = first; c < last; ++c) {
      const int64_t length = chunk_end(c) - c * chunk;
      kept_before[c + 1] =
          length - std::count(entry + c * chunk, entry + chunk_end(c), ignored);
    }
  });
  std::partial_sum(kept_before.begin(), kept_before.end(), kept_before.begin());
  const int64_t total = kept_before[chunks];
  const int64_t room = capacity.value_or(total);

  const auto int32 = values.options().dtype(at::kInt);
  at::Tensor kept = at::empty({room}, values.options());
  at::Tensor positions = at::empty({room}, int32);
  at::Tensor slots = at::empty({size}, int32);
  at::Tensor offsets = at::empty({rows + 1}, int32);
  auto* kept_data = static_cast<Entry*>(kept.mutable_data_ptr());
  auto* position = positions.mutable_data_ptr<int32_t>();
  auto* slot = slots.mutable_data_ptr<int32_t>();
  auto* offset = offsets.mutable_data_ptr<int32_t>();

  at::parallel_for(0, chunks, 1, [&](int64_t first, int64_t last) {
    for (int64_t c = first; c < last; ++c) {
      int64_t rank = kept_before[c];
      int64_t row = ceil_div(c * chunk, columns);  // the first row that begins in this chunk
      for (int64_t i = c * chunk; i < chunk_end(c); ++i) {
        if (i == row * columns) {
          offset[row++] = static_cast<int32_t>(rank);
        }
        const bool is_kept = entry[i] != ignored;
        const bool has_slot = is_kept && rank < room;
        slot[i] = has_slot ? static_cast<int32_t>(rank) : -1;
        if (has_slot) {
          kept_data[rank] = entry[i];
          position[rank] = static_cast<int32_t>(i);
        }
        rank += is_kept;
      }
    }
  });
  // the end of the last row; without columns, the loop above has set no offset, so set all
  std::fill(offset + (size > 0 ? rows : 0), offset + rows + 1, static_cast<int32_t>(total));
  const int64_t used = std::min(total, room);
  std::fill(kept_data + used, kept_data + room, ignored);
  std::fill(position + used, position + room, -1);
  return {kept, positions, slots, offsets};
}

}  // namespace

Compacted compact_cpu(
    const at::Tensor& values, int64_t ignore_index, std::optional<int64_t> capacity) {
  return for_entry_size(values, [&](auto zero) {
    using Entry = decltype(zero);
    return compact_entries(values.contiguous(), static_cast<Entry>(ignore_index), capacity);
  });
}

}  // namespace fastbert
