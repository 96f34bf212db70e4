"""One image, one question → the answer and what it rests on, as one HTML page to work with:

    python -m paligemma_med.explain --workdir=out/s1 --image=film.jpg --out=report.html
        --question="Any nodule?"

Or many, with an index, worst first: --image_dir=films --questions=questions.csv --out=reports/
(columns image and question; without --questions, each --question of each image). DICOM files are
read too. With --config and --checkpoint instead of --workdir, weights of any form that
`load_params` takes. --mask, --png, --npz: see below and docs/explain.md. Not for diagnosis.
"""

import contextlib
import csv
import dataclasses
import hashlib
import io
import json
import os
import pathlib
import re
import shlex
import sys
from typing import Any, NamedTuple

import jax
import numpy as np
import PIL.Image
from absl import app, flags

import paligemma_med
from paligemma_med import cli, decode, files, weights
from paligemma_med.checkpoints import fingerprint
from paligemma_med.config import files as config_files
from paligemma_med.evaluation import results
from paligemma_med.models import vlm
from paligemma_med.parallel import compilation_cache, distributed, ending, sharding
from paligemma_med.pp import get_preprocess_fn, ops_image
from paligemma_med.pp import images as images_lib
from paligemma_med.saliency import capture, checks, occlusion, page, report, sequence

SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".tif", ".tiff", ".gif", ".webp", ".dcm", ".dicom")
CONTROLS = {"blank": "Nothing (mid-grey)", "shuffled": "Its own patches, shuffled"}
_SPECIAL = {0: "‹pad›", 1: "‹end›", 2: "‹start›"}


class Loaded(NamedTuple):
    """What answering takes, loaded once for many questions."""

    config: Any
    weights: str  # their file's name, and what tells them from others (`fingerprint`)
    model: Any
    tokenizer: Any
    mesh: Any
    params: Any
    pp: Any


def load(config, checkpoint):
    """`Loaded` of a config and weights of any form that `checkpoints.load_params` takes.

    Raises:
      ValueError: the config has no prompt.
    """
    if not config.get("predict_pp"):
        raise ValueError("config has no predict_pp, which makes a prompt of a question.")
    pp = get_preprocess_fn(config.predict_pp)
    model, tokenizer, mesh, params = weights.load(config, checkpoint)
    names = [os.path.basename(os.path.normpath(str(x))) for x in (checkpoint, config.get("adapter_init")) if x]
    prints = "".join(fingerprint.of_leaves(params))
    origin = f"{' with '.join(names)} ({hashlib.sha256(prints.encode()).hexdigest()[:16]})"
    return Loaded(config, origin, capture.capturable(model), tokenizer, mesh, params, pp)


