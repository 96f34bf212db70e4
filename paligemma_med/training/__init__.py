"""The parts of a training run: the step, the optimizer, the files it writes, and how it is stopped."""
