"""The questions about phantoms: modality, organ, what is abnormal, and where."""

from collections.abc import Iterator

import numpy as np

from data_prep.datasets.drawn.questions import LEVELS, QUADRANTS, SIDES, YES_NO, Balancer, Question
from data_prep.datasets.phantom.draw import FINDINGS, MODALITIES, Finding

ALL_KINDS = tuple(dict.fromkeys(k for kinds in FINDINGS.values() for k in kinds))
ALL_MODALITIES = tuple(dict.fromkeys(m for names in MODALITIES.values() for m in names))


def _article(noun: str) -> str:
    """`an MRI`, `an X-Ray`, `an opacity`, `a CT`: by the noun's first sound."""
    return f"an {noun}" if noun in ("MRI", "X-Ray") or noun[0] in "aeiou" else f"a {noun}"


def candidates(region: str, modality: str, finding: Finding | None) -> Iterator[list[Question]]:
    """Yields groups of questions that fit an image; about one of each group is asked."""

    def yes_no(texts: list[tuple[str, bool]], content_type: str) -> list[Question]:
        return [Question(t, "Yes" if yes else "No", YES_NO, content_type) for t, yes in texts]

    def opens(texts: list[str], answer: str, answers: tuple, content_type: str) -> list[Question]:
        return [Question(t, answer, answers, content_type) for t in texts]

    asked = [
        "What modality is used to take this image?",
        "Which imaging method was used here?",
    ]
    yield [
        *opens(asked, modality, ALL_MODALITIES, "Modality"),
        *yes_no([(f"Is this {_article(m)}?", m == modality) for m in ALL_MODALITIES], "Modality"),
    ]
    asked = [
        "Which part of the body does this image belong to?",
        "What part of the body is shown?",
    ]
    yield [
        *opens(asked, region, tuple(FINDINGS), "Organ"),
        *yes_no([(f"Does the picture contain the {r.lower()}?", r == region) for r in FINDINGS], "Organ"),
    ]
    yield yes_no(
        [
            ("Is the scan normal?", finding is None),
            ("Does the picture look healthy?", finding is None),
            ("Is there any abnormality in this image?", finding is not None),
            ("Are there abnormalities in this picture?", finding is not None),
        ],
        "Abnormality",
    )

    presence, sided = [], []
    for kind in FINDINGS[region]:
        here = finding is not None and finding.kind == kind
        noun = _article(kind.lower())
        # "Mass" occurs in head and abdomen; naming the region keeps each wording to one region.
        place = region.lower()
        presence.append((f"Is there {noun} in the {place}?", here))
        presence.append((f"Does this {place} image show {noun}?", here))
        for side in SIDES:
            text = f"Is there {noun} on the {side.lower()} side of this {place} image?"
            sided.append((text, here and finding.side == side))
    presence, sided = yes_no(presence, "Presence"), yes_no(sided, "Presence")
    yield presence
    if finding is None:
        yield presence
        yield sided
        return

    yield sided
    yield [
        *opens(
            ["What is the main finding in this image?", "What abnormality is visible?"],
            finding.kind,
            ALL_KINDS,
            "Abnormality",
        ),
        *opens(
            [f"What abnormality is in the {region.lower()}?", f"Which finding does this {region.lower()} image show?"],
            finding.kind,
            FINDINGS[region],
            "Abnormality",
        ),
    ]
    kind = finding.kind.lower()
    levels = opens(
        [
            "Is the abnormality in the upper or the lower half of the image?",
            "At which level of the image is the abnormality, upper or lower?",
        ],
        finding.level,
        LEVELS,
        "Position",
    )
    if finding.kind != "Effusion":  # an effusion is always low: the wording would give the answer away
        levels += opens(
            [f"Is the {kind} in the upper or the lower half of the image?"],
            finding.level,
            LEVELS,
            "Position",
        )
    yield [
        *opens(
            [
                "On which side of the image is the abnormality?",
                "Which side of the image is abnormal, left or right?",
                f"On which side of the image is the {kind}?",
            ],
            finding.side,
            SIDES,
            "Position",
        ),
        *levels,
        *opens(
            ["Where in the image is the abnormality?", "In which quadrant is the finding?"],
            f"{finding.level} {finding.side}",
            QUADRANTS,
            "Position",
        ),
        *yes_no(
            [(f"Is the abnormality on the {s.lower()} side of the image?", s == finding.side) for s in SIDES]
            + [(f"Is the abnormality in the {v.lower()} half of the image?", v == finding.level) for v in LEVELS],
            "Position",
        ),
    ]


def ask(
    rng: np.random.Generator,
    balancer: Balancer,
    region: str,
    modality: str,
    finding: Finding | None,
) -> list[Question]:
    """About six different questions about one image, two of them on the position of a finding."""
    chosen: dict[str, Question] = {}
    groups = list(candidates(region, modality, finding))
    if finding is not None:
        groups.append(groups[-1])
    for group in groups:
        fresh = [q for q in group if q.text not in chosen]
        if question := balancer.choose(rng, fresh):
            chosen[question.text] = question
    return list(chosen.values())