def explain(
    loaded,
    image,
    question,
    *,
    title="image",
    mask=None,
    num_samples=5,
    temperature=1.0,
    seed=0,
    max_new_tokens=64,
    methods=report.METHODS,
    fill="blur",
):
    """Answers a question about an image, and measures what the answer rests on.

    Args:
      loaded: `load`.
      image: bytes of an image or DICOM file, or uint8[H, W, 3].
      question: str.
      title: of the page; a file's name.
      mask: optional bool[H, W], of the image's own size or as the model sees it: a region to be
        replaced by `fill`.
      num_samples, temperature, seed: of the answers sampled beside the greedy one; 0 for none.
      max_new_tokens: of an answer.
      methods, fill: as `report.measure` takes them.

    Returns:
      (`report.Report`, the checks it was flagged by: list of `checks.Flag`).

    Raises:
      ValueError: an image that can't be read, a mask of another size, no answer at all.
    """
    if not question.strip():
        raise ValueError("the question is empty.")
    if num_samples < 0:
        raise ValueError(f"num_samples is {num_samples}; expected 0 or more.")
    if not temperature > 0:
        raise ValueError(f"temperature is {temperature:g}; expected more than 0.")
    tok = loaded.tokenizer
    if isinstance(image, bytes):
        image = images_lib.to_rgb(image)
    row = loaded.pp({"image": image, "question": question})
    cut = int(row.get("_truncated", 0))
    seen = np.asarray(row["image"], np.float32)
    stretched = _is_stretched(image, seen)
    patch = _patch(loaded.model, seen)
    images = {"image": seen, "blank": decode.blank_image(seen.shape), "shuffled": checks.shuffled(seen, patch)}
    if mask is not None:
        mask = fit_mask(mask, image.shape, seen.shape, stretched)
        images["masked"] = occlusion.replace(seen, mask, fill, patch[0])

    answers, samples = _answers(loaded, row, list(images.values()), num_samples, temperature, seed, max_new_tokens)
    answer_ids, answer = answers[0]
    texts = dict(zip(images, (text for _, text in answers)))
    prompt = sequence.prompt_of(row)
    arrays, score = report.measure(
        loaded.model, loaded.params, seen, answer_ids=answer_ids, **prompt, methods=methods, fill=fill
    )
    names = [name for name in images if name != "image"]
    # In batches as occlusion's, whose program is compiled already.
    size = report.BATCH if "occlusion" in methods else len(names)
    others = occlusion.in_batches(score, [images[name] for name in names], size)
    others = dict(zip(names, others))

    length = len(arrays.logprobs)
    out = report.Report(
        **vars(arrays),
        title=title,
        question=question,
        answer=answer,
        prompt=[piece(tok, t) for t in prompt["prompt_ids"]],
        tokens=[piece(tok, t) for t in answer_ids[:length]],
        ended=int(answer_ids[length - 1]) == tok.eos_token,
        others=[[(piece(tok, t), float(p)) for t, p in zip(*pair)] for pair in zip(*arrays.rivals)],
        picture=image if stretched else _pixels(seen),
        seen=_pixels(seen),
        samples=samples,
        controls=[
            dict(name=name, answer=texts[key], logprob=float(others[key].sum())) for key, name in CONTROLS.items()
        ],
        mask=None
        if mask is None
        else report.Masked(fill, _pixels(images["masked"]), others["masked"], texts["masked"]),
    )
    raised = [checks.prompt_cut(cut), *check(out, {k: others[k] for k in CONTROLS})]
    return dataclasses.replace(
        out,
        flags=[dict(name=words(f.name), says=f.says) for f in raised if f.raised],
        about=_about(loaded, out, answer_ids, num_samples, temperature, seed),
    ), raised


def check(made, controls):
    """The checks of `saliency.checks` on a report: list of `Flag`, raised or not.

    Args:
      made: a `report.Report`.
      controls: {name: float[R]} log-probabilities of the answer on other images.
    """
    out = [
        checks.image_ignored(made.logprobs, controls),
        checks.low_image_mass(made.mass),
    ]
    if made.samples:
        out.append(checks.samples_disagree(made.answer, [s["answer"] for s in made.samples]))
    patches = made.grid[0] * made.grid[1]
    method = page.first_method(made)
    found = [m.values for m in made.maps if m.method == method]
    values = found[0] if found else made.raw.mean((0, 1))
    saliency = page.whole(method, values[page.content(made), :patches])
    name = f"map by {page.METHODS[method][0].lower()}"
    out.append(checks.outside_body(saliency.reshape(made.grid), made.seen, name=name))
    return out


def words(name):
    """ "image_ignored" → "Image ignored"."""
    return name.replace("_", " ").capitalize()


def piece(tokenizer, token):
    """A token as text that can be seen: specials in ‹ ›, line breaks as ↵, bytes by number."""
    token = int(token)
    if token in _SPECIAL:
        return _SPECIAL[token]
    text = tokenizer.to_str([token], stop_at_eos=False)
    if not text or "\ufffd" in text:
        return f"‹{token}›"
    return text.replace("\n", "↵")


