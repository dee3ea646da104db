"""transformers' `ModelTesterMixin` over the classes of four families, patched or as they come.

tests/hf/test_modeltester.py runs this file in a process: pytest does not collect it by itself.
FASTBERT_TRANSFORMERS_TESTS names the folder that `sdist.fetch` gives, FASTBERT_MODELTESTER_PART the
part of the tests (see `parts`), FASTBERT_MODELTESTER_PATCHED=1 puts `fastbert.patched_class` of
each class in its place. Each test notes in `packed` how often the packed path ran the layers.
"""

import os
import sys
import types
import unittest
from typing import Any
from unittest import mock

import pytest
import torch
import transformers

import fastbert
from fastbert.hf import stack
from tests.hf.modeltester import parts
from tests.hf.modeltester.different import DIFFERENT, UNTRACEABLE

PACKAGE = "transformers_tests"
IS_PATCHED = os.environ["FASTBERT_MODELTESTER_PATCHED"] == "1"
PART = os.environ["FASTBERT_MODELTESTER_PART"]


def _module(name: str, **attributes: Any) -> types.ModuleType:
    module = types.ModuleType(f"{PACKAGE}{name}")
    vars(module).update(attributes)
    sys.modules[module.__name__] = module
    return module


# Stand-ins for what the mixin's module imports and the source distribution lacks.
_module("", __path__=[os.environ["FASTBERT_TRANSFORMERS_TESTS"]])
_module(".exporters", __path__=[])
_module(".exporters.test_export", ExportTesterMixin=type("ExportTesterMixin", (), {}))
_module(".generation", __path__=[])
_module(".generation.test_utils", GenerationTesterMixin=type("GenerationTesterMixin", (), {}))

from transformers_tests import test_modeling_common as common  # noqa: E402


class Tester:
    """A tiny model and a batch of it, as ModelTesterMixin asks for them."""

    batch_size = 5
    seq_length = 7
    num_hidden_layers = 2
    num_attention_heads = 4
    hidden_size = 32
    num_choices = 3
    is_training = True
    has_padding = True

    def __init__(self, family: str) -> None:
        self.family = family

    def get_config(self) -> Any:
        dropout, sizes = "dropout", {}
        if self.family == "DistilBert":
            sizes = {"dim": 32, "n_layers": 2, "n_heads": 4, "hidden_dim": 37}
            attention_dropout = "attention_dropout"
        else:
            dropout, attention_dropout = "hidden_dropout_prob", "attention_probs_dropout_prob"
            sizes = {
                "hidden_size": self.hidden_size,
                "num_hidden_layers": self.num_hidden_layers,
                "num_attention_heads": self.num_attention_heads,
                "intermediate_size": 37,
            }
        if self.family == "Electra":
            sizes["embedding_size"] = 16  # ELECTRA's small models embed narrower
        return getattr(transformers, f"{self.family}Config")(
            vocab_size=99,
            max_position_embeddings=40,
            **{dropout: 0.1, attention_dropout: 0.1},
            **sizes,
        )

    def prepare_config_and_inputs_for_common(self) -> tuple[Any, dict[str, torch.Tensor]]:
        shape = [self.batch_size, self.seq_length]
        config = self.get_config()
        # RoBERTa takes what equals its padding token for padding
        inputs = {
            "input_ids": common.ids_tensor(shape, 90) + 5,
            "attention_mask": common.random_attention_mask(shape),
        }
        if not self.has_padding:
            inputs["attention_mask"] = torch.ones(shape, dtype=torch.long)
        if self.family in ("Bert", "Electra"):
            inputs["token_type_ids"] = common.ids_tensor(shape, config.type_vocab_size)
        return config, inputs


class Families:
    """Holds the base class, which pytest would collect by itself at the top of the module."""

    class Test(common.ModelTesterMixin, unittest.TestCase):
        family: str
        kinds = (
            "Model",
            "ForMaskedLM",
            "ForSequenceClassification",
            "ForTokenClassification",
            "ForQuestionAnswering",
            "ForMultipleChoice",
        )
        fx_compatible = True  # 4.57's alone
        test_torch_exportable = True

        @classmethod
        def setUpClass(cls) -> None:
            classes = [getattr(transformers, f"{cls.family}{kind}") for kind in cls.kinds]
            cls.all_model_classes = tuple(
                fastbert.patched_class(one) if IS_PATCHED else one for one in classes
            )

        def setUp(self) -> None:
            self.model_tester = Tester(self.family)
            common.global_rng.seed(0)
            torch.manual_seed(0)

        @pytest.fixture(autouse=True)
        def _count(self, record_property: Any) -> Any:
            with mock.patch.object(stack, "run_stack", wraps=stack.run_stack) as layers:
                yield
            record_property("packed", layers.call_count)

        def _prepare_for_class(
            self, inputs_dict: Any, model_class: Any, return_labels: bool = False
        ) -> Any:
            inputs = super()._prepare_for_class(inputs_dict, model_class, return_labels)
            if return_labels and model_class.__name__.endswith("ForPreTraining"):
                inputs["labels"] = torch.zeros_like(inputs["input_ids"])
                if self.family == "Bert":
                    inputs["next_sentence_label"] = torch.zeros_like(inputs["input_ids"][:, 0])
            return inputs

        def test_bc_torch_dtype(self) -> None:
            """Loads each class 14 times, by one code for all: here the first ones."""
            self.all_model_classes = self.all_model_classes[: self.classes_of_dtypes]
            super().test_bc_torch_dtype()

        classes_of_dtypes = 1


def _without_padding(name: str) -> Any:
    def test(self: Any) -> None:
        self.model_tester.has_padding = False
        if name.startswith("test_torch_fx"):
            classes = self.all_model_classes
            self.all_model_classes = [one for one in classes if one.__name__ not in UNTRACEABLE]
        getattr(self, name)()

    return test


for _name in DIFFERENT:
    if hasattr(Families.Test, _name):
        setattr(Families.Test, f"{_name}_without_padding", _without_padding(_name))


class TestBert(Families.Test):
    family = "Bert"
    kinds = (*Families.Test.kinds, "ForPreTraining", "ForNextSentencePrediction")
    classes_of_dtypes = 2

    def test_bc_torch_dtype_of_the_other_heads(self) -> None:
        self.all_model_classes = self.all_model_classes[self.classes_of_dtypes :]
        common.ModelTesterMixin.test_bc_torch_dtype(self)


class TestRoberta(Families.Test):
    family = "Roberta"


class TestElectra(Families.Test):
    family = "Electra"
    kinds = (*Families.Test.kinds, "ForPreTraining")


class TestDistilBert(Families.Test):
    family = "DistilBert"


for _class in (TestBert, TestRoberta, TestElectra, TestDistilBert):
    for _name in dir(_class):
        if _name.startswith("test_") and parts.part_of(_class.family, _name) != PART:
            setattr(_class, _name, None)  # which pytest does not collect
