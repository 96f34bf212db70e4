"""One image, one question → the answer and what it rests on, as one HTML page to work with:

    python -m paligemma_med.explain --workdir=out/s1 --image=film.jpg --out=report.html
        --question="Any nodule?"

Or many, with an index, worst first: --image_dir=films --questions=questions.csv --out=reports/
(columns image and question; without --questions, each --question of each image). DICOM files are
read too. Or a page to ask on, at an address of this machine that is printed: --serve, with examples from
--image_dir if given. With --config and --checkpoint instead of --workdir, weights of any form that
`load_params` takes. --mask, --png, --npz: see below and docs/explain.md. Not for diagnosis.

--dry_run compiles the programs of a page for this machine or for --chip=h200, and prints what they take and do.
"""

import contextlib
import os
import shlex
import sys

import jax
import numpy as np
from absl import app, flags

from paligemma_med import cli, files, forecast
from paligemma_med.explain import asking, page, serve
from paligemma_med.explain.answer import explain, load
from paligemma_med.explain.files import write_npz, write_page, write_pngs
from paligemma_med.explain.many import explain_many
from paligemma_med.explain.questions import about_images, images_in, read_mask, read_questions
from paligemma_med.page import check_jinja, shown
from paligemma_med.parallel import chips, compilation_cache, distributed, ending
from paligemma_med.pp import command_line, image_cells, own_rows
from paligemma_med.saliency import occlusion
from paligemma_med.saliency.methods import METHODS
from paligemma_med.setup import Setup


def _keep_programs(folder):
    """Keeps compiled programs on disk, so that the next report starts within seconds."""
    if folder:
        compilation_cache.start(folder, ".")
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.2)


@cli.command
def main(argv) -> None:
    del argv
    values = flags.FLAGS
    if cli.check_chip_flags("dry_run"):
        _forecast(values)  # before JAX starts the devices that are here
        return
    _keep_programs(values.compilation_cache)
    distributed.start_from_flags(awaits_sigterm=False)
    if not ending.is_alone():
        raise app.UsageError("explain runs in one process.")
    if values.serve:
        _serve(values)
        return
    if values.keep is not None or values["port"].present:
        raise app.UsageError("--port and --keep go with --serve.")
    if values.out is None:
        raise app.UsageError("Give --out.")
    if (values.image is None) == (values.image_dir is None):
        raise app.UsageError("Give --image or --image_dir.")
    if values.questions and values.image_dir is None:
        raise app.UsageError("--questions goes with --image_dir.")
    if (values.columns or values.choose) and not values.questions:
        raise app.UsageError("--columns and --choose go with --questions.")
    if not values.questions and not (values.question and all(q.strip() for q in values.question)):
        raise app.UsageError("Give --question" + (" or --questions." if values.image_dir else "."))
    if values.image and len(values.question) > 1:
        raise app.UsageError("--image takes one --question; --image_dir takes several.")
    if values.image_dir and values.mask:
        raise app.UsageError("--mask goes with --image.")
    if values.choices is not None and values.questions:
        raise app.UsageError("--choices goes with --question; a table of --questions has columns choice_a, choice_b, …")
    choices = own_rows.choices_of_flag(values.choices)
    asked = None
    if values.image_dir:
        if not os.path.isdir(values.image_dir):
            raise ValueError(f"--image_dir {values.image_dir}: no such folder.")
        if os.path.exists(values.out) and not os.path.isdir(values.out):
            raise ValueError(f"--out {values.out}: a file; expected a folder with --image_dir.")
    elif os.path.isdir(values.out):
        raise ValueError(f"--out {values.out}: a folder; expected a file with --image.")
    if values.image_dir:
        asked = (
            read_questions(values.questions, values.image_dir, columns=values.columns, choose=values.choose)
            if values.questions
            else about_images(values.image_dir, values.question, choices)
        )
    image = values.image and image_cells.read(values.image, "--image")
    mask = values.mask and read_mask(values.mask)
    config, checkpoint = cli.from_flags()
    check_jinja()
    loaded = load(config, checkpoint)
    kw = {k: values[k].value for k in _OPTIONS}
    if asked:
        title = os.path.basename(os.path.abspath(values.image_dir))
        failed = explain_many(loaded, title, asked, values.out, npz=bool(values.npz), png=bool(values.png), **kw)
        print(f"Written to {os.path.join(values.out, 'index.html')}")
        if failed:
            raise ValueError(f"{failed} of {len(asked)} have no report; index.html says why.")
        return
    try:
        kw |= dict(mask=mask, choices=choices, title=os.path.basename(values.image))
        made, _ = explain(loaded, image, values.question[0], **kw)
    except ValueError as e:
        raise ValueError(f"{values.image}: {e}") from e
    command = shlex.join(["python", "-m", "paligemma_med.explain", *sys.argv[1:]])
    made.about.append(("Command", command))
    write_page(made, values.out)
    if values.npz:
        write_npz(made, values.npz)
    if values.png:
        write_pngs(made, values.png)
    print(f"{shown(made.answer)}   (probability {page.percent(np.sum(made.logprobs))})")
    for flag in made.flags:
        print(f"  {flag['name']}: {flag['says']}")
    print(f"Written to {values.out}")


