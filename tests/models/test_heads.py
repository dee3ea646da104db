import torch

from fastbert.modules.sequences import first_tokens


def test_first_tokens_are_each_sequences_own():
    hidden_states = torch.randn(6, 3, requires_grad=True)
    cu_seqlens = torch.tensor([0, 0, 2, 2, 5, 6, 6], dtype=torch.int32)  # lengths 0 2 0 3 1 0
    rows = first_tokens(hidden_states, cu_seqlens)
    expected = torch.zeros(6, 3)
    expected[[1, 3, 4]] = hidden_states[[0, 2, 5]]
    assert torch.equal(rows, expected)
    rows.sum().backward()
    assert hidden_states.grad.sum(1).tolist() == [3, 0, 3, 0, 0, 3]


def test_a_batch_of_empty_sequences_has_zeros():
    rows = first_tokens(torch.ones(0, 3), torch.zeros(3, dtype=torch.int32))
    assert torch.equal(rows, torch.zeros(2, 3))


def test_first_tokens_of_sequences_of_one_length_are_the_same_and_have_their_gradients():
    found = []
    for seqlen in (0, 4):
        x = torch.arange(24.0).view(12, 2).requires_grad_()
        first = first_tokens(x, torch.tensor([0, 4, 8, 12], dtype=torch.int32), seqlen)
        first.square().sum().backward()
        found.append((first.detach(), x.grad))
    for one, other in zip(*found, strict=True):
        assert torch.equal(one, other)
