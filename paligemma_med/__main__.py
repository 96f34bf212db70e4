"""All programs under one name: `paligemma-med train …` once installed, or `python -m paligemma_med train …`.

A program is found beside this package, also in a folder that has tools/, configs/ or data_prep/ of its own, which
`python -m tools.report` would take instead.
"""

import os
import pathlib
import runpy
import sys

PROGRAMS = {name: f"paligemma_med.{name}" for name in ("train", "evaluate", "predict", "ask", "explain")}
PROGRAMS |= {"build": "data_prep.build", "data_report": "data_prep.report"}
PROGRAMS |= {name: f"data_prep.{name}" for name in ("curate", "convert_images")}
PROGRAMS |= {
    name: f"tools.{name}"
    for name in (
        "bench",
        "convert_checkpoint",
        "eval_saliency",
        "fit_scaling_law",
        "judge",
        "quickstart",
        "report",
        "review_qa",
        "synthesize_qa",
    )
}
ROOT = pathlib.Path(__file__).resolve().parent.parent


def main() -> None:
    name, *rest = sys.argv[1:] or ["--help"]
    if name in ("--help", "-h", "--helpshort", "--helpfull"):
        print(f"usage: paligemma-med PROGRAM …, with --help for its flags\n\nprograms: {', '.join(PROGRAMS)}")
        return
    if name not in PROGRAMS:
        sys.exit(f"error: there is no program {name!r}; expected one of {', '.join(PROGRAMS)}.")
    here = [path for path in sys.path if os.path.realpath(path) == os.path.realpath(os.getcwd())]
    sys.path[:] = [path for path in sys.path if path not in here] + here
    if str(ROOT) not in sys.path:
        sys.path.insert(0, str(ROOT))
    sys.argv = [name, *rest]
    runpy.run_module(PROGRAMS[name], run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    main()