def _forecast(values):
    """--dry_run: what the programs of a page take, for this machine's devices or for --chip."""
    config = cli.config_from_flags()
    with chips.aimed_at(values.chip):
        setup = Setup(config)
        kw = {k: values[k].value for k in ("num_samples", "max_new_tokens", "methods")}
        forecast.run(setup, forecast.of_saliency(setup, **kw), forecast.ADVICE_OF_SALIENCY)


def _serve(values):
    """The page to ask on; ends by Ctrl-C, or with an error before it is ready."""
    others = ("image", "question", "questions", "columns", "choose", "choices", "out", "mask", "png", "npz")
    if given := [name for name in others if values[name].value is not None]:
        raise app.UsageError(f"--{given[0]} doesn't go with --serve.")
    examples = []
    if values.image_dir is not None:
        if not os.path.isdir(values.image_dir):
            raise ValueError(f"--image_dir {values.image_dir}: no such folder.")
        examples = [(name, os.path.join(values.image_dir, name)) for name in images_in(values.image_dir)]
    config, checkpoint = cli.from_flags()
    check_jinja()
    serve.limit_pixels()
    with contextlib.ExitStack() as stack:
        server = stack.enter_context(serve.Server(values.port, examples))  # a port that is taken is told at once
        if values.keep is not None:
            os.makedirs(values.keep, exist_ok=True)
            stack.enter_context(files.sole_use(values.keep, "give another --keep"))
        server.desk = asking.Desk(load(config, checkpoint), keep=values.keep, **{k: values[k].value for k in _OPTIONS})
        try:
            serve.run(server)
        except KeyboardInterrupt:
            kept = f"Answers and pages are in {values.keep}." if values.keep else "Nothing was kept."
            print(f"\nEnded. {kept}")
    ending.leave_at_once(130)  # a question may be under way


_OPTIONS = ("num_samples", "temperature", "seed", "max_new_tokens", "methods", "fill")


if __name__ == "__main__":
    cli.define_source_flags()
    cli.define_chip_flags()
    distributed.define_flags()
    command_line.define_path("image", None, "Image or DICOM file.")
    flags.DEFINE_multi_string("question", None, "Question; with --image_dir, of each image.")
    command_line.define_path("image_dir", None, "Folder of images, in place of --image; with --serve: examples.")
    command_line.define_path("questions", None, "Table (.csv, .tsv, .jsonl, .parquet, .xlsx): columns image, question.")
    flags.DEFINE_string("columns", None, "Names of the table's columns, such as image=file,question=frage.")
    command_line.define_choose()
    command_line.define_choices()
    command_line.define_path("out", None, "The page; with --image_dir a folder.")
    command_line.define_path("mask", None, "Image file, white where the image is to be replaced.")
    command_line.define_path("png", None, "Folder for the maps as PNG; with --image_dir: 1 for --out.")
    command_line.define_path("npz", None, "File for the exact arrays; with --image_dir: 1 for --out.")
    flags.DEFINE_bool("serve", False, "A page to ask on, on this machine, in place of files.")
    flags.DEFINE_integer("port", 8765, "With --serve: where the page is; 0 takes a free one.", 0, 65535)
    command_line.define_path("keep", None, "With --serve: folder for answers.jsonl and the pages; none keeps nothing.")
    flags.DEFINE_list("methods", list(METHODS), f"Some of {', '.join(METHODS)}.")
    flags.DEFINE_enum("fill", "blur", list(occlusion.FILLS), "What stands in for what is occluded.")
    flags.DEFINE_integer("num_samples", 5, "Sampled answers beside the most probable one.")
    flags.DEFINE_float("temperature", 1.0, "Of the samples.")
    flags.DEFINE_integer("seed", 0, "Of the samples.")
    flags.DEFINE_integer("max_new_tokens", 64, "Length of an answer, at most.")
    command_line.define_path(
        "compilation_cache",
        os.path.join(os.environ.get("XDG_CACHE_HOME", "~/.cache"), "paligemma_med", "programs"),
        "Folder that keeps compiled programs for the next start; empty for none.",
    )
    app.run(main, flags_parser=cli.parse_flags)
