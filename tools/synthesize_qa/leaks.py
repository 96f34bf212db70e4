"""How much of its answer and of its caption a question gives away, in any file of pairs.

    python -m tools.synthesize_qa.leaks qa.jsonl
    python -m tools.synthesize_qa.leaks roco_test.json --answer_is_caption
    python -m tools.synthesize_qa.leaks qa_pairs_generated_all.json --captions=release:medpix2:DIR

Reads what `data_prep.qa_files` reads, ours and MedM's, so that the two can be compared. Captions come
from the file's own column or from a source of tools.synthesize_qa, or are the answers.
"""

import json
import os
from collections.abc import Mapping
from typing import Any

from absl import app, flags

from data_prep import qa_files
from paligemma_med import cli
from paligemma_med.pp import command_line
from tools.synthesize_qa import quality, sources


def measure(
    path: str | os.PathLike,
    captions: Mapping[str, str] | None = None,
    answer_is_caption: bool = False,
) -> dict[str, Any]:
    """Leak figures of a file.

    Args:
      path: see `qa_files.read_qa`.
      captions: by image id; without a caption, a pair has no caption leak.
      answer_is_caption: the answers are the captions, as in MedM's ROCO files.

    Returns:
      {"pairs", "with_caption", "leak": {"mean", "at_least_half"}, "caption_leak": the same}; see
      `quality.leak` and `quality.caption_leak`. Figures over no pair are None.

    Raises:
      DataError: a file that can't be read.
    """
    scores = {"leak": [], "caption_leak": []}
    for pair in qa_files.read_qa(path):
        caption = pair.extra.get("caption", "")
        if answer_is_caption:
            caption = pair.answer
        elif captions is not None:
            caption = captions.get(pair.image_id, "")
        scores["leak"].append(quality.leak(pair.question, pair.answer))
        if caption:
            scores["caption_leak"].append(quality.caption_leak(pair.question, caption))
    figures = {
        name: {
            "mean": sum(x) / len(x) if x else None,
            "at_least_half": sum(s >= 0.5 for s in x) / len(x) if x else None,
        }
        for name, x in scores.items()
    }
    return {
        "pairs": len(scores["leak"]),
        "with_caption": len(scores["caption_leak"]),
        **figures,
    }


@cli.command
def main(argv) -> None:
    v = flags.FLAGS
    if len(argv) < 2:
        raise app.UsageError("Give at least one file of pairs.")
    captions = None
    if v.captions:
        rows = sources.open_rows([v.captions], sources.new_books(), data_dir=v.data_dir)
        captions = {row.image_id: row.fields["caption"] for row in rows}
    for path in argv[1:]:
        print(json.dumps({"file": path, **measure(path, captions, v.answer_is_caption)}))


if __name__ == "__main__":
    flags.DEFINE_string("captions", None, "A source of captions, as --input of synthesize_qa.")
    command_line.define_path("data_dir", None, "Where TFDS data sets are.")
    flags.DEFINE_bool("answer_is_caption", False, "The answers are the captions.")
    app.run(main, flags_parser=cli.parse_flags)
