"""The error that the input raises for anything a user can fix."""


class InputError(ValueError):
    """What is wrong with a data set, a record or an input config, in one sentence.

    It only holds text, so that it can be passed on by a worker process.
    """
