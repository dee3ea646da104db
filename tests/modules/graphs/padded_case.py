"""A patched model twice, the second of which has recorded one small batch."""

from tests.modules.graphs.case import batch, logits, models

NARROW = {"embedding_size": 16}  # of ELECTRA's small models, which project them
INPUTS = batch([7, 3, 5])


def pair(kind="Bert", **options):
    plain, recorded = (model.eval() for model in models(kind, **options))
    logits(recorded, INPUTS)
    return plain, recorded
