"""The sum of embeddings, normed, and its gradients, beside plain PyTorch's."""

import pytest
import torch
import torch.nn.functional as F

from fastbert import backend
from fastbert import rng as random
from fastbert.ops.embedding import embedding_layer_norm
from tests.ops.embedding.case import NAMES, WORDS, inputs
from tests.oracle import assert_as_accurate, gradients


@pytest.mark.pairs(within="body")
@pytest.mark.parametrize(
    ("num_tokens", "hidden"), [(70, 40), (70, 312), (5, 770), (3, 7), (3, 2060), (0, 16)]
)
@pytest.mark.parametrize("dropout_p", [0.3, 0.0])
@pytest.mark.usefixtures("body")
def test_is_as_accurate_as_pytorch(num_tokens, hidden, dropout_p, dtype, device):
    case = inputs(num_tokens, hidden, dtype, device)
    options = {"eps": 0.5, "dropout_p": dropout_p, "padding_idx": 2}
    truth = case.plain(torch.double, **options)
    assert_as_accurate(case.results(**options), case.plain(dtype, **options), truth, names=NAMES)


def skewed(num_tokens):
    """Mostly [MASK], a [CLS] and a [SEP] for each of many sequences, few others."""
    weights = torch.tensor([0.05, 0.05, 0.8, *[0.1 / (WORDS - 3)] * (WORDS - 3)])
    return torch.multinomial(weights, num_tokens, replacement=True)


def shuffled_runs(*lengths):
    ids = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))
    return ids[torch.randperm(len(ids))]


CASES = {
    "one id": lambda: torch.full((80,), 7),
    "a chunk of one id": lambda: torch.full((64,), 7),
    "all distinct": lambda: torch.randperm(WORDS),
    "skewed": lambda: skewed(100),
    # sorted runs that begin and end where a chunk does, or one before or after
    "boundaries of 32": lambda: shuffled_runs(32, 31, 1, 64, 33, 30, 1, 32, 1, 31, 96, 1),
    "boundaries of 64": lambda: shuffled_runs(64, 63, 1, 128, 65, 62, 1, 64, 1, 63, 192, 1),
}


@pytest.mark.parametrize(
    "draw",
    [
        # some GPUs' chunks alone are of 64
        pytest.param(draw, id=name, marks=[pytest.mark.exhaustive] * (name == "boundaries of 64"))
        for name, draw in CASES.items()
    ],
)
@pytest.mark.usefixtures("triton")
def test_sums_gradients_however_ids_repeat(draw, device):
    ids = draw()
    case = inputs(len(ids), 24, torch.float32, device)
    case.input_ids = ids.to(device)
    case.token_type_ids = None
    truth = case.plain(torch.double)
    assert_as_accurate(case.results(), case.plain(torch.float32), truth, names=NAMES)


@pytest.mark.usefixtures("triton")
def test_sums_runs_of_more_chunks_than_are_joined_at_once(device):
    case = inputs(1300, 8, torch.float32, device)
    case.input_ids[100:] = 7
    case.token_type_ids = None
    truth = case.plain(torch.double)
    assert_as_accurate(case.results(), case.plain(torch.float32), truth, names=NAMES)


@pytest.mark.parametrize("dropout_p", [0.0, 0.3])
@pytest.mark.usefixtures("body")
def test_without_a_table_of_types_it_is_a_table_of_zeros(dropout_p, device):
    case = inputs(33, 24, torch.float32, device)
    case.token_type_ids, case.parameters[2] = None, torch.zeros(1, 24, device=device)

    def function(word, position, types, weight, bias):
        ids = case.input_ids, case.position_ids, None
        options = {"dropout_p": dropout_p, "rng": case.rng}
        return embedding_layer_norm(*ids, word, position, types, weight, bias, 0.5, **options)

    expected = gradients(function, *case.parameters, dy=case.dy)
    del expected[3]  # of the types
    word, position, _, *vectors = case.parameters
    actual = gradients(
        lambda word, position, *others: function(word, position, None, *others),
        *(word, position, *vectors),
        dy=case.dy,
    )
    for a, e in zip(actual, expected, strict=True):
        torch.testing.assert_close(a, e, rtol=0, atol=0)


@pytest.mark.parametrize("padding_idx", [0, 7, -1, -WORDS, None])
@pytest.mark.usefixtures("body")
def test_padding_gets_no_gradient(padding_idx, device):
    case = inputs(90, 16, torch.float32, device)
    case.input_ids[:75] = 7  # a run over chunks
    case.input_ids[75] = 0
    case.input_ids[76] = WORDS - 1
    dword = case.results(padding_idx=padding_idx)[1]
    torch.testing.assert_close(
        dword, case.plain(torch.float32, padding_idx=padding_idx)[1], rtol=1e-4, atol=1e-4
    )
    is_zero = (dword[[0, 7, WORDS - 1]] == 0).all(1).tolist()
    assert is_zero == [padding_idx in (0, -WORDS), padding_idx == 7, padding_idx == -1]


@pytest.mark.parametrize("site", [0, 5])
@pytest.mark.usefixtures("triton")
def test_drops_exactly_what_the_reference_drops(site, device):
    case = inputs(19, 72, torch.float32, device)
    case.rng = case.rng.at(site)
    dropped, kept = case.results(dropout_p=0.5)[0], case.results()[0]
    keep = random.hidden_keep_mask(case.rng, 72, 0.5)
    torch.testing.assert_close(dropped, kept * keep * 2)
    assert torch.equal(dropped != 0, keep)


