"""Protocols of the field, one function each: what exactly a reported accuracy counts.

Tables can't be compared if "accuracy" means a substring in one and a letter in the other. Each function
states its rule, its source, and what it gets wrong. They work on strings and lists; `scoring` turns
them into figures.

Several runs       accuracy_over_runs, distinct_answers, nonrobust, penalised
Multiple choice    letter, closest_option, most_likely_option, qa_score
Closed and open    exact_match, token_f1, token_recall, llava_med_closed, llava_med_f1

The originals, as read: microsoft/LLaVA-Med v1.0.0 (b9a98a7) llava/eval/run_eval.py and
eval_metrics/; xiaoman-zhang/PMC-VQA 1678ec2 src/MedVInT_TD/test.py; OpenGVLab/Multi-Modality-Arena
bd2999a MedicalEval/Question-answering_Score/utils/medicalqa.py.
"""

import collections
import difflib
import math
import re
import string
import unicodedata

import numpy as np

from paligemma_med.metrics import answers

# --- Several runs of the same questions ---


def accuracy_over_runs(correct) -> tuple[float, float]:
    """Mean accuracy of R runs and its standard deviation over them, the paper's "mean ± sd".

      a_r = mean over questions of correct[q][r];  mean = Σ a_r / R;
      sd = sqrt(Σ (a_r - mean)² / (R - 1))

    The sd says how much resampling the answers moves the score of *these* questions, and nothing about
    other questions: with 200 of them that error is another 3 points, see `stats`. It divides by R - 1
    (the paper, papers/001 section 5, doesn't say; R would give 0.89 of it for R = 5).

    Args:
      correct: [Q][R] bools or numbers in [0, 1]; run r is answer r of every question.

    Returns:
      (mean, sd); sd is NaN for a single run.

    Raises:
      ValueError: no questions, no runs, or different numbers of runs.
    """
    runs = _table(correct, "correct").mean(axis=0)
    sd = float(runs.std(ddof=1)) if len(runs) > 1 else math.nan
    return float(runs.mean()), sd


def distinct_answers(predictions, form=answers.normalise) -> np.ndarray:
    """How many different answers each question got.

    Args:
      predictions: [Q][R] answers.
      form: function from an answer to what is compared; None compares answers as they are (letters,
        numbers of choices; an answer of None, "no answer", counts as an answer of its own).

    Returns:
      int[Q], 1 to R.
    """
    form = form or (lambda answer: answer)
    return np.array([len({form(answer) for answer in row}) for row in predictions], np.int64)


def nonrobust(predictions, threshold=3, form=answers.normalise) -> np.ndarray:
    """Which questions are answered non-robustly: with `threshold` or more different answers.

    The paper (papers/001, 5): "non-robust if the model produces different answers in three or more
    out of five inferences". This is read as three different answers among the five. (The other reading,
    three that differ from the most frequent one, would only spare the split 3 + 1 + 1.)

    Args:
      predictions, form: as in `distinct_answers`.
      threshold: the least number of different answers.

    Returns:
      bool[Q].
    """
    return distinct_answers(predictions, form) >= threshold


def penalised(correct, predictions, reading="item", threshold=3, form=answers.normalise) -> tuple[float, float]:
    """Accuracy over runs, docked for non-robust questions: "we penalize the accuracy by one point"
    (papers/001, 5), which can be read in two ways.

    item     a non-robust question loses its own point: it counts as wrong in every run.
    total    every non-robust question takes one percentage point off the whole score, at least 0:
             mean - 0.01 · (number of non-robust questions). The sd stays.

    "item" is the default. It doesn't depend on the number of questions, while "total" counts a question
    n / 100 times (200 questions: twice; 1,061: ten times) and soon reaches 0: near chance on four
    choices, 82 % of questions are non-robust when sampled at temperature 1 (with uniform answers), so
    the paper's 33 % on PMC-VQA can't have been docked in that way. And "item" is still an accuracy, with
    an interval: the share of questions that are answered right *and* robustly.

    Args:
      correct: [Q][R] as in `accuracy_over_runs`.
      predictions, threshold, form: as in `nonrobust`.
      reading: "item" or "total".

    Returns:
      (mean, sd).

    Raises:
      ValueError: an unknown reading; shapes that differ.
    """
    if reading not in ("item", "total"):
        raise ValueError(f"reading is {reading!r}; expected 'item' or 'total'.")
    correct = _table(correct, "correct")
    if [len(row) for row in predictions] != [correct.shape[1]] * len(correct):
        raise ValueError(f"predictions aren't {correct.shape} as correct is; expected [Q][R] of both.")
    bad = nonrobust(predictions, threshold, form)
    if reading == "item":
        return accuracy_over_runs(np.where(bad[:, None], 0.0, correct))
    mean, sd = accuracy_over_runs(correct)
    return max(0.0, mean - 0.01 * int(bad.sum())), sd


