"""What a workdir's eval/ holds, and whether its metrics.json follows from its predictions.

Every figure of a report is made from predictions.jsonl by `scoring.summarise`, never taken from
metrics.json; the latter is only compared.
"""

import dataclasses
import functools
import hashlib
import math
import pathlib
import re

from paligemma_med.evaluation import predictions, results
from paligemma_med.judge import figures as judge_figures
from paligemma_med.judge import judge
from paligemma_med.metrics import scoring
from paligemma_med.pp import json_text
from paligemma_med.pp import rows as row_keys
from tools.report import about as about_lib
from tools.report import figures

NEEDED = (*row_keys.NEEDED, "prompt", "predictions", "correct")
# Not told by predictions.jsonl of earlier versions.
_COUNTS = ("truncated", "unfinished")


@dataclasses.dataclass
class Evaluation:
    """One eval/<name>/ of a run.

    run: short name of the workdir; name: of the evaluation, as config.evals has it; rows: of
    predictions.jsonl; metrics: made from them; stored: what metrics.json says; about: what it says
    about the run; section: of the config; config: the run's config.json, or {}; verdicts: parts of
    judge.json about these predictions, their "metrics" made anew from judgements.jsonl; problems:
    sentences; foreign: of which program these predictions are, if not of ours.
    """

    run: str
    name: str
    folder: pathlib.Path
    rows: list
    metrics: dict
    stored: dict
    about: dict
    section: dict
    config: dict
    verdicts: list
    problems: list
    foreign: str = ""

    @property
    def label(self) -> str:
        return f"{self.run}, {self.name}"

    @property
    def data(self) -> dict:
        """dict(name=…, split=…) of the data set, as far as it is known."""
        of_section = self.section.get("data") or {}
        if str(of_section.get("name")).startswith("table:"):
            return of_section  # which says where the images are
        return self.about.get("data") or of_section or self._data_by_name()

    def _data_by_name(self):
        """Earlier versions keep no section of an evaluation that the command line renamed: where
        the config calls one "x_validate" by its split, this is "x_test" by its own."""
        stem, _, split = self.name.rpartition("_")
        for name, section in (self.config.get("evals") or {}).items():
            data = section.get("data") or {}
            if stem and name == f"{stem}_{data.get('split')}":
                return {**data, "split": split}
        return {}

    @property
    def samples(self) -> int:
        return len(self.rows[0]["predictions"])

    @functools.cached_property
    def rule(self) -> str:
        """How its right answers are told, see `figures.RULES`."""
        return figures.rule_of(self.rows) if self.about.get("protocol") == "multiple_choice" else "acc"

    @property
    def controls(self) -> tuple[str, ...]:
        return scoring.controls_of(self.rows)

    @property
    def clusters(self) -> list[str]:
        """One key a question: equal where questions share an image."""
        return [scoring.cluster(row) for row in self.rows]

    @property
    def protocol(self) -> str:
        """How the answers came about, in words."""
        kw = self.section.get("pred_kw") or {}
        temperature = kw.get("temperature", 0)
        how = "greedy" if not temperature else f"temperature {temperature:g}"
        if kw.get("beams", 1) > 1:
            how = f"beam search of {kw['beams']}"
        if self.foreign:
            how = f"decoded as {self.run} was"
        count = "1 answer" if self.samples == 1 else f"{self.samples} answers"
        name = self.about.get("protocol")
        return f"{count} a question, {how}" + (f", protocol {name}" if name else "")


def load_all(paths) -> list[Evaluation]:
    """The evaluations below these workdirs, as a list.

    Args:
      paths: workdirs with eval/<name>/predictions.jsonl (a name may have several parts, as in
        vqav2/minival), or single folders of an evaluation.

    Raises:
      ValueError: a path without evaluations, or files that can't be read.
    """
    paths = [pathlib.Path(path) for path in paths]
    labels = [path.resolve().name for path in paths]
    evaluations = []
    for path, label in zip(paths, labels):
        run = label if labels.count(label) == 1 else str(path)
        if (path / results.PREDICTIONS).is_file():
            workdir, name = _split(path.resolve())
            run = workdir.name if workdir else run
            evaluations.append(load(path, name, run, _config(workdir or path.resolve().parent.parent)))
            continue
        folders = sorted(p.parent for p in path.glob(f"eval/**/{results.PREDICTIONS}"))
        if not folders:
            raise ValueError(
                f"{path} has no eval/<name>/{results.PREDICTIONS}; expected a workdir in which "
                "paligemma_med.evaluate or train has run."
            )
        config = _config(path)
        evaluations += [load(f, f.relative_to(path / "eval").as_posix(), run, config) for f in folders]
    return evaluations


def is_evaluated(path) -> bool:
    """Whether `load_all` finds an evaluation of answers there."""
    path = pathlib.Path(path)
    return (path / results.PREDICTIONS).is_file() or any(path.glob(f"eval/**/{results.PREDICTIONS}"))


def _split(folder):
    """(workdir, name) of <workdir>/eval/<name>; (None, the folder's own name) if it lies elsewhere."""
    for parent in folder.parents:
        if parent.name == "eval":
            return parent.parent, folder.relative_to(parent).as_posix()
    return None, folder.name


