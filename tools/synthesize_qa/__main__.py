r"""Makes open, closed and multiple-choice questions from image captions with a language model.

    python -m tools.synthesize_qa --input=medpix2 --output=qa.jsonl \
        --model=meta-llama/Llama-3.1-8B-Instruct --templates=caption,case,choice --download
    python -m tools.synthesize_qa --input=captions.csv --output=qa.jsonl --backend=server \
        --base_url=http://127.0.0.1:8000/v1 --model=llama3.1 --concurrency=64
    python -m tools.synthesize_qa --input=captions.csv --output=qa.jsonl --from_journal \
        --config=my_filter.py

If interrupted, the same command resumes; no reply is lost or requested twice. The output is for
`data_prep.build … --config=qa --qa=qa.jsonl`; docs/synthesis.md describes all steps.
"""
# The docstring above is what --help prints.

import json
import pathlib
import re

from absl import app, flags
from ml_collections import config_flags

from paligemma_med import cli
from paligemma_med.pp import command_line, json_text
from tools.synthesize_qa import loading, run, sources, templates, write

DEFAULT_MODEL = "meta-llama/Llama-3.1-8B-Instruct"
_CONFIG = pathlib.Path(__file__).parent / "configs" / "default.py"


def shard_from(text) -> tuple | None:
    """--shard as (i, n), or None; ValueError says what is wrong with it."""
    if text is None:
        return None
    found = re.fullmatch(r"(\d+)/(\d+)", text)
    if not found or int(found[1]) >= int(found[2]):
        raise ValueError(f"--shard={text}: expected i/n with i from 0 to n-1, such as 0/8.")
    return int(found[1]), int(found[2])


def settings_from(text) -> dict:
    """--settings as a dict; ValueError says what is wrong with it."""
    return json_text.parse(text, f"--settings is {text!r:.200}", "a JSON object", root=dict)


@cli.command
def main(argv) -> None:
    if len(argv) > 1:
        raise app.UsageError(f"unexpected argument {argv[1]!r}; --help shows an example.")
    v = flags.FLAGS
    if v.list_templates:
        print("\n".join(templates.describe()))
        return
    if not v.input or not (v.output or v.dry_run):
        raise app.UsageError("Give --input and --output; --help shows an example.")
    what = dict(
        chosen=v.templates,
        pairs=v.pairs,
        examples=v.examples,
        rows=dict(
            data_dir=v.data_dir,
            max_rows=v.max_rows,
            id_column=v.id_column,
            caption_column=v.caption_column,
        ),
    )
    if v.dry_run:
        run.dry_run(v.input, **what)
        return
    if v.from_journal + v.merge + (v.shard is not None) > 1:
        raise ValueError("--from_journal, --merge and --shard exclude each other; expected one.")
    top_p = v.top_p if v.temperature else None  # has no meaning without sampling
    report = run.run(
        v.input,
        v.output,
        # JSON has lists where a ConfigDict may have tuples.
        json.loads(json.dumps(v.config.to_dict())),
        **what,
        seed=v.seed,
        backend=v.backend,
        model=v.model,
        shard=shard_from(v.shard),
        replay=v.from_journal,
        merge=v.merge,
        decoding=dict(max_new_tokens=v.max_new_tokens, temperature=v.temperature, top_p=top_p),
        local=dict(
            dtype=v.dtype,
            quantize=v.quantize,
            device_map=v.device_map,
            download=v.download,
            threads=v.threads,
            batch_size=v.batch_size,
            batch_tokens=v.batch_tokens,
        ),
        server=dict(
            base_url=v.base_url,
            concurrency=v.concurrency,
            requests_per_minute=v.requests_per_minute,
            timeout=v.timeout,
            structured=v.structured,
            send_seed=v.send_seed,
            settings=settings_from(v.settings),
        ),
    )
    if report is not None:
        print("\n".join(write.describe(report)))
        paths = write.paths_of(v.output)
        print(f"{paths.output}, {paths.drops.name}, {paths.failed.name}, {paths.report.name}")


if __name__ == "__main__":
    flags.DEFINE_multi_string(
        "input", [], "Captions: " + sources.EXPECTED.removeprefix("expected ") + ". May be given several times."
    )
    command_line.define_path("output", None, "JSON Lines to write; the journal is next to it.")
    flags.DEFINE_list("templates", ["caption"], f"Some of {', '.join(templates.names())}.")
    flags.DEFINE_bool("list_templates", False, "Show the templates, and do nothing else.")
    flags.DEFINE_integer("pairs", 5, "Questions to ask for in one reply.", lower_bound=1)
    command_line.define_path("examples", None, "JSON Lines of captions with good pairs, shown first.")
    flags.DEFINE_integer("max_rows", None, "Only the first so many captions; default: all.", lower_bound=1)
    command_line.define_path("data_dir", None, "Where TFDS data sets are.")
    flags.DEFINE_string("id_column", None, "Column of a table that names the image.")
    flags.DEFINE_string("caption_column", None, "Column of a table that holds the caption.")
    config_flags.DEFINE_config_file("config", str(_CONFIG), "Which pairs are dropped.")

    flags.DEFINE_enum("backend", "transformers", run.BACKENDS, "What answers.")
    command_line.define_path("model", DEFAULT_MODEL, "Folder, .gguf file, name on the hub, or as the server calls it.")
    flags.DEFINE_integer("max_new_tokens", 1024, "Tokens of a reply, at most.", lower_bound=1)
    flags.DEFINE_float("temperature", 0.0, "0: always the likeliest token.", lower_bound=0.0)
    flags.DEFINE_float(
        "top_p", 1.0, "Sample among the likeliest tokens with this total.", lower_bound=0.0, upper_bound=1.0
    )
    flags.DEFINE_integer("seed", 0, "Seed of sampled tokens and of the order of options.")
    flags.DEFINE_string("shard", None, "i/n: every n-th unit from the i-th (0 to n-1) on, for job arrays.")
    flags.DEFINE_bool("merge", False, "Write the output from the journals of all shards.")
    flags.DEFINE_bool("from_journal", False, "Write the output anew, without a model.")
    flags.DEFINE_bool("dry_run", False, "Count, show prompts, load no model.")

    flags.DEFINE_integer("batch_size", 16, "transformers: replies at a time.", lower_bound=1)
    flags.DEFINE_integer("batch_tokens", 65_536, "transformers: tokens in a batch, at most.")
    flags.DEFINE_enum("dtype", "bfloat16", loading.DTYPES, "transformers: of the weights.")
    flags.DEFINE_enum("quantize", "none", loading.QUANTIZE, "transformers: by bitsandbytes.")
    flags.DEFINE_string("device_map", None, "transformers: auto, cpu, cuda:0, …")
    flags.DEFINE_bool("download", False, "transformers: fetch a model from the hub.")
    flags.DEFINE_integer("threads", None, "transformers: of PyTorch on the CPU.", lower_bound=1)

    flags.DEFINE_string("base_url", None, "server: http(s)://…/v1; default: OpenAI's own.")
    flags.DEFINE_integer("concurrency", 8, "server: requests under way.", lower_bound=1)
    flags.DEFINE_float("requests_per_minute", None, "server: begin at most so many.")
    flags.DEFINE_float("timeout", 300.0, "server: seconds for a reply.")
    flags.DEFINE_bool("structured", False, "server: hold replies to a JSON schema.")
    flags.DEFINE_bool("send_seed", True, "server: send a seed with each request.")
    flags.DEFINE_string("settings", "{}", "server: JSON of further request arguments; null takes one away.")
    app.run(main, flags_parser=cli.parse_flags)