def _table(values, name):
    lengths = {len(row) for row in values}
    if len(lengths) != 1 or 0 in lengths:
        raise ValueError(
            f"{name} has {len(values)} questions of {sorted(lengths)} runs; expected one question "
            "or more, each with as many runs, one or more."
        )
    return np.asarray(values, np.float64)


# --- Multiple choice ---


def letter(text, choices) -> str | None:
    r"""The letter that an answer names, or None if it names none or several.

    Understood, in either case: "B", "(b)", "B." alone or on a line; "B: text", "B) text", "b. text", "B - text",
    "B, because" at the start of a line; "B text" if `text` is choice B; "(B)" anywhere; "option B", "I choose B",
    "it is B", "leaving B."; and, with priority, "the answer is B", "Answer: (b)", the same with the word for
    "answer" of a dozen languages ("答案：B"), "\boxed{B}", "<answer>B</answer>". Not counted as letters: the
    article ("A large mass"), names ("hepatitis B"), denials ("not option B", "option B is wrong").
    "A or B", "A, B", "A: yes, B: no" name two. What stands between <think> and </think>, and tokens such as <|im_end|>,
    are no part of the answer.

    An answer that gives a choice's text without its letter names none, even if the text begins with one
    ("C. difficile"): see `closest_option`. The field's scripts take the nearest of "A".."D" by difflib
    and so find a letter in anything (PMC-VQA's MedVInT_TE takes "Both" for B).

    Args:
      text: the model's answer.
      choices: the choices' texts, in order: letters A, B, ….

    Returns:
      "A", "B", … or None.

    Raises:
      ValueError: fewer than two choices, or more than 26.
    """
    last = letter_of(_count(choices) - 1)
    capital, small = f"[A-{last}]", f"[a-{last.lower()}]"
    either = f"[A-{last}a-{last.lower()}]"
    # Within a sentence a lone "a" may be the article: a small letter only counts before punctuation or
    # the end.
    within = rf"[(\[]?(?:({capital})(?![\w'’]|-\w)|({small})(?=\s*(?:[)\].:,;!?]|$)))"
    text = _said(text)

    if m := re.fullmatch(rf"[(\[]?\s*({either})\s*[)\]]?\s*[.:,;!?]*", text):
        return m[1].upper()
    options, answer = _unlabelled(choices), answers.normalise(text)
    if answer in options:
        return None
    for i, option in enumerate(options):
        if answer == answers.normalise(f"{letter_of(i)} {option}"):
            return letter_of(i)

    be = "is|was|(?:would|must|should|could|may|might|has to|seems to|appears to) be"
    says = rf"(?:\s+(?:{be}))?\s*[:=\-–—]?\s*"
    kind = r"(?:(?:the\s+)?(?:option|choice|letter)\s*)?"
    closed = rf"\s*{kind}[(\[]?({either})(?=\s*[)\].:]?\s*[<}}])"
    verbs = "option|choice|letter|choose|chose|pick|select|go with|think"
    # "C. text" is a label, unless choices themselves begin that way: "C. difficile", "E. coli".
    period = r"|\.(?=\s|$)" if not any(re.match(r"[a-z]\. ", o) for o in options) else ""
    either_or = rf"\s*[)\].:]?\s*(?:,|/|&|\bor\b|\band\b)\s*{kind}{within}"
    strong = [
        rf"(?i:\bans(?:wer|\.)?{says}{kind}){within}",
        rf"(?i:{_ANSWER}){within}",
        rf"(?i:\\boxed\{{(?:\\\w+\{{)?|<answer>){closed}",
    ]
    weak = [
        rf"^\s*[(\[]?({either})(?:\s*[)\]:]{period}|\s+-\s|[)\]]?\s*[.:]?\s*$)",
        rf"^\s*({capital}),\s(?=\s*(?:because|since|as|given|due|based|which)\b)",
        rf"(?i:\bleav(?:es|ing)\s+(?:only\s+)?{kind}){within}(?=\s*(?:[)\].,:;!?]|$))",
        rf"[(\[]({either})[)\]]",
        rf"(?i:\b(?:{verbs}){says}{kind}){within}",
        rf"(?i:\b(?:it|that)(?:\s+(?:{be})|['’]s)\s+{kind}){within}",
    ]
    for patterns in (strong, weak):
        matches = [m for p in patterns for m in re.finditer(p, text, re.MULTILINE)]
        matches = [m for m in matches if not _denied(text, m)]
        if any(re.match(either_or, text[m.end() :]) for m in matches):
            return None
        if matches:
            named = {next(filter(None, m.groups())).upper() for m in matches}
            if patterns is weak:  # further labels contradict: "A: yes, B: no"
                named |= set(re.findall(rf"(?<=[\s,;])({capital})\s*[):]", text))
            return named.pop() if len(named) == 1 else None
    return None