def fit_mask(mask, image_shape, seen_shape, stretched):
    """bool[H, W] as the model sees it, of a mask of the image's or the model's size.

    Raises:
      ValueError: another size; a mask that covers nothing.
    """
    sizes = {tuple(image_shape[:2]): "the image's"} if stretched else {}
    sizes[tuple(seen_shape[:2])] = "the model's"
    if mask.shape not in sizes:
        known = " or ".join(f"{w} x {h} ({whose})" for (h, w), whose in sizes.items())
        raise ValueError(f"the mask has {mask.shape[1]} x {mask.shape[0]} pixels; expected {known}")
    size = seen_shape[1], seen_shape[0]
    out = np.asarray(PIL.Image.fromarray(mask.astype(np.uint8)).resize(size, PIL.Image.NEAREST)) > 0
    if not out.any():
        raise ValueError("the mask covers nothing (white is what is replaced)")
    return out


def _patch(model, image):
    h, w = vlm.patch_grid(model, image)
    return image.shape[0] // h, image.shape[1] // w


def _is_stretched(image, seen):
    """Is what the model sees the whole image, only resized? Then maps can lie on the image."""
    small = ops_image.resize_image(image, *seen.shape[:2], antialias=True)
    return float(np.abs(small - (seen + 1) * 127.5).mean()) < 2


def _pixels(image):
    """float[H, W, 3] in [-1, 1] → uint8."""
    return np.floor(np.clip((np.asarray(image) + 1) * 127.5, 0, 255) + 0.5).astype(np.uint8)


def _answers(loaded, row, images, num_samples, temperature, seed, max_new_tokens):
    """([(tokens, text)] of the most probable answer on each image, samples on the first).

    Greedy as `predict` is: a draw from the one most probable token would be another answer where
    two are equally probable.
    """

    def draw(images, **kw):
        with sharding.rules(loaded.config, loaded.mesh):
            found = decode.generate(
                loaded.model,
                loaded.params,
                decode.batch_of([{**row, "image": image} for image in images]),
                eos_token=tok.eos_token,
                max_new_tokens=max_new_tokens,
                **kw,
            )
        return distributed.to_host(found)

    tok = loaded.tokenizer
    tokens, _ = draw(images)
    greedy = [(t[0], tok.to_str(t[0].tolist())) for t in tokens]
    if not num_samples:
        return greedy, []
    tokens, logprobs = draw(images[:1], num_samples=num_samples, temperature=temperature, seed=seed)
    return greedy, [dict(answer=tok.to_str(t.tolist()), logprob=float(p.sum())) for t, p in zip(tokens[0], logprobs[0])]


def _about(loaded, made, answer_ids, num_samples, temperature, seed):
    (height, width), (rows, columns) = made.seen.shape[:2], made.grid
    # No time and no duration: the same command makes the same bytes.
    out = [
        ("Weights", loaded.weights),
        ("Image", f"{width} × {height} px as the model sees it, {rows} × {columns} patches"),
        ("Language model", f"{made.raw.shape[0]} layers of {made.raw.shape[1]} heads"),
        ("Answer", "most probable token at each place (greedy)"),
        ("Samples", f"{num_samples} at temperature {temperature:g}, seed {seed}"),
        ("Software", f"paligemma_med {paligemma_med.__version__}, jax {jax.__version__}"),
    ]
    if loaded.tokenizer.eos_token not in np.asarray(answer_ids):
        out.append(("Cut off", f"the answer had not ended after {len(answer_ids)} tokens"))
    return out


# --- Files ---


def write_page(made, path):
    """The page of a report; the file appears whole."""
    with files.whole_file(path) as f:
        f.write(page.render(made).encode())


def write_npz(made, path):
    """All arrays of a report, exact: raw, mass, logprobs, grid, <method> or <method>_<variant>, …,
    and `texts`, JSON as UTF-8 bytes in an array (no pickle)."""
    arrays = {k: np.asarray(getattr(made, k)) for k in ("raw", "mass", "logprobs", "grid", "picture", "seen")}
    for m in made.maps:
        arrays[slug("_".join(filter(None, (m.method, m.variant))))] = np.asarray(m.values)
    for key in ("boxes", "logprobs") if made.regions else ():
        arrays[f"regions_{key}"] = np.asarray(getattr(made.regions, key))
    if made.mask:
        arrays["mask_logprobs"] = np.asarray(made.mask.logprobs)
    keys = ("title", "question", "answer", "prompt", "tokens", "samples", "controls", "flags", "about", "occlusion")
    texts = {k: getattr(made, k) for k in keys}
    arrays["texts"] = np.frombuffer(json.dumps(texts).encode(), np.uint8)
    with files.whole_file(path) as f:
        np.savez_compressed(f, **arrays)