@pytest.mark.usefixtures("body")
def test_dropout_without_numbers_takes_them_from_torchs_generator(device):
    case = inputs(6, 64, torch.float32, device)
    case.rng = None
    torch.manual_seed(1)
    first, second = (case.results(dropout_p=0.5)[0] for _ in range(2))
    torch.manual_seed(1)
    assert torch.equal(case.results(dropout_p=0.5)[0], first)
    assert not torch.equal(first, second)


@pytest.mark.parametrize("table", [torch.float32, torch.float16], ids=str)
@pytest.mark.usefixtures("body")
def test_the_result_has_the_dtype_that_is_asked_for(table, device):
    """Gradients of tables in float32 are as exact as float32, however coarse the result is."""
    case = inputs(40, 48, torch.float32, device)
    case.parameters = [p.to(table) for p in case.parameters[:3]] + case.parameters[3:]
    case.dy = case.dy.half()
    other = torch.float16 if table == torch.float32 else torch.float32
    actual = case.results(dtype=other, eps=0.5)
    assert [t.dtype for t in actual] == [other, *[table] * 3, *[torch.float32] * 2]
    truth = case.plain(torch.double, eps=0.5)
    expected = [t.to(a.dtype) for t, a in zip(case.plain(table, eps=0.5), actual, strict=True)]
    assert_as_accurate(actual, expected, truth, names=NAMES)


@pytest.mark.usefixtures("body")
def test_ids_may_be_padded_broadcast_int32_and_strided(device):
    case = inputs(18, 16, torch.float32, device)
    expected = case.results()
    case.position_ids = torch.arange(9, device=device)
    case.input_ids = case.input_ids.view(2, 9)
    case.token_type_ids = torch.ones(1, 1, dtype=torch.int64, device=device)
    case.dy = case.dy.view(2, 9, 16)
    padded = case.results()
    assert padded[0].shape == (2, 9, 16)
    case.input_ids = case.input_ids.flatten()
    case.position_ids = case.position_ids.repeat(2).int()
    case.token_type_ids = torch.ones(36, dtype=torch.int32, device=device)[::2]
    case.dy = F.pad(case.dy.view(18, 16), (0, 7))[:, :16]
    packed = case.results()
    padded[0] = padded[0].flatten(0, 1)
    assert all(torch.equal(a, b) for a, b in zip(padded, packed, strict=True))
    assert not torch.equal(packed[0], expected[0])


@pytest.mark.usefixtures("body")
def test_an_expanded_gradient_is_that_of_its_copy(device):
    case = inputs(11, 24, torch.float32, device)
    case.dy = torch.full((1, 1), 3.0, device=device).expand(11, 24)
    expanded = case.results()
    case.dy = case.dy.contiguous()
    assert all(torch.equal(a, b) for a, b in zip(expanded, case.results(), strict=True))


@pytest.mark.usefixtures("body")
def test_the_backward_gives_the_same_bits_each_time(device):
    case = inputs(100, 24, torch.float32, device)
    first, second = (case.results(dropout_p=0.3) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.usefixtures("triton")
def test_torch_compile_gives_the_eager_result(device):
    case = inputs(20, 24, torch.float32, device)
    ids = case.input_ids, case.position_ids, case.token_type_ids
    for dropout_p in (0.0, 0.3):
        eager = case.results(dropout_p=dropout_p)
        torch._dynamo.reset()

        @torch.compile(fullgraph=True, backend="aot_eager")
        def function(*parameters, p=dropout_p):
            return embedding_layer_norm(*ids, *parameters, dropout_p=p, rng=case.rng)

        traced = gradients(function, *case.parameters, dy=case.dy)
        assert all(torch.equal(a, b) for a, b in zip(eager, traced, strict=True))


def test_the_reference_is_differentiable_twice_in_float64():
    case = inputs(3, 4, torch.float64, "cpu", sizes=(4, 3, 2))
    ids = case.input_ids, case.position_ids, case.token_type_ids
    leaves = [p.requires_grad_() for p in case.parameters]
    with backend.use("reference"):
        torch.autograd.gradgradcheck(lambda *p: embedding_layer_norm(*ids, *p, eps=0.1), leaves)


@pytest.mark.gpu
@pytest.mark.parametrize("hidden", [128, 384, 768, 1024])
def test_real_sizes_on_a_gpu(hidden):
    case = inputs(16384 + 3, hidden, torch.float32, "cuda", sizes=(30522, 512, 2))
    case.input_ids[::6] = 103
    case.input_ids[1::128] = 101
    case.dy = case.dy.bfloat16()
    with backend.use("triton"):
        actual = case.results(dropout_p=0.1, dtype=torch.bfloat16, padding_idx=0)
    options = {"dropout_p": 0.1, "padding_idx": 0}
    plain = case.plain(torch.float32, **options)
    expected = [t.to(a.dtype) for t, a in zip(plain, actual, strict=True)]
    assert_as_accurate(actual, expected, case.plain(torch.double, **options), names=NAMES)


@pytest.mark.gpu
def test_tables_that_32_bit_offsets_do_not_reach():
    """The same as with a table of the last rows alone."""
    if torch.cuda.mem_get_info()[0] < 30 * 2**30:
        pytest.skip("needs 30 GB of free GPU memory")
    hidden, num_words, last = 1024, 2**21 + 64, 64
    case = inputs(256, hidden, torch.bfloat16, "cuda", sizes=(last, 512, 2))
    with backend.use("triton"):
        few = case.results()
        word = torch.zeros(num_words, hidden, dtype=torch.bfloat16, device="cuda")
        word[-last:] = case.parameters[0]
        case.parameters[0] = word
        case.input_ids += num_words - last
        many = case.results()
    assert torch.equal(many[1][-last:], few[1])
    assert not many[1][:-last].any()
    for a, b in zip(many[2:] + many[:1], few[2:] + few[:1], strict=True):
        assert torch.equal(a, b)