# "The answer is" where a letter follows, in other languages; without \b before scripts that write no blanks.
_ANSWER = (
    r"(?:\b(?:réponse|respuesta|resposta|risposta|antwort|antwoord|svar|vastaus|odpowiedź|odpověď|ответ|відповідь|cevap"
    r"|jawaban|đáp án)(?:\s+(?:correct\w*|corrett\w*|richtige?|exact\w*|final\w*|est|es|è|é|ist|jest|je|är|er|on"
    r"|adalah|là|la|option|opción))*|(?:答案|答え|正解|(?<!不)选择?|(?<!不)選擇?|정답|답)(?:应该)?(?:是|为|為|选|選|は|은)?)"
    r"\s*[:=\-–—]?\s*(?:选项|選項)?"
)


def _said(text):
    """An answer without reasoning, special tokens and marks around it."""
    text = re.sub(r"(?s)^.*</think>", "", unicodedata.normalize("NFKC", text))
    text = re.sub(r"<\|[^|<>]{1,40}\|>|</?s>|<(?:eos|pad|bos|end_of_turn)>", "", text)
    text = re.sub(r'[*`"“”$]|\\(?=[()\[\]])', "", text)
    return re.sub(r"(?<!\w)['‘’](\w)['‘’](?!\w)", r"\1", text).strip()


def _denied(text, m):
    """Whether a letter is mentioned as *not* the answer."""
    before = r"\b(?:not|than|instead of|neither|nor|except|excluding|rul\w+ out|eliminat\w+)\s+(?:the\s+)?[(\[]?$"
    after = r"[)\].:]?\s*(?:is|was|are)(?:\s+not\b|n['’]t\b|\s+(?:wrong|incorrect|false)\b)"
    return bool(re.search(before, text[: m.start()], re.IGNORECASE) or re.match(after, text[m.end() :], re.IGNORECASE))


