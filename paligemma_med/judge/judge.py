"""A language model as the judge of answers: what it is asked, how its replies are read, figures.

For open questions exact match is too strict and word overlap too lenient; a language model that
compares meanings lies between. It errs as well, so that everything it said is kept, agreement with
human labels is a figure of its own, and a reply that can't be used is never taken for a score.

Judged texts come from other models and may hold anything, "reply 1" included. They are fenced by a
code that no text can contain, declared to be data, and a reply counts only if it is a score and
nothing else. `judge_client` does the asking. Every prompt is a file of prompts/, known by its
name and digest; a changed prompt is a new file.
"""

import collections
import csv
import hashlib
import json
import math
import pathlib
import re
import string
from typing import NamedTuple

import numpy as np

from paligemma_med import files
from paligemma_med.evaluation import results
from paligemma_med.judge import client as judge_client
from paligemma_med.metrics import scoring, stats, tables
from paligemma_med.pp import markdown

PROMPTS = pathlib.Path(__file__).parent / "prompts"
JUDGEMENTS, SUMMARY, CACHE = "judgements.jsonl", "judge.json", "judge_cache.jsonl"
# Room for the reply alone: {"score": 1} is seven tokens or so. Temperature 0, since a verdict that
# differs from time to time is no measurement.
SETTINGS = {"temperature": 0.0, "max_tokens": 32}


class Protocol(NamedTuple):
    """A criterion: its prompt's file, its scores from the lowest up, what the judge sees."""

    prompt: str
    scores: tuple
    sees: tuple
    source: str


PROTOCOLS = {
    "binary": Protocol(
        "binary_v1.txt",
        (0, 1),
        ("answer", "prediction"),
        "MedM, fig. 10: 1 if factually correct and aligned in meaning with the truth, else 0. As "
        "there, the judge sees generation and truth alone. The mean is the paper's accuracy.",
    ),
    "binary_question": Protocol(
        "binary_question_v1.txt",
        (0, 1),
        ("question", "answer", "prediction"),
        "The same with the question, as PeFoMed has it for VQA (gpt_eval/gpt_eval_medvqa.py): what "
        "an answer means depends on what was asked.",
    ),
    "pefomed5": Protocol(
        "pefomed5_v1.txt",
        (0, 1, 2, 3, 4),
        ("answer", "prediction"),
        "PeFoMed, arXiv 2401.02797: a Likert scale of five points, 0 to 4 in its code "
        "(gpt_eval/gpt_eval_iuxray.py), made for reports. The mean is its WASM, Σ k n_k / Σ n_k.",
    ),
}


# --- What is asked ---


class Prompt(NamedTuple):
    """A prompt's file: name, sha256 in hexadecimal digits, and its two parts with $names."""

    name: str
    digest: str
    system: str
    user: str


def load_prompt(name):
    """Reads a file of prompts/: system text, a line of "=====", user text."""
    text = (PROMPTS / name).read_text("utf-8")
    system, found, user = text.partition("\n=====\n")
    if not found:
        raise ValueError(f"{PROMPTS / name} has no line of '====='; expected one between its parts.")
    return Prompt(name, hashlib.sha256(text.encode()).hexdigest(), system.strip(), user.strip())


def messages(prompt, texts, attempt=0):
    """The chat messages of one judgement.

    The fence's code is a digest of the prompt, the texts within the fence and the attempt. So it is
    the same whenever the same is asked, it differs from attempt to attempt (a model at temperature
    0 would repeat an unusable reply), and no text can hold it: that would take a text which holds
    its own digest.

    Args:
      prompt: a `Prompt`.
      texts: {name: text} of what the prompt shows.
      attempt: number of replies that couldn't be used.

    Returns:
      [{"role", "content"}, {"role", "content"}].
    """
    texts = {k: _sound(v) for k, v in texts.items()}
    marker = _digest([prompt.digest, texts, attempt])[:24]
    # One pass: what stands in a text isn't replaced again.
    fill = {"marker": marker, **texts}
    return [
        {"role": "system", "content": string.Template(prompt.system).substitute(marker=marker)},
        {"role": "user", "content": string.Template(prompt.user).substitute(fill)},
    ]


