"""How many states of the same modules a planner keeps, and for how long."""

import gc
import weakref

from torch import nn

from fastbert.modules import plan


class Encoder(nn.Module):
    """Layers that a planner reads, and counts."""

    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList(nn.Sequential(nn.Linear(2, 2), nn.Dropout(0)) for _ in "ab")
        self.planner, self.reads = plan.Planner(self.read), 0

    def read(self, layer):
        self.reads += 1
        return layer[0], layer[1].p

    def probability(self, p):
        self.layers[1][1].p = p
        (_, first), (_, second) = self.planner.parts(self.layers)
        assert (first, second) == (0, p)


def test_who_switches_between_a_few_states_has_them_read_once():
    encoder = Encoder()
    states = [0.1 * number for number in range(plan.MOST_PLANS)]
    for _ in range(3):
        for p in states:
            encoder.probability(p)
    assert encoder.reads == 2 * plan.MOST_PLANS
    for p in (0.9, states[-1]):
        encoder.probability(p)
    assert encoder.reads == 2 * plan.MOST_PLANS + 2
    encoder.probability(states[0])  # that of the last use longest ago made room
    assert encoder.reads == 2 * plan.MOST_PLANS + 4


def test_states_of_modules_that_are_gone_keep_none_of_them():
    encoder = Encoder()
    for p in (0.1, 0.2):
        encoder.probability(p)
    gone = weakref.ref(encoder.layers[0][0])
    encoder.layers[0][0] = nn.Linear(2, 2)
    encoder.probability(0.2)
    gc.collect()
    assert gone() is None
    assert len(encoder.planner.plans[encoder.layers][True]) == 1


def test_what_is_read_under_hooks_of_all_modules_is_read_again_without():
    encoder = Encoder()
    handle = nn.modules.module.register_module_forward_hook(lambda *_: None)
    encoder.probability(0.1)
    handle.remove()
    for _ in range(2):
        encoder.probability(0.1)
    assert encoder.reads == 4