def write_pngs(made, folder, prefix=""):
    """Each method's map over the picture, of the whole answer and of each token: <prefix><method>_
    all.png, …_00.png. Tokens of one method share their scale."""
    grid, patches = made.grid, made.grid[0] * made.grid[1]
    chosen = {"raw": made.raw.mean((0, 1))}
    for m in made.maps:
        chosen.setdefault(m.method, m.values)
    picture = np.asarray(PIL.Image.open(io.BytesIO(_png(made.picture))).convert("RGB"))
    for method, values in chosen.items():
        values = np.asarray(values)[:, :patches].reshape(-1, *grid)
        whole = page.whole(method, values[page.content(made)])
        least = page.LEAST if method in page.SIGNED else 0.0

        def top(x, least=least):
            return max(float(np.abs(x).max()), least) or 1.0

        for name, x, scale in [("all", whole, top(whole))] + [
            (f"{r:02d}", x, top(values)) for r, x in enumerate(values)
        ]:
            with files.whole_file(os.path.join(folder, f"{prefix}{method}_{name}.png")) as f:
                f.write(_png(page.overlay(picture, x, top=scale, signed=method in page.SIGNED)))


def _png(pixels):
    image = PIL.Image.fromarray(pixels)
    image.thumbnail((page.MAX_SIDE, page.MAX_SIDE))
    out = io.BytesIO()
    image.save(out, "PNG")
    return out.getvalue()


def read_mask(path):
    """bool[H, W], True where an image file is lighter than mid-grey."""
    return images_lib.to_rgb(_read(path, "--mask")).max(-1) > 127


def read_questions(path, folder):
    """[(image's path below `folder`, question)] of a CSV or TSV file with those columns.

    Raises:
      ValueError: a column is missing, a field is empty, or an image's path leaves the folder; with
        the file and line.
    """
    text = _read(path, "--questions")
    try:
        lines = io.StringIO(text.decode("utf-8-sig"), newline="")
    except UnicodeDecodeError as e:
        raise ValueError(f"{path}: not UTF-8 ({e.reason} at byte {e.start}).") from None
    reader = csv.DictReader(lines, delimiter="\t" if str(path).endswith(".tsv") else ",")
    if missing := {"image", "question"} - {*(reader.fieldnames or ())}:
        raise ValueError(f"{path}: no column {' and '.join(sorted(missing))}; found {reader.fieldnames}.")
    out = []
    for row in reader:
        image, question = ((row[k] or "").strip() for k in ("image", "question"))
        if not image or not question:
            raise ValueError(f"{path} line {reader.line_num}: image or question is empty.")
        if not _inside(folder, image):
            raise ValueError(f"{path} line {reader.line_num}: {image!r} is not below {folder}.")
        out.append((image, question))
    if not out:
        raise ValueError(f"{path}: no rows below its header.")
    return out


def _inside(folder, name):
    if "\0" in name or os.path.isabs(name):
        return False
    root = os.path.realpath(folder)
    return os.path.realpath(os.path.join(root, name)).startswith(os.path.join(root, ""))


def images_in(folder):
    """Names of the image files below a folder, sorted."""
    root = pathlib.Path(folder)
    found = sorted(p for p in root.rglob("*") if p.is_file() and p.suffix.lower() in SUFFIXES)
    if not found:
        raise ValueError(f"--image_dir {folder}: no image files ({', '.join(SUFFIXES)}).")
    return [str(p.relative_to(root)) for p in found]


def slug(text, limit=40):
    """A text as part of a file's name: ASCII letters, digits, - and _."""
    return re.sub(r"[^A-Za-z0-9]+", "_", text).strip("_")[:limit] or "x"


def _read(path, flag):
    try:
        return pathlib.Path(path).read_bytes()
    except OSError as e:
        raise ValueError(f"{flag} {path}: {e.strerror}.") from None