def key_of(model, prompt, texts, settings):
    """What a verdict depends on, as 64 hexadecimal digits: the cache's key."""
    return _digest([model, prompt.digest, {k: _sound(v) for k, v in texts.items()}, settings])


def _digest(value):
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def _sound(text):
    """Without halves of surrogate pairs, which can't be sent."""
    return text.encode("utf-8", "replace").decode()


def schema(scores):
    """`response_format` for servers that can hold a reply to a form ("structured outputs")."""
    score = {"type": "integer", "enum": list(scores)}
    form = dict(type="object", properties={"score": score}, required=["score"])
    return {
        "type": "json_schema",
        "json_schema": dict(name="verdict", strict=True, schema=form | {"additionalProperties": False}),
    }


# --- How replies are read ---


def parse(reply, scores):
    """The score of a reply, or None for one that isn't a score and nothing else.

    Usable are a lone digit and a single JSON object {"score": digit} with no other key, blanks
    around apart; in place of bare JSON a code fence that holds it and is the whole reply. All else
    is unusable: several scores, words around, other keys, "1.0", "１", true, a score off the scale,
    a reply that was cut off. Whatever an answer says, no part of a reply is ever picked out.

    Args:
      reply: text.
      scores: whole numbers, 0 to 9.

    Returns:
      One of scores, or None.
    """
    text = reply.strip()
    if fenced := re.fullmatch(r"```(?:json)?\s*\n(\{.*\})\s*```", text, re.DOTALL):
        text = fenced[1]
    if not re.fullmatch(r"[0-9]", text):
        if len(text) > 200:  # also: nothing deeply nested comes to the parser
            return None
        try:
            pairs = json.loads(text, object_pairs_hook=list)
        except (ValueError, RecursionError):
            return None
        # Of a key that stands there twice, pairs show both.
        if not (isinstance(pairs, list) and len(pairs) == 1 and isinstance(pairs[0], tuple)):
            return None
        key, value = pairs[0]
        if key != "score" or type(value) is not int:
            return None
        return value if value in scores else None
    return int(text) if int(text) in scores else None


# --- Judging ---


