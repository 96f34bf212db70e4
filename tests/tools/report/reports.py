"""Evaluations made by hand, and a parser of pages: what tests of tools.report share."""

import html.parser
import json

from paligemma_med.evaluation import results
from paligemma_med.metrics import scoring
from tools.report import (
    blocks,
)
from tools.report.__main__ import make

HOSTILE = '<script>alert(1)</script> | *x* [a](http://evil.example/) `b`\n# c <img src="//e.example/x">'
LOCATIONS = ("Lung", "Abdomen", "Brain_Tissue", "Neck")


def row(number, predictions, answer="yes", *, kind="CLOSED", image=None, question=None, **kw):
    """A line of predictions.jsonl with all its marks."""
    question = question or f"Is sign {number} there?"
    out = dict(
        question_id=f"q{number}",
        image_id=f"i{number // 3 if image is None else image}",
        question=question,
        prompt=f"answer en {question}\n",
        answer=answer,
        answer_type=kind,
        predictions=list(predictions),
        logprobs=[-0.1 * (i + 1) for i in range(len(predictions))],
        **kw,
    )
    out |= scoring.correct(predictions[0], answer)
    for who in scoring.CONTROLS:
        if f"{who}_prediction" in kw or f"{who}_predictions" in kw:
            out |= scoring.correct(scoring.texts(out, who)[0], answer, f"{who}_")
    return out


def rows(count=12, samples=5, wrong=lambda i: i % 3 == 0, **kw):
    """Every third question wrong; the majority says no, shuffled images say what the model does."""
    out = []
    for i in range(count):
        said = ["no" if wrong(i) else "yes"] * samples
        kind = "CLOSED" if i % 2 else "OPEN"
        out.append(
            row(
                i,
                said,
                kind=kind,
                location=LOCATIONS[i % 4],
                majority_prediction="no",
                shuffled_images_predictions=said,
                **kw,
            )
        )
    return out


def save(folder, made, name="slake_test", data="slake/en", split="test", config=None, **about):
    """A workdir with one evaluation, as `evaluate` leaves it."""
    section = dict(pred_kw=dict(num_samples=len(made[0]["predictions"]), temperature=1.0))
    about = {"protocol": "vqa", "groups": list(scoring.GROUPS), **about}
    about |= dict(
        split_hash=results.split_hash(made),
        prompt_hash=results.prompt_hash(made),
        data=dict(name=data, split=split),
        section=section,
        split=f"{data} {split}",
        command="python -m paligemma_med.evaluate",
    )
    out = folder / "eval" / name
    results.write(out, made, scoring.summarise(made, about["protocol"], groups=about["groups"]), about)
    (folder / "config.json").write_text(json.dumps(config or {"evals": {}}))
    return out


def report(*workdirs, **kw):
    made = make(workdirs, **kw)
    markdown, files = blocks.to_markdown("T", made)
    return made, markdown, blocks.to_html("T", made), files


def warnings(made):
    return [b.text for s in made for b in s.blocks if b.kind == "warning"]


def table(made, caption):
    """The first table of that caption as {first word cell: {head: cell}}."""
    found = next(b for s in made for b in s.blocks if b.kind == "table" and b.caption.startswith(caption))
    return {r[found.left - 1]: dict(zip(found.head, r)) for r in found.rows}


class Page(html.parser.HTMLParser):
    """Elements of a page and what they refer to."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.links, self.text = [], [], ""
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        for name, value in attrs:
            assert not name.startswith("on"), (tag, name)
            if name in ("src", "href", "xlink:href", "action", "data", "srcset"):
                self.links.append(value)

    handle_startendtag = handle_starttag

    def handle_data(self, data):
        self.text += data


def edit(path, function):
    value = json.loads(path.read_text())
    function(value)
    path.write_text(json.dumps(value))
