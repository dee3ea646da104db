"""What users put on any module of a model counts as in Hugging Face's, or is called as there."""

import copy
import itertools

import pytest
import torch
import transformers
from torch import nn
from torch.utils import _pytree as pytree

import fastbert
from tests.versions import IS_V4

SHAPE = {
    "vocab_size": 61,
    "hidden_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "max_position_embeddings": 40,
    "hidden_dropout_prob": 0.0,
    "attention_probs_dropout_prob": 0.0,
    "num_labels": 2,
}
MASK = torch.tensor([[1] * 7, [1, 1, 1, 0, 0, 0, 0], [1, 1, 1, 1, 1, 0, 0]])
IDS = torch.arange(3, 24).view(3, 7) * MASK
WORDS = torch.tensor([[1, 0, -100, 1, 1, 0, -100], [0, 1, 1] + [-100] * 4, [-100] * 7])
PAIRS = torch.tensor([0, 1, 1])
LABELS = {
    "Model": {},
    "ForSequenceClassification": {"labels": PAIRS},
    "ForTokenClassification": {"labels": WORDS},
    "ForQuestionAnswering": {},  # whose loss differs on purpose
    "ForMaskedLM": {"labels": WORDS},
    "ForPreTraining": {"labels": WORDS, "next_sentence_label": PAIRS},
    "ForNextSentencePrediction": {"labels": PAIRS},
    "ForMultipleChoice": {"labels": torch.tensor([1])},
}
UNWRAPPED = "attention.self.dropout"  # whose probability Hugging Face reads


def make(head, kind="own"):
    """Hugging Face's model, and fastbert's own of the same weights or the same model patched."""
    torch.manual_seed(0)
    config = transformers.BertConfig(**SHAPE)
    theirs = getattr(transformers, f"Bert{head}")(config)
    for parameter in theirs.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    if kind == "patched":
        return theirs, fastbert.patch(copy.deepcopy(theirs))
    own = getattr(fastbert, f"Bert{head}")(config)
    own.load_state_dict(theirs.state_dict())
    return theirs, own


def doubled(values):
    return pytree.tree_map(lambda x: x * 2 if torch.is_tensor(x) and x.is_floating_point() else x,
                           values)  # fmt: skip


def after(module, args, output):
    if isinstance(output, dict):
        for name in list(output):
            output[name] = doubled(output[name])
        return output
    return (doubled(output[0]), *output[1:]) if isinstance(output, tuple) else doubled(output)


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


def along_the_sequence(hidden_states, mask):
    """What no module could compute of packed tokens."""
    if mask is not None:
        keys = mask[:, 0, 0, :, None]
        hidden_states = hidden_states * (keys == (0 if keys.is_floating_point() else 1))
    return hidden_states.cumsum(1).tanh()


class Encoder(nn.Module):
    def forward(self, hidden_states, attention_mask=None, **others):
        x = along_the_sequence(hidden_states, attention_mask)
        kind = transformers.modeling_outputs.BaseModelOutputWithPastAndCrossAttentions
        return kind(last_hidden_state=x)


class Layer(nn.Module):
    def forward(self, hidden_states, attention_mask=None, *args, **others):
        x = along_the_sequence(hidden_states, attention_mask)
        return (x,) if IS_V4 else x


class Attention(Layer):
    def forward(self, hidden_states, attention_mask=None, *args, **others):
        return along_the_sequence(hidden_states, attention_mask), None


class Pooler(nn.Module):
    def forward(self, hidden_states):
        return hidden_states[:, :2].flatten(1)[:, :32].tanh() + hidden_states[:, 1]


class Embeddings(transformers.models.bert.modeling_bert.BertEmbeddings):
    def forward(self, input_ids=None, token_type_ids=None, **others):
        x = super().forward(input_ids, token_type_ids, **others)
        before = nn.functional.pad(x, (0, 0, 1, 0))[:, :-1]
        return x + before * (token_type_ids[..., None] + 1)


def with_embeddings(model):
    of = Embeddings(model.config)
    of.load_state_dict(model.bert.embeddings.state_dict())
    model.bert.embeddings = of


