"""Results that others have published on the same data sets, each with its protocol, and our runs among them.

A figure without its protocol says nothing: LLaVA-Med's on SLAKE are 83 to 87 fine-tuned, 42 to 48 zero-shot, 48.6 by
multiple choice and 86.5 in the main paper. What isn't of the authors' own paper or repository is said to be quoted, and
what couldn't be traced to a source isn't here.
"""

from typing import NamedTuple

from tools.report import blocks, figures, paper

RECALL = "fine-tuned; open: LLaVA-Med's recall, closed: its substring rule"
EXACT = "fine-tuned, exact match or a classifier over training answers"
CHOICE = "zero-shot, by multiple choice"
TOOLKIT = "zero-shot, MultiMedEval: open by recall, closed yes or no"
CARD = "zero-shot, tokenized F1 of all questions; closed: accuracy of yes or no"
_OWN, _QUOTED, _MEDGEMMA = "authors' repository", "quoted by others", "model card"


class Result(NamedTuple):
    """One system on one data set, as it was published; figures are in percent, "" where there is none."""

    system: str
    open: str = ""
    closed: str = ""
    all: str = ""
    protocol: str = EXACT
    source: str = _OWN


# Data set → results, from the repositories of LLaVA-Med, M2I2, MUMC, VILA-M3 and HuatuoGPT-Vision, MedGemma's model
# card, and papers 001 to 004 (reference/systems.md, 8).
RESULTS = {
    "VQA-RAD": (
        Result("LLaVA-Med (LLaVA)", "61.52", "84.19", "", RECALL),
        Result("LLaVA-Med (Vicuna)", "64.39", "81.98", "", RECALL),
        Result("LLaVA-Med (BiomedCLIP)", "64.75", "83.09", "", RECALL),
        Result("LLaVA-Med", "36.23", "60.16", "", "zero-shot, the same rules", _QUOTED),
        Result("LLaVA", "50.00", "65.07", "", RECALL),
        Result("M2I2", "66.5", "83.5", "76.8"),
        Result("MUMC", "71.5", "84.2", "79.2"),
        Result("PubMedCLIP", "60.1", "80.0", "72.1", EXACT, "M2I2's and LLaVA-Med's repositories"),
        Result("M3AE", "67.2", "83.5", "77.0", EXACT, "MUMC's repository"),
        Result("BiomedGPT-B", "60.9", "81.3", "73.2", "fine-tuned", _QUOTED),
        Result("LaPA", "68.72", "86.40", "79.38", "fine-tuned", _QUOTED),
        Result("Med-MoE (Phi2, 3.6B)", "58.55", "82.72", "", "fine-tuned", _QUOTED),
        Result("RadBloomz", "", "", "73.2", "fine-tuned", "paper 003"),
        Result("PeFoMed", "", "87.1", "77.4", "fine-tuned, exact match (protocol pefomed)", "paper 004"),
        Result("VILA-M3 3B", "", "", "78.2", "accuracy, as its README has it"),
        Result("VILA-M3 8B", "", "", "84.5", "accuracy, as its README has it"),
        Result("RadFM", "33.5", "57.7", "", TOOLKIT, _QUOTED),
        Result("MiniGPT-Med", "49.0", "82.9", "", TOOLKIT, _QUOTED),
        Result("HuatuoGPT-Vision 7B", "", "", "63.7", CHOICE),
        Result("HuatuoGPT-Vision 34B", "", "", "68.1", CHOICE),
        Result("LLaVA-Med 7B", "", "", "51.4", CHOICE, "HuatuoGPT-Vision's repository"),
        Result("MedGemma 4B, 1.0", "", "69.1", "F1 49.9", f"{CARD}; another split than the usual 451", _MEDGEMMA),
        Result("MedGemma 4B, 1.5", "", "70.2", "F1 48.1", f"{CARD}; another split than the usual 451", _MEDGEMMA),
    ),
    "SLAKE": (
        Result("PaliGemma, two stages", "", "79.00 ± 2.75", "", "five runs of 200 questions", "paper 001"),
        Result("LLaVA-Med", "", "86.50 ± 1.60", "", "five runs of 200 questions", "paper 001"),
        Result("LLaVA-Med (LLaVA)", "83.08", "85.34", "", RECALL),
        Result("LLaVA-Med (Vicuna)", "84.71", "83.17", "", RECALL),
        Result("LLaVA-Med (BiomedCLIP)", "87.11", "86.78", "", RECALL),
        Result("LLaVA-Med", "41.72", "47.60", "", "zero-shot, the same rules", _QUOTED),
        Result("LLaVA", "78.18", "63.22", "", RECALL),
        Result("M2I2", "74.7", "91.1", "81.2"),
        Result("MUMC", "", "", "84.9"),
        Result("PubMedCLIP", "78.4", "82.5", "80.1", EXACT, "M2I2's and LLaVA-Med's repositories"),
        Result("M3AE", "", "", "83.2", EXACT, "MUMC's repository"),
        Result("BiomedGPT-B", "84.3", "89.9", "86.5", "fine-tuned", _QUOTED),
        Result("LaPA", "82.17", "88.70", "84.73", "fine-tuned", _QUOTED),
        Result("Med-MoE (Phi2, 3.6B)", "85.06", "85.58", "", "fine-tuned", _QUOTED),
        Result("Med-PaLM M 562B", "", "", "87.0", "not said where it is quoted", _QUOTED),
        Result("RadBloomz", "", "", "87.5", "fine-tuned", "paper 003"),
        Result("VILA-M3 3B", "", "", "79.8", "accuracy, as its README has it"),
        Result("VILA-M3 8B", "", "", "84.5", "accuracy, as its README has it"),
        Result("RadFM", "72.5", "75.2", "", TOOLKIT, _QUOTED),
        Result("MiniGPT-Med", "27.8", "57.2", "", TOOLKIT, _QUOTED),
        Result("HuatuoGPT-Vision 7B", "", "", "76.2", CHOICE),
        Result("HuatuoGPT-Vision 34B", "", "", "76.9", CHOICE),
        Result("LLaVA-Med 7B", "", "", "48.6", CHOICE, "HuatuoGPT-Vision's repository"),
        Result("MedGemma 4B, 1.0", "", "87.6", "F1 72.3", f"{CARD}; SLAKE is in its training data", _MEDGEMMA),
        Result("MedGemma 4B, 1.5", "", "82.8", "F1 59.7", f"{CARD}; SLAKE is in its training data", _MEDGEMMA),
    ),
    "PathVQA": (
        Result("LLaVA-Med (LLaVA)", "37.95", "91.21", "", RECALL),
        Result("LLaVA-Med (Vicuna)", "38.87", "91.65", "", RECALL),
        Result("LLaVA-Med (BiomedCLIP)", "39.60", "91.09", "", RECALL),
        Result("LLaVA-Med", "10.86", "59.75", "", "zero-shot, the same rules", _QUOTED),
        Result("LLaVA", "7.74", "63.20", "", RECALL),
        Result("M2I2", "36.3", "88.0", "62.2"),
        Result("MUMC", "39.0", "90.4", "65.1"),
        Result("Med-MoE (Phi2, 3.6B)", "34.74", "91.98", "", "fine-tuned", _QUOTED),
        Result("VILA-M3 3B", "", "", "87.9", "accuracy, as its README has it"),
        Result("VILA-M3 8B", "", "", "90.0", "accuracy, as its README has it"),
        Result("RadFM", "0.5", "50.5", "", TOOLKIT, _QUOTED),
        Result("MiniGPT-Med", "1.9", "58.1", "", TOOLKIT, _QUOTED),
        Result("HuatuoGPT-Vision 7B", "", "", "57.9", CHOICE),
        Result("HuatuoGPT-Vision 34B", "", "", "63.5", CHOICE),
    ),
    "PMC-VQA": (
        Result("PaliGemma, two stages", "", "", "33.15 ± 3.15", "five runs of 200 questions", "paper 001"),
        Result("MedVInT-TD", "", "", "42.3", "multiple choice", "its paper"),
        Result("MedVInT-TE", "", "", "39.2", "multiple choice", "its paper"),
        Result("HuatuoGPT-Vision 7B", "", "", "54.3", CHOICE),
        Result("HuatuoGPT-Vision 34B", "", "", "58.2", CHOICE),
        Result("LLaVA-Med 7B", "", "", "24.7", CHOICE, "HuatuoGPT-Vision's repository"),
    ),
    "OmniMedVQA": (
        Result("LLama-CLIP", "73.4", "", "", "open questions", "paper 002"),
        Result("HuatuoGPT-Vision 7B", "", "", "74.0", CHOICE),
        Result("HuatuoGPT-Vision 34B", "", "", "76.9", CHOICE),
        Result("LLaVA-Med 7B", "", "", "44.5", CHOICE, "HuatuoGPT-Vision's repository"),
    ),
}
# How names of our data sets begin.
NAMES = {
    "VQA-RAD": ("vqa_rad",),
    "SLAKE": ("slake",),
    "PathVQA": ("pathvqa",),
    "PMC-VQA": ("pmc_vqa",),
    "OmniMedVQA": ("omnimedvqa",),
}
_NOTE = (
    "Published figures are as their authors, or whom the third column names, give them, in percent. Where a protocol "
    "isn't ours the numbers don't compare: an evaluation can have theirs beside it (docs/evaluation.md, As others "
    "count). Ours: exact match, 95 % in brackets; multiple choice as it says."
)


