"""The sums of partial sums, and who asks for them."""

import threading

import pytest
import torch

pytestmark = pytest.mark.usefixtures("triton")


def case(k, count, columns, device, rows=None):
    partials = torch.randn(k, count, columns, device=device)
    sums = torch.full((rows or k, columns), float("nan"), device=device)
    expected = partials.sum(1)
    if rows == 3 > k:
        expected = torch.stack([expected[0], torch.zeros_like(expected[0]), expected[1]])
    return partials, sums, expected


# more partial sums than the kernel takes in one step, and columns that are no multiple of a strip
@pytest.mark.parametrize(("k", "rows"), [(1, 1), (2, 2), (3, 3), (2, 3)])
@pytest.mark.parametrize(("count", "columns"), [(1100, 20), (3, 600), (0, 40)])
def test_partial_sums_are_all_added(k, rows, count, columns, device):
    from fastbert.kernels.partial_sums import add_partials

    partials, sums, expected = case(k, count, columns, device, rows)
    add_partials(partials, sums)
    torch.testing.assert_close(sums, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("number", [0, 1, 2, 3, 4, 5, 9])
def test_together_all_of_them_are_added_at_the_end(number, device, monkeypatch):
    from fastbert.kernels import partial_sums

    launches = []
    launch = partial_sums._launch
    monkeypatch.setattr(partial_sums, "_launch", lambda p: (launches.append(len(p)), launch(p)))
    shapes = [(2, 7, 40, None), (1, 30, 300, None), (2, 5, 33, 3), (3, 600, 16, None)]
    cases = [case(*shapes[n % 4][:3], device, shapes[n % 4][3]) for n in range(number)]
    with partial_sums.together():
        for partials, sums, _ in cases:
            partial_sums.add_partials(partials, sums)
        assert all(sums.isnan().all() for _, sums, _ in cases)
    for _, sums, expected in cases:
        torch.testing.assert_close(sums, expected, rtol=1e-4, atol=1e-4)
    assert launches == [4] * (number // 4) + [number % 4] * bool(number % 4)


def test_another_thread_waits_for_nothing(device):
    """Autograd runs the backwards of several devices at once, each in a thread of its own."""
    from fastbert.kernels import partial_sums

    partials, sums, expected = case(2, 9, 40, device)
    with partial_sums.together():
        thread = threading.Thread(target=partial_sums.add_partials, args=(partials, sums))
        thread.start()
        thread.join()
        torch.testing.assert_close(sums, expected, rtol=1e-4, atol=1e-4)


def test_after_an_error_nothing_waits(device):
    from fastbert.kernels import partial_sums

    partials, sums, expected = case(2, 9, 40, device)

    def fail():
        with partial_sums.together():
            partial_sums.add_partials(partials, sums)
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    assert sums.isnan().all()
    partial_sums.add_partials(partials, sums)
    torch.testing.assert_close(sums, expected, rtol=1e-4, atol=1e-4)
