#pragma once

#include <ATen/core/Tensor.h>

#include <initializer_list>

namespace at {

Tensor empty(std::initializer_list<int64_t> size, Options options);

}  // namespace at