def section(evaluations, everything=False) -> blocks.Section | None:
    """A table for each data set that a run was evaluated on, or for all; None without any.

    Args:
      evaluations: list of `Evaluation`.
      everything: whether data sets that no run was evaluated on are shown, with ours "not run".
    """
    made = []
    for dataset, results in RESULTS.items():
        found = _best(evaluations, dataset)
        if found or everything:
            made.append(_table(dataset, results, found))
    return blocks.Section("Beside published results", made) if made else None


def _best(evaluations, dataset):
    """The evaluation of each run that stands for this data set: the test split first, then the most questions."""
    best = {}
    for e in evaluations:
        if "dialogue_id" in e.rows[0] or not str(e.data.get("name", "")).startswith(NAMES[dataset]):
            continue
        rank = "test" in str(e.data.get("split", "")), len(e.rows)
        if e.run not in best or rank > best[e.run][0]:
            best[e.run] = rank, e
    return [e for _, e in best.values()]


def _table(dataset, results, found):
    rows = []
    for e in found:
        split = e.about.get("split") or f"{e.data['name']} {e.data.get('split', '')}"
        for who in ("model", *(c for c in paper.CONTROLS if c in e.controls)):
            kinds = ("OPEN", "CLOSED", None)
            inside = [[row for row in e.rows if kind in (None, row["answer_type"])] for kind in kinds]
            cells = [paper.accuracy(some, who) if some else "–" for some in inside]
            rows.append([f"ours: {e.run}, {figures.title_of(who)}", e.protocol, f"{split} ({e.name})", *cells])
    if not found:
        rows.append(["ours", "–", "–", *[paper.NOT_RUN] * 3])
    rows += [[r.system, r.protocol, r.source, *(x or "–" for x in (r.open, r.closed, r.all))] for r in results]
    head = ["system", "protocol", "split, or source", "open", "closed", "all"]
    return blocks.Table(head, rows, dataset, [_NOTE], left=3)
