"""The figures of an evaluation loss, from the rows of its losses.jsonl.

A row has `loss`, the sum of -log p over the answer's tokens in nats, EOS included, and `tokens`, how many they are.

avg          mean over rows of loss / tokens: each example counts the same. big_vision's figure of this name, and the
             training loss with loss_norm="example"
sum          mean over rows of loss: nats an answer. big_vision's, too
per_token    Σ loss / Σ tokens: each token counts the same. Hugging Face's loss over the whole split, and the training
             loss with loss_norm="token"
perplexity   exp(per_token)
n, tokens    rows, and supervised tokens
no_answer    rows without any supervised token, which have no loss and are left out (big_vision counts them as 0); only
             if there are some

avg_low and avg_high are its 95 % interval, a bootstrap over images. The same for groups of rows: `avg/{key}/{value}`,
such as `avg/answer_type/CLOSED`.

Losses compare between models with one tokenizer: per_token and perplexity are of its tokens, sum is in any case of the
whole answer.
"""

import math

import numpy as np

from paligemma_med.metrics import scoring, stats

GROUPS = ("answer_type",)
FIGURES = ("avg", "sum", "per_token", "perplexity")


def summarise(rows, groups=GROUPS) -> dict[str, float]:
    """The figures that the top of this file describes.

    Args:
      rows: dicts with loss, tokens and question_id; image_id or patient_id where there is one.
      groups: keys of a row; keys that rows lack, or that have many values, are left out.

    Returns:
      {name: number}.

    Raises:
      ValueError: no row has a supervised token.
    """
    told = [row for row in rows if row["tokens"]]
    if not told:
        raise ValueError(f"none of {len(rows)} rows has a supervised token: there is no loss to average.")
    out = _figures(told, "")
    if len(told) < len(rows):
        out["no_answer"] = len(rows) - len(told)
    for key in groups:
        members = {}
        for row in told:
            if value := str(row.get(key) or ""):
                members.setdefault(value, []).append(row)
        if len(members) <= scoring.MAX_VALUES:
            for value in sorted(members):
                out |= _figures(members[value], f"/{key}/{value}")
    return out


def _figures(rows, ending):
    sums, tokens = (np.array([row[key] for row in rows], np.float64) for key in ("loss", "tokens"))
    means = sums / tokens
    per_token = sums.sum() / tokens.sum()
    out = dict(avg=means.mean(), sum=sums.mean(), per_token=per_token, perplexity=math.exp(min(per_token, 700.0)))
    if np.isfinite(means).all():
        low, high = stats.bootstrap(means, [scoring.cluster(row) for row in rows])
        if math.isfinite(low) and math.isfinite(high):  # a single image gives no interval
            out |= dict(avg_low=low, avg_high=high)
    out = {name: float(x) for name, x in out.items()} | dict(n=len(rows), tokens=int(tokens.sum()))
    return {name + ending: x for name, x in out.items()}
