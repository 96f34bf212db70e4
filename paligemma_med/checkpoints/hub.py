"""Models by their name on the Hugging Face Hub, as "google/paligemma-3b-pt-224" or "hf:owner/name@revision".

Reading looks in the user's own cache alone, which huggingface_hub keeps (HF_HOME). Only `fetch` asks the network, and
only programs given --download call it: a folder that was mistyped must not become a question to a server, nor a name in
somebody's config.json. Weights are fetched as safetensors, with the JSON beside them: never what could hold code.

A path wins over a name. What a run's config.json keeps has the commit (`pinned`): the name may mean others later.
"""

import fnmatch
import os
import re
import sys
from typing import Any, NamedTuple

from paligemma_med.checkpoints import bv, compose
from paligemma_med.checkpoints.errors import CheckpointError
from paligemma_med.pp import files

PREFIX = "hf:"
FETCHED = ("*.safetensors", "*.json")
# What reading needs: other programs, which fetch less of the rest, fill the same cache.
_READ = ("*.safetensors", "*.safetensors.index.json", "config.json", "adapter_config.json")
_PART = r"[A-Za-z0-9](?:[\w-]|\.(?!\.)){0,95}"
_NAME = re.compile(rf"({PREFIX})?({_PART}/{_PART})(?:@({_PART}(?:/{_PART})*))?", re.ASCII)
_FILES = (".npz", ".safetensors", ".json", ".bin", ".pt", ".pth")  # how names of models don't end


class Name(NamedTuple):
    """Of a model: owner/name, a branch, tag or commit or None, and whether "hf:" says that it is one."""

    repo: str
    revision: str | None
    is_said: bool


def parse(spec: Any) -> Name | None:
    """The name that `spec` is, or could be if there is no such path; None if it can't be one."""
    found = _NAME.fullmatch(spec) if isinstance(spec, str) else None
    if found is None or (not found[1] and spec.lower().endswith(_FILES)):
        return None
    return Name(found[2], found[3], bool(found[1]))


def name_of(spec: Any) -> Name | None:
    """`parse`, of what isn't a path on this machine: no file or folder, nor a run's step or a checkpoint's prefix."""
    name = parse(spec)
    if name is None or os.path.lexists(spec) or os.path.lexists(spec.rpartition("@")[0] or spec) or bv.find(spec):
        return None
    return name


def located(spec: Any) -> Any:
    """The folder in the cache that a name stands for; anything else as it is, as a name without "hf:" that isn't there.

    Raises:
      FileNotFoundError: "hf:…" that isn't in the cache.
    """
    name = name_of(spec)
    if name is None:
        return spec
    try:
        found = _snapshot(name, is_local=True)
    except Exception as e:  # huggingface_hub's errors have no common kind, and differ between its versions
        found, reason = None, f"; {e}" if isinstance(e, _Missing) else ""
    if found:
        return found
    if name.is_said:
        raise FileNotFoundError(
            f"{spec} isn't whole in the cache of the Hugging Face Hub: --download fetches it{reason}"
        )
    return spec


def hint(spec: Any) -> str:
    """The end of a sentence on a path that isn't there but could be a name; "" for others."""
    return "; a model of that name on the Hugging Face Hub is fetched by --download" if name_of(spec) else ""


def pinned(spec: Any) -> str | None:
    """The name with "hf:" and the commit that is in the cache ("hf:owner/name@commit"), or, if none is, as it is; None
    if `spec` is a path."""
    name = name_of(spec)
    if name is None:
        return None
    try:
        folder = located(spec)
    except FileNotFoundError:
        return spec
    return None if folder == spec else f"{PREFIX}{name.repo}@{os.path.basename(folder)}"


def is_pinned_from(old: Any, spec: Any) -> bool:
    """Whether `old` is the `pinned` of a name without a revision."""
    new, old = name_of(spec), parse(old)
    return bool(new and old and old.is_said and old.revision and not new.revision and new.repo == old.repo)


def fetch(spec: Any, seen: tuple[str, ...] = ()) -> None:
    """Fetches what `spec` names into the cache: a name, sources of parts, and what a run started from. What is there
    already isn't fetched again.

    Raises:
      CheckpointError: the Hub can't be reached or refuses; or it has no safetensors of that name.
    """
    from paligemma_med.checkpoints import workdir  # here: it needs Orbax, which is slow to import

    if spec is None:
        return
    for source in (compose.parts_of(spec) or {None: spec}).values():
        source = os.fspath(source)
        if name := name_of(source):
            _fetch_one(source, name)
        elif (run := workdir.split_spec(source)) and (folder := os.path.realpath(run[0])) not in seen:
            config = workdir.read_config(run[0])
            for key in ("model_init", "adapter_init", "base"):
                fetch(config.get(key) or None, (*seen, folder))


def _fetch_one(spec, name):
    print(f"Fetching {spec} from the Hugging Face Hub, unless it is in the cache.", file=sys.stderr)
    try:
        folder = _snapshot(name, is_local=False)
    except Exception as e:  # as above
        kinds = {kind.__name__ for kind in type(e).__mro__}
        why = next((text for kind, text in _WHY.items() if kind in kinds), files.reason(e))
        isnt = "" if name.is_said else "isn't here, and "
        raise CheckpointError(f"{spec} {isnt}can't be fetched from the Hugging Face Hub: {why}") from e
    found = [n for _, _, names in os.walk(folder) for n in names]
    if not fnmatch.filter(found, FETCHED[0]):
        raise CheckpointError(
            f"{spec} has no safetensors on the Hugging Face Hub, and other forms of weights aren't fetched: expected "
            "a model in transformers' form"
        )
    print(f"It is in {folder}.", file=sys.stderr)  # as is its tokenizer.json, which PALIGEMMA_TOKENIZER may name


# What to do about errors of huggingface_hub, the more special ones first.
_WHY = {
    "_Missing": "huggingface_hub isn't installed (pip install huggingface_hub)",
    "GatedRepoError": "its owner asks for consent: accept the terms on its page, and log in with `hf auth login`",
    "RepositoryNotFoundError": "there is no model of that name, or it is private and needs `hf auth login`",
    "RevisionNotFoundError": "it has no such revision",
    "OfflineModeIsEnabled": "HF_HUB_OFFLINE forbids it: unset it",
}


class _Missing(ImportError):
    pass


def _snapshot(name, is_local):
    """The folder of a model in the cache; errors are huggingface_hub's, or _Missing."""
    try:
        import huggingface_hub  # here, since few need it
    except ImportError as e:
        raise _Missing(_WHY["_Missing"]) from e
    return huggingface_hub.snapshot_download(
        name.repo, revision=name.revision, allow_patterns=[*(_READ if is_local else FETCHED)], local_files_only=is_local
    )
