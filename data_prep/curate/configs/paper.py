"""The filter of the paper's Figure 4, as far as its text and MedM's code describe it.

Rules against measurements, numbers, history and left-over chatter are what MedM's prompt asked of its
language model; 60 words is its only length limit. Its draft keeps MedPix locations with at least 100
examples, counted in images: counted in cases, one of its five would be left. It has no rules against
leaks and near duplicates or about form and language, and its released data shows it.

Arguments: min_cases; count (images, cases); max_share (of an answer in its question); within
(image, case, all: where near duplicates are looked for); reinforce (weight, repeat, none).
"""

from ml_collections import ConfigDict


def get_config(arg: str | None = None) -> ConfigDict:
    """Config of `python -m data_prep.curate`; `arg` such as "min_cases=50,within=case"."""
    args = {
        "min_cases": "100",
        "count": "images",
        "max_share": "0.8",
        "within": "case",
        "reinforce": "weight",
    }
    for item in filter(None, (arg or "").split(",")):
        name, _, value = item.partition("=")
        if name not in args:
            raise ValueError(f"config argument {name!r} is unknown; known: {', '.join(args)}")
        args[name] = value
    config = ConfigDict()
    config.rules = [
        {"rule": "empty"},
        {
            "rule": "pattern",
            "name": "placeholder",
            "patterns": [r"replace this - ", r"description of the image or findings"],
            "fields": ["question", "answer", "caption"],
        },
        {"rule": "chatter"},
        {"rule": "question_form"},
        {"rule": "length", "max_answer_words": 60},
        {"rule": "language", "allowed": ["en"]},
        {"rule": "patient_history"},
        {"rule": "measurement"},
        {"rule": "numbers"},
        {
            "rule": "pattern",
            "name": "codes",
            "patterns": [r"\b(?:ACR|ICD)(?:-?\d+)?(?:-CM)?\b(?: codes?)?"],
        },
        {"rule": "answer_leak", "max_share": float(args["max_share"])},
        {"rule": "near_duplicate", "within": args["within"], "threshold": 0.8},
    ]
    config.relevance = {
        "keys": ["category", "location"],
        "min_cases": int(args["min_cases"]),
        "count": args["count"],
        "below": "drop",
        "missing": "keep",
        "reinforce": args["reinforce"],
        "power": 0.5,
        "max_weight": 3.0,
    }
    return config
