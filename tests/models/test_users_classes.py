"""Modules of users' classes, and modules that users call, are called as in Hugging Face's."""

import copy
import itertools

import pytest
import torch
import transformers
from torch import nn

import fastbert
from tests.models.users_case import IDS, LABELS, MASK, WORDS, make
from tests.versions import IS_V4


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


class Later(nn.ModuleList):
    """Leaves its first layer out, as LayerDrop's lists do at random."""

    def __iter__(self):
        return iter(list(super().__iter__())[1:])


@pytest.mark.parametrize("kind", [Later, tuple, lambda layers: nn.Sequential(*layers)])
@pytest.mark.parametrize("head", ["Model", "ForSequenceClassification"])
def test_layers_in_another_list_are_refused(head, kind):
    _, own = make(head)
    encoder = own.base_model.encoder
    layers = kind(encoder.layer)
    del encoder.layer
    encoder.layer = layers
    with pytest.raises(
        ValueError, match=r"layers in a plain nn.ModuleList, got \w+; use a Hugging"
    ):
        own(input_ids=IDS, attention_mask=MASK)
    with pytest.raises(ValueError, match=r"layers in a plain nn\.ModuleList"):
        encoder(torch.ones(2, 3, 32))
