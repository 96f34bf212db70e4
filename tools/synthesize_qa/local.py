"""The `transformers` backend: a causal language model in PyTorch answers units in batches.

Batches are planned from the list of all units, answered or not, so that a killed and resumed run makes
the same batches and so the same replies. What all prompts of a template have in common, its rules and
examples, goes through the model only once.
"""

import copy
import sys
import time

from tools.synthesize_qa import units as units_lib
from tools.synthesize_qa.loading import prompt

WINDOW = 32  # batches whose units are sorted by length together


def answer(
    units,
    journal,
    model,
    read,
    *,
    seed=0,
    batch_size=16,
    batch_tokens=65_536,
    progress=None,
    log=lambda text: print(text, file=sys.stderr, flush=True),
) -> None:
    """Has `model` answer all units that aren't settled; see `units` for the journal's records.

    A batch's replies, second attempts included, are written to disk together.

    Args:
      units: all units of the run, answered or not: batches are planned from them.
      journal: see `journal`; replies are added to it.
      model: from `loading.load`.
      read: `parse.read_reply`.
      seed: of sampling; each batch draws by (seed, its keys).
      batch_size: maximum of units in a batch.
      batch_tokens: maximum of tokens in a batch, with every prompt padded to the longest and every reply
        at its maximum; a unit with more tokens is asked alone.
      progress: called with the number of replies and of new tokens after each batch.
      log: called with a line when a batch didn't fit into memory.

    Raises:
      ValueError: one unit alone doesn't fit into memory.
    """
    # These can change sums, and so replies, although all settings are equal.
    ran = {"batch_size": batch_size, "batch_tokens": batch_tokens, **_machine(model)}
    # One template after the other, so that the common part of their prompts is computed once.
    groups = {}
    for unit in units:
        groups.setdefault(unit.template.digest, []).append(unit)
    size = WINDOW * batch_size
    for group in groups.values():
        for start in range(0, len(group), size):
            window = group[start : start + size]
            is_open = {u.key for u in window if not units_lib.settled(journal.replies(u.key))}
            if not is_open:
                continue
            prompts = {u.key: prompt(model, u.messages()) for u in window}
            for batch in plan(window, prompts, model.settings["max_new_tokens"], batch_size, batch_tokens):
                if any(u.key in is_open for u in batch):
                    records = _answer_batch(batch, prompts, model, read, seed, log)
                    # Some may be answered already, if an earlier batch was made of other units.
                    new = [r for r in records if r["key"] in is_open]
                    new = [r | {"ran": ran} for r in new if r["attempt"] >= journal.count(r["key"])]
                    journal.add_many(new)
                    if progress:
                        progress(len(new), sum(r["usage"][1] for r in new))


def _machine(model):
    import torch

    device = model.model.device
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    return {"device": name, "threads": torch.get_num_threads()}


def plan(window, prompts, new_tokens, batch_size, batch_tokens) -> list[list]:
    """Units in batches of similar length, within both limits; the same for the same units."""
    batches, longest = [[]], 0
    for unit in sorted(window, key=lambda u: (len(prompts[u.key]), u.number)):
        longest = len(prompts[unit.key])  # they come in order of length
        full = (len(batches[-1]) + 1) * (longest + new_tokens) > batch_tokens
        if batches[-1] and (full or len(batches[-1]) == batch_size):
            batches.append([])
        batches[-1].append(unit)
    return [b for b in batches if b]


def _answer_batch(batch, prompts, model, read, seed, log):
    """Records of the units' replies: those of attempt 0, then those of second attempts."""
    out, room = [], model.limit - model.settings["max_new_tokens"]
    asked = [(u, prompts[u.key]) for u in batch]
    for attempt in range(units_lib.MAX_REPLIES):
        for unit, ids in asked:
            if len(ids) > room:
                problem = f"the prompt of {len(ids)} tokens leaves no room for a reply"
                out.append(_record(unit, attempt, "", units_lib.TOO_LONG, len(ids), 0, 0.0, problem, None, model))
        asked = [(u, ids) for u, ids in asked if len(ids) <= room]
        if not asked:
            break
        start = time.monotonic()
        replies = _generate(asked, model, seed, attempt, log)
        seconds = (time.monotonic() - start) / len(asked)
        again = []
        for (unit, ids), (text, finish, tokens) in zip(asked, replies):
            found = read(text, unit.template.kind, finish == "length")
            out.append(
                _record(
                    unit,
                    attempt,
                    text,
                    finish,
                    len(ids),
                    tokens,
                    seconds,
                    found.problem,
                    len(found.pairs) or None,
                    model,
                )
            )
            if not found.pairs and attempt + 1 < units_lib.MAX_REPLIES:
                again.append((unit, prompt(model, unit.messages(attempt + 1, found.problem))))
        asked = again
    return out


