"""Which generated pairs are dropped: what the prompts forbid, leaks, repeats, and malformed pairs.

The rules are those of `data_prep.curate`, so that sets filtered here and there are filtered alike. With
drop=False a rule only tags: `not_in_source` can't distinguish a synonym from an invention.

Arguments: max_share (of an answer in its question); within (image, case: where near duplicates are
looked for); drop (no: everything is kept but still tagged).
"""

from ml_collections import ConfigDict

from data_prep.curate import rules
from paligemma_med.pp import rows

TEXTS = ("question", "answer", *rows.CHOICES)
# Words that the prompts forbid in addition to `rules.META`.
TOLD = (
    r"\b(?:mentioned|stated|described|given|noted|reported|according to|based on|in) "
    r"(?:\w+ ){0,2}?(?:the|this|that) (?:\w+ )?(?:description|report)\b",
)


def get_config(arg: str | None = None) -> ConfigDict:
    """Config of `python -m tools.synthesize_qa`; `arg` such as "max_share=0.6,within=image"."""
    args = {"max_share": "0.8", "within": "case", "drop": "yes"}
    for item in filter(None, (arg or "").split(",")):
        name, _, value = item.partition("=")
        if name not in args:
            raise ValueError(f"config argument {name!r} is unknown; known: {', '.join(args)}")
        args[name] = value
    if args["drop"] not in ("yes", "no"):
        raise ValueError(f"config argument drop is {args['drop']!r}; expected yes or no")
    try:
        max_share = float(args["max_share"])
    except ValueError:
        raise ValueError(f"config argument max_share is {args['max_share']!r}; expected a number") from None
    config = ConfigDict()
    config.rules = [
        {"rule": "empty"},
        {"rule": "chatter", "name": "refusal", "patterns": rules.REFUSALS},
        {"rule": "chatter", "name": "meta_talk", "patterns": rules.META + TOLD},
        {"rule": "chatter", "name": "chatter", "patterns": rules.CHATTER + rules.MARKUP},
        {"rule": "question_form", "name": "form"},
        {"rule": "length"},
        {"rule": "language", "allowed": ["en"]},
        {"rule": "patient_history", "name": "history"},
        {"rule": "measurement"},
        {"rule": "numbers"},
        {
            "rule": "pattern",
            "name": "codes",
            "patterns": [r"\b(?:ACR|ICD)(?:-?\d+)?(?:-CM)?\b(?: codes?)?"],
        },
        {"rule": "copied_example", "fields": ["source_text"]},
        {"rule": "answer_leak", "name": "leak", "max_share": max_share},
        {"rule": "not_in_source", "fields": ["source_text"], "drop": False},
        {"rule": "near_duplicate", "within": args["within"], "threshold": 0.8},
    ]
    for rule in config.rules:
        rule.setdefault("drop", True)
        if rule["rule"] in ("chatter", "patient_history", "measurement", "numbers", "pattern"):
            rule["fields"] = list(TEXTS)
        if args["drop"] == "no":
            rule["drop"] = False
    return config