def load(folder, name, run, config) -> Evaluation:
    """The evaluation `name` in `folder`, checked.

    Raises:
      ValueError: predictions.jsonl is empty or lacks a key.
    """
    path = folder / results.PREDICTIONS
    rows = predictions.read(path, NEEDED)
    stored, about = {}, {}
    problems = _wrong_flags(rows)
    try:
        stored, about = results.read_metrics(folder / results.METRICS)
    except FileNotFoundError:
        problems.append("there is no metrics.json")
    except (ValueError, AttributeError) as e:
        problems.append(f"metrics.json can't be read: {e}")
    about = about_lib.sound(about, about_lib.ABOUT, "metrics.json, about", problems)
    protocol = about.get("protocol", "vqa")
    if protocol not in scoring.PROTOCOLS:
        problems.append(f"metrics.json has the protocol {protocol!r}, which is unknown here")
        protocol = "vqa"
    metrics = scoring.summarise(rows, protocol, groups=tuple(about.get("groups", scoring.GROUPS)))
    problems += differences(stored, metrics) if stored else []
    problems += _wrong_hashes(rows, about)
    verdicts, wrong = _verdicts(folder, rows)
    problems += wrong
    # Evaluated into a folder of its own, a run is described where its weights lie.
    if not config and about.get("checkpoint"):
        config = _config(pathlib.Path(re.sub(r"@\d+$", "", str(about["checkpoint"]))))
    config = about_lib.sound_config(config, problems)
    section = about.get("section") or (config.get("evals") or {}).get(name) or {}
    return Evaluation(
        run,
        name,
        folder,
        rows,
        metrics,
        stored,
        about,
        section,
        config,
        verdicts,
        problems,
    )


def differences(stored, metrics) -> list[str]:
    """What metrics.json says that its predictions don't, as sentences; at most a few of a kind."""
    wrong, ends, unknown = [], [], []
    for name, value in stored.items():
        if name not in metrics:
            if name not in _COUNTS:
                unknown.append(name)
        elif not _same(value, metrics[name]):
            sentence = f"{name} is {value}, from the predictions {metrics[name]}"
            (ends if name.endswith(("_low", "_high")) else wrong).append(sentence)
    out = []
    if wrong:
        out.append(_some("metrics.json does NOT follow from predictions.jsonl", wrong))
    if ends:
        out.append(_some("intervals in metrics.json differ (of another version of this program?)", ends))
    if unknown:
        out.append(_some("metrics.json has figures that can't be made from predictions", unknown))
    return out


def _same(a, b):
    if not all(isinstance(x, int | float) and not isinstance(x, bool) for x in (a, b)):
        return False
    return math.isclose(a, b, rel_tol=1e-9, abs_tol=1e-12) or (math.isnan(a) and math.isnan(b))


def _some(what, found, shown=3):
    more = f" and {len(found) - shown} more" if len(found) > shown else ""
    return f"{what}: {'; '.join(found[:shown])}{more}"


def _wrong_flags(rows):
    """Whether "correct…" of each row follows from its texts."""
    wrong = []
    for row in rows:
        for who in ("model", *scoring.controls_of(rows)):
            prefix = "" if who == "model" else f"{who}_"
            true = scoring.correct(scoring.texts(row, who)[0], scoring.truths(row), prefix)
            if any(row.get(key) != x for key, x in true.items()):
                wrong.append(f"question {row['question_id']} ({who})")
    what = "marks in predictions.jsonl do NOT follow from its answers"
    return [_some(what, wrong)] if wrong else []


def _wrong_hashes(rows, about):
    made = dict(split_hash=results.split_hash, prompt_hash=results.prompt_hash)
    return [
        f"the {key} in metrics.json is NOT that of predictions.jsonl"
        for key, function in made.items()
        if key in about and about[key] != function(rows)
    ]


def _verdicts(folder, rows):
    """→ (parts of judge.json about these rows, with figures made anew; problems)."""
    out, problems = [], []
    try:
        summary, lines = judge.read_summary(folder), judge.read_judgements(folder)
        content = hashlib.sha256((folder / results.PREDICTIONS).read_bytes()).hexdigest()
        for version, entry in summary.items():
            if entry.get("predictions_sha256") != content:
                problems.append(f"the verdicts of {version} are on other predictions; left out")
                continue
            mine = [line for line in lines if line.get("judge") == version]
            metrics = judge_figures.summarise(mine, rows, entry["protocol"])
            stored = {k: v for k, v in entry["metrics"].items() if v is not None}
            differ = [k for k, v in stored.items() if not _same(v, metrics.get(k))]
            ends = [k for k in differ if k.endswith(("_low", "_high"))]
            if wrong := [k for k in differ if k not in ends]:
                what = f"judge.json does NOT follow from judgements.jsonl ({version})"
                problems.append(_some(what, wrong))
            if ends:
                what = "intervals in judge.json differ (of another version of this program?)"
                problems.append(_some(f"{what} ({version})", ends))
            out.append({**entry, "metrics": metrics})
    except (ValueError, KeyError, TypeError, AttributeError) as e:
        problems.append(f"judge.json or judgements.jsonl can't be read: {e!r}")
    return out, problems


def _config(workdir):
    try:
        return json_text.read(workdir / "config.json", "the config of a run", root=dict, constants=True)
    except OSError:
        return {}
