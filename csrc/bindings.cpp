// Registers `torch.ops.fastbert.*` when Python imports `fastbert._C`, which is otherwise empty.

#include <Python.h>
#include <torch/library.h>

#include "ops.h"

TORCH_LIBRARY(fastbert, m) {
  m.def(
      "compact(Tensor values, int ignore_index, SymInt? capacity=None)"
      " -> (Tensor kept, Tensor positions, Tensor slots, Tensor offsets)",
      {at::Tag::pt2_compliant_tag});
  m.def(
      "gather_rows(Tensor src, Tensor index, Tensor inverse) -> Tensor",
      {at::Tag::pt2_compliant_tag});
  m.def(
      "hidden_keep_mask(Tensor token_key, Tensor state, int site, SymInt num_cols, int threshold)"
      " -> Tensor",
      {at::Tag::pt2_compliant_tag});
  m.def(
      "attention_keep_mask(Tensor token_key, Tensor state, int site, SymInt num_heads,"
      " SymInt num_keys, int threshold) -> Tensor",
      {at::Tag::pt2_compliant_tag});
}

TORCH_LIBRARY_IMPL(fastbert, CPU, m) {
  m.impl("compact", &fastbert::compact_cpu);
  m.impl("gather_rows", &fastbert::gather_rows_cpu);
  m.impl("hidden_keep_mask", &fastbert::hidden_keep_mask_cpu);
  m.impl("attention_keep_mask", &fastbert::attention_keep_mask_cpu);
}

PyMODINIT_FUNC PyInit__C() {
  static PyModuleDef definition = {PyModuleDef_HEAD_INIT, "_C", nullptr, -1, nullptr};
  return PyModule_Create(&definition);
}
