"""One answer and what it rests on: a question about an image → a `report.Report` with flags."""

import dataclasses
import hashlib
import os
from typing import Any, NamedTuple

import jax
import numpy as np
import PIL.Image

import paligemma_med
from paligemma_med import decode, weights
from paligemma_med.checkpoints import fingerprint
from paligemma_med.explain import page
from paligemma_med.models import vlm
from paligemma_med.parallel import distributed, notes, sharding
from paligemma_med.pp import get_preprocess_fn, ops_image, own_rows
from paligemma_med.pp import images as images_lib
from paligemma_med.saliency import capture, checks, occlusion, report, sequence
from paligemma_med.saliency.methods import KINDS, METHODS

CONTROLS = {"blank": "Nothing (mid-grey)", "shuffled": "Its own patches, shuffled"}


class Loaded(NamedTuple):
    """What answering needs, loaded once for many questions."""

    config: Any
    weights: str  # the file's name, and the weights' `fingerprint`
    model: Any
    tokenizer: Any
    mesh: Any
    params: Any
    pp: Any


class Answer(NamedTuple):
    """An answer: its tokens up to the one that ends it int32[R], its text, their log-probabilities float32[R]."""

    tokens: np.ndarray
    text: str
    logprobs: np.ndarray


def load(config, checkpoint) -> Loaded:
    """`Loaded` from a config and weights in any form that `checkpoints.load_params` takes.

    Raises:
      ValueError: the config has no prompt.
    """
    if not config.get("predict_pp"):
        raise ValueError("config has no predict_pp, which makes a prompt of a question.")
    pp = get_preprocess_fn(config.predict_pp)
    model, tokenizer, mesh, params = weights.load(config, checkpoint)
    names = [os.path.basename(os.path.normpath(str(x))) for x in (checkpoint, config.get("adapter_init")) if x]
    with notes.stage("taking the weights' fingerprint"):
        prints = "".join(fingerprint.of_leaves(params))
    origin = f"{' with '.join(names)} ({hashlib.sha256(prints.encode()).hexdigest()[:16]})"
    return Loaded(config, origin, capture.capturable(model), tokenizer, mesh, params, pp)


