"""The model card of a run's export (README.md): where its weights are from, how it was trained, what it scored.

Everything in it is read from the run's folder, whose names come from data sets and outsiders: all are escaped.
"""

import json
import os
import pathlib
import sys
from collections.abc import Mapping, Sequence
from typing import Any

import paligemma_med
from paligemma_med.checkpoints import workdir
from paligemma_med.evaluation import results
from paligemma_med.metrics import tables
from paligemma_med.pp import markdown

NAME = "README.md"  # where the Hub looks for it
# Facts of a config, in the order of the table; the others are in the run's config.json.
RECIPE = (
    *("total_steps", "total_epochs", "lr", "wd", "optax_name", "optax", "schedule", "grad_clip_norm"),
    *("seed", "res", "dtype", "frozen_dtype", "tokenizer", "lora"),
)


# What an export is: (the Hub's name of the library that loads it, or None; in words).
KINDS = {
    "hf": ("transformers", "A vision-language model"),
    "peft": ("peft", "A LoRA adapter of a vision-language model"),
    "parts": (None, "Parts of a vision-language model"),
}


def make(src: os.PathLike | str, kind: str, told: Sequence[str] = (), base_model: str | None = None) -> str:
    """The card of an export of a run.

    Args:
      src: the workdir, or "workdir@step".
      kind: one of `KINDS`.
      told: sentences on how images and questions are read.
      base_model: name of the model that an adapter is for.

    Returns:
      Markdown. An evaluation that can't be read is named in it, and on stderr.
    """
    src = os.fspath(src)
    folder, _ = workdir.split_spec(src)
    config = workdir.read_config(folder)
    escape = markdown.escape
    library, what = KINDS[kind]
    lines = [
        *("---", *([f"library_name: {library}"] if library else [])),
        *([f"base_model: {json.dumps(base_model)}"] if base_model else []),  # a JSON text is a YAML text
        *("pipeline_tag: image-text-to-text", "tags: [medical]", "---", ""),
        *(f"# {escape(os.path.basename(os.path.abspath(src)))}", ""),
        *(f"{what}, fine-tuned on medical questions about images.", ""),
        *("**For research. Not a medical device.** Its answers can be wrong: they are no basis for a diagnosis.", ""),
        *("## Weights", ""),
        *(f"- exported: {escape(src)}", f"- began with: {escape(_plain(config.get('model_init') or 'nothing'))}"),
    ]
    if config.get("adapter_init"):
        lines.append(f"- adapter that it began with: {escape(config['adapter_init'])}")
    if kind == "parts":
        lines.append(
            "- only what the run changed is here: decoder/ and tower/ load in PEFT or transformers, on the models that "
            "it began with, with the tokenizer of the language model; connector.safetensors has no class there"
        )
    lines += [f"- written by paligemma\\_med {escape(paligemma_med.__version__)}", "", "## Training", ""]
    facts = [("data", ", ".join(sorted(_names(config.get("input")))) or "not recorded")]
    if isinstance(batch := config.get("input"), Mapping) and "batch_size" in batch:
        facts.append(("batch_size", batch["batch_size"]))
    facts += [(key, config[key]) for key in RECIPE if config.get(key) not in (None, "", [], {})]
    lines += [markdown.table([["setting", "value"], *([escape(k), escape(_plain(x))] for k, x in facts)], left=2), ""]
    if told:
        lines += ["## Images and questions", "", *(f"- {escape(sentence)}" for sentence in told), ""]
    lines += ["## Evaluation", ""]
    found = sorted(pathlib.Path(folder).glob(f"eval/*/{results.METRICS}"))
    for path in found:
        lines += _evaluation(path)
    lines += [] if found else ["The run's folder has no evaluation.", ""]
    return "\n".join(lines)


def _evaluation(path):
    """Lines about one metrics.json: its table, whose columns are the model and its controls, and what was asked."""
    escape = markdown.escape
    lines = [f"### {escape(path.parent.name)}", ""]
    try:
        metrics, about = results.read_metrics(path)
        table = tables.format_table(metrics, escape)
    except (OSError, ValueError, KeyError, TypeError) as e:
        print(f"{path} is not in the model card: {e}", file=sys.stderr)
        return [*lines, f"Its {results.METRICS} can't be read.", ""]
    lines += [table, ""]
    facts = dict(data="split", weights="checkpoint", fingerprint="fingerprint", command="command")
    lines += [f"- {title}: {escape(about[key])}" for title, key in facts.items() if about.get(key)]
    return [*lines, ""]


def _names(section) -> set[str]:
    """Names, with their splits, of all data sets in a section of a config, mixtures included."""
    if isinstance(section, Mapping):
        own = section.get("name")
        found = {f"{own} {section.get('split') or ''}".strip()} if isinstance(own, str) else set()
        return found.union(*map(_names, section.values()))
    if isinstance(section, list | tuple):
        return set().union(*map(_names, section))
    return set()


def _plain(value: Any) -> str:
    """A value of a config as words: "b2=0.99, rank=2" of a dict."""
    if isinstance(value, Mapping):
        return ", ".join(f"{k}={_plain(x)}" for k, x in value.items())
    if isinstance(value, list | tuple):
        return ", ".join(f"({_plain(x)})" if isinstance(x, list | tuple) else _plain(x) for x in value)
    return str(value)
