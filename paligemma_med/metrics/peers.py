"""Accuracies as other evaluation programs compute them, one protocol each, to be put beside their tables.

They are here so that numbers compare, not because they are good: what each gets wrong stands with it (and in
docs/evaluation.md). A figure that is of closed or of open questions alone is NaN for the others.

lmms_eval_slake      EvolvingLMMs-Lab/lmms-eval 75571cfe, lmms_eval/tasks/slake/utils.py
medevalkit_slake     alibaba-damo-academy/MedEvalKit 9b12e3b, utils/SLAKE/SLAKE.py and utils/utils.py, without its judge
medevalkit_vqa_rad   the same, utils/VQA_RAD/VQA_RAD.py
multimedeval         corentin-ryr/MultiMedEval d9ac283, multimedeval/task_families.py (VQA) and utils.py (clean_str)
pefomed              jinlHe/PeFoMed, pefomed/common/medvqa_tools/vqa_eval.py: the figures of papers/004
medgemma             MedGemma Technical Report (A. Sellergren et al., 2507.05201), 3.4 and table 9; no code is published
"""

import math
import re
import string
from collections.abc import Callable, Mapping
from typing import NamedTuple

from paligemma_med.metrics import answers, protocols

# --- lmms-eval ---

_WIDE = "".join(chr(ord(c) + 0xFEE0) for c in string.punctuation if c != ".") + "｡。、《》【】"
_BLANKS = dict.fromkeys(map(ord, string.punctuation + _WIDE), " ")
_FOLDED = dict.fromkeys("yes yeah yep true 是 是的 有 包含 可以 能 会 正常".split(), "yes")
_FOLDED |= dict.fromkeys("no nope false 否 不是 没有 无 不包含 不能 不会 不可以 不正常 异常".split(), "no")
_FOLDED |= {"x ray": "xray"}


def lmms_eval_form(text) -> str:
    """The form in which lmms-eval's SLAKE task compares answers.

    Lower case; what stands in round brackets is dropped; punctuation becomes blanks, also full-width; then the whole
    answer is folded: x ray is xray, words for yes are yes and words for no are no, in English and Chinese. Among
    the Chinese words for yes are 正常 ("normal") and 有 ("there is"), for no 异常 ("abnormal") and 无 ("none"): so
    "yes" is right where the truth is "normal", whatever was asked.
    """
    text = re.sub(r"\([^)]*\)|（[^）]*）", " ", text.strip().lower())
    text = " ".join(text.translate(_BLANKS).split())
    return _FOLDED.get(text, text)


def _lmms_eval(row, said):
    return {"lmms_slake": lmms_eval_form(said) == lmms_eval_form(row["answer"])}


# --- MedEvalKit ---

_INTRODUCTIONS = (
    *("**answer**:", "**answer**", "*answer*:", "**answer:**", "answer is", "answer:", "答案:"),
    *("final answer", "final answer is"),
)


def _boxed(text):
    r"""What the last \boxed{…} holds, or None; braces within are matched (mathruler's extract_boxed_content)."""
    start, depth = text.rfind(r"\boxed{"), 0
    if start < 0:
        return None
    start += len(r"\boxed{")
    for i, c in enumerate(text[start:], start):
        depth += (c == "{") - (c == "}")
        if depth < 0:
            return text[start:i].strip()
    return None


def _tagged(text):
    """What stands between <answer> and </answer>, all of them; the text itself if that is nothing."""
    return " ".join(re.findall(r"(?s)<answer>(.*?)</answer>", text)).strip() or text


def _medevalkit_parsed(text):
    text = text.lower()
    if "boxed" in text:
        box = _boxed(text)
        text = "None" if box is None else box
    elif "<answer>" in text:
        text = _tagged(text)
    for introduction in _INTRODUCTIONS:
        text = text.rpartition(introduction)[2]
    return text


