"""What users put on any module of a model counts as in Hugging Face's."""

import pytest
import torch
from torch import nn

import fastbert
from tests.models.users_case import IDS, LABELS, MASK, SHAPE, UNWRAPPED, WORDS, after, doubled, make


class Around(nn.Module):
    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, *args, **kwargs):
        return after(self, args, self.inner(*args, **kwargs))


def give_a_forward(model, name):
    module = model.get_submodule(name)
    own = module.forward
    module.forward = lambda *args, **kwargs: after(module, args, own(*args, **kwargs))


def put_in_another(model, name):
    owner, _, last = name.rpartition(".")
    owner = model.get_submodule(owner)
    setattr(owner, last, Around(getattr(owner, last)))


WAYS = {
    "hook": lambda model, name: model.get_submodule(name).register_forward_hook(after),
    "hook before": lambda model, name: model.get_submodule(name).register_forward_pre_hook(
        lambda module, args: doubled(args)
    ),
    "forward": give_a_forward,
    "module": put_in_another,
    "hook of gradients": lambda model, name: model.get_submodule(name).register_full_backward_hook(
        lambda module, inputs, outputs: doubled(inputs)
    ),
    "hook before gradients": lambda model, name: model.get_submodule(
        name
    ).register_full_backward_pre_hook(lambda module, outputs: doubled(outputs)),
}


def results(model, head, *, training):
    """The loss, or the outputs at real tokens; and the gradients of the parameters."""
    inputs = {"input_ids": IDS, "attention_mask": MASK}
    if head == "ForMultipleChoice":
        inputs = {name: x[None] for name, x in inputs.items()}
    output = model.train(training)(**inputs, **(LABELS[head] if training else {}))
    found, loss = {}, output.get("loss")
    if loss is None:
        for name, x in output.items():
            is_by_token = x.shape[:2] == MASK.shape
            found[name] = x * MASK.view(*MASK.shape, *[1] * (x.ndim - 2)) if is_by_token else x
        loss = sum(x.sin().sum() for x in found.values())
    loss.backward()
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return {"loss": loss, **found, **gradients}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize(
    ("head", "kind"), [*((head, "own") for head in LABELS), ("ForPreTraining", "patched")]
)
def test_what_users_put_on_any_module_counts(head, kind, way):
    theirs, own = (dict(model.named_modules()) for model in make(head))
    names = [name for name in own if name in theirs and not isinstance(own[name], nn.ModuleList)]
    if head != "ForPreTraining":  # which has all inner modules
        names = [name for name in names if not name.startswith(("bert.e", "bert.p"))]
        names = [name for name in names if "layer" not in name]
    if way == "module":
        names = [name for name in names if not name.endswith(UNWRAPPED)]
    for name in filter(None, names):
        for training in (False, True) if LABELS[head] else (False,):
            expected, actual = make(head, kind)
            for model in (expected, actual):
                WAYS[way](model, name)
            expected, actual = (
                results(model, head, training=training) for model in (expected, actual)
            )
            for key in expected.keys() & actual.keys():
                torch.testing.assert_close(
                    actual[key], expected[key], rtol=1e-3, atol=1e-4,
                    msg=lambda text, name=name, key=key: f"{name}, {key}: {text}",
                )  # fmt: skip


def test_a_hook_before_the_bare_model_gets_hugging_faces_arguments_and_may_change_them():
    both, seen = make("ForTokenClassification"), []

    def without_mask(module, args, kwargs):
        assert args == (IDS,)
        seen.append({name for name, x in kwargs.items() if torch.is_tensor(x)})
        return args, {**kwargs, "attention_mask": None}

    for model in both:
        model.eval().bert.register_forward_pre_hook(without_mask, with_kwargs=True)
    expected, actual = (model(input_ids=IDS, attention_mask=MASK).logits for model in both)
    torch.testing.assert_close(actual[MASK == 1], expected[MASK == 1])
    assert seen[0] >= {"attention_mask"} <= seen[1]


def test_a_hook_of_the_bare_model_keeps_documents_apart():
    _, own = make("ForTokenClassification")
    bounds = torch.tensor([0, 9, 21], dtype=torch.int32)
    given = {"input_ids": IDS.view(1, -1), "cu_seq_lens_q": bounds, "max_length_q": 12}
    expected = own.eval()(**given).logits
    own.bert.register_forward_hook(lambda module, args, output: None)
    torch.testing.assert_close(own(**given).logits, expected)