def with_another_layer(model):
    model.bert.encoder.layer.append(Layer())
    model.config.num_hidden_layers += 1


USERS = {
    "embeddings": with_embeddings,
    "encoder": lambda model: setattr(model.bert, "encoder", Encoder()),
    "layer": with_another_layer,
    "attention": lambda model: setattr(model.bert.encoder.layer[0], "attention", Attention()),
    "self": lambda model: setattr(model.bert.encoder.layer[0].attention, "self", Attention()),
    "pooler": lambda model: setattr(model.bert, "pooler", Pooler()),
}


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("part", USERS)
@pytest.mark.parametrize("head", ["ForPreTraining", "ForNextSentencePrediction"])
def test_parts_of_a_users_classes_are_called_as_hugging_faces_are(head, part, training):
    both = make(head)
    for model in both:
        USERS[part](model.train(training))
    labels = LABELS[head] if training else {}
    inputs = {"input_ids": IDS, "attention_mask": MASK, "token_type_ids": IDS % 2 * MASK}
    expected, actual = (model(**inputs, **labels) for model in both)
    for key in expected.keys() & actual.keys():
        x, y = expected[key], actual[key]
        if x.shape[:2] == MASK.shape:
            x, y = x[MASK == 1], y[MASK == 1]
        torch.testing.assert_close(y, x, msg=lambda text, key=key: f"{key}: {text}")


@pytest.mark.parametrize(
    ("form", "part"),
    # padding on the left is seen by who reads columns, or the one before
    [
        *itertools.product(["packed", "documents"], USERS),
        *(("left", part) for part in ("encoder", "layer", "attention", "self")),
    ],
)
def test_parts_of_a_users_classes_get_a_row_for_each_sequence(form, part):
    """However these are given, hidden states included."""
    _, model = make("ForPreTraining")
    USERS[part](model.eval())
    bare, types = model.bert, IDS % 2 * MASK
    options = {"output_hidden_states": part != "encoder"}
    expected = bare(IDS, MASK, types, **options)
    kept = [torch.cat([x[row][MASK[row] == 1] for row in range(3)]) for x in (IDS, types)]
    bounds = torch.tensor([0, 7, 10, 15], dtype=torch.int32)
    ids, types = kept
    places = torch.cat([torch.arange(n) for n in (7, 3, 5)])
    if form == "packed":
        batch = fastbert.PackedBatch(
            input_ids=ids, token_type_ids=types, position_ids=places, cu_seqlens=bounds,
            max_seqlen=7,
        )  # fmt: skip
        actual = bare(batch, **options)
    elif form == "documents":
        documents = {"cu_seq_lens_q": bounds, "max_length_q": 7}
        actual = bare(ids[None], token_type_ids=types[None], **documents, **options)
    else:
        left = MASK.flip(1)
        columns = (left.cumsum(1) - 1).clamp(min=0)
        ids, types = (torch.zeros_like(IDS).masked_scatter(left == 1, x) for x in kept)
        actual = bare(ids, left, types, columns, **options)
    torch.testing.assert_close(actual.pooler_output, expected.pooler_output)
    for x, y in zip(
        (expected.last_hidden_state, *(expected.hidden_states or ())),
        (actual.last_hidden_state, *(actual.hidden_states or ())),
        strict=True,
    ):
        y = y[MASK.flip(1) == 1] if form == "left" else y.flatten(0, -2)
        torch.testing.assert_close(y, x[MASK == 1])


def test_a_layer_is_called_by_hand_as_hugging_faces():
    """With its mask in every form, and computed again in the backward pass where that is asked."""
    both = make("Model")
    x = torch.randn(3, 7, 32, requires_grad=True)
    mask = MASK[:, None, None].bool()
    both[1].gradient_checkpointing_enable()  # the name of transformers 5.17 and 4.57 too
    runs = []
    both[1].encoder.layer[0].output.register_forward_pre_hook(lambda *_: runs.append(1))
    expected, actual = (model.train().encoder.layer[0](x, mask) for model in both)
    expected = expected[0] if IS_V4 else expected
    torch.testing.assert_close(actual[MASK == 1], expected[MASK == 1])
    grads = [torch.autograd.grad(y[MASK == 1].sin().sum(), x)[0] for y in (expected, actual)]
    torch.testing.assert_close(grads[1], grads[0])
    assert len(runs) == 2
    with pytest.raises(ValueError, match=r"BertLayer: expected only arguments .* got cache"):
        both[1].encoder.layer[0](x, mask, cache=1)


