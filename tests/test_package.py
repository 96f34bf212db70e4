"""The house rules: what importing costs, who may import whom, and what no file may call.

Rules are checked on the syntax tree, so an import inside a function counts as well.
"""

import ast
import pathlib
import re
import subprocess
import sys
import time
import tomllib

import pytest

from tests import environ

ROOT = pathlib.Path(__file__).resolve().parent.parent
OURS = ("paligemma_med", "configs", "data_prep", "tools")
ENTRY_POINTS = ("train", "evaluate", "predict", "ask", "explain")

# Room of the library -> the rooms that it may import besides itself. One that isn't here may know
# everybody but the programs.
MAY_IMPORT = {
    "files": (),
    "metrics": ("pp",),
    "pp": (),
    "models": (),
    "parallel": ("models",),
    "checkpoints": ("models", "files", "pp"),
    "input_pipeline": ("pp", "parallel"),
    "quantise": ("models",),
    "decode": ("models", "parallel"),
    "saliency": ("models", "decode"),
    "evaluation": ("decode", "metrics", "pp", "parallel", "files"),
    "evaluators": ("evaluation", "decode", "metrics", "pp", "parallel", "files"),
    "config": ("pp", "models", "quantise", "checkpoints"),
    "cli": ("pp", "parallel", "config", "checkpoints"),
    "experiment": ("config", "evaluators", "input_pipeline", "evaluation", "pp", "models", "parallel", "checkpoints"),
    "weights": ("setup", "experiment", "config", "quantise", "models", "parallel", "checkpoints"),
    "judge": ("evaluation", "metrics", "pp", "files"),
    "served": ("judge", "evaluation", "metrics", "pp", "files", "input_pipeline", "config", "parallel"),
}
# TensorFlow Datasets is welcome: its reading and building of array_record needs no TensorFlow.
# big_vision does, and is no package: `upstream`, which nobody imports, is the place for both.
HEAVY = ("tensorflow", "tf_keras", "keras", "torch", "torchvision", "torchaudio", "transformers")
# Where other packages' private names may stand: a release may move them, so that place guards each.
PRIVATE_NAMES = "paligemma_med.parallel.jax_private"
UNSAFE_MODULES = ("pickle", "cPickle", "cloudpickle", "dill", "shelve", "marshal", "joblib")
UNSAFE_CALLS = ("eval", "exec")
# Files from outside are read by `pp.json_text`. These read what their own process, or another of the same run, wrote.
READ_OWN_JSON = (
    "paligemma_med.config.files",
    "paligemma_med.evaluation.results",
    "paligemma_med.input_pipeline.evaluation",
    "paligemma_med.judge.criteria",  # at most 200 characters
    "paligemma_med.judge.replies",  # lines that were checked when the file was opened
    "paligemma_med.parallel.distributed",
    "paligemma_med.training.metric_writers",
    "paligemma_med.training.run_files",
    "data_prep.builders.row_file",
    "data_prep.curate.__main__",
    "data_prep.curate.run",
    "tools.synthesize_qa.__main__",
    "tools.synthesize_qa.parse",  # texts of models, each of which may be wrong
)


def python_files(*folders):
    return sorted(p for folder in folders for p in (ROOT / folder).rglob("*.py"))


