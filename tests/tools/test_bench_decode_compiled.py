"""The program that samples answers, compiled on abstract arrays: one loop without a known length, over tokens."""

import jax
import pytest

from paligemma_med.parallel import compiled, hlo
from paligemma_med.setup import TrainingSetup
from tests import tiny
from tools.bench import decode_compiled


@pytest.mark.slow
def test_a_token_moves_a_part_of_it():
    c = tiny.config("/no/such/folder", mesh=[("data", 8)])
    setup = TrainingSetup.without_data(c)
    made = decode_compiled.lowered(setup, jax.devices()[0], rows=2, samples=3, prompt=8, new=4).compile()
    program = hlo.Program(made.as_text())
    assert 0 < decode_compiled.per_token(program) < compiled.moved(program)
