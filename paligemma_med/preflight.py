"""Checks before weights are read whether a run can start: what its config names must exist and fit.

Opens data sets and checkpoints, reads one record of each set and no weights, and traces the optimizer: a
few seconds for a model of any size. `config.values` checks values that need no files.
"""

import jax

from paligemma_med import experiment, input_pipeline, weights
from paligemma_med import pp as pp_lib
from paligemma_med.config import values as config_values
from paligemma_med.input_pipeline import overlap
from paligemma_med.setup import Setup, TrainingSetup


def check(setup: TrainingSetup) -> None:
    """Raises ValueError or OSError, in one sentence, for a run that would fail later."""
    config = setup.config
    _check_durations(setup)
    _check_optimizer(setup)
    setup.batch_sharding, setup.shardings  # noqa: B018  (refuse what can't be cut)
    overlap.check_held_out(config.input)
    _check_training_rows(setup)
    check_evals(setup)
    if config.get("predict_pp"):
        _build_pp(config.predict_pp, "config.predict_pp")
    if config.get("model_init"):
        kw = dict(leaves=setup.leaves, may_be_moved=True, may_begin_afresh=True, **weights.reading(config))
        weights.load_host_params(config.model_init, setup.abstract, **kw)
        weights.check_described(config.model_init, setup.model)


def check_evals(setup: Setup) -> None:
    """Raises ValueError for config.evals whose pp strings give something that can't be evaluated."""
    config, model = setup.config, setup.model
    for name, section in (config.get("evals") or {}).items():
        if not config_values.is_big_visions(section):
            _check_eval_row(config, name, section, model)


def _check_durations(setup):
    for name in ("log_training", "ckpt"):
        setup.to_steps(setup.config, name)
    for name, section in (setup.config.get("evals") or {}).items():
        try:
            setup.to_steps(section, "log")
        except ValueError as e:
            raise ValueError(f"config.evals.{name}: {e}") from None


def _check_optimizer(setup):
    """Takes an abstract step."""
    config, tx = setup.config, setup.tx
    try:
        trained = {n: setup.abstract[n] for n in setup.trained_names}
        jax.eval_shape(lambda x: tx.update(x, tx.init(x), x), trained)
    except (TypeError, ValueError) as e:
        raise ValueError(
            f"optax.{config.optax_name} can't take a step with config.optax = {dict(config.get('optax') or {})}: {e}"
        ) from e


def _check_training_rows(setup):
    config = setup.config
    try:
        with input_pipeline.training(
            config.input,
            seed=config.get("seed", 0),
            mesh=setup.mesh,
            eos_token=setup.tokenizer.eos_token,
            total_steps=setup.total_steps,
            sets=setup.data,
        ) as batches:
            rows = batches.first_rows()
    except input_pipeline.InputError:
        raise
    except ValueError as e:  # a pp string that can't be read doesn't know whose it is
        raise ValueError(f"config.input, pp: {e}") from e
    for name, row in rows.items():
        what = f"input.pp of {name}"
        _check_arrays(row, ("image", "text", "mask_ar", "mask_loss"), what)
        _check_image(config, row, what)
        if len(row["text"]) != config.text_len + 1:
            raise ValueError(
                f"{what} gives text of length {len(row['text'])}, but config.text_len = "
                f"{config.text_len} asks for {config.text_len + 1}, one more than the model reads: "
                f"set config.text_len = {len(row['text']) - 1}, or the length given to tolen."
            )
        _check_tokens(row, setup.model, what)


def _check_eval_row(config, name, section, model):
    evaluator = experiment.evaluator_module(section.type, f"config.evals.{name}")
    needed, arrays = evaluator.NEEDED, evaluator.ARRAYS
    what = f"config.evals.{name}.pp_fn"
    source = input_pipeline.open_source(section.data)
    if len(source) < 2 and "shuffled_images" in (section.get("controls") or ()):
        raise ValueError(
            f"config.evals.{name}: there is one question in {source}, and no other whose image could be shown in its "
            "place: leave 'shuffled_images' out of its controls, or take more questions."
        )
    try:
        row = _build_pp(section.pp_fn, what)(source[0])
    except (ValueError, TypeError, KeyError) as e:
        raise ValueError(f"{what} on record 0 of {source}: {e}") from e
    _check_arrays(row, arrays, what)
    choices = tuple(section.get("choices") or ())
    needed = (*needed, *choices, *(["answer_letter"] if choices else []))
    if missing := [k for k in needed if k not in row]:
        raise ValueError(f"{what} leaves no {missing[0]!r}, found {sorted(row)}: add it to its keep(...).")
    _check_image(config, row, what)
    _check_tokens(row, model, what)


def _build_pp(text, what):
    try:
        return pp_lib.get_preprocess_fn(text)
    except (ValueError, OSError) as e:
        raise ValueError(f"{what}: {e}") from e


def _check_arrays(row, needed, what):
    if missing := [k for k in needed if k not in row]:
        raise ValueError(f"{what} leaves no {missing[0]!r}, found {sorted(row)}: add it to its keep(...).")


def _check_image(config, row, what):
    found, expected = row["image"].shape, (config.res, config.res, 3)
    if found != expected:
        raise ValueError(
            f"{what} gives images of shape {found}, but config.res = {config.res} asks for "
            f"{expected}: write resize({config.res}) there."
        )


def _check_tokens(row, model, what):
    largest = int(row["text"].max())
    if largest >= model.vocab_size:
        raise ValueError(
            f"{what} gives token {largest}, but the model has {model.vocab_size} rows: tok(model=…) there must "
            "name config.tokenizer."
        )