def closest_option(text, choices) -> int | None:
    """The number of the choice that an answer's text is nearest to, or None if it resembles none.

    An answer equal to a choice is that choice (`answers.normalise` of both, without a label such as
    "B:" at the front of the answer, or of every choice). Otherwise it is the choice with the highest
    difflib ratio (twice the matching characters over the characters of both), the first among equals;
    None if all ratios are 0.

    The ratio is that of PMC-VQA's own script (find_most_similar_index), which compares the raw texts,
    and only the last character generated. It always decides, so a question's chance level isn't 1 in 4:
    a long choice is close to many texts.

    Args:
      text: what the model said.
      choices: the choices' texts, in order.

    Returns:
      0, 1, … or None.

    Raises:
      ValueError: fewer than two choices, or more than 26.
    """
    _count(choices)
    options, bare = _unlabelled(choices), answers.normalise(re.sub(_LABEL, "", text))
    for form in (answers.normalise(text), bare):
        if form and form in options:
            return options.index(form)
    return _most_similar(options, bare)


def most_likely_option(logprobs, lengths=None) -> int:
    """The number of the choice that the model finds likeliest, whatever it would generate.

      argmax_c log p(choice c | image, question), the sum over the choice's tokens, EOS included;
      with lengths: that divided by the number of tokens

    The sum is the probability of generating exactly the choice and favours short ones; per token favours
    long ones, whose later tokens follow from the earlier. The latter is GPT-3's rule (T. Brown et al.,
    2005.14165, 2.4) and, as the smallest mean loss, the "prefix-based score" of OmniMedVQA (Y. Hu
    et al., CVPR 2024, 2402.09181). Report which one is used.

    Args:
      logprobs: [C] sums of log-probabilities, such as a row's option_logprobs.
      lengths: [C] numbers of tokens, or None for the sum.

    Returns:
      0, 1, …; the first among equals.

    Raises:
      ValueError: fewer than two choices, NaN, a length below 1, or too few lengths.
    """
    _count(logprobs)
    scores = np.asarray(logprobs, np.float64)
    if np.isnan(scores).any():
        raise ValueError(f"logprobs has NaN: {list(logprobs)}.")
    if lengths is not None:
        if len(lengths) != len(scores) or min(lengths) < 1:
            raise ValueError(f"lengths is {list(lengths)}; expected {len(scores)} of 1 or more.")
        scores = scores / np.asarray(lengths)
    return int(scores.argmax())


def qa_score(prediction, choices, answer) -> bool:
    """OmniMedVQA's question-answering score: is the choice nearest to the text the right one?

    Like `closest_option`, but exactly as in OmniMedVQA's script: case, blanks and labels count, and exact
    matches have no priority. An answer that resembles no choice at all, such as an empty one, is
    wrong. OmniMedVQA's prompt lists the choices as a Python list and asks for one of them.
    Y. Hu et al., CVPR 2024, 2402.09181; MedicalEval in utils/medicalqa.py.

    Args:
      prediction: the model's answer.
      choices: the choices' texts, in order.
      answer: the text of the right one.

    Returns:
      bool.

    Raises:
      ValueError: an answer that isn't among the choices.
    """
    _count(choices)
    if answer not in choices:
        raise ValueError(f"the answer {answer!r} isn't among the choices {list(choices)}.")
    nearest = _most_similar(choices, prediction)
    return nearest is not None and choices[nearest] == answer


def letter_of(i) -> str:
    """0 → "A", 1 → "B", …"""
    return string.ascii_uppercase[i]


def _most_similar(options, text):
    # The order of the two texts matters to difflib; this is the original scripts' order.
    ratios = [difflib.SequenceMatcher(None, option, text).ratio() for option in options]
    return ratios.index(max(ratios)) if max(ratios) > 0 else None


# "B:", "(B)", "B)", "B. " at the front of a choice or an answer.
_LABEL = r"^\s*\(?([A-Za-z])(?:\s*[:)]|\.\s)\s*"


def _unlabelled(choices):
    """The choices' texts, normalised, without their labels if each has its own."""
    labels = [re.match(_LABEL, choice) for choice in choices]
    if not all(m and m[1].upper() == letter_of(i) for i, m in enumerate(labels)):
        labels = [None] * len(choices)
    return [answers.normalise(c[m.end() :] if m else c) for c, m in zip(choices, labels)]


def _count(choices):
    if not 2 <= len(choices) <= 26:
        raise ValueError(f"there are {len(choices)} choices; expected 2 to 26.")
    return len(choices)