@pytest.mark.parametrize("returns_rows", [False, True])
def test_a_hook_behind_the_bare_model_gets_hidden_states_in_their_padded_form(returns_rows):
    """Those of all tokens too where the loss reads the masked ones alone."""
    _, own = make("ForMaskedLM")
    shapes = []
    own.bert.register_forward_hook(lambda m, args, output: shapes.append(output[0].shape))
    own.train(returns_rows)(input_ids=IDS, attention_mask=MASK, labels=WORDS)
    assert shapes == [(3, 7, 32)]


@pytest.mark.parametrize("head", ["ForSequenceClassification", "ForTokenClassification"])
def test_an_output_that_a_hook_of_the_bare_model_keeps_stays_as_it_was(head):
    """As of those who take features of a model with a head."""
    kept = []
    for model in make(head):
        model.eval().bert.register_forward_hook(lambda m, args, output: kept.append(output))
        model(input_ids=IDS, attention_mask=MASK)
    expected, actual = (output.last_hidden_state * MASK[..., None] for output in kept)
    torch.testing.assert_close(actual, expected)


def test_a_bare_model_of_a_users_class_gets_hugging_faces_arguments():
    def scaled(kind):
        class Scaled(kind):
            def forward(self, input_ids, attention_mask=None, **others):
                output = super().forward(input_ids, attention_mask=attention_mask, **others)
                scale = 1 + (input_ids * attention_mask)[..., None] / 10
                output.last_hidden_state = output.last_hidden_state * scale
                return output

        return Scaled

    both = make("ForTokenClassification")
    for model in both:
        model.eval().bert.__class__ = scaled(type(model.bert))
    expected, actual = (model(input_ids=IDS, attention_mask=MASK).logits for model in both)
    torch.testing.assert_close(actual[MASK == 1], expected[MASK == 1])


SEEN = {
    "ForPreTraining": ("bert.embeddings", "bert.encoder", "cls"),
    "ForNextSentencePrediction": [
        f"bert.encoder.layer.0{name}" for name in ("", ".attention", ".attention.self")
    ],
    "ForMaskedLM": ("cls.predictions",),
    "ForTokenClassification": ("dropout", "classifier"),
    "ForQuestionAnswering": ("qa_outputs",),
}


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize(("head", "name"), [(h, name) for h, some in SEEN.items() for name in some])
def test_a_hook_sees_the_hidden_states_that_hugging_faces_does(head, name, training):
    both, seen = make(head), []

    def see(module, args, kwargs, output):
        states = args[0] if args and args[0].is_floating_point() else None
        output = output[0] if isinstance(output, (tuple, dict)) else output
        seen.append([x[MASK == 1] for x in (states, output) if x is not None])

    for model in both:
        model.get_submodule(name).register_forward_hook(see, with_kwargs=True)
        model.train(training)(
            input_ids=IDS, attention_mask=MASK, **(LABELS[head] if training else {})
        )
    expected, actual = seen
    torch.testing.assert_close(actual, expected)


@pytest.mark.parametrize("name", ["", ".attention", ".attention.self"])
def test_a_hook_inside_a_layer_gets_the_mask_by_its_place_or_its_name_as_hugging_faces(name):
    seen = []

    def see(module, args, kwargs):
        seen.append(
            (sum(map(torch.is_tensor, args)), torch.is_tensor(kwargs.get("attention_mask")))
        )

    for model in make("ForTokenClassification"):
        inside = model.get_submodule(f"bert.encoder.layer.0{name}")
        inside.register_forward_pre_hook(see, with_kwargs=True)
        model.eval()(input_ids=IDS, attention_mask=MASK)
    assert seen[0] == seen[1]


@pytest.mark.parametrize(
    "name", ["embeddings", "encoder", *(f"encoder.layer.0{x}" for x in ("", ".attention.self"))]
)
@pytest.mark.parametrize("form", ["padded", "full", "packed"])
def test_a_hook_that_only_looks_changes_no_dropout(name, form):
    batch = {"input_ids": IDS, "attention_mask": MASK if form == "padded" else None}
    if form == "packed":
        texts = [row[:count].tolist() for row, count in zip(IDS, (7, 3, 5), strict=True)]
        batch = {"input_ids": fastbert.PackedBatch.from_sequences(texts)}
    torch.manual_seed(0)
    dropouts = {"hidden_dropout_prob": 0.3, "attention_probs_dropout_prob": 0.2}
    model = fastbert.BertModel(fastbert.BertConfig(**(SHAPE | dropouts))).train()
    found = []
    for _ in range(2):
        torch.manual_seed(1)
        found.append(model(**batch).last_hidden_state)
        model.get_submodule(name).register_forward_hook(lambda module, args, output: None)
    torch.testing.assert_close(found[1], found[0])
