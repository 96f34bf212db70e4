"""The loop: rows → units → journal ← backend; then the journal → files.

Next to F.jsonl are F.journal (every reply; F.journal.i-of-n for shard i of n), F.run.json (what all units
have in common, so that the files can be written again without the model), and the files that `write`
derives from them.
"""

import contextlib
import json
import math
import os
import pathlib
import re
import sys
import time

import tqdm

from data_prep.files import DataError
from data_prep.ledger import describe as describe_books
from paligemma_med import files
from paligemma_med.pp import json_text
from tools.synthesize_qa import journal as journal_lib
from tools.synthesize_qa import parse, sources, templates, write
from tools.synthesize_qa import units as units_lib

BACKENDS = ("transformers", "server")
_TOLD = 5  # how many units without a reply are listed


def run(
    inputs,
    output,
    config,
    *,
    chosen=("caption",),
    pairs=5,
    examples=None,
    seed=0,
    backend="transformers",
    model=None,
    shard=None,
    replay=False,
    merge=False,
    rows=None,
    decoding=None,
    local=None,
    server=None,
) -> dict | None:
    """Makes question-answer pairs from captions, or resumes an interrupted run.

    Args:
      inputs: specs of `sources`.
      output: JSON Lines to write; all other files are next to it.
      config: the filter's, a dict.
      chosen: names of templates.
      pairs: how many to ask for in one reply.
      examples: file for `templates.read_examples`, or None.
      seed: of sampling, and of the order of options.
      backend: one of BACKENDS.
      model: name or path.
      shard: (i, n): answer each n-th unit from the i-th on, into a separate journal; no files.
      replay: write the files from the existing journals, without a model.
      merge: the same, from the journals of all shards, none of which may be missing.
      rows: further arguments of `sources.open_rows`.
      decoding: {"max_new_tokens", "temperature", "top_p"}.
      local: arguments of `loading.load` (dtype, …) and of `local.answer` (batch_size, …).
      server: arguments of `server.answer`.

    Returns:
      The report of `write.write`; None for a shard.

    Raises:
      DataError, ValueError: a mistake in an argument, in one sentence.
      ServerError: as in `server.answer`.
    """
    output = pathlib.Path(output).expanduser()
    asked, shown, books, found = _read(inputs, chosen, examples, pairs, rows)
    own = journal_lib.path_of(output, shard)
    if odd := [k for k, v in (decoding or {}).items() if not math.isfinite(v or 0)]:
        raise ValueError(f"--{odd[0]} is {decoding[odd[0]]}; expected a finite number.")
    if replay or merge:
        about = _read_run(output)["about"]
        _check_same(about, {"pairs": pairs, "seed": seed, "examples": _examples_digest(shown)}, output)
        return _write_from_journals(output, config, about, books, found, asked, shown, merge)
    others = [p for p in journal_lib.paths_of(output) if p != str(own)]
    if shard is None and others:
        raise ValueError(
            f"{others[0]} is a shard's journal; expected --shard=i/n to resume it, --merge to "
            "join all of them, or another --output."
        )
    ready, about = _open_backend(backend, model, decoding or {}, local or {}, server or {}, seed)
    about |= {"seed": seed, "pairs": pairs, "examples": _examples_digest(shown)}
    units = units_lib.plan(found, asked, about, books, shown)
    tell_books(books)
    mine = [u for u in units if shard is None or u.number % shard[1] == shard[0]]
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
    except OSError as e:
        raise ValueError(f"{output.parent}: no such folder can be made ({e.strerror}).") from None
    _write_run(output, about, asked, inputs)
    with journal_lib.open_journal(str(own)) as journal:
        _answer(ready, mine, journal, seed)
        if shard is None:
            return write.write(units, journal, output, config, about=about, books=books.to_report())
        done = sum(units_lib.settled(journal.replies(u.key)) for u in mine)
    print(
        f"shard {shard[0]} of {shard[1]}: {done:,} of its {len(mine):,} units are settled in "
        f"{own}; --merge joins the shards"
    )
    return None


