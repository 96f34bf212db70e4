"""`evaluate --server=URL --model=NAME`: sections of a config, or a table, through a model behind a server.

A hospital's images leave this machine only for a host that the command line names.
"""

import functools
import os
import shlex
import sys
import urllib.parse
from collections.abc import Mapping
from typing import Any

import paligemma_med
from paligemma_med import input_pipeline
from paligemma_med.config import values as config_values
from paligemma_med.evaluation.controls import TrainingRows
from paligemma_med.judge import server as judge_server
from paligemma_med.metrics import tables
from paligemma_med.pp import own_rows, registry
from paligemma_med.pp import rows as row_keys
from paligemma_med.pp.files import path_inside
from paligemma_med.served import evaluator as served_evaluator
from paligemma_med.served import templates

# What a section may have besides; all else is about our own models.
_TAKEN = ("controls", "protocol", "groups", "choices", "shuffle_seed", "noise_seed", "pred_kw")


def evaluate(
    sections: Mapping[str, Any],
    out: str,
    *,
    model: str,
    server: str,
    template: str | None = None,
    send_images_to: str | None = None,
    controls=None,
    resume: bool = True,
    **client: Any,
) -> dict[str, dict[str, float]]:
    """Asks a served model the questions of sections of config.evals, and prints a table for each.

    Args:
      sections: {name: section}; dialogues and big_vision's own are left out, and said.
      out: folder for eval/<name>/.
      model: as the server calls it.
      server: its address, ".../v1".
      template: path of a file of `templates`; None: the default.
      send_images_to: the server's host, unless that is this machine.
      controls: names, "all", or None for the sections' own.
      resume: whether finished evaluations of the same kind are kept.
      client: further arguments of `judge.client.ask_all`.

    Returns:
      {name: {figure: value}}.

    Raises:
      ValueError: a section that can't be asked; a host that isn't allowed; a wrong template.
      ServerError: questions without an answer; the next run asks only these.
    """
    host = _check_host(server, send_images_to)
    form = templates.read(template)
    client = dict(client, base_url=server)
    made = {}
    for name, section in sections.items():
        kind = section.get("type")
        if config_values.is_big_visions(section) or kind != "vqa":
            _say(f"config.evals.{name} is of type {kind!r}: left out; a served model is asked those of type 'vqa'.")
            continue
        made[name] = _evaluator(name, section, out, model, form, controls, client)
    if not made:
        raise ValueError("there is no evaluation of type 'vqa': there is nothing to ask.")
    results = {}
    for name, one in made.items():
        one.resume = resume
        images, size = one.sent()
        _say(f"{name}: {len(one.inputs)} questions on {images} images ({size / 2**20:.1f} MiB) go to {host}.")
        results[name] = one.run({})
        print(f"\n{name} by {model}\n\n{tables.format_table(results[name])}", flush=True)
        print(f"\nWritten to {one.outdir}", flush=True)
    return results


def _say(text):
    print(text, file=sys.stderr, flush=True)


def _check_host(server, allowed):
    """The server's host, if images may go there."""
    host = urllib.parse.urlsplit(judge_server.server_of(server)).hostname
    if not judge_server.is_loopback(host) and allowed != host:
        raise ValueError(
            f"images would leave this machine for {host}: --send_images_to={host} allows it."
            + (f" Found --send_images_to={allowed}." if allowed else "")
        )
    return host


def _evaluator(name, section, out, model, form, controls, client):
    section = section.to_dict() if hasattr(section, "to_dict") else dict(section)
    source = input_pipeline.open_source(section["data"])
    if missing := [k for k in row_keys.NEEDED if k not in source.features]:
        raise ValueError(f"config.evals.{name}: {source} has no {missing[0]!r}, only {', '.join(source.features)}.")
    if section.get("options"):
        _say(f"config.evals.{name}.options is left aside: servers don't score choices.")
    kw = {k: section[k] for k in _TAKEN if k in section}
    train = section.get("train_data")
    if controls is not None and not (controls == "all" and "controls" in section):
        names = served_evaluator.Evaluator.known_controls if controls == "all" else controls
        kw["controls"] = [c for c in names if train or controls != "all" or not c.startswith("majority")]
    if train:
        rows, answer = input_pipeline.open_source(train), _train_answer(section)
        kw["train_data"] = TrainingRows(rows.columns, rows.features, answer=answer, name=str(rows))
    made = served_evaluator.Evaluator(
        None,
        None,
        inputs=source,
        total=len(source),
        outdir=path_inside(os.path.join(out, "eval"), name),
        name=model,
        template=form,
        keys=_kept(section, source),
        client=client,
        **kw,
    )
    made.about = functools.partial(_about, made, section)
    return made


def _train_answer(section):
    """The key of the answers that majorities are counted in: of choices, which are asked for by letter, the letters."""
    return section.get("train_answer", row_keys.ANSWER_LETTER if section.get("choices") else "answer")


def _kept(section, source):
    """Keys of the texts that the section's pp keeps; without one, all that the data has."""
    texts = [k for k in source.features if k != "image"]
    if section.get("pp_fn"):
        name, kept, _ = registry.parse_call(registry.split(section["pp_fn"])[-1])
        if name == "keep":
            kept = {*kept, *row_keys.NEEDED, "image_id", "patient_id", *section.get("choices", ())}
            if section.get("choices"):
                kept.add(row_keys.ANSWER_LETTER)
            return [k for k in texts if k in kept]
    return texts


def _about(made, section, params):
    data = made.inputs.about()
    name = "/".join(filter(None, [data["name"], data.get("version")]))
    return dict(
        split=" ".join(filter(None, [name, data["split"]])),
        data=data,
        section={k: v for k, v in section.items() if k in (*_TAKEN, "type", "data", "train_data", "train_answer")},
        model=made.name,
        template=made.template.digest,
        settings=made.settings,
        versions=dict(paligemma_med=paligemma_med.__version__),
        checkpoint=None,
        command=shlex.join([os.path.basename(sys.orig_argv[0]), *sys.orig_argv[1:]]),
    )


def table_section(data, train_data=None, *, max_new_tokens=0) -> dict[str, Any]:
    """The section that asks every question of a table: `table_eval.section`, without a config for its prompt."""
    out = dict(type="vqa", data=dict(data), protocol="vqa", pred_kw=dict(max_new_tokens=max_new_tokens or 64))
    source = input_pipeline.open_source(data)
    choices = tuple(k for k in source.features if own_rows.CHOICE.fullmatch(k))
    if choices and row_keys.ANSWER_LETTER in source.features:
        has = [bool(row[row_keys.ANSWER_LETTER]) for row in source.columns((row_keys.ANSWER_LETTER,))]
        if all(has):
            out |= dict(choices=choices, protocol="multiple_choice")
        elif any(has):
            _say(
                f"{sum(has):,} of {len(has):,} questions of {source} have choices: all are asked without, as open "
                "questions; a table of these alone is asked with them."
            )
    return out | (dict(train_data=dict(train_data)) if train_data else {})
