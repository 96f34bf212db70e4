"""The pp strings of all our configs; without TensorFlow, so that quick tests can read it."""

import importlib
import pathlib
import re

from configs import common
from paligemma_med.pp import registry

RANDOM = ("inception_crop", "brightness", "contrast", "choice_no_replacement")
# Configs with ops on boxes, which big_vision hasn't.
OURS_ALONE = ("slake_grounded",)
# Arguments of a config that change its pp strings.
VARIANTS = {
    "slake_mini": ["turns=3"],
    "quickstart": ["stage=2"],
    "stage1_slake": ["res=224", "lang=all", "lang=zh", "tiny=True"],
    "stage2_pmc_vqa": ["answer=text", "version=v2_open", "tiny=True"],
    "stage2_medpix2": ["letters=True", "prompt=bare", "tiny=True"],
    "tiny_base": ["lesson=2"],
}


def config_strings(names=".*"):
    """{pp string: where it stands first}, over configs whose name matches and their variants. Those of systems that
    big_vision has no model or ops for are left out: its trainer refuses them."""
    folder, found = pathlib.Path(common.__file__).parent, {}
    for path in sorted(folder.glob("*.py")):
        if path.stem.startswith(("__", "common")) or path.stem in OURS_ALONE or not re.fullmatch(names, path.stem):
            continue
        module = importlib.import_module(f"configs.{path.stem}")
        for arg in (None, *VARIANTS.get(path.stem, ())):
            c = module.get_config(arg)
            if c.model.get("connector") or c.model.get("image_ar", "prefix") != "prefix":
                continue
            _collect(c.to_dict(), f"{path.stem}:{arg or ''}", found)
    return found


def _collect(section, where, found):
    for key, value in section.items():
        if isinstance(value, dict):
            _collect(value, f"{where}.{key}", found)
        elif key.endswith("pp") or key == "pp_fn":
            found.setdefault(value, f"{where}.{key}")


def fixed(pp):
    """`pp` without its random ops, which draw other numbers on each side."""
    ops = registry.split(pp)
    return "|".join(op for op in ops if registry.parse_call(op)[0] not in RANDOM)