def explain(
    loaded,
    image,
    question,
    *,
    title="image",
    given="",
    choices=None,
    mask=None,
    num_samples=5,
    temperature=1.0,
    seed=0,
    max_new_tokens=64,
    methods=tuple(METHODS),
    fill="blur",
    fixed=False,
    stage=notes.stage,
) -> tuple[report.Report, list[checks.Flag]]:
    """Answers a question about an image, and measures what the answer rests on.

    Args:
      loaded: `load`.
      image: bytes of an image or DICOM file, or uint8[H, W, 3].
      question: str.
      title: the page's, such as the file's name.
      given: the right answer as the page shows it, where there is one; the model isn't told.
      choices: {"choice_a": text, …} that the question offers, for prompts that show them.
      mask: optional bool[H, W], of the image's own size or as the model sees it: a region to replace
        by `fill`.
      num_samples, temperature, seed: for the answers sampled besides the greedy one; 0 for none.
      max_new_tokens: in an answer.
      methods, fill: as `report.measure` takes them.
      fixed: the same programs for questions and answers of any length: slower for short ones, but only the first call
        compiles.
      stage: a context for each part of the work, as `report.measure` takes it.

    Returns:
      (`report.Report`, its raised flags: list of `checks.Flag`).

    Raises:
      ValueError: an image that can't be read, a mask of another size, an empty answer.
    """
    if not question.strip():
        raise ValueError("the question is empty.")
    if num_samples < 0:
        raise ValueError(f"num_samples is {num_samples}; expected 0 or more.")
    if not temperature > 0:
        raise ValueError(f"temperature is {temperature:g}; expected more than 0.")
    if isinstance(image, bytes):
        image = images_lib.to_rgb(image, window=ops_image.window_of(loaded.pp.pp))
    row = own_rows.prompted(loaded.pp, {"image": image, "question": question}, choices)
    images, stretched = _images(loaded, row, image, mask, fill)
    with stage("compiling the programs, and answering"):
        answers = dict(zip(images, greedy(loaded, row, list(images.values()), max_new_tokens, fixed=fixed)))
        samples = _samples(loaded, row, images["image"], num_samples, temperature, seed, max_new_tokens, fixed)
    kw = dict(methods=methods, fill=fill, stage=stage)
    if fixed:
        kw |= dict(pad_to=-(-(len(row["text"]) + max_new_tokens) // 16) * 16, least=max_new_tokens)
    arrays, others = _measured(loaded, row, images, answers["image"].tokens, **kw)
    texts = dict(title=title, given=given, question=question)
    out = _report(loaded, row, images, answers, arrays, others, **texts, fill=fill, samples=samples)
    out = dataclasses.replace(out, picture=image if stretched else out.seen)
    raised = [checks.prompt_cut(int(row.get("_truncated", 0))), *check(out, {k: others[k] for k in CONTROLS})]
    return dataclasses.replace(
        out,
        flags=[dict(name=words(f.name), says=f.says) for f in raised if f.raised],
        about=_about(loaded, out, answers["image"].tokens, num_samples, temperature, seed),
    ), raised


def _images(loaded, row, image, mask, fill):
    """(`pictures`, with "masked" where there is a mask; whether maps can lie on the image as it was given)."""
    images = pictures(loaded, row)
    seen = images["image"]
    stretched = _is_stretched(image, seen)
    if mask is not None:
        mask = fit_mask(mask, image.shape, seen.shape, stretched)
        images["masked"] = occlusion.replace(seen, mask, fill, _patch(loaded.model, seen)[0])
    return images, stretched


def _measured(loaded, row, images, answer_ids, *, methods, stage, **kw):
    """(`report.Arrays`, {name of each other image: float[R] log-probabilities of the answer on it})."""
    batch_size = report.batch_size_for(loaded.params)
    arrays, score = report.measure(
        loaded.model,
        loaded.params,
        images["image"],
        answer_ids=answer_ids,
        **sequence.prompt_of(row),
        methods=methods,
        batch_size=batch_size,
        stage=stage,
        **kw,
    )
    names = [name for name in images if name != "image"]
    # In batches of occlusion's size, whose program is compiled already.
    size = batch_size if "occlusion" in methods else len(names)
    with stage("asking again about other images"):
        others = occlusion.in_batches(score, [images[name] for name in names], size)
    return arrays, dict(zip(names, others))


def _report(loaded, row, images, answers, arrays, others, *, fill, **kw):
    """The `report.Report` of what was answered and measured, without flags."""
    tok, prompt, answer = loaded.tokenizer, sequence.prompt_of(row), answers["image"]
    seen = _pixels(images["image"])
    masked = None
    if "masked" in images:
        masked = report.Masked(fill, _pixels(images["masked"]), others["masked"], answers["masked"].text)
    return report.Report(
        **vars(arrays),
        **kw,
        answer=answer.text,
        prompt=[piece(tok, t) for t in prompt["prompt_ids"]],
        tokens=[piece(tok, t) for t in answer.tokens],
        ended=int(answer.tokens[-1]) in tok.stop_tokens,
        others=[[(piece(tok, t), float(p)) for t, p in zip(*pair)] for pair in zip(*arrays.rivals)],
        picture=seen,
        seen=seen,
        controls=[
            dict(name=name, answer=answers[key].text, logprob=float(others[key].sum()))
            for key, name in CONTROLS.items()
        ],
        mask=masked,
        causal=loaded.model.image_ar != "prefix" or bool(np.any(prompt["mask_ar"])),
    )


def check(made, controls) -> list[checks.Flag]:
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
    name = f"map by {KINDS[method].title.lower()}"
    out.append(checks.outside_body(saliency.reshape(made.grid), made.seen, name=name))
    return out


def words(name) -> str:
    """ "image_ignored" → "Image ignored"."""
    return name.replace("_", " ").capitalize()


def piece(tokenizer, token) -> str:
    """A token as visible text: specials in ‹ ›, line breaks as ↵, bytes by number."""
    token = int(token)
    if token in tokenizer.stop_tokens:
        return "‹end›"
    text = tokenizer.to_piece(token)
    if not text or "\ufffd" in text:
        return {tokenizer.bos_token: "‹start›", tokenizer.pad_token: "‹pad›"}.get(token, f"‹{token}›")
    return text.replace("\n", "↵")


def fit_mask(mask, image_shape, seen_shape, stretched) -> np.ndarray:
    """bool[H, W] as the model sees it, from a mask of the image's or the model's size.

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
    small = (ops_image.resize_image(image, *seen.shape[:2], antialias=True, method=m) for m in ops_image.METHODS)
    return any(float(np.abs(x - (seen + 1) * 127.5).mean()) < 2 for x in small)


def _pixels(image):
    """float[H, W, 3] in [-1, 1] → uint8."""
    return np.floor(np.clip((np.asarray(image) + 1) * 127.5, 0, 255) + 0.5).astype(np.uint8)


def pictures(loaded, row) -> dict[str, np.ndarray]:
    """{"image", "blank", "shuffled": float32[H, W, 3]}: what the model is asked about, of a preprocessed row."""
    seen = np.asarray(row["image"], np.float32)
    patch = _patch(loaded.model, seen)
    return {"image": seen, "blank": decode.blank_image(seen.shape), "shuffled": checks.shuffled(seen, patch)}


def greedy(loaded, row, images, max_new_tokens, *, fixed=False) -> list[Answer]:
    """The most probable answer to a preprocessed row's prompt on each of `images`.

    As in `predict`: sampling from the single most probable token could give another answer where two are equally
    probable.
    """
    tokens, logprobs = _draw(loaded, row, images, max_new_tokens, fixed)
    stops, to_str = loaded.tokenizer.stop_tokens, loaded.tokenizer.to_str
    found = [(sequence.ended(t[0], stops), to_str(t[0].tolist()), p[0]) for t, p in zip(tokens, logprobs)]
    return [Answer(t, text, p[: len(t)]) for t, text, p in found]


def _samples(loaded, row, image, num_samples, temperature, seed, max_new_tokens, fixed):
    """[dict(answer, logprob)] sampled on one image."""
    if not num_samples:
        return []
    kw = dict(num_samples=num_samples, temperature=temperature, seed=seed)
    tokens, logprobs = _draw(loaded, row, [image], max_new_tokens, fixed, **kw)
    to_str = loaded.tokenizer.to_str
    return [dict(answer=to_str(t.tolist()), logprob=float(p.sum())) for t, p in zip(tokens[0], logprobs[0])]


def _draw(loaded, row, images, max_new_tokens, fixed, **kw):
    with sharding.rules(loaded.config, loaded.mesh):
        found = decode.generate(
            loaded.model,
            loaded.params,
            decode.batch_of([{**row, "image": image} for image in images]),
            eos_token=loaded.tokenizer.stop_tokens,
            max_new_tokens=max_new_tokens,
            whole_text=fixed,
            **kw,
        )
    return distributed.to_host(found)


def _about(loaded, made, answer_ids, num_samples, temperature, seed):
    (height, width), (rows, columns) = made.seen.shape[:2], made.grid
    image = f"{width} × {height} px as the model sees it, {rows} × {columns} patches"
    if (read := vlm.num_image_tokens(loaded.model, made.seen)) != rows * columns:
        image += f", of which the language model reads {read} tokens"
    # No date and no duration, so that the same command writes the same bytes.
    out = [
        ("Weights", loaded.weights),
        ("Image", image),
        ("Language model", f"{made.raw.shape[0]} layers of {made.raw.shape[1]} heads"),
        ("Answer", "most probable token at each place (greedy)"),
        ("Samples", f"{num_samples} at temperature {temperature:g}, seed {seed}"),
        ("Software", f"paligemma_med {paligemma_med.__version__}, jax {jax.__version__}"),
    ]
    if constants := _on_constants(made):
        out.append(("On learned constants, not in the maps", constants))
    if not made.ended:
        out.append(("Cut off", f"the answer had not ended after {len(answer_ids)} tokens"))
    return out


def _on_constants(made):
    """The largest share of a map that is on learned constants, by kinds of maps; "" if the model has none."""
    tokens = page.content(made)
    found = {} if made.raw_constants is None else {"raw": made.raw_constants.mean((0, 1))}
    for m in made.maps:
        if m.constants is not None:
            found.setdefault(m.method, m.constants)
    return ", ".join(f"{KINDS[k].title.lower()} {page.share(float(x[tokens].mean()))}" for k, x in found.items())
