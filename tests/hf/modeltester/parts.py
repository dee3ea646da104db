"""Which of Hugging Face's tests `make test` runs over each family, and which `make test-all` alone.

"quick": every test of what a family's own forward does, and BERT's of everything. "rest": what
another test of the quick part shows already.
"""

QUICK, REST = "quick", "rest"
PARTS = (QUICK, REST)

# Eager attention and SDPA, which are one packed path once a class is patched. Each data type, side
# of the padding and kind of call has a test of BERT in the quick part; the rest are their
# combinations, and the same in other families, whose attention is that of BERT's layer.
SDPA = "test_eager_matches_sdpa_inference_"
SDPA_QUICK = ("fp32_pad_left", "bf16_pad_right_sdpa_kernels", "fp16_pad_right_no_attn_mask")
SDPA_QUICK_OF_OTHERS = SDPA_QUICK[:1]
SDPA_QUICK_OF_BERT = (*SDPA_QUICK, "fp32_pad_left_output_attentions")

# Saving, loading, resizing, initialising and ways of checkpointing gradients, by PreTrainedModel's
# code for all of its classes. Of the other families, only the rest has them.
MACHINERY = (
    "test_all_tensors_are_parameter_or_buffer",
    "test_bc_torch_dtype",
    "test_can_load_ignoring_mismatched_shapes",
    "test_can_use_safetensors",
    "test_correct_missing_keys",
    "test_enable_input_require_grads_with_gradient_checkpointing",
    "test_from_pretrained_no_checkpoint",
    "test_init_weights_can_init_buffers",
    "test_load_contiguous_weights",
    "test_load_save_without_tied_weights",
    "test_load_with_mismatched_shapes",
    "test_model_weights_reload_no_missing_tied_weights",
    "test_resize_embeddings_untied",
    "test_resize_tokens_embeddings",
    "test_save_load",
    "test_sdpa_can_dispatch_non_composite_models",
    "test_torch_save_load",
    "test_training_gradient_checkpointing_use_reentrant_false",
    "test_training_gradient_checkpointing_use_reentrant_true",
)
DTYPES_OF_HEADS = "test_bc_torch_dtype_of_the_other_heads"


def part_of(family: str, name: str) -> str:
    """The part that runs a test, by its name, over a family."""
    is_bert = family == "Bert"
    if name.startswith(SDPA):
        kind = name.removeprefix(SDPA).lstrip("0123456789").lstrip("_")
        is_quick = kind in (SDPA_QUICK_OF_BERT if is_bert else SDPA_QUICK_OF_OTHERS)
    else:
        is_quick = name != DTYPES_OF_HEADS and (is_bert or name not in MACHINERY)
    return QUICK if is_quick else REST
