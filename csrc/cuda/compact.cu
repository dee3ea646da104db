// Stream compaction on the GPU in two launches, without atomics, so entries keep their order.
//
// The entries are divided into tiles of kThreads entries, one for each thread, and the tiles into
// at most kMaxBlocks runs, one for each block. The first launch counts the entries that each block
// keeps. In the second, each block adds up the counts of the blocks before it, which are few, and
// goes through its tiles again with a running rank.

#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>

#include "../ops.h"

namespace fastbert {

namespace {

constexpr int kWarp = 32;
constexpr int kThreads = 256;
constexpr int kWarps = kThreads / kWarp;
constexpr int64_t kMaxBlocks = 1024;

// Returns the sum of `x` over the block to every thread.
__device__ int block_sum(int x) {
  __shared__ int warp_sums[kWarps];
  for (int distance = kWarp / 2; distance > 0; distance /= 2) {
    x += __shfl_xor_sync(0xffffffff, x, distance);
  }
  __syncthreads();  // an earlier call may still read warp_sums
  if (threadIdx.x % kWarp == 0) {
    warp_sums[threadIdx.x / kWarp] = x;
  }
  __syncthreads();
  int sum = 0;
  for (int warp = 0; warp < kWarps; ++warp) {
    sum += warp_sums[warp];
  }
  return sum;
}

struct Rank {
  int before;  // number of threads before this one whose flag is set
  int total;   // number of threads in the block whose flag is set
};

__device__ Rank block_rank(bool flag) {
  __shared__ int warp_counts[kWarps];
  const unsigned ballot = __ballot_sync(0xffffffff, flag);
  const unsigned earlier_lanes = (1u << threadIdx.x % kWarp) - 1;
  __syncthreads();  // an earlier call may still read warp_counts
  if (threadIdx.x % kWarp == 0) {
    warp_counts[threadIdx.x / kWarp] = __popc(ballot);
  }
  __syncthreads();
  Rank rank{__popc(ballot & earlier_lanes), 0};
  for (int warp = 0; warp < kWarps; ++warp) {
    rank.before += warp < threadIdx.x / kWarp ? warp_counts[warp] : 0;
    rank.total += warp_counts[warp];
  }
  return rank;
}

template <typename Entry>
__global__ void __launch_bounds__(kThreads) count_kernel(
    const Entry* __restrict__ entries,  // (size,)
    int* __restrict__ counts,           // (blocks,)
    int64_t size,
    int tiles_per_block,
    Entry ignored) {
  const int64_t first = int64_t{blockIdx.x} * tiles_per_block * kThreads + threadIdx.x;
  int count = 0;
  for (int tile = 0; tile < tiles_per_block; ++tile) {
    const int64_t i = first + int64_t{tile} * kThreads;
    count += i < size && entries[i] != ignored;
  }
  count = block_sum(count);
  if (threadIdx.x == 0) {
    counts[blockIdx.x] = count;
  }
}

template <typename Entry>
__global__ void __launch_bounds__(kThreads) write_kernel(
    const Entry* __restrict__ entries,  // (rows * columns,)
    const int* __restrict__ counts,     // (gridDim.x,)
    Entry* __restrict__ kept,           // (capacity,)
    int* __restrict__ positions,        // (capacity,)
    int* __restrict__ slots,            // (rows * columns,)
    int* __restrict__ offsets,          // (rows + 1,)
    int rows,
    int columns,
    int64_t capacity,
    int tiles_per_block,
    Entry ignored) {
  int before = 0, total = 0;
  for (int block = threadIdx.x; block < gridDim.x; block += kThreads) {
    const int count = counts[block];
    before += block < blockIdx.x ? count : 0;
    total += count;
  }
  before = block_sum(before);
  total = block_sum(total);

  const int64_t size = int64_t{rows} * columns;
  const int64_t first = int64_t{blockIdx.x} * tiles_per_block * kThreads + threadIdx.x;
  for (int tile = 0; tile < tiles_per_block; ++tile) {
    const int64_t i = first + int64_t{tile} * kThreads;
    const Entry entry = i < size ? entries[i] : ignored;
    const bool is_kept = entry != ignored;
    const Rank in_tile = block_rank(is_kept);
    const int rank = before + in_tile.before;
    before += in_tile.total;
    if (i < size) {
      const bool has_slot = is_kept && rank < capacity;
      slots[i] = has_slot ? rank : -1;
      if (has_slot) {
        kept[rank] = entry;
        positions[rank] = static_cast<int>(i);
      }
      const int row = static_cast<int>(i) / columns;
      if (static_cast<int>(i) == row * columns) {
        offsets[row] = rank;
      }
    }
  }

  const int64_t thread = int64_t{blockIdx.x} * kThreads + threadIdx.x;
  if (thread == 0) {
    offsets[rows] = total;
  }
  for (int64_t spare = total + thread; spare < capacity; spare += int64_t{gridDim.x} * kThreads) {
    kept[spare] = ignored;
    positions[spare] = -1;
  }
}

template <typename Entry>
Compacted compact_entries(
    const at::Tensor& values, Entry ignored, std::optional<int64_t> capacity) {
  const int64_t rows = values.size(0), columns = values.size(1), size = values.numel();
  const auto int32 = values.options().dtype(at::kInt);
  const int64_t tiles = ceil_div(size, kThreads);
  const int64_t tiles_per_block = ceil_div(tiles, kMaxBlocks);
  const int64_t blocks = ceil_div(tiles, tiles_per_block);
  const auto stream = c10::cuda::getCurrentCUDAStream();

  const auto* entries = static_cast<const Entry*>(values.const_data_ptr());
  at::Tensor counts = at::empty({blocks}, int32);
  count_kernel<Entry><<<blocks, kThreads, 0, stream>>>(
      entries, counts.mutable_data_ptr<int>(), size, tiles_per_block, ignored);
  C10_CUDA_KERNEL_LAUNCH_CHECK();

  // without a capacity, the host must wait here to know how much to allocate; nothing else waits
  const int64_t room = capacity ? *capacity : counts.sum().item<int64_t>();
  at::Tensor kept = at::empty({room}, values.options());
  at::Tensor positions = at::empty({room}, int32);
  at::Tensor slots = at::empty({size}, int32);
  at::Tensor offsets = at::empty({rows + 1}, int32);
  write_kernel<Entry><<<blocks, kThreads, 0, stream>>>(
      entries,
      counts.const_data_ptr<int>(),
      static_cast<Entry*>(kept.mutable_data_ptr()),
      positions.mutable_data_ptr<int>(),
      slots.mutable_data_ptr<int>(),
      offsets.mutable_data_ptr<int>(),
      static_cast<int>(rows),
      static_cast<int>(columns),
      room,
      tiles_per_block,
      ignored);
  C10_CUDA_KERNEL_LAUNCH_CHECK();
  return {kept, positions, slots, offsets};
}

Compacted compact_nothing(
    const at::Tensor& values, int64_t ignore_index, std::optional<int64_t> capacity) {
  const auto int32 = values.options().dtype(at::kInt);
  const int64_t room = capacity.value_or(0);
  return {
      at::empty({room}, values.options()).fill_(ignore_index),
      at::empty({room}, int32).fill_(-1),
      at::empty({0}, int32),
      at::empty({values.size(0) + 1}, int32).zero_()};
}

}  // namespace

Compacted compact_cuda(
    const at::Tensor& values, int64_t ignore_index, std::optional<int64_t> capacity) {
  const c10::cuda::CUDAGuard guard(values.device());
  if (values.numel() == 0) {
    return compact_nothing(values, ignore_index, capacity);
  }
  return for_entry_size(values, [&](auto zero) {
    using Entry = decltype(zero);
    return compact_entries(values.contiguous(), static_cast<Entry>(ignore_index), capacity);
  });
}

}  // namespace fastbert
