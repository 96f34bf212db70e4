"""What a program that samples answers takes and does on a chip that needn't be here.

    python -m tools.bench.decode_compiled --config=configs/stage2_rocov2.py:res=448 --chip=h200 --rows=64 --samples=5

As `evaluate --dry_run` (`forecast`), but for so many prompts and answers, whatever config.evals says. --filters counts
top-k and top-p, between which and none the program chooses as it runs.
"""

from absl import app, flags
from ml_collections import config_flags

from paligemma_med import cli, forecast
from paligemma_med.parallel import chips
from paligemma_med.setup import Setup


def setup_of(config, rows, samples, new, filters=False) -> Setup:
    """A setup whose only evaluation draws so many `samples` of up to `new` tokens for `rows` prompts at a time."""
    pred_kw = dict(num_samples=samples, temperature=1.0, max_new_tokens=new)
    pred_kw |= dict(top_p=0.9) if filters else {}
    config = config.copy_and_resolve_references()
    with config.unlocked():
        config.evals = {}
        config.evals.sampled = dict(type="vqa", data={}, pp_fn=config.predict_pp, batch_size=rows, pred_kw=pred_kw)
    return Setup(config)


@cli.command
def main(argv) -> None:
    del argv
    values = flags.FLAGS
    with chips.aimed_at(values.chip):
        setup = setup_of(values.config, values.rows, values.samples, values.new, values.filters)
        forecast.run(setup, forecast.of_evals(setup, values.prompt), "lower --rows or --samples")


if __name__ == "__main__":
    config_flags.DEFINE_config_file("config", None, "Experiment: configs/x.py[:arg=value,…].")
    flags.DEFINE_string("chip", None, "Compile for this chip, not for what is here: h200, v5e:1x1, …")
    flags.DEFINE_integer("rows", 64, "Prompts at a time.", lower_bound=1)
    flags.DEFINE_integer("samples", 5, "Answers to each.", lower_bound=1)
    flags.DEFINE_integer("prompt", 64, "Tokens of a prompt.", lower_bound=1)
    flags.DEFINE_integer("new", 64, "Tokens of an answer, at most.", lower_bound=1)
    flags.DEFINE_bool("filters", False, "Count top-k and top-p.")
    flags.mark_flag_as_required("config")
    app.run(main, flags_parser=cli.parse_flags)