def test_attention_is_called_by_hand_as_hugging_faces():
    both, x = make("Model"), torch.randn(3, 7, 32)
    for name in ("attention", "attention.self"):
        for mask in (None, MASK[:, None, None].bool()):
            expected, actual = (
                model.encoder.layer[0].get_submodule(name)(x, attention_mask=mask)[0]
                for model in both
            )
            torch.testing.assert_close(actual[MASK == 1], expected[MASK == 1])


def test_embeddings_and_a_pooler_are_called_by_hand_as_hugging_faces():
    both = make("Model")
    expected, actual = (model.embeddings(IDS, IDS % 2) for model in both)
    torch.testing.assert_close(actual, expected)
    found = [model.embeddings(inputs_embeds=actual) for model in both]
    torch.testing.assert_close(found[1], found[0])
    found = [model.pooler(actual) for model in both]
    torch.testing.assert_close(found[1], found[0])


def test_a_head_of_a_users_class_is_called_in_training_too():
    """Not the transform and the decoder inside it alone."""

    def scaled(kind):
        class Scaled(kind):
            def forward(self, *args):
                return super().forward(*args) * 2

        return Scaled

    for where in ("cls", "cls.predictions"):
        both = make("ForMaskedLM")
        for model in both:
            head = model.train().get_submodule(where)
            head.__class__ = scaled(type(head))
        expected, actual = (
            model(input_ids=IDS, attention_mask=MASK, labels=WORDS).loss for model in both
        )
        torch.testing.assert_close(actual, expected)


def test_heads_that_are_pruned_by_hand_are_counted_by_their_size():
    both = make("ForSequenceClassification")
    for model in both:
        attention = model.eval().bert.encoder.layer[0].attention
        for linear in (attention.self.query, attention.self.key, attention.self.value):
            linear.weight, linear.bias = (
                nn.Parameter(x[:24]) for x in (linear.weight, linear.bias)
            )
            linear.out_features = 24
        attention.self.all_head_size = 24  # transformers 4.57 reads both of these
        if model is both[0]:
            attention.self.num_attention_heads = 3
        end = attention.output.dense
        end.weight, end.in_features = nn.Parameter(end.weight[:, :24]), 24
    expected, actual = (model(input_ids=IDS, attention_mask=MASK).logits for model in both)
    torch.testing.assert_close(actual, expected)


class Share(nn.Linear):
    """As torch's tensor parallelism has it: features of a part of the heads, said to be all."""

    def forward(self, x):
        return super().forward(x)[..., :16] if x.shape[-1] == 32 else self.of_share(x)

    def of_share(self, x):
        return nn.functional.linear(x, self.weight[:, :16], self.bias)


@pytest.mark.parametrize("kind", ["own", "encoder"])
def test_a_rank_with_a_share_of_the_heads_attends_by_heads_of_their_size(kind):
    both = make("ForSequenceClassification")
    if kind == "encoder":
        encoder, swapped = both[1].bert.encoder, copy.deepcopy(both[0])
        swapped.bert.encoder = encoder
        both = both[0], swapped
    for model in both:
        attention = model.eval().bert.encoder.layer[0].attention
        for linear in (*list(attention.self.children())[:3], attention.output.dense):
            linear.__class__ = Share
        if model is both[0]:  # transformers 4.57 reads both of these
            attention.self.num_attention_heads, attention.self.all_head_size = 2, 16
    expected, actual = (model(input_ids=IDS, attention_mask=MASK).logits for model in both)
    torch.testing.assert_close(actual, expected)


def test_a_configuration_that_has_become_a_decoders_is_refused():
    _, own = make("ForSequenceClassification")
    own.config.is_decoder = True
    with pytest.raises(ValueError, match="a configuration of an encoder, got is_decoder=True"):
        own(input_ids=IDS)


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