def dry_run(inputs, *, chosen=("caption",), pairs=5, examples=None, rows=None) -> None:
    """Prints what would be asked: counts, and the first prompt of each template."""
    asked, shown, books, found = _read(inputs, chosen, examples, pairs, rows)
    units = units_lib.plan(found, asked, {"pairs": pairs}, books, shown)
    for template in asked:
        if first := next((u for u in units if u.template is template), None):
            print(f"===== template {template.name}_v{template.version}, row {first.row.row_id}")
            for message in first.messages():
                print(f"--- {message['role']}\n{message['content']}\n")
    tell_books(books)
    count = {t.name: sum(u.template is t for u in units) for t in asked}
    print(
        f"{len(units):,} replies would be asked for ("
        + ", ".join(f"{k} {n:,}" for k, n in count.items())
        + f"), {pairs} pairs in each"
    )


def tell_books(books) -> None:
    for line in describe_books(books.to_report()):
        line = re.sub(r" \(\(none\)[^)]*\)", "", line)
        print(re.sub(r"^units: ([\d,]+) rows read", r"units: \1 of rows and templates", line))


def _read(inputs, chosen, examples, pairs, rows):
    if pairs < 1:
        raise ValueError(f"--pairs is {pairs}; expected at least 1.")
    asked = [templates.load(name) for name in chosen]
    if len({t.name for t in asked}) < len(asked):
        raise ValueError(f"--templates={','.join(chosen)}: one comes twice; expected each once.")
    shown = templates.read_examples(examples) if examples else ()
    books = sources.new_books()
    return asked, shown, books, sources.open_rows(inputs, books, **(rows or {}))


def _examples_digest(examples):
    return units_lib.digest(examples) if examples else ""


def _open_backend(backend, model, decoding, local, server, seed):
    """(function (units, journal, progress) that answers, what it adds to `about`)."""
    if backend == "server":
        from tools.synthesize_qa import server as backend_lib

        settings = {k: v for k, v in decoding.items() if v is not None}
        settings["max_tokens"] = settings.pop("max_new_tokens")
        settings |= server.pop("settings", {})
        settings = {k: v for k, v in settings.items() if v is not None}
        structured = server.get("structured", False)
        about = dict(model=model, weights="", backend=backend, settings={**settings, "structured": structured})
        own_seed = seed if server.pop("send_seed", True) else None

        def answer(units, journal, progress):
            return backend_lib.answer(
                units,
                journal,
                model,
                parse.read_reply,
                settings=settings,
                seed=own_seed,
                progress=progress,
                **server,
            )

        return answer, about
    from tools.synthesize_qa import loading
    from tools.synthesize_qa import local as backend_lib

    batches = {k: local.pop(k) for k in ("batch_size", "batch_tokens") if k in local}
    loaded = loading.load(model, **local, **decoding)
    about = dict(model=loaded.name, weights=loaded.weights, backend=backend, settings=loaded.settings)

    def answer(units, journal, progress):
        backend_lib.answer(
            units,
            journal,
            loaded,
            parse.read_reply,
            seed=seed,
            progress=progress,
            log=lambda text: tqdm.tqdm.write(text, file=sys.stderr),
            **batches,
        )
        return {}

    return answer, about


