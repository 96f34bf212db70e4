"""A language model as the judge of answers.

For open questions exact match is too strict and word overlap too lenient; a language model that compares
meanings is between the two. It makes mistakes too, so every reply is kept, agreement with human labels is
reported, and an unusable reply never counts as a score.

`criteria` says what is asked and how replies are read, `client` does the asking, `figures` makes
figures of the verdicts.
"""

import collections
import hashlib
import json
import pathlib

from paligemma_med import files
from paligemma_med.evaluation import predictions, results
from paligemma_med.judge import client as judge_client
from paligemma_med.judge import criteria, figures, replies, server
from paligemma_med.judge.criteria import PROTOCOLS
from paligemma_med.metrics import scoring
from paligemma_med.pp import json_text

JUDGEMENTS, SUMMARY, CACHE = "judgements.jsonl", "judge.json", "judge_cache.jsonl"
# Room for the reply alone: {"score": 1} is seven tokens or so. Temperature 0, since a verdict that
# differs from time to time is no measurement.
SETTINGS = {"temperature": 0.0, "max_tokens": 32}


def judge(
    rows, protocol, *, model, cache, who=("model",), samples=None, settings=None, **client
) -> tuple[list[dict], dict]:
    """Has answers judged, those of each question and sample once.

    Equal texts are asked once, whoever said them; what the cache has isn't asked.

    Args:
      rows: dicts of predictions.jsonl.
      protocol: one of PROTOCOLS.
      model: the judge, as the server calls it.
      cache: an open `replies.Cache`.
      who: "model" and controls that the rows hold.
      samples: of each question, the first so many; None: all.
      settings: on top of SETTINGS; None takes one away.
      client: arguments of `client.ask_all`.

    Returns:
      (judgements, about): lines of judgements.jsonl ({question_id, who, scores, keys}, and
      unjudged where there are None among scores: {sample: why}), and {"prompt_digest", "settings",
      "tokens", "faults", …} as in judge.json.

    Raises:
      ValueError: an unknown protocol or control, no rows, a row without a key.
      ServerError: as `client.ask_all`; what was received is in the cache.
    """
    spec, prompt, settings = _prepare(protocol, settings)
    judgements, requests = plan(rows, protocol, model=model, who=who, samples=samples, settings=settings)
    before = replies.totals(cache, requests)
    why, faults = judge_client.ask_all(
        requests,
        lambda _, record: criteria.parse(record["reply"], spec.scores, cut=record["finish"] == "length"),
        cache,
        model=model,
        settings=settings,
        **client,
    )
    for line in judgements:
        line["scores"] = [cache.score(key) for key in line["keys"]]
        if odd := [s for s in line["scores"] if s is not None and s not in spec.scores]:
            raise ValueError(f"{cache.path} has score {odd[0]}; expected one of {spec.scores}.")
        missing = [i for i, score in enumerate(line["scores"]) if score is None]
        if missing:
            line["unjudged"] = {str(i): why[line["keys"][i]] for i in missing}
    tokens = replies.totals(cache, requests)
    about = dict(
        protocol=protocol,
        scores=list(spec.scores),
        source=spec.source,
        model=model,
        server=server.server_of(client.get("base_url")),
        answered_by=sorted({r["model"] for k in requests for r in cache.replies(k) if r["model"]}),
        prompt=prompt.name,
        prompt_digest=prompt.digest,
        prompt_text=f"{prompt.system}\n=====\n{prompt.user}",
        settings=settings,
        who=list(who),
        samples=samples,
        questions=len(rows),
        requests=len(requests),
        tokens=tokens,
        tokens_this_run={k: n - before[k] for k, n in tokens.items()},
        faults=dict(faults),
    )
    return judgements, about


def plan(rows, protocol, *, model, who=("model",), samples=None, settings=None) -> tuple[list[dict], dict]:
    """What is to be asked: (judgements without scores, {key: function for the client})."""
    spec, prompt, settings = _prepare(protocol, settings)
    if not rows:
        raise ValueError("there are no questions to judge.")
    known = ("model", *scoring.controls_of(rows))
    if unknown := [w for w in who if w not in known]:
        raise ValueError(f"who has {unknown[0]!r}; the predictions hold {', '.join(known)}.")
    judgements, requests = [], {}
    for number, row in enumerate(rows, 1):
        for name in who:
            line = dict(question_id=row.get("question_id"), who=name, scores=[], keys=[])
            try:
                predictions = scoring.texts(row, name)[:samples]
                shown = [{k: text if k == "prediction" else row[k] for k in spec.sees} for text in predictions]
                good = predictions and all(isinstance(t, str) for texts in shown for t in texts.values())
            except (KeyError, TypeError):
                good = False
            if not good or line["question_id"] is None:
                raise ValueError(
                    f"row {number} of the predictions (question {line['question_id']!r}) lacks an "
                    f"id, texts of {name} or {', '.join(spec.sees[:-1])}; expected them as strings."
                )
            for texts in shown:
                key = criteria.key_of(model, prompt, texts, settings)
                line["keys"].append(key)
                requests.setdefault(key, lambda n, texts=texts: criteria.messages(prompt, texts, n))
            judgements.append(line)
    return judgements, requests


