"""Scores generated reports exactly as COCO's caption evaluation does: its tokeniser, BLEU, METEOR 1.5, ROUGE-L, CIDEr.

    pip install --no-deps --target=coco pycocoevalcap
    python -m tools.coco_scores out/stage2 --pycocoevalcap=coco/pycocoevalcap

Needs Java, and pycocoevalcap for its two jars. Reads eval/<name>/predictions.jsonl of each workdir, or single files,
and prints the first answers' figures beside those of the protocol "report", which has another tokeniser and no METEOR.
"""
# The docstring above is what --help prints.

import os
import pathlib

from absl import app, flags

from paligemma_med.cli import command
from paligemma_med.evaluation import predictions, results
from paligemma_med.metrics import coco, scoring, text_metrics
from paligemma_med.pp import command_line, markdown

_TOKENISER, _METEOR = "tokenizer/stanford-corenlp-3.4.1.jar", "meteor/meteor-1.5.jar"


def scores(said, true, folder) -> dict[str, float]:
    """{BLEU-1, …, METEOR, ROUGE-L, CIDEr} of N texts, with pycocoevalcap's tokeniser.

    Args:
      folder: of pycocoevalcap.

    Raises:
      ValueError: a jar is missing, or can't be run.
    """
    for name in (_TOKENISER, _METEOR):
        if not os.path.isfile(os.path.join(folder, name)):
            raise ValueError(f"{folder} has no {name}; expected pycocoevalcap's folder: --pycocoevalcap=….")
    words = coco.ptb_words([*said, *true], os.path.join(folder, _TOKENISER))
    words = [" ".join(x) for x in words]
    a, b = words[: len(said)], words[len(said) :]
    counts = coco.bleu_counts(a, b, str.split)
    out = {f"BLEU-{n}": coco.bleu(counts, n) for n in (1, 2, 3, 4)}
    out["METEOR"], _ = coco.meteor([x.split() for x in a], [x.split() for x in b], os.path.join(folder, _METEOR))
    out["ROUGE-L"] = float(coco.rouge_l(a, b, str.split).mean())
    out["CIDEr"] = float(text_metrics.cider(a, b, str.split).mean())
    return out


def _ours(said, true):
    counts = coco.bleu_counts(said, true)
    out = {f"BLEU-{n}": coco.bleu(counts, n) for n in (1, 2, 3, 4)}
    return out | {
        "ROUGE-L": float(coco.rouge_l(said, true).mean()),
        "CIDEr": float(text_metrics.cider(said, true).mean()),
    }


def files(path) -> list[pathlib.Path]:
    """The predictions.jsonl of a workdir or an evaluation's folder, or the file itself; ValueError without any."""
    path = pathlib.Path(path)
    if path.is_file():
        return [path]
    found = sorted({*path.glob(f"eval/**/{results.PREDICTIONS}"), *path.glob(results.PREDICTIONS)})
    if not found:
        raise ValueError(f"{path} has no {results.PREDICTIONS}; expected a workdir in which evaluate has run.")
    return found


@command
def main(argv) -> None:
    if len(argv) < 2 or not flags.FLAGS.pycocoevalcap:
        raise app.UsageError("name at least one WORKDIR or predictions.jsonl, and --pycocoevalcap.")
    for path in (file for name in argv[1:] for file in files(name)):
        rows = predictions.read(path, ("answer", "predictions"))
        said, true = [scoring.texts(row, "model")[0] for row in rows], [row["answer"] for row in rows]
        theirs, ours = scores(said, true, flags.FLAGS.pycocoevalcap), _ours(said, true)
        table = [[f"{len(rows):,} answers", "COCO's evaluation", 'protocol "report"']]
        table += [[name, f"{x:.4f}", f"{ours[name]:.4f}" if name in ours else "–"] for name, x in theirs.items()]
        print(f"{path}\n\n{markdown.table(table)}\n", flush=True)


if __name__ == "__main__":
    command_line.define_path("pycocoevalcap", None, "Folder of the package pycocoevalcap, for its jars.")
    app.run(main, flags_parser=command_line.parse_flags)
