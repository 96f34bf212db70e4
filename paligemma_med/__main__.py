"""All programs under one name: `paligemma_med train …` once installed, or `python -m paligemma_med train …`.

A program is found in our own folders (`command_line.programs_folder`), also from a folder that has tools/, configs/ or
data_prep/ of its own, which `python -m tools.report` would take instead.
"""

import contextlib
import importlib.util
import os
import runpy
import sys

import paligemma_med

# name: (module, what it does), in the order of --help.
PROGRAMS = {
    "train": ("paligemma_med.train", "train a config; started again, the run goes on where it was"),
    "evaluate": ("paligemma_med.evaluate", "accuracy beside its controls, with intervals"),
    "predict": ("paligemma_med.predict", "answer questions about one image"),
    "ask": ("paligemma_med.ask", "answer the questions of one's own table: a folder and a table in, a table out"),
    "explain": ("paligemma_med.explain", "a page on what an answer was read from"),
    "report": ("tools.report", "tables, plots and questions of evaluations, as Markdown and HTML"),
    "convert": ("tools.convert_checkpoint", "weights to big_vision, Hugging Face, PEFT, Orbax"),
    "export_predictions": ("tools.export_predictions", "predictions in the formats of lmms-eval and VLMEvalKit"),
    "judge": ("tools.judge", "have a language model judge the answers of an evaluation"),
    "build": ("data_prep.build", "build a data set for TFDS from files on this machine"),
    "data_report": ("data_prep.report", "what built data sets contain"),
    "leakage": ("data_prep.leakage", "images and questions that built data sets have in common"),
    "curate": ("data_prep.curate", "filter question-answer pairs by rules"),
    "convert_images": ("data_prep.convert_images", "images of any kind (DICOM, 16 bits) as plain PNG or JPEG"),
    "synthesize": ("tools.synthesize_qa", "questions and answers from captions, by a language model"),
    "review": ("tools.review_qa", "a page to judge question-answer pairs on, by hand"),
    "eval_saliency": ("tools.eval_saliency", "do saliency maps find what answers name? measured against boxes"),
    "fit_scaling_law": ("tools.fit_scaling_law", "the paper's scaling law, fitted to losses"),
    "coco_scores": ("tools.coco_scores", "generated reports by COCO's own evaluation, with Java"),
    "torch_to_safetensors": ("tools.torch_to_safetensors", "safetensors of PyTorch's pickles"),
    "quickstart": ("tools.quickstart", "everything once, in minutes, on drawn images and a tiny model"),
    "bench": ("tools.bench", "our parts beside others' on the same work (in a checkout only)"),
}
ALIASES = {"convert_checkpoint": "convert", "synthesize_qa": "synthesize", "review_qa": "review"}


def usage() -> str:
    """What --help prints: each program with what it does."""
    from paligemma_med.pp import command_line

    width = max(map(len, PROGRAMS))
    lines = [f"  {name:{width}}  {what}" for name, (_, what) in PROGRAMS.items()]
    return "\n".join(
        [
            "usage: paligemma_med PROGRAM …        flags of a program, with an example: paligemma_med PROGRAM --help",
            "",
            *lines,
            "",
            "example: paligemma_med quickstart --out=quickstart_out",
            f"configs: {os.path.join(command_line.programs_folder(), 'configs')}",
        ]
    )


def main() -> None:
    from paligemma_med.pp import command_line

    command_line.prepare_output()
    name, *rest = sys.argv[1:] or ["--help"]
    if name in ("--help", "-h", "help", "--helpshort", "--helpfull"):
        with contextlib.suppress(BrokenPipeError):
            print(usage())
        return
    if name == "--version":
        print(paligemma_med.__version__)
        return
    name = ALIASES.get(name, name)
    if name not in PROGRAMS:
        sys.exit(f"error: there is no program {name!r}; expected one of {', '.join(PROGRAMS)}.")
    folder = command_line.programs_folder()
    here = [path for path in sys.path if os.path.realpath(path) == os.path.realpath(os.getcwd())]
    sys.path[:] = [path for path in sys.path if path not in here] + here
    if folder not in sys.path or folder in here:
        sys.path.insert(0, folder)
    command_line.CALLED_AS.update({module: f"paligemma_med {word}" for word, (module, _) in PROGRAMS.items()})
    module, _ = PROGRAMS[name]
    if importlib.util.find_spec(module) is None:
        sys.exit(f"error: {name} isn't part of what is installed; it is in a checkout of the project.")
    sys.argv = [name, *("--help" if flag == "-h" else flag for flag in rest)]
    runpy.run_module(module, run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    main()