def explain_many(loaded, folder, asked, out, *, npz=False, png=False, **kw):
    """A page for each (image, question), and index.html, worst first.

    An image that can't be read gets a line in the index and no page. Stopped at any point, the same
    call goes on where it was: what is done stands in `results.PART` until the index is written.

    Args:
      folder, asked: image files below a folder, [(name, question)].
      out: folder for the pages.
      npz, png: write those beside each page.
      **kw: for `explain`.

    Returns:
      How many have no page.
    """
    identity = dict(
        weights=loaded.weights,
        settings=kw,
        npz=npz,
        png=png,
        config=config_files.to_json(loaded.config),
        software=paligemma_med.__version__,
        asked=[(page.clean(name), page.clean(question)) for name, question in asked],
    )
    rows = []
    with contextlib.closing(results.Part(out, identity)) as part:
        for i, (name, question) in enumerate(asked):
            content = _content(os.path.join(folder, name))
            sha = isinstance(content, bytes) and hashlib.sha256(content).hexdigest()
            (row,) = part.found.get(("model", i), [{}])
            there = not row.get("href") or os.path.exists(os.path.join(out, row["href"]))
            if row.get("sha256", "") != sha or not there:
                stem = os.path.join(out, f"{i + 1:04d}_{slug(pathlib.PurePath(name).stem)}")
                row = _row(loaded, content, name, question, stem, npz=npz, png=png, **kw)
                row["sha256"] = sha
                part.add("model", i, [row])
            rows.append(row)
            said = f"{row['name']}: {row['error'] or row['question'] + ' ' + row['answer']}"
            said = f"[{i + 1}/{len(asked)}] {' '.join(said.split())}"
            print(said, file=sys.stderr if row["error"] else sys.stdout, flush=True)
    raised = [[checks.Flag(*flag) for flag in row["raised"]] for row in rows]
    order = worst_first(rows, raised)
    title = f"{len(rows)} answers about images in {os.path.basename(os.path.abspath(folder))}"
    with files.whole_file(os.path.join(out, "index.html")) as f:
        f.write(page.render_index([rows[i] for i in order], title).encode())
    os.remove(os.path.join(out, results.PART))
    return sum(row["error"] is not None for row in rows)


def _content(path):
    """The bytes of a file, or the error that reading it gave."""
    try:
        return pathlib.Path(path).read_bytes()
    except OSError as e:
        return e


def _row(loaded, content, name, question, stem, *, npz, png, **kw):
    """Writes the files of one of many, `stem` and an ending; → its row in the index, as JSON."""
    row = dict(
        name=page.clean(name),
        question=page.clean(question),
        answer="",
        probability=None,
        flags=[],
        raised=[],
        thumb=None,
        href=None,
        error=None,
    )
    try:
        if isinstance(content, OSError):
            raise content
        made, raised = explain(loaded, content, question, title=name, **kw)
    except (OSError, ValueError) as e:
        return row | dict(error=page.clean(getattr(e, "strerror", None) or str(e)))
    write_page(made, f"{stem}.html")
    if npz:
        write_npz(made, f"{stem}.npz")
    if png:
        write_pngs(made, os.path.dirname(stem), f"{os.path.basename(stem)}_")
    return row | dict(
        answer=page.clean(made.answer),
        flags=made.flags,
        raised=results.plain(raised, name),
        probability=float(np.exp(min(0.0, made.logprobs.sum()))),
        thumb=page.data_url(made.picture, 96),
        href=f"{os.path.basename(stem)}.html",
    )


def worst_first(rows, raised):
    """Order for the index: what failed, then by flags, then the least probable answer first."""
    by_flags = {i: place for place, i in enumerate(checks.worst_first(raised))}

    def key(i):
        row = rows[i]
        probability = row["probability"]
        return (
            row["error"] is None,
            [-x for x in checks.severity(raised[i])],
            -1 if probability is None else probability,
            by_flags[i],
        )

    return sorted(range(len(rows)), key=key)


# --- The program ---


def _keep_programs(folder):
    """Compiled programs outlive the process: the next report starts within seconds."""
    if folder:
        compilation_cache.start(folder, ".")
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.2)