def _answer(answer, units, journal, seed):
    """Has the units answered, and shows the progress on stderr."""
    left = sum(not units_lib.settled(journal.replies(u.key)) for u in units)
    if left < len(units):
        print(f"{len(units) - left:,} of {len(units):,} units are settled already; going on")
    if not left:
        return
    start, tokens = time.monotonic(), 0
    # In a log each state of the bar is a separate line.
    every = 0.5 if sys.stderr.isatty() else 30
    with tqdm.tqdm(total=left, desc="synthesis", unit=" replies", mininterval=every) as bar:

        def progress(replies, new):
            nonlocal tokens
            tokens += new
            bar.total = max(bar.total, bar.n + replies)  # some units are asked twice
            speed = tokens / max(time.monotonic() - start, 1e-6)
            bar.set_postfix_str(f"{speed:,.1f} tokens/s", refresh=False)
            bar.update(replies)

        told = answer(units, journal, progress)
    if faults := told.get("faults"):
        print("Faults got over: " + ", ".join(f"{n} {k}" for k, n in faults.items()) + ".")
    if unanswered := told.get("unanswered"):
        first = {u.key: u.row.row_id for u in units if u.key in unanswered}
        shown = "; ".join(f"{first[k]}: {why}" for k, why in [*unanswered.items()][:_TOLD])
        more = "; …" * (len(unanswered) > _TOLD)
        print(f"{len(unanswered):,} units are without a reply: {shown}{more}", file=sys.stderr)


# --- What a run is ---


def _run_path(output):
    return output.with_name(output.name.removesuffix(".jsonl") + ".run.json")


def _read_run(output):
    path = _run_path(output)
    try:
        found = json_text.read(path, "the settings of a run", root=dict)
        if {"model", "weights", "backend", "settings", "seed", "pairs", "examples"} <= found["about"].keys():
            return found
    except FileNotFoundError:
        raise ValueError(f"there is no {path}; expected that of a run with this --output.") from None
    except (ValueError, KeyError, TypeError, AttributeError):
        pass
    raise ValueError(f"{path} isn't what a run of this program writes; expected its settings.")


def _check_same(about, now, output):
    for key, value in now.items():
        if about[key] != value:
            raise ValueError(
                f"{_run_path(output)}: {key} was {about[key]!r} and is {value!r} now, which would "
                "make other replies; expected the same, or another --output."
            )


def _write_run(output, about, asked, inputs):
    """Records the run's settings; another run's output is left alone, unless it never got a reply."""
    path = _run_path(output)
    begun = output.exists() or any(os.path.getsize(p) for p in journal_lib.paths_of(output))
    if path.exists():
        before = _read_run(output)["about"]
        if begun:
            _check_same(before, about, output)
    elif output.exists():
        raise ValueError(f"{output} is there, without {path.name} of an earlier run beside it; expected a new name.")
    content = {
        "about": about,
        "templates": {f"{t.name}_v{t.version}": t.digest for t in asked},
        "inputs": list(inputs),
    }
    try:
        files.write_text(path, json.dumps(content, indent=1) + "\n")  # shards may start together
    except OSError as e:
        raise ValueError(f"{path} can't be written: {e.strerror}.") from None


def _write_from_journals(output, config, about, books, found, asked, shown, merge):
    paths = journal_lib.paths_of(output)
    if merge:
        _check_shards(output, paths)
    units = units_lib.plan(found, asked, about, books, shown)
    tell_books(books)
    with contextlib.closing(journal_lib.Journals(paths)) as journal:
        if units and not any(journal.count(u.key) for u in units):
            raise DataError(
                f"{', '.join(paths)}: no reply to any of these {len(units):,} units; expected the "
                "--input and --templates that the journal was made with"
            )
        return write.write(units, journal, output, config, about=about, books=books.to_report())


def _check_shards(output, paths):
    """Raises ValueError if a shard's journal is missing."""
    there = [tuple(map(int, m.groups())) for p in paths if (m := re.search(r"\.(\d+)-of-(\d+)$", p))]
    if not there:
        raise ValueError(f"there is no {journal_lib.path_of(output)}.i-of-n; expected journals of shards.")
    for n in sorted({n for _, n in there}):
        if missing := [i for i in range(n) if (i, n) not in there]:
            raise ValueError(
                f"{journal_lib.path_of(output, (missing[0], n))} is missing (of {len(missing)} "
                f"shards of {n}); expected all of them. --from_journal takes what there is."
            )
