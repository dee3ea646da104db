#pragma once

#include <cuda_runtime_api.h>

namespace c10::cuda {

cudaStream_t getCurrentCUDAStream();

}  // namespace c10::cuda