def module_name(path):
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imported(tree, module, is_package=False):
    """Dotted names that a file imports; `from a import b` gives "a.b", b being a module or not."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                parts = module.split(".")
                up = parts[: len(parts) - node.level + is_package]
                base = ".".join(up + ([node.module] if node.module else []))
            yield from (f"{base}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.Call):
            name = called(node)
            if name in ("__import__", "import_module", "importlib.import_module") and node.args:
                if isinstance(node.args[0], ast.Constant) and isinstance(node.args[0].value, str):
                    yield node.args[0].value


def called(node):
    """The dotted name that is called, such as np.load; empty for anything more involved."""
    return ast.unparse(node.func) if isinstance(node.func, ast.Name | ast.Attribute) else ""


def import_faults(source, module, is_package=False):
    """What a file imports against the rules, as a list of sentences."""
    package, *rest = module.split(".")
    part = rest[0] if rest else ""
    faults = []
    for name in imported(ast.parse(source), module, is_package):
        top, *below = name.split(".")
        inside = package == "paligemma_med" and part == "upstream"
        if top == "big_vision" and not inside:
            faults.append(f"{module} imports {name}: that is for paligemma_med.upstream alone")
        if top in HEAVY and package != "tools" and not (inside and top == "tensorflow"):
            faults.append(f"{module} imports {name}: PyTorch is for tools and tests alone")
        private = any(part.startswith("_") and not part.startswith("__") for part in below)
        if private and top not in (*OURS, "tests") and module != PRIVATE_NAMES:
            faults.append(f"{module} imports {name}, a private name: those are for {PRIVATE_NAMES} alone")
        if (
            package == "data_prep"
            and top in OURS
            and top != "data_prep"
            and not f"{name}.".startswith("paligemma_med.pp.")
        ):
            faults.append(f"{module} imports {name}: data_prep imports paligemma_med.pp and nothing else of ours")
        if package == "paligemma_med":
            if top in ("configs", "data_prep", "tools", "tests"):
                faults.append(f"{module} imports {name}: the library stands on its own")
            if top == "paligemma_med" and below:
                target = below[0]
                if part in MAY_IMPORT and target not in (part, *MAY_IMPORT[part]):
                    allowed = ", ".join(MAY_IMPORT[part]) or "nobody"
                    faults.append(f"{module} imports {name}: {part} may know {allowed}")
                if target == "upstream" and not inside:
                    faults.append(f"{module} imports {name}, which is for big_vision alone")
                if target in ENTRY_POINTS and part not in ENTRY_POINTS:
                    faults.append(f"{module} imports {name}, which is a program")
    return faults


def unsafe_faults(source, module):
    """Ways to run code out of data that a file uses, as a list of sentences."""
    tree = ast.parse(source)
    faults = [f"{module} imports {name}" for name in imported(tree, module) if name.split(".")[0] in UNSAFE_MODULES]
    for node in ast.walk(tree):
        if not isinstance(node, ast.Call):
            continue
        if called(node).removeprefix("builtins.") in UNSAFE_CALLS:
            faults.append(f"{module}:{node.lineno} calls {called(node)}")
        for keyword in node.keywords:
            refused = isinstance(keyword.value, ast.Constant) and keyword.value.value is False
            if keyword.arg == "allow_pickle" and not refused:
                faults.append(f"{module}:{node.lineno} allows pickles")
    return faults


def test_import_is_quick_and_brings_no_framework():
    code = (
        "import sys, paligemma_med; assert paligemma_med.__version__;"
        "print([m for m in ('jax', 'flax', 'tensorflow', 'torch', 'numpy') if m in sys.modules])"
    )
    start = time.monotonic()
    run = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60)
    seconds = time.monotonic() - start
    assert run.returncode == 0, run.stderr
    assert run.stdout.strip() == "[]"
    assert seconds < 3


def test_a_command_line_brings_no_jax():
    code = "import sys, paligemma_med.cli; print([m for m in ('jax', 'flax', 'orbax', 'grain') if m in sys.modules])"
    run = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert run.stdout.strip() == "[]", run.stdout + run.stderr


def test_every_file_keeps_to_who_may_import_whom():
    files = python_files(*OURS)
    assert files
    faults = []
    for path in files:
        is_package = path.name == "__init__.py"
        faults += import_faults(path.read_text("utf-8"), module_name(path), is_package)
    assert not faults, "\n".join(faults)


def circles(folders):
    """Circles of imports among modules, those inside functions included, as lists of names."""
    files = {module_name(p): p for p in python_files(*folders)}
    knows = {}
    for module, path in files.items():
        knows[module] = set()
        for name in imported(ast.parse(path.read_text("utf-8")), module, path.name == "__init__.py"):
            while name and name not in files:
                name = name.rpartition(".")[0]
            if name and name != module:
                knows[module].add(name)
    return strongly_connected(knows)


def strongly_connected(graph):
    """Groups of more than one node that reach each other (Tarjan 1972)."""
    index, low, stack, out = {}, {}, [], []

    def visit(node):
        index[node] = low[node] = len(index)
        stack.append(node)
        for other in graph.get(node, ()):
            if other not in index:
                visit(other)
            if other in stack:
                low[node] = min(low[node], low[other])
        if low[node] == index[node]:
            at = stack.index(node)
            if len(stack) - at > 1:
                out.append(sorted(stack[at:]))
            del stack[at:]

    for node in graph:
        if node not in index:
            visit(node)
    return out


def test_no_circles():
    assert not circles(OURS)


def test_a_circle_would_be_seen():
    assert strongly_connected({"a": {"b"}, "b": {"c"}, "c": {"b", "d"}, "d": set()}) == [["b", "c"]]


def test_the_lock_is_of_this_pyproject():
    """That it was made anew (`uv lock`) after requirements changed."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
    packages = tomllib.loads((ROOT / "uv.lock").read_text("utf-8"))["package"]
    [ours] = [p["metadata"] for p in packages if p["source"] == {"editable": "."}]
    assert ours["provides-extras"] == list(project["optional-dependencies"])

    def words(requirement):
        """(name, its specifiers) of a requirement as pyproject.toml has it."""
        name, specifiers = re.fullmatch(r"([\w-]+)(?:\[.*\])?([^;]*)(?:;.*)?", requirement).groups()
        return name.lower().replace("_", "-"), specifiers.strip()

    asked = sum(project["optional-dependencies"].values(), project["dependencies"])
    locked = {(x["name"], x.get("specifier", "")) for x in ours["requires-dist"]}
    assert locked == {words(x) for x in asked}, "run `uv lock`"


