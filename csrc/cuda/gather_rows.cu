// Gathers rows on the GPU by copying bytes, in the widest vectors that fit; this serves all dtypes.

#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>
#include <cuda_runtime.h>

#include <algorithm>

#include "../ops.h"

namespace fastbert {

namespace {

constexpr int kThreads = 256;
constexpr int kMaxLanes = 32;
constexpr int kUnroll = 4;  // vectors in flight for each lane: up to 2 KiB for a warp

// threadIdx.x is the lane within a row, threadIdx.y the row within the block.
template <typename Vector>
__global__ void __launch_bounds__(kThreads) gather_rows_kernel(
    const Vector* __restrict__ src,  // (source_rows, width), rows source_stride apart
    const int* __restrict__ index,   // (rows,)
    Vector* __restrict__ out,        // (rows, width)
    int64_t source_stride,
    int64_t source_rows,
    int64_t rows,
    int width) {
  const int64_t row = int64_t{blockIdx.x} * blockDim.y + threadIdx.y;
  if (row >= rows) {
    return;
  }
  const int lanes = blockDim.x;
  const int source_row = index[row];
  CUDA_KERNEL_ASSERT(source_row >= -1 && source_row < source_rows);
  Vector* to = out + row * width + threadIdx.x;
  int left = width - static_cast<int>(threadIdx.x);
  if (source_row < 0) {
    for (; left > 0; left -= lanes, to += lanes) {
      *to = Vector{};
    }
    return;
  }
  const Vector* from = src + source_row * source_stride + threadIdx.x;
#pragma unroll 1
  for (; left > 0; left -= kUnroll * lanes, from += kUnroll * lanes, to += kUnroll * lanes) {
    Vector held[kUnroll];
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) {
      if (u * lanes < left) {
        held[u] = from[u * lanes];
      }
    }
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) {
      if (u * lanes < left) {
        to[u * lanes] = held[u];
      }
    }
  }
}

template <typename Vector>
void launch(const at::Tensor& src, const at::Tensor& index, at::Tensor& out) {
  constexpr int64_t size = sizeof(Vector);
  const int64_t rows = out.size(0);
  const int64_t width = out.size(1) * out.element_size() / size;
  TORCH_CHECK_VALUE(
      width <= 1 << 30, "gather_rows: expected rows of at most 2^30 vectors, got ", width);
  // a wide row gets a whole warp; a row of one token id gets one lane
  int64_t lanes = 1;
  while (lanes < std::min<int64_t>(width, kMaxLanes)) {
    lanes *= 2;
  }
  const int64_t rows_per_block = kThreads / lanes;
  const dim3 threads(lanes, rows_per_block);
  gather_rows_kernel<Vector>
      <<<ceil_div(rows, rows_per_block), threads, 0, c10::cuda::getCurrentCUDAStream()>>>(
          static_cast<const Vector*>(src.const_data_ptr()),
          index.const_data_ptr<int>(),
          static_cast<Vector*>(out.mutable_data_ptr()),
          src.stride(0) * src.element_size() / size,
          src.size(0),
          rows,
          static_cast<int>(width));
  C10_CUDA_KERNEL_LAUNCH_CHECK();
}

// The largest power of two, at most 16, that divides the address and length in bytes of every row.
int64_t vector_bytes(const at::Tensor& src, const at::Tensor& out) {
  const uint64_t multiples = reinterpret_cast<uintptr_t>(src.const_data_ptr()) |
      reinterpret_cast<uintptr_t>(out.const_data_ptr()) |
      static_cast<uint64_t>(src.stride(0) * src.element_size()) |
      static_cast<uint64_t>(out.size(1) * out.element_size());
  int64_t bytes = 16;
  while (multiples % bytes != 0) {
    bytes /= 2;
  }
  return bytes;
}

}  // namespace

at::Tensor gather_rows_cuda(
    const at::Tensor& src, const at::Tensor& index, const at::Tensor& inverse) {
  const c10::cuda::CUDAGuard guard(src.device());
  const at::Tensor source = with_unit_column_stride(src);
  const at::Tensor indices = index.contiguous();
  at::Tensor out = at::empty({indices.size(0), source.size(1)}, source.options());
  if (out.numel() == 0) {
    return out;
  }
  switch (vector_bytes(source, out)) {
    case 16:
      launch<uint4>(source, indices, out);
      break;
    case 8:
      launch<uint2>(source, indices, out);
      break;
    case 4:
      launch<uint32_t>(source, indices, out);
      break;
    case 2:
      launch<uint16_t>(source, indices, out);
      break;
    default:
      launch<uint8_t>(source, indices, out);
  }
  return out;
}

}  // namespace fastbert
