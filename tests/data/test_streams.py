from fastbert.data.streams import Purpose, stream


def test_every_argument_gives_another_stream():
    places = [
        (seed, purpose, epoch, index)
        for seed in (0, 1, 2**32, 2**63)
        for purpose in Purpose
        for epoch in (0, 1, 2)
        for index in (0, 1, 2**40)
    ]
    firsts = {stream(*place).random() for place in places}
    assert len(firsts) == len(places)
    assert stream(3, Purpose.PAIRS, 4, 5).random() == stream(3, Purpose.PAIRS, 4, 5).random()


def test_any_integer_is_a_seed():
    assert stream(-1, Purpose.SPLIT).random() == stream(2**64 - 1, Purpose.SPLIT).random()
