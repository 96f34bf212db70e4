"""The parts of a training run: the step, the optimizer, what is written, and what stops it."""