def _prepare(protocol, settings):
    if protocol not in PROTOCOLS:
        raise ValueError(f"protocol is {protocol!r}; expected one of {', '.join(PROTOCOLS)}.")
    spec = PROTOCOLS[protocol]
    settings = judge_client.check_settings({**SETTINGS, **(settings or {})})
    return spec, criteria.load_prompt(spec.prompt), settings


def choose(rows, n, seed=0) -> list[dict]:
    """n of the rows, in their order: the same ones whatever their order, for a seed."""
    if n is None or n >= len(rows):
        return list(rows)
    ranked = sorted(rows, key=lambda row: criteria.digest([seed, str(row["question_id"])]))
    chosen = {str(row["question_id"]) for row in ranked[:n]}
    return [row for row in rows if str(row["question_id"]) in chosen]


# --- Files ---

# Of a row; protocols ask for more.
NEEDED = ("question_id", "predictions")


def judge_folder(
    folder,
    protocol,
    *,
    model,
    num_questions=None,
    human=None,
    cache=None,
    price_in=None,
    price_out=None,
    **kw,
) -> dict:
    """Judges folder/predictions.jsonl and writes judgements.jsonl and judge.json next to it.

    Both files may hold several judges, by `version`: prompt, its digest and model. Running one again
    replaces its part; parts about other predictions than the present ones are dropped.

    Args:
      folder: that of an evaluation.
      protocol, model: as in `judge`.
      num_questions: judge so many, chosen by their ids; None: all.
      human: a CSV for `figures.read_labels`, or None.
      cache: path; None: judge_cache.jsonl in the folder.
      price_in, price_out: of a million tokens.
      kw: as for `judge`.

    Returns:
      The part of judge.json: what `judge` says about itself, and version, predictions_sha256,
      metrics (of `figures.summarise`), cost, agreement.
    """
    folder = pathlib.Path(folder)
    path = folder / results.PREDICTIONS
    content = hashlib.sha256(path.read_bytes()).hexdigest()
    rows = choose(predictions.read(path, NEEDED), num_questions)
    ids = collections.Counter(row.get("question_id") for row in rows)
    if twice := [i for i, n in ids.items() if n > 1]:
        raise ValueError(f"{path} has question {twice[0]!r} twice; expected ids of one row each.")
    labels = figures.read_labels(human, rows, protocol) if human else None
    with replies.Cache(cache or folder / CACHE) as opened:
        judgements, about = judge(rows, protocol, model=model, cache=opened, **kw)
    version = f"{about['prompt'].removesuffix('.txt')}-{about['prompt_digest'][:8]}@{model}"
    entry = dict(
        version=version,
        predictions_sha256=content,
        **about,
        cost=figures.cost(about["tokens"], price_in, price_out),
        cost_this_run=figures.cost(about["tokens_this_run"], price_in, price_out),
        agreement=figures.agreement(judgements, labels, protocol) if labels else None,
        metrics=figures.plain(figures.summarise(judgements, rows, protocol)),
    )
    others = {
        name: x
        for name, x in read_summary(folder).items()
        if x.get("predictions_sha256") == content and name != version
    }
    lines = [x for x in read_judgements(folder) if isinstance(x.get("judge"), str) and x["judge"] in others]
    lines += [{"judge": version, **line} for line in judgements]
    files.write_text(folder / JUDGEMENTS, "".join(json.dumps(x, ensure_ascii=False) + "\n" for x in lines))
    files.write_text(folder / SUMMARY, json.dumps({**others, version: entry}, indent=2) + "\n")
    return entry


def read_summary(folder) -> dict:
    """judge.json of an evaluation: {version: part}; {} where there is none."""
    path = pathlib.Path(folder) / SUMMARY
    if not path.exists():
        return {}
    expected = "an object of objects, as the judge writes it"
    summary = json_text.read(path, expected, root=dict, constants=True)
    if odd := [key for key, x in summary.items() if not isinstance(x, dict)]:
        raise ValueError(f"{path}: {odd[0]!r} is {json_text.name_of(summary[odd[0]])}; expected {expected}")
    return summary


def read_judgements(folder) -> list[dict]:
    """The lines of judgements.jsonl; [] where there is none."""
    path = pathlib.Path(folder) / JUDGEMENTS
    return results.read_rows(path) if path.exists() else []