def test_no_file_evaluates_or_unpickles():
    faults = []
    for path in python_files(*OURS):
        faults += unsafe_faults(path.read_text("utf-8"), module_name(path))
    assert not faults, "\n".join(faults)


def test_json_from_outside_has_one_reader():
    files = {module_name(p): p for p in python_files(*OURS)}
    found = set()
    for module, path in files.items():
        calls = [called(node) for node in ast.walk(ast.parse(path.read_text("utf-8"))) if isinstance(node, ast.Call)]
        if {"json.load", "json.loads", "json.JSONDecoder"} & {*calls} and not module.startswith("tools.bench."):
            found.add(module)
    assert found == {*READ_OWN_JSON, "paligemma_med.pp.json_text"}


def test_images_have_one_opener():
    """PIL hands EPS to Ghostscript unless it is told which formats to read; `pp.images` tells it."""
    opener = re.compile(r"Image\.open\(|\bimread\(|\bimageio\b|\bcv2\b|decode_image\(|decode_jpeg\(")
    found = {module_name(p) for p in python_files(*OURS) if opener.search(p.read_text("utf-8"))}
    assert found == {"paligemma_med.pp.images"}


# What the families of parts call their own: others ask the tables of leaves and the presets.
FAMILY_NAMES = re.compile("MultiHeadDotProductAttention|q_einsum|kv_einsum|gating_einsum|encoderblock|So400m|gemma_2b")
MAY_NAME = ("paligemma_med/models/", "paligemma_med/checkpoints/hf/", "paligemma_med/checkpoints/gm.py", "configs/")


def family_names(path, source):
    """Names of families' own that a file may not spell."""
    return [] if path.startswith(MAY_NAME) else FAMILY_NAMES.findall(source)


def test_nobody_else_spells_what_a_family_calls_its_parameters():
    found = {}
    for path in python_files(*OURS):
        path, source = str(path.relative_to(ROOT)), path.read_text("utf-8")
        if names := family_names(path, source):
            found[path] = sorted(set(names))
    assert not found
    assert family_names("tools/x.py", '"""Of So400m."""')
    assert not family_names("configs/x.py", 'variant="So400m/14"')
    assert family_names("paligemma_med/checkpoints/hf.py", "q_einsum")


def test_no_file_is_long():
    limit = 500  # past 400 lines a file has two ideas
    files = python_files(*OURS, "tests")
    long = [f"{p.relative_to(ROOT)}: {n}" for p in files if (n := len(p.read_text("utf-8").splitlines())) > limit]
    assert not long, "\n".join(long)


def test_every_file_says_what_it_is_for():
    bare = [
        str(path.relative_to(ROOT))
        for path in python_files(*OURS)
        if (source := path.read_text("utf-8")).strip() and not ast.get_docstring(ast.parse(source))
    ]
    assert not bare, f"no docstring at the top of: {', '.join(bare)}"


