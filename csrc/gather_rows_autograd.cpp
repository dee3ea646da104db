// The gradient of gather_rows, in C++ because autograd in Python takes longer than the rows.

#include <ATen/core/dispatch/Dispatcher.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/library.h>

#include "ops.h"

namespace fastbert {

namespace {

using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

at::Tensor dispatched(const at::Tensor& src, const at::Tensor& index, const at::Tensor& inverse) {
  static const auto op = c10::Dispatcher::singleton()
                             .findSchemaOrThrow("fastbert::gather_rows", "")
                             .typed<decltype(gather_rows_cpu)>();
  return op.call(src, index, inverse);
}

struct GatherRows : torch::autograd::Function<GatherRows> {
  static constexpr bool is_traceable = true;  // for compiled autograd: all state is saved tensors

  static at::Tensor forward(
      AutogradContext* context, const at::Tensor& src, const at::Tensor& index,
      const at::Tensor& inverse) {
    const at::AutoDispatchBelowADInplaceOrView below;
    context->save_for_backward({index, inverse});
    return dispatched(src, index, inverse);
  }

  static variable_list backward(AutogradContext* context, const variable_list& gradients) {
    const variable_list saved = context->get_saved_variables();
    return {dispatched(gradients[0], saved[1], saved[0]), at::Tensor(), at::Tensor()};
  }
};

at::Tensor gather_rows_autograd(
    const at::Tensor& src, const at::Tensor& index, const at::Tensor& inverse) {
  return GatherRows::apply(src, index, inverse);
}

}  // namespace

TORCH_LIBRARY_IMPL(fastbert, Autograd, m) {
  m.impl("gather_rows", &gather_rows_autograd);
}

}  // namespace fastbert