def judge(rows, protocol, *, model, cache, who=("model",), samples=None, settings=None, **client):
    """Has answers judged, those of each question and sample once.

    Equal texts are asked once, whoever said them; what the cache has isn't asked.

    Args:
      rows: dicts of predictions.jsonl.
      protocol: one of PROTOCOLS.
      model: the judge, as the server calls it.
      cache: an open `judge_client.Cache`.
      who: "model" and controls that the rows hold.
      samples: of each question, the first so many; None: all.
      settings: on top of SETTINGS; None takes one away.
      client: arguments of `judge_client.ask_all`.

    Returns:
      (judgements, about): lines of judgements.jsonl ({question_id, who, scores, keys}, and
      unjudged where there are None among scores: {sample: why}), and {"prompt_digest", "settings",
      "tokens", "faults", …} as in judge.json.

    Raises:
      ValueError: an unknown protocol or control, no rows, a row without a key.
      ServerError: as `judge_client.ask_all`; what was received is in the cache.
    """
    spec, prompt, settings = _prepare(protocol, settings)
    judgements, requests = plan(rows, protocol, model=model, who=who, samples=samples, settings=settings)
    before = judge_client.totals(cache, requests)
    why, faults = judge_client.ask_all(
        requests,
        lambda _, record: parse(record["reply"], spec.scores),
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
    tokens = judge_client.totals(cache, requests)
    about = dict(
        protocol=protocol,
        scores=list(spec.scores),
        source=spec.source,
        model=model,
        server=judge_client.server_of(client.get("base_url")),
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


def plan(rows, protocol, *, model, who=("model",), samples=None, settings=None):
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
                said = scoring.texts(row, name)[:samples]
                shown = [{k: text if k == "prediction" else row[k] for k in spec.sees} for text in said]
                good = said and all(isinstance(t, str) for texts in shown for t in texts.values())
            except (KeyError, TypeError):
                good = False
            if not good or line["question_id"] is None:
                raise ValueError(
                    f"row {number} of the predictions (question {line['question_id']!r}) lacks an "
                    f"id, texts of {name} or {', '.join(spec.sees[:-1])}; expected them as strings."
                )
            for texts in shown:
                key = key_of(model, prompt, texts, settings)
                line["keys"].append(key)
                requests.setdefault(key, lambda n, texts=texts: messages(prompt, texts, n))
            judgements.append(line)
    return judgements, requests


def _prepare(protocol, settings):
    if protocol not in PROTOCOLS:
        raise ValueError(f"protocol is {protocol!r}; expected one of {', '.join(PROTOCOLS)}.")
    spec = PROTOCOLS[protocol]
    settings = judge_client.check_settings({**SETTINGS, **(settings or {})})
    return spec, load_prompt(spec.prompt), settings


def choose(rows, n, seed=0):
    """n of the rows, in their order: the same ones whatever their order, for a seed."""
    if n is None or n >= len(rows):
        return list(rows)
    ranked = sorted(rows, key=lambda row: _digest([seed, str(row["question_id"])]))
    chosen = {str(row["question_id"]) for row in ranked[:n]}
    return [row for row in rows if str(row["question_id"]) in chosen]


# --- Figures ---


def summarise(judgements, rows, protocol):
    """Figures of judgements.

    Args:
      judgements: as `judge` gives them.
      rows: the predictions' rows, for groups and images.
      protocol: one of PROTOCOLS.

    Returns:
      {`{who}/{group}/{figure}`: number}; groups as in `scoring`. Figures:
        n               verdicts asked for: questions times samples
        unjudged        of these, without a score; they are in none of the next
        mean            of the scores: accuracy of a 0/1 protocol, WASM of pefomed5. NaN if none
        mean_low, mean_high   95 %, verdicts on one image kept together: Wilson's of a 0/1 protocol,
                        else the bootstrap
        mean_worst, mean_best   were all unjudged of the lowest or highest score
        runs, sd        samples a question, and the standard deviation (ddof 1) of the runs' means;
                        run i is sample i of every question; sd from two runs on
        count_{score}   verdicts by score
    """
    scores = PROTOCOLS[protocol].scores
    by_id = {row["question_id"]: row for row in rows}
    pairs = [(line, by_id[line["question_id"]]) for line in judgements]
    groups = {"overall": pairs}
    for key in scoring.GROUPS:
        for value in sorted({str(row[key]) for _, row in pairs if row.get(key)}):
            groups[f"{key}/{value}"] = [pair for pair in pairs if str(pair[1].get(key)) == value]
    out = {}
    for group, members in groups.items():
        for who in dict.fromkeys(line["who"] for line, _ in members):
            figures = _figures([pair for pair in members if pair[0]["who"] == who], scores)
            out |= {f"{who}/{group}/{name}": x for name, x in figures.items()}
    return out


def _figures(members, scores):
    asked = [(s, _image(row)) for line, row in members for s in line["scores"]]
    found = [(s, image) for s, image in asked if s is not None]
    values = [s for s, _ in found]
    missing, total = len(asked) - len(found), sum(values)
    out = dict(n=len(asked), unjudged=missing, mean=total / len(values) if values else math.nan)
    interval = stats.wilson_clustered if tuple(scores) == (0, 1) else stats.bootstrap
    out["mean_low"], out["mean_high"] = (
        interval(values, [image for _, image in found]) if values else (math.nan, math.nan)
    )
    out["mean_worst"] = (total + missing * scores[0]) / len(asked)
    out["mean_best"] = (total + missing * scores[-1]) / len(asked)
    runs = collections.defaultdict(list)
    for line, _ in members:
        for run, score in enumerate(line["scores"]):
            if score is not None:
                runs[run].append(score)
    out["runs"] = max(len(line["scores"]) for line, _ in members)
    if out["runs"] > 1 and len(runs) == out["runs"]:
        out["sd"] = float(np.std([np.mean(x) for x in runs.values()], ddof=1))
    counts = collections.Counter(values)
    return out | {f"count_{score}": counts[score] for score in scores}


def _image(row):
    """What tells images apart; a question without one stands by itself."""
    found = (row.get(key) for key in ("image_key", "image_id"))
    return next((str(x) for x in found if x is not None), f"question {row['question_id']}")


def read_labels(path, rows, protocol):
    """Human labels from a CSV with the columns question_id and label.

    A column sample says which answer of the question was labelled, from 0; without it, the first.

    Returns:
      {(question_id, sample): label}, question_id as in the rows.

    Raises:
      ValueError: a missing column; a row with an unknown question, a label off the scale, or one
        that stands there twice.
    """
    scores = PROTOCOLS[protocol].scores
    ids = {str(row["question_id"]): row["question_id"] for row in rows}
    labels = {}
    with open(path, encoding="utf-8-sig", newline="") as f:
        reader = csv.DictReader(f)
        if missing := {"question_id", "label"} - set(reader.fieldnames or ()):
            raise ValueError(f"{path} has no column {sorted(missing)[0]!r}; it has {reader.fieldnames}.")
        for row in reader:
            where = f"{path}, line {reader.line_num}"
            question, label = ((row[k] or "").strip() for k in ("question_id", "label"))
            sample = (row.get("sample") or "0").strip()
            if question not in ids:
                raise ValueError(f"{where}: no question {question!r} in the predictions.")
            if label not in map(str, scores):
                raise ValueError(f"{where}: label is {label!r}; expected one of {scores}.")
            if not re.fullmatch("[0-9]{1,9}", sample):
                raise ValueError(f"{where}: sample is {sample!r}; expected a whole number from 0.")
            key = ids[question], int(sample)
            if key in labels:
                raise ValueError(f"{where}: question {question!r} has a label already.")
            labels[key] = int(label)
    if not labels:
        raise ValueError(f"{path} has no labels; expected a row a question.")
    return labels


def agreement(judgements, labels, protocol):
    """How far the judge agrees with people, on the model's answers.

    Returns:
      n: answers with a label and a score; unjudged: with a label alone; agree: share of equal
      ones; kappa: Cohen's, and kappa_quadratic on a scale of more than two points (`stats.kappa`;
      None where it isn't defined); table: [[human, judge, n], …].

    Raises:
      ValueError: a label of an answer that wasn't to be judged.
    """
    said = {
        (line["question_id"], i): score
        for line in judgements
        if line["who"] == "model"
        for i, score in enumerate(line["scores"])
    }
    if missing := [key for key in labels if key not in said]:
        raise ValueError(
            f"sample {missing[0][1]} of question {missing[0][0]!r} has a label, but isn't judged; "
            "expected labels of judged answers alone."
        )
    pairs = [(label, said[key]) for key, label in labels.items() if said[key] is not None]
    human, found = [a for a, _ in pairs], [b for _, b in pairs]
    out = dict(n=len(pairs), unjudged=len(labels) - len(pairs))
    out["agree"] = sum(a == b for a, b in pairs) / len(pairs) if pairs else math.nan
    out["kappa"] = stats.kappa(human, found)
    if len(PROTOCOLS[protocol].scores) > 2:
        out["kappa_quadratic"] = stats.kappa(human, found, "quadratic")
    table = sorted(collections.Counter(pairs).items())
    return _plain(out) | {"table": [[a, b, n] for (a, b), n in table]}


def cost(tokens, price_in, price_out):
    """Price of these tokens; prices are of a million. None where prices or tokens aren't known."""
    if price_in is None or price_out is None or tokens["without_usage"]:
        return None
    spent = tokens["prompt_tokens"] * price_in + tokens["completion_tokens"] * price_out
    return spent / 1e6


# --- Files ---


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
):
    """Judges folder/predictions.jsonl and writes judgements.jsonl and judge.json beside it.

    Both files may hold several judges, by `version`: prompt, its digest and model. Running one
    again replaces its part; parts about other predictions than those that stand there are dropped.

    Args:
      folder: that of an evaluation.
      protocol, model: as in `judge`.
      num_questions: judge so many, chosen by their ids; None: all.
      human: a CSV for `read_labels`, or None.
      cache: path; None: judge_cache.jsonl in the folder.
      price_in, price_out: of a million tokens.
      kw: as for `judge`.

    Returns:
      The part of judge.json: what `judge` says about itself, and version, predictions_sha256,
      metrics (of `summarise`), cost, agreement.
    """
    folder = pathlib.Path(folder)
    path = folder / results.PREDICTIONS
    content = hashlib.sha256(path.read_bytes()).hexdigest()
    rows = choose(results.read_rows(path), num_questions)
    ids = collections.Counter(row.get("question_id") for row in rows)
    if twice := [i for i, n in ids.items() if n > 1]:
        raise ValueError(f"{path} has question {twice[0]!r} twice; expected ids of one row each.")
    labels = read_labels(human, rows, protocol) if human else None
    with judge_client.Cache(cache or folder / CACHE) as opened:
        judgements, about = judge(rows, protocol, model=model, cache=opened, **kw)
    version = f"{about['prompt'].removesuffix('.txt')}-{about['prompt_digest'][:8]}@{model}"
    entry = dict(
        version=version,
        predictions_sha256=content,
        **about,
        cost=cost(about["tokens"], price_in, price_out),
        cost_this_run=cost(about["tokens_this_run"], price_in, price_out),
        agreement=agreement(judgements, labels, protocol) if labels else None,
        metrics=_plain(summarise(judgements, rows, protocol)),
    )
    others = {
        name: x
        for name, x in read_summary(folder).items()
        if x.get("predictions_sha256") == content and name != version
    }
    lines = [x for x in read_judgements(folder) if x.get("judge") in others]
    lines += [{"judge": version, **line} for line in judgements]
    files.write_text(folder / JUDGEMENTS, "".join(json.dumps(x, ensure_ascii=False) + "\n" for x in lines))
    files.write_text(folder / SUMMARY, json.dumps({**others, version: entry}, indent=2) + "\n")
    return entry


def read_summary(folder):
    """judge.json of an evaluation: {version: part}; {} where there is none."""
    path = pathlib.Path(folder) / SUMMARY
    if not path.exists():
        return {}
    try:
        found = json.loads(path.read_text("utf-8"))
        good = isinstance(found, dict) and all(isinstance(x, dict) for x in found.values())
    except ValueError:
        good = False
    if not good:
        raise ValueError(f"{path} can't be read; expected JSON as the judge writes it.")
    return found


def read_judgements(folder):
    """The lines of judgements.jsonl; [] where there is none."""
    path = pathlib.Path(folder) / JUDGEMENTS
    return results.read_rows(path) if path.exists() else []


def _plain(figures):
    """What isn't finite as None: NaN is no JSON."""
    return {k: x if math.isfinite(x) else None for k, x in figures.items()}


def format_table(entry):
    """A part of judge.json as a Markdown table, with what its figures rest on below."""
    metrics, top = entry["metrics"], entry["scores"][-1]
    unit, digits = (100, 1) if top == 1 else (1, 2)

    def number(x):
        return "–" if x is None else f"{unit * x:.{digits}f}"

    head = ["accuracy, %" if top == 1 else f"WASM, 0–{top}", "mean (95 %)", "sd over runs", "unjudged", "verdicts"]
    table = [head]
    for name in (k.removesuffix("/mean") for k in metrics if k.endswith("/mean")):
        who, _, group = name.partition("/")
        title = group.partition("/")[2] or group
        figure = {k: metrics.get(f"{name}/{k}") for k in ("mean", "mean_low", "mean_high", "sd")}
        mean, low, high, sd = map(number, figure.values())
        counts = (f"{metrics[f'{name}/{k}']:,}" for k in ("unjudged", "n"))
        said = tables.COLUMNS[who]
        if figure["mean_low"] is not None:
            mean += f" ({low}–{high})"
        table.append([f"{said}, {title}", mean, sd, *counts])
    tokens, used = entry["tokens"], entry["cost"]
    lines = [markdown.table(table), ""]
    lines += [
        f"Judge {entry['model']}, prompt {entry['prompt']} ({entry['prompt_digest'][:8]}): "
        f"{entry['requests']:,} texts, {tokens['replies']:,} replies, {tokens['unusable']:,} of "
        f"them unusable; {tokens['prompt_tokens']:,} + {tokens['completion_tokens']:,} tokens"
        + ("" if used is None else f", cost {used:.4f}")
        + "."
    ]
    if found := entry["agreement"]:
        kappa = found.get("kappa_quadratic", found["kappa"])
        kind = "quadratic kappa" if "kappa_quadratic" in found else "kappa"
        lines += [
            f"Human labels: {found['n']:,} compared, {100 * (found['agree'] or 0):.1f} % equal, "
            f"Cohen's {kind} " + ("not defined." if kappa is None else f"{kappa:.3f}.")
        ]
    return "\n".join(lines)
