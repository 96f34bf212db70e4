"""COCO's figures of reports: by hand, against pycocoevalcap's own scorers, and, where Java is, against all of it."""

import math
import os
import shutil

import numpy as np
import pytest

from paligemma_med.metrics import coco, scoring, tables, text_metrics
from tools import coco_scores

TRUE = [
    "The heart is normal in size. No pleural effusion or pneumothorax.",
    "Lungs are clear (bilaterally); cardiomediastinal silhouette is unremarkable.",
    "No acute disease.",
    "Stable 1.5 cm nodule in the right upper-lobe, unchanged since 2010.",
]
SAID = [
    "The heart is normal. No pleural effusion.",
    "The lungs are clear. The heart is normal in size and the mediastinum is unremarkable",
    "No acute disease.",
    "",
]


def test_bleu_by_hand():
    # "the the cat" of "the cat": clipped 2 of 3 words, 1 of 2 pairs; longer than the truth, so no penalty.
    counts = coco.bleu_counts(["the the cat"], ["the cat"])
    assert counts.tolist() == [[2, 1, 0, 0, 3, 2, 1, 0, 3, 2]]
    assert coco.bleu(counts, 1) == pytest.approx(2 / 3) and coco.bleu(counts, 2) == pytest.approx(math.sqrt(1 / 3))
    short = coco.bleu_counts(["the"], ["the cat"])
    assert coco.bleu(short, 1) == pytest.approx(math.exp(-1))
    # Of several rows counts add up first.
    assert coco.bleu(np.concatenate([counts, short]), 1) == pytest.approx(3 / 4)
    assert coco.bleu(coco.bleu_counts([""], ["x"]), 4) == 0.0


def test_rouge_l_by_hand():
    # "a c" of "a b c d": P = 1, R = 1/2.
    assert coco.rouge_l(["a c", "", "c a"], ["a b c d", "a", "a c"]) == pytest.approx([2.44 * 0.5 / 1.94, 0, 0.5])


def test_the_protocol_and_its_groups():
    rows = [
        dict(question_id=str(i), image_id=str(i), answer=a, answer_type=k, predictions=[s])
        for i, (a, s, k) in enumerate(zip(TRUE, SAID, ("OPEN", "OPEN", "CLOSED", "OPEN")))
    ]
    found = scoring.summarise(rows, "report")
    assert found["model/overall/coco_bleu2"] == coco.bleu(coco.bleu_counts(SAID, TRUE), 2)
    assert found["model/answer_type/CLOSED/coco_bleu1"] == pytest.approx(1)
    assert found["model/overall/coco_rougeL"] == pytest.approx(coco.rouge_l(SAID, TRUE).mean())
    assert found["model/overall/coco_rougeL_low"] < found["model/overall/coco_rougeL"]
    assert found["model/overall/cider"] == pytest.approx(text_metrics.cider(SAID, TRUE).mean())
    assert "BLEU-4 (COCO)" in tables.format_table(found)


def test_java_that_fails_is_one_sentence(tmp_path):
    with pytest.raises(ValueError, match="has no tokenizer/stanford.*--pycocoevalcap"):
        coco_scores.scores(SAID, TRUE, tmp_path)
    with pytest.raises(ValueError, match="has no predictions.jsonl"):
        coco_scores.files(tmp_path)
    with pytest.raises(ValueError, match="java (isn't installed|can't run .*none.jar)"):
        coco.meteor([["a"]], [["a"]], tmp_path / "none.jar")


@pytest.mark.slow
def test_equals_pycocoevalcap():
    package = pytest.importorskip("pycocoevalcap")
    from pycocoevalcap.bleu.bleu import Bleu
    from pycocoevalcap.cider.cider import Cider
    from pycocoevalcap.rouge.rouge import Rouge

    folder = next(iter(package.__path__))
    said, true = SAID * 3 + TRUE[1:], TRUE * 3 + TRUE[:-1]
    with_java = shutil.which("java") is not None
    if with_java:
        from pycocoevalcap.tokenizer.ptbtokenizer import PTBTokenizer

        words = coco.ptb_words([*said, *true], os.path.join(folder, coco_scores._TOKENISER))
        theirs = PTBTokenizer().tokenize({i: [{"caption": text}] for i, text in enumerate([*said, *true])})
        assert [[" ".join(x)] for x in words] == list(theirs.values())
        a, b = ([" ".join(x) for x in half] for half in (words[: len(said)], words[len(said) :]))
    else:
        a, b = ([" ".join(text_metrics.tokens(x)) for x in half] for half in (said, true))
    res, gts = ({i: [x] for i, x in enumerate(half)} for half in (a, b))
    counts = coco.bleu_counts(a, b, str.split)
    assert [coco.bleu(counts, n) for n in (1, 2, 3, 4)] == pytest.approx(
        Bleu(4).compute_score(gts, res, 0)[0], abs=1e-12
    )
    assert coco.rouge_l(a, b, str.split) == pytest.approx(Rouge().compute_score(gts, res)[1], abs=1e-12)
    assert text_metrics.cider(a, b, str.split) == pytest.approx(Cider().compute_score(gts, res)[1], abs=1e-12)
    if with_java:
        from pycocoevalcap.meteor.meteor import Meteor

        corpus, rows = Meteor().compute_score(gts, res)
        jar = os.path.join(folder, coco_scores._METEOR)
        found = coco.meteor([x.split() for x in a], [x.split() for x in b], jar)
        assert found[0] == pytest.approx(corpus) and found[1] == pytest.approx(rows)
        assert coco_scores.scores(said, true, folder)["METEOR"] == found[0]