def medevalkit(said, answer, is_open) -> tuple[bool, tuple[float, float, float] | None]:
    r"""MedEvalKit's verdict on one answer, and the overlap of an open one.

    Both are in lower case; of the prediction counts what is in \boxed{} or <answer>, and what follows "answer is" and
    the like.
    Open: equal, closing period and blanks included; overlap of *sets* of words.
    Closed, the truth being "yes" or "no" in lower case: the prediction contains exactly one of the letters "yes" and
    "no", and it is the truth. "Normal" contains "no".
    Other closed ones: equal, but for periods and line breaks. So are SLAKE's own "Yes" and "No", which are capitalised:
    there "Yes, it is" is wrong.

    Returns:
      (right, (F1, precision, recall) of an open question, else None). Their program prints these three under other
      names: it takes what its function returns in another order, so that its "precision" is F1, its "recall" is
      precision and its "f1" is recall.
    """
    box = _boxed(said)
    if box is not None and box != "None":
        said = box
    elif "<answer>" in said:
        said = _tagged(said)
    said, wanted = _medevalkit_parsed(said), answer.lower()
    if is_open:
        a, b = set(said.lower().split()), set(wanted.split())
        common = len(a & b)
        overlap = (2 * common / (len(a) + len(b)), common / len(a), common / len(b)) if common else (0.0, 0.0, 0.0)
        return said == wanted, overlap
    said = said.replace("\n", "").replace(".", "")
    if answer in ("yes", "no"):
        return ("yes" in said) != ("no" in said) and wanted in said, None
    return said == wanted, None


def _medevalkit_figures(prefix, said, answer, is_open):
    right, overlap = medevalkit(said, answer, is_open)
    names = (f"{prefix}_f1", f"{prefix}_precision", f"{prefix}_recall")
    return {prefix: right} | dict(zip(names, overlap or [math.nan] * 3))


def _medevalkit_slake(row, said):
    return _medevalkit_figures("medevalkit_slake", said, row["answer"], row["answer_type"] == "OPEN")


def _medevalkit_rad(row, said):
    answer = row["answer"].lower().strip()
    box = _boxed(said)
    if box is not None and box != "None":
        said = box
    elif "<answer>" in said:
        said = _tagged(said)
    return _medevalkit_figures("medevalkit_rad", said.lower().strip(), answer, answer not in ("yes", "no"))


# --- The form of the VQA challenge, with contractions ---

# Each without one of its apostrophes becomes the whole: "dont" → "don't"; "couldntve" lacks two and stays. The list is
# the challenge's own (S. Antol et al., ICCV 2015).
_CONTRACTED = """
    ain't aren't can't could've couldn't couldn't've didn't doesn't don't hadn't hadn't've hasn't haven't he'd
    he'd've he's how'd how'll how's isn't it'd it'd've it'll ma'am mightn't mightn't've might've mustn't must've
    needn't not've o'clock oughtn't 'ow's'at shan't she'd've should've shouldn't shouldn't've somebody'd've
    somebody'll somebody's someone'd someone'd've someone'll someone's something'd something'd've something'll
    that's there'd there'd've there're there's they'd they'd've they'll they're they've 'twas wasn't we'd've
    we've weren't what'll what're what's what've when's where'd where's where've who'd who'd've who'll who's
    who've why'll why're why's won't would've wouldn't wouldn't've y'all y'all'll y'all'd've you'd you'd've
    you'll you're you've
""".split()
_CONTRACTIONS = {w[:i] + w[i + 1 :]: w for w in _CONTRACTED for i, c in enumerate(w) if c == "'"}
_CONTRACTIONS |= {"somebody'd": "somebodyd"}


def vqa_challenge_form(text) -> str:
    """`answers.llava_med`, and contractions without an apostrophe get theirs."""
    return " ".join(_CONTRACTIONS.get(word, word) for word in answers.llava_med(text).split())


def multimedeval(said, answer) -> dict[str, float]:
    """MultiMedEval's figures of one answer, over *sets* of words of `vqa_challenge_form`.

    A question is closed if its truth is yes or no: right if the prediction has that word anywhere, or "not" for no.
    "Yes and no" is always right, and in a long answer "no" often turns up. Others are open, right from a recall of
    0.75.

    Returns:
      {multimedeval_f1, multimedeval_recall, multimedeval_closed, multimedeval_open, multimedeval_open_recall}. Its BLEU
      (torchmetrics', of single words) isn't computed.
    """
    wanted = vqa_challenge_form(answer.lower().strip())
    a, b = set(vqa_challenge_form(said).split()), set(wanted.split())
    common = len(a & b)
    precision, recall = common / len(a) if a else 0.0, common / len(b) if b else 0.0
    out = dict(multimedeval_f1=2 * precision * recall / (precision + recall + 1e-8), multimedeval_recall=recall)
    if wanted in ("yes", "no"):
        words = {"no", "not"} if wanted == "no" else {"yes"}
        return out | dict(
            multimedeval_closed=bool(a & words), multimedeval_open=math.nan, multimedeval_open_recall=math.nan
        )
    return out | dict(multimedeval_closed=math.nan, multimedeval_open=recall >= 0.75, multimedeval_open_recall=recall)


