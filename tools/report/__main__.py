"""Reports on evaluations, as Markdown and as one self-contained HTML page.

    python -m tools.report out/a out/b --out=out/report
    python -m tools.report out/a --foreign=inference_results.xlsx,20260806_102223_samples_slake.jsonl

Reads eval/<name>/predictions.jsonl of each workdir, computes every figure again, and says where
metrics.json differs. Writes report.md (with figures/) and report.html: the paper's tables with our
figures, accuracies with controls and intervals, paired tests, plots, worst questions.
"""
# The docstring above is what --help prints.

import contextlib
import functools
import importlib.util
import os
import pathlib

from absl import app, flags

from paligemma_med import files
from paligemma_med.cli import command
from paligemma_med.pp import command_line
from tools.report import blocks, evaluations, losses, paper, pictures, plots, published, sections
from tools.report import foreign as foreign_lib


def check_installed() -> None:
    """Raises ValueError if a package of the extra `report` is missing, rather than an hour later."""
    for name in ("jinja2", "matplotlib", "openpyxl", "rouge_score", "sacrebleu"):
        if importlib.util.find_spec(name) is None:
            raise ValueError(f"tools.report needs {name}; pip install 'paligemma_med[report]'")


def make(workdirs, *, compare=(), foreign=(), data_dir=None, num_questions=8, all_published=False) -> list:
    """The report as a list of `blocks.Section`.

    Args:
      workdirs: see `evaluations.load_all`.
      compare: two of the workdirs; () compares each with the first.
      foreign: other people's files of predictions.
      data_dir: where data sets are built, for images; None: the config's.
      num_questions: how many questions of each kind to show.
      all_published: published results on data sets, too, that no run was evaluated on.

    Raises:
      ValueError: something can't be read.
    """
    curves, evaluated = losses.read(workdirs), losses.read_evaluated(workdirs)
    with_losses = {x.folder for x in (*curves, *evaluated)}  # a run may have no other evaluation
    found = evaluations.load_all(
        [p for p in workdirs if evaluations.is_evaluated(p) or str(pathlib.Path(p)) not in with_losses]
    )

    @functools.cache
    def lookup(key):
        return pictures.Lookup(dict(key), data_dir)

    def lookup_of(e):
        return lookup(tuple((k, v) for k, v in sorted(e.data.items()) if isinstance(v, str)))

    others = [foreign_lib.load(path, found) for path in foreign]
    everything = [*found, *(other.evaluation for other in others)]
    out = [sections.overview(everything)] if everything else []
    if paper.belongs(found):
        out.append(paper.section(found, sections.judge_entry, lambda e: lookup_of(e).column("location")))
    if beside := published.section(found, all_published):
        out.append(beside)
    out += [losses.section(curves, evaluated)] if with_losses else []
    for a, b in _pairs(found, workdirs, compare):
        out.append(sections.compare(a, b))
    for e in found:
        out += sections.of_evaluation(e, lookup_of(e), num_questions)
    for other in others:
        out += foreign_lib.sections_of(other, lookup_of(other.evaluation), num_questions)
    return [*out, sections.about_measures()]


def _pairs(found, workdirs, compare):
    """[(a, b)]: evaluations of the same name in two runs; if asked for, also two single ones of any names."""
    if compare:
        wanted = [[e for e in found if _belongs(e, path)] for path in compare]
        for path, evaluated in zip(compare, wanted):
            if not evaluated:
                raise ValueError(f"--compare names {path}, which isn't among {list(workdirs)}.")
        first, others = wanted[0], wanted[1:]
    else:
        runs = list(dict.fromkeys(e.run for e in found))
        by_run = [[e for e in found if e.run == run] for run in runs]
        first, others = (by_run[0], by_run[1:]) if by_run else ([], [])
    pairs = [(a, b) for other in others for b in other for a in first if a.name == b.name]
    if compare and not pairs:
        if [len(x) for x in wanted] != [1, 1]:
            names = " and ".join(str([e.name for e in x]) for x in wanted)
            raise ValueError(
                f"--compare: {' and '.join(map(str, compare))} have no evaluation of one name, but "
                f"{names}; name the folders of two evaluations."
            )
        pairs = [(wanted[0][0], wanted[1][0])]
    return pairs


def _belongs(e, path):
    folder = pathlib.Path(path).resolve()
    return e.folder.resolve() == folder or folder / "eval" in e.folder.resolve().parents


def write(title, made, out) -> None:
    """Writes report.html, report.md and figures/ into the folder `out`, all or none."""
    out = pathlib.Path(out)
    markdown, figures = blocks.to_markdown(title, made)
    texts = {out / "report.html": blocks.to_html(title, made), out / "report.md": markdown}
    texts |= {out / "figures" / name: plots.standalone(svg) for name, svg in figures.items()}
    with contextlib.ExitStack() as stack:
        for path, text in texts.items():
            f = stack.enter_context(files.whole_file(path))
            # Halves of surrogate pairs, which JSON can hold and UTF-8 can't, become question marks.
            f.write(text.encode("utf-8", "replace"))
            f.flush()


@command
def main(argv) -> None:
    f = flags.FLAGS
    if len(argv) < 2 and not f.foreign and not f.compare:
        raise app.UsageError("name at least one WORKDIR, or --foreign.")
    if f.compare and len(f.compare) != 2:
        raise app.UsageError("--compare takes two workdirs: --compare=out/a,out/b.")
    check_installed()
    workdirs = list(dict.fromkeys([*argv[1:], *(f.compare or [])]))
    made = make(
        workdirs,
        compare=f.compare or (),
        foreign=f.foreign,
        data_dir=f.data_dir,
        num_questions=f.questions,
        all_published=f.published,
    )
    out = f.out or os.path.join(workdirs[0] if workdirs else ".", "report")
    write(f.title, made, out)
    said = []
    for text in (b.text for section in made for b in section.blocks if b.kind == "warning"):
        if not any(earlier.endswith(text) for earlier in said):  # an evaluation's own comes twice
            said.append(text)
            print(f"warning: {text}")
    print(f"Written: {os.path.join(out, 'report.md')} and {os.path.join(out, 'report.html')}")


if __name__ == "__main__":
    command_line.define_path("out", None, "Folder to write to; default: report/ in the first workdir.")
    command_line.define_paths("compare", None, "Two workdirs: the second against the first.")
    command_line.define_paths("foreign", [], "Others' predictions: of lmms-eval, VLMEvalKit, or any table.")
    command_line.define_path("data_dir", None, "Where the data sets are built, for images.")
    flags.DEFINE_integer("questions", 8, "Questions to show of each kind.", lower_bound=0)
    flags.DEFINE_bool("published", False, "Published results on all data sets, also where no run is.")
    flags.DEFINE_string("title", "Evaluation report", "Title of the report.")
    app.run(main, flags_parser=command_line.parse_flags)