@pytest.mark.parametrize(
    "module, source, wrong",
    [
        ("paligemma_med.train", "import torch", True),
        ("configs.x", "def f():\n  from tensorflow import io", True),
        ("data_prep.x", "import tensorflow_datasets as tfds", False),
        ("tools.x", "import torch", False),
        ("data_prep.x", "from paligemma_med.pp import ops_image", False),
        ("data_prep.x", "from paligemma_med import input_pipeline", True),
        ("data_prep.x", "from data_prep import files", False),
        ("paligemma_med.x", "import importlib; importlib.import_module('torch')", True),
        ("paligemma_med.models.vit", "from paligemma_med.models.layers import attention", False),
        ("paligemma_med.models.vit", "from .layers import attention", False),
        ("paligemma_med.models.vit", "from .. import pp", True),
        ("paligemma_med.models.vit", "from paligemma_med import decode", True),
        ("paligemma_med.pp.ops", "import paligemma_med.models.vit", True),
        ("paligemma_med.checkpoints.hf", "from paligemma_med.models import vit", False),
        ("paligemma_med.checkpoints.hf", "from paligemma_med.parallel import sharding", True),
        ("paligemma_med.evaluators.vqa", "from paligemma_med import decode", False),
        ("paligemma_med.evaluators.vqa", "from paligemma_med import train", True),
        ("paligemma_med.models.loss", "from paligemma_med import train", True),
        ("paligemma_med.train", "from paligemma_med import evaluate", False),
        ("paligemma_med.train", "from configs import common", True),
        ("paligemma_med.upstream.pp_ops", "import tensorflow as tf", False),
        ("paligemma_med.upstream.pp_ops", "import torch", True),
        ("paligemma_med.upstream.evaluators", "import big_vision.utils as u", False),
        ("paligemma_med.evaluators.vqa", "import big_vision.utils as u", True),
        ("paligemma_med.evaluate", "from paligemma_med import upstream", True),
        ("paligemma_med.distributed", "from jax._src import distributed", True),
        ("tools.x", "def f():\n  import jax._src.core", True),
        ("paligemma_med.x", "from orbax.checkpoint import _src", True),
        ("paligemma_med.parallel.jax_private", "from jax._src import distributed", False),
        ("paligemma_med.x", "from jax import __version__", False),
    ],
)
def test_the_import_rules_can_fail(module, source, wrong):
    assert bool(import_faults(source, module)) == wrong


def test_relative_imports_of_a_package_are_its_own():
    assert not import_faults("from .vit import Model", "paligemma_med.models", is_package=True)
    assert import_faults("from ..pp import x", "paligemma_med.models", is_package=True)


@pytest.mark.parametrize(
    "source, wrong",
    [
        ("eval('1')", True),
        ("import builtins; builtins.exec('1')", True),
        ("import pickle", True),
        ("from cloudpickle import loads", True),
        ("np.load(f, allow_pickle=True)", True),
        ("np.load(f, allow_pickle=flag)", True),
        ("np.load(f, allow_pickle=False)", False),
        ("ast.literal_eval('1'); model.eval()", False),
    ],
)
def test_the_safety_rules_can_fail(source, wrong):
    assert bool(unsafe_faults(source, "m")) == wrong


def test_started_programs_keep_the_xla_flags_of_the_test_run():
    """Or tests under another instruction set would compare programs for it with some for this one."""
    theirs = ("tests/conftest.py", "tests/environ.py", "tests/test_package.py")
    others = [p for p in python_files("tests") if p.relative_to(ROOT).as_posix() not in theirs]
    named = [str(p) for p in others if '"XLA_FLAGS"' in p.read_text("utf-8") or "XLA_FLAGS=" in p.read_text("utf-8")]
    assert others and not named, f"environ.of_program sets XLA_FLAGS, not {named}"


def test_environment_of_started_programs(monkeypatch):
    monkeypatch.setenv("XLA_FLAGS", "--xla_cpu_max_isa=AVX2 --xla_force_host_platform_device_count=8")
    assert environ.of_program(A="1")["A"] == "1"
    flags = environ.of_program(devices=3)["XLA_FLAGS"].split()
    assert flags == ["--xla_cpu_max_isa=AVX2", "--xla_force_host_platform_device_count=3"]


def test_wrong_use_is_one_line():
    """absl prints the whole help above an app.UsageError; `cli.command` doesn't."""
    bare = []
    for path in python_files("paligemma_med", "tools"):
        text = path.read_text(encoding="utf-8")
        if "raise app.UsageError" in text and path.name != "cli.py":
            mains = [n for n in ast.parse(text).body if isinstance(n, ast.FunctionDef) and n.name == "main"]
            bare += [
                str(path) for n in mains if not {ast.unparse(d) for d in n.decorator_list} & {"command", "cli.command"}
            ]
    assert not bare
