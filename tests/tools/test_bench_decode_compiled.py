"""Sampling of any size, whatever evaluations a config has."""

from paligemma_med import forecast
from tests import tiny
from tools.bench import decode_compiled


def test_so_many_prompts_and_answers():
    c = tiny.config("/no/such/folder")
    setup = decode_compiled.setup_of(c, rows=16, samples=3, new=9, filters=True)
    (program,) = forecast.of_evals(setup, text_len=20)
    assert (program.name, program.rows, program.text_len, program.rounds) == ("sampled: answers", 2, 32, 8)
    assert program.filters and dict(c.evals.val.pred_kw) == {"max_new_tokens": 4}
    (program,) = forecast.of_evals(decode_compiled.setup_of(c, rows=16, samples=3, new=9))
    assert not program.filters and program.text_len == 40