# --- Closed and open answers ---


def exact_match(prediction, answer) -> bool:
    """Equality after `answers.normalise`: the tables' `acc`."""
    return answers.normalise(prediction) == answers.normalise(answer)


def token_f1(prediction, answer) -> float:
    """SQuAD's F1: the harmonic mean of token precision and recall.

      common = Σ_w min(count in prediction, count in answer)
      F1 = 2 · common / (tokens of prediction + tokens of answer)

    over the words of `answers.squad`; in scripts that write no blanks, over characters (`answers.spaced`). Of an
    answer without words, such as "..." or "A", its text counts as a word, where SQuAD 2.0's script (1806.03822) would
    take an empty prediction for right. P. Rajpurkar et al., EMNLP 2016 (1606.05250).

    Returns:
      float, 0 to 1.
    """
    common, predicted, wanted = _overlap(prediction, answer)
    return 2 * common / (predicted + wanted) if predicted and wanted else float(predicted == wanted)


def token_recall(prediction, answer) -> float:
    """The share of the answer's tokens that the prediction contains: common / (tokens of answer), see
    `token_f1`. Repeating or listing everything raises it, so it means little without precision;
    `llava_med_f1` is what others report under this name.

    Returns:
      float, 0 to 1; for an empty answer 1.0 if the prediction is empty too, else 0.0.
    """
    common, predicted, wanted = _overlap(prediction, answer)
    return common / wanted if wanted else float(predicted == 0)


def _overlap(prediction, answer):
    predicted, wanted = (collections.Counter(_words(x)) for x in (prediction, answer))
    return (predicted & wanted).total(), predicted.total(), wanted.total()


def _words(text):
    words = [word for word in answers.spaced(answers.squad(text)).split() if not answers.is_mark(word)]
    return words or answers.normalise(text).split()


def llava_med_closed(prediction, answer) -> bool:
    """LLaVA-Med's accuracy of closed questions: the answer is a substring of the prediction.

    After `answers.llava_med` of both: right if "yes" or "no" occurs in the prediction *and* the
    answer does. So "No, it is not normal" is right for "normal"; any text with "normal" or "know" is
    right for "no"; "yes and no" is always right; and an answer other than yes and no, of which SLAKE's
    closed questions have many, is wrong unless "no" turns up somewhere. Use it to compare with others'
    figures of that name, not instead of `exact_match`. One thing is otherwise: an answer of which nothing is left
    ("a") is never right, where the original finds it in every prediction.
    C. Li et al., NeurIPS 2023 (2306.00890), 5; evaluate() in run_eval.py.

    Returns:
      bool.
    """
    predicted, wanted = answers.llava_med(prediction), answers.llava_med(answer)
    return ("yes" in predicted or "no" in predicted) and bool(wanted) and wanted in predicted


def llava_med_f1(prediction, answer) -> tuple[float, float, float]:
    """LLaVA-Med's (f1, precision, recall) of open questions; its tables show the recall.

    Over the words of `answers.llava_med`. A word in both counts as often as the *prediction* has it, a
    word only in the answer as often as the answer has it:
      precision = tp / (tp + fp);  recall = tp / (tp + fn);  f1 = 2 · precision · recall / (both)
    So repeating a right word raises recall: "left left left" gets 3/4 for "left lung", where
    `token_recall` gives 1/2. All three are 0.0 if either has no words.
    C. Li et al., NeurIPS 2023 (2306.00890), 5; calculate_f1score in evaluate_metrics.py.

    Returns:
      (float, float, float), 0 to 1.
    """
    predicted, wanted = (collections.Counter(answers.llava_med(x).split()) for x in (prediction, answer))
    tp = sum(n for word, n in predicted.items() if word in wanted)
    if not tp:
        return 0.0, 0.0, 0.0
    fn = sum(n for word, n in wanted.items() if word not in predicted)
    precision, recall = tp / predicted.total(), tp / (tp + fn)
    return 2 * precision * recall / (precision + recall), precision, recall