@cli.command
def main(argv):
    del argv
    values = flags.FLAGS
    _keep_programs(values.compilation_cache)
    distributed.start_from_flags(awaits_sigterm=False)
    if not ending.is_alone():
        raise app.UsageError("explain runs in one process.")
    if (values.image is None) == (values.image_dir is None):
        raise app.UsageError("Give --image or --image_dir.")
    if values.questions and values.image_dir is None:
        raise app.UsageError("--questions goes with --image_dir.")
    if not values.questions and not values.question:
        raise app.UsageError("Give --question" + (" or --questions." if values.image_dir else "."))
    if values.image and len(values.question) > 1:
        raise app.UsageError("--image takes one --question; --image_dir takes several.")
    if values.image_dir and values.mask:
        raise app.UsageError("--mask goes with --image.")
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
            read_questions(values.questions, values.image_dir)
            if values.questions
            else [(n, q) for n in images_in(values.image_dir) for q in values.question]
        )
    image = values.image and _read(values.image, "--image")
    mask = values.mask and read_mask(values.mask)
    config, checkpoint = cli.from_flags()
    page.check_jinja()
    loaded = load(config, checkpoint)
    kw = {k: values[k].value for k in _OPTIONS}
    if asked:
        failed = explain_many(
            loaded, values.image_dir, asked, values.out, npz=bool(values.npz), png=bool(values.png), **kw
        )
        print(f"Written to {os.path.join(values.out, 'index.html')}")
        if failed:
            raise ValueError(f"{failed} of {len(asked)} have no report; index.html says why.")
        return
    try:
        made, _ = explain(loaded, image, values.question[0], mask=mask, title=os.path.basename(values.image), **kw)
    except ValueError as e:
        raise ValueError(f"{values.image}: {e}") from e
    command = shlex.join(["python", "-m", "paligemma_med.explain", *sys.argv[1:]])
    made.about.append(("Command", command))
    write_page(made, values.out)
    if values.npz:
        write_npz(made, values.npz)
    if values.png:
        write_pngs(made, values.png)
    print(f"{made.answer}   (probability {page.percent(np.sum(made.logprobs))})")
    for flag in made.flags:
        print(f"  {flag['name']}: {flag['says']}")
    print(f"Written to {values.out}")


_OPTIONS = ("num_samples", "temperature", "seed", "max_new_tokens", "methods", "fill")


if __name__ == "__main__":
    cli.define_source_flags()
    distributed.define_flags()
    flags.DEFINE_string("image", None, "Image or DICOM file.")
    flags.DEFINE_multi_string("question", None, "Question; with --image_dir, of each image.")
    flags.DEFINE_string("image_dir", None, "Folder of images, in place of --image.")
    flags.DEFINE_string("questions", None, "CSV or TSV: columns image (below it) and question.")
    flags.DEFINE_string("out", None, "The page; with --image_dir a folder.", required=True)
    flags.DEFINE_string("mask", None, "Image file, white where the image is to be replaced.")
    flags.DEFINE_string("png", None, "Folder for the maps as PNG; with --image_dir: 1 for --out.")
    flags.DEFINE_string("npz", None, "File for the exact arrays; with --image_dir: 1 for --out.")
    flags.DEFINE_list("methods", list(report.METHODS), f"Some of {', '.join(report.METHODS)}.")
    flags.DEFINE_enum("fill", "blur", list(occlusion.FILLS), "What stands in for what is occluded.")
    flags.DEFINE_integer("num_samples", 5, "Sampled answers beside the most probable one.")
    flags.DEFINE_float("temperature", 1.0, "Of the samples.")
    flags.DEFINE_integer("seed", 0, "Of the samples.")
    flags.DEFINE_integer("max_new_tokens", 64, "Length of an answer, at most.")
    flags.DEFINE_string(
        "compilation_cache",
        os.path.join(os.environ.get("XDG_CACHE_HOME", "~/.cache"), "paligemma_med", "programs"),
        "Folder that keeps compiled programs for the next start; empty for none.",
    )
    app.run(main, flags_parser=cli.parse_flags)
