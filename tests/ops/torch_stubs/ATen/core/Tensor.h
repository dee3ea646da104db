// What the CUDA sources name of torch's tensors, for the compiler of their kernels: torch's own
// headers take it ten times as long as the kernels do, for every architecture. Nothing is defined.
#pragma once

#include <c10/macros/Macros.h>

#include <cstdint>

#define TORCH_CHECK_VALUE(condition, ...) static_cast<void>(condition)

namespace at {

enum Type { kInt };

struct Options {
  Options dtype(Type) const;
};

struct Tensor {
  int64_t size(int64_t dimension) const;
  int64_t stride(int64_t dimension) const;
  int64_t dim() const;
  int64_t numel() const;
  int64_t element_size() const;
  int device() const;
  Options options() const;
  Tensor contiguous() const;
  Tensor sum() const;
  Tensor& fill_(int64_t value);
  Tensor& zero_();
  const void* const_data_ptr() const;
  void* mutable_data_ptr() const;
  template <typename T>
  const T* const_data_ptr() const;
  template <typename T>
  T* mutable_data_ptr() const;
  template <typename T>
  T item() const;
};

}  // namespace at
