// Registers the CUDA kernels. Separate from ../bindings.cpp because only a build with nvcc has
// them, and not a .cu file because nvcc would parse torch/library.h once for every architecture.

#include <torch/library.h>

#include "../ops.h"

TORCH_LIBRARY_IMPL(fastbert, CUDA, m) {
  m.impl("compact", &fastbert::compact_cuda);
  m.impl("gather_rows", &fastbert::gather_rows_cuda);
}