def _record(unit, attempt, text, finish, asked, tokens, seconds, problem, score, model):
    return dict(
        key=unit.key,
        score=score,
        reply=text,
        finish=finish,
        usage=[asked, tokens],
        model=None,
        time=round(time.time(), 3),
        attempt=attempt,
        row_id=unit.row.row_id,
        template=f"{unit.template.name}_v{unit.template.version}",
        problem=problem,
        seconds=round(seconds, 4),
        versions=model.versions,
        system_fingerprint=None,
    )


def _generate(asked, model, seed, attempt, log):
    """[(text, finish, new tokens)] of one batch; halves that don't fit into memory."""
    import torch

    try:
        return _generate_all(asked, model, seed, attempt)
    except (torch.OutOfMemoryError, MemoryError, RuntimeError) as e:
        if isinstance(e, RuntimeError) and not isinstance(e, torch.OutOfMemoryError):
            if "allocate memory" not in str(e):
                raise
        if len(asked) == 1:
            raise ValueError(
                f"{asked[0][0].row.row_id}: a prompt of {len(asked[0][1])} tokens doesn't fit into "
                "memory alone; expected more memory, or --quantize, or fewer --max_new_tokens."
            ) from None
    # Outside the except block, whose traceback keeps alive what filled the memory.
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    half = len(asked) // 2
    log(
        f"{len(asked)} replies at a time don't fit into memory: {half} and {len(asked) - half} now "
        "(a smaller --batch_size or --batch_tokens saves the attempt)"
    )
    return [r for part in (asked[:half], asked[half:]) for r in _generate(part, model, seed, attempt, log)]


def _generate_all(asked, model, seed, attempt):
    import torch

    net = model.model
    pad, eos = net.generation_config.pad_token_id, set(net.generation_config.eos_token_id)
    shared, cache = _prefix(model, asked[0][0])
    if any(ids[: len(shared)] != shared for _, ids in asked):
        shared, cache = [], None
    rest = [ids[len(shared) :] for _, ids in asked]
    width = max(map(len, rest))
    # [shared, padding, the rest]: what is masked doesn't count as a position.
    rows = [shared + [pad] * (width - len(r)) + r for r in rest]
    masks = [[1] * len(shared) + [0] * (width - len(r)) + [1] * len(r) for r in rest]
    inputs = dict(
        input_ids=torch.tensor(rows, device=net.device),
        attention_mask=torch.tensor(masks, device=net.device),
    )
    if cache is not None:
        cache = copy.deepcopy(cache)
        cache.batch_repeat_interleave(len(rows))
        inputs["past_key_values"] = cache
    keys = [u.key for u, _ in asked]
    torch.manual_seed(int(units_lib.digest([seed, attempt, keys])[:15], 16))
    with torch.inference_mode():
        made = net.generate(**inputs)[:, len(shared) + width :].tolist()
    out = []
    for ids in made:
        end = next((i for i, t in enumerate(ids) if t in eos), None)
        text = model.tokenizer.decode(ids[:end], skip_special_tokens=True, clean_up_tokenization_spaces=False)
        text = text.encode("utf-8", "replace").decode()
        ended = end is not None
        out.append((text, "stop" if ended else "length", end + 1 if ended else len(ids)))
    return out


# --- What prompts have in common ---


def _prefix(model, unit):
    """(ids, cache) of the part that all prompts of a template share; the last template's is kept."""
    messages = unit.messages()
    key = units_lib.digest(messages[:-1])
    if key not in model.prefixes:
        model.prefixes.clear()
        model.prefixes[key] = _make_prefix(model, messages)
    return model.prefixes[key]


def _make_prefix(model, messages):
    import torch

    if not _plain_attention(model.model.config.get_text_config()):
        return [], None
    ids = [prompt(model, [*messages[:-1], {**messages[-1], "content": c}]) for c in "0x"]
    ids = ids[0][: _common(*ids)]
    if not ids:
        return [], None
    with torch.inference_mode():
        inputs = torch.tensor([ids], device=model.model.device)
        return ids, model.model(input_ids=inputs, use_cache=True, logits_to_keep=1).past_key_values


def _plain_attention(config):
    """Whether every layer attends to all earlier positions: only then can a cache be cut and shared."""
    kinds = getattr(config, "layer_types", None) or ["full_attention"]
    return not getattr(config, "sliding_window", None) and set(kinds) == {"full_attention"}


def _common(a, b):
    return next((i for i, (x, y) in enumerate(zip(a, b)) if x != y), min(len(a), len(b)))
