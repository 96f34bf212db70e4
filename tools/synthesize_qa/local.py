"""The `transformers` backend: a causal language model in PyTorch answers units in batches."""


def answer(units, journal, model, read, *, batch_size, progress=None):
    """Has `model` answer all units that aren't settled; see `units` for the journal's records.

    read: (text, kind) → `parse.Reply`.
    """
    raise NotImplementedError
