"""The one error that the input raises for what a user can mend."""


class InputError(ValueError):
    """What is wrong with a data set, a record or an input config, in one sentence.

    It holds text alone, so that it comes back whole from a worker process.
    """
