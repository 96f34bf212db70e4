"""Builds the wheel: the programs' folders go below `paligemma_med/_programs/`; pyproject.toml says everything else.

At the top of other people's site-packages `tools` and `configs` would be in the way of theirs. In a checkout, and in an
editable install of it, the folders stay where they are. `paligemma_med.pp.command_line.programs_folder` finds them.
"""

import fnmatch
import pathlib
import shutil

from setuptools import setup
from setuptools.command.build_py import build_py

ROOT = pathlib.Path(__file__).resolve().parent
FOLDERS = ("configs", "data_prep", "tools")
# Of use in a checkout alone.
LEFT_OUT = ("tools/bench", "tools/random_kills.py", "tools/docs_site.py", "tools/docs_pictures.py")


class BuildWithPrograms(build_py):
    """`build_py` that also copies the folders of programs, with the files that pyproject.toml calls package data."""

    def run(self):
        if not self.editable_mode:
            # What an earlier build left there, such as tools/ at the top, would be in the wheel as well.
            shutil.rmtree(self.build_lib, ignore_errors=True)
        super().run()
        if not self.editable_mode:
            for source, target in self._programs().items():
                self.mkpath(str(pathlib.Path(target).parent))
                self.copy_file(source, target)

    def get_outputs(self, include_bytecode=1):
        return super().get_outputs(include_bytecode) + ([] if self.editable_mode else [*self._programs().values()])

    def get_source_files(self):
        return super().get_source_files() + list(self._programs())

    def _programs(self):
        """{path of a file in the checkout: where it goes}."""
        patterns = ("*.py", *self.distribution.package_data[""])  # pyproject.toml calls it "*"
        below = pathlib.Path(self.build_lib, "paligemma_med", "_programs")
        names = sorted(p.relative_to(ROOT).as_posix() for x in FOLDERS for p in (ROOT / x).rglob("*") if p.is_file())
        return {
            name: str(below / name)
            for name in names
            if any(fnmatch.fnmatch(name, pattern) for pattern in patterns)
            and not any(f"{name}/".startswith(f"{out}/") for out in LEFT_OUT)
        }


setup(cmdclass={"build_py": BuildWithPrograms})