def pefomed_form(text) -> str:
    """The form of papers/004's exact match: `vqa_challenge_form`, and "x ray" is "xray"."""
    return vqa_challenge_form(text).replace("x ray", "xray")


def _pefomed(row, said):
    return {"pefomed": pefomed_form(said) == pefomed_form(row["answer"])}


def _medgemma(row, said):
    """Tokenized F1 of all questions, accuracy of those whose truth is yes or no. The report doesn't say how words are
    told: they are SQuAD's here (`protocols.token_f1`), and closed answers are compared by `answers.normalise`."""
    truth = answers.normalise(row["answer"])
    closed = float(answers.normalise(said) == truth) if truth in ("yes", "no") else math.nan
    return dict(medgemma_f1=protocols.token_f1(said, row["answer"]), medgemma_closed=closed)


# --- The list ---


class Peer(NamedTuple):
    """One protocol: figures of one answer.

    titles: {name of a figure: its title in tables}.
    score: function of a row of predictions.jsonl and an answer → {name: number or bool; NaN where it has no meaning}.
    means: names of figures that aren't shares of questions.
    """

    titles: Mapping[str, str]
    score: Callable[[Mapping, str], Mapping[str, float]]
    means: tuple[str, ...] = ()


def _medevalkit_titles(prefix, of):
    return {
        prefix: f"MedEvalKit, {of}",
        f"{prefix}_f1": f"MedEvalKit, {of}, open: F1 (its “precision”)",
        f"{prefix}_precision": f"MedEvalKit, {of}, open: precision (its “recall”)",
        f"{prefix}_recall": f"MedEvalKit, {of}, open: recall (its “f1”)",
    }


def _overlaps(prefix):
    return tuple(f"{prefix}_{name}" for name in ("f1", "precision", "recall"))


PEERS = {
    "lmms_eval_slake": Peer({"lmms_slake": "lmms-eval, SLAKE"}, _lmms_eval),
    "medevalkit_slake": Peer(
        _medevalkit_titles("medevalkit_slake", "SLAKE"), _medevalkit_slake, _overlaps("medevalkit_slake")
    ),
    "medevalkit_vqa_rad": Peer(
        _medevalkit_titles("medevalkit_rad", "VQA-RAD"), _medevalkit_rad, _overlaps("medevalkit_rad")
    ),
    "multimedeval": Peer(
        {
            "multimedeval_closed": "MultiMedEval, closed",
            "multimedeval_open": "MultiMedEval, open (recall of 0.75)",
            "multimedeval_open_recall": "MultiMedEval, open: recall",
            "multimedeval_f1": "MultiMedEval, F1",
            "multimedeval_recall": "MultiMedEval, recall",
        },
        lambda row, said: multimedeval(said, row["answer"]),
        ("multimedeval_open_recall", "multimedeval_f1", "multimedeval_recall"),
    ),
    "pefomed": Peer({"pefomed": "PeFoMed's exact match"}, _pefomed),
    "medgemma": Peer(
        {"medgemma_f1": "MedGemma, tokenized F1", "medgemma_closed": "MedGemma, yes or no"}, _medgemma, ("medgemma_f1",)
    ),
}
ALL = "peers"  # all of them at once
NAMES = (*PEERS, ALL)
TITLES = {name: title for peer in PEERS.values() for name, title in peer.titles.items()}
MEANS = tuple(name for peer in PEERS.values() for name in peer.means)


def score(row, said, protocol) -> dict[str, float]:
    """The figures of one answer by one of NAMES."""
    out = {}
    for peer in PEERS.values() if protocol == ALL else [PEERS[protocol]]:
        out |= peer.score(row, said)
    return out
