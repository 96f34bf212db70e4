"""`metrics.peers` against the programs' own code, on demand: `PALIGEMMA_MED_PEERS` names a folder with their checkouts
(lmms-eval, MedEvalKit, MultiMedEval, PeFoMed, Multi-Modality-Arena and `mathruler`), `PALIGEMMA_MED_PREDICTIONS`
optionally a predictions.jsonl.

Only the functions that score are taken from their files: the rest would bring models and servers.
"""

import ast
import collections
import difflib
import importlib.util
import math
import os
import pathlib
import re
import string
import sys
import types

import numpy as np
import pytest

from paligemma_med.evaluation import results
from paligemma_med.metrics import peers, protocols

pytestmark = pytest.mark.slow
ANSWERS = """
    Yes|yes|No|no|Not at all.|nope|True|是|是的|正常|不正常|异常|没有|有|normal|Normal.|abnormal|know|x-ray|X ray|X-Ray
    xray|MRI (T2)|the left lung|Left lung.|left, lung|left lung, right lung|lung left|2,000 mm|1.5 cm|.5|two|a|none|0
    Yes, it is.|no, there is not|yes and no|\\boxed{Yes}|the answer is \\boxed{no}.|\\boxed{\\text{No}}|boxed
    <answer>Yes</answer>|The answer is: left lung|**Answer**: yes|答案:是|dont know|couldntve|somebody'd|it's||...
    左肺，右肺|（左）肺|Transverse Plane
    T1/T2-weighted|a lung; the heart|CT\\nscan|Is it?|no.|No evidence of mass|final answer is no
""".strip()
TEXTS = [text.strip().replace("\\n", "\n") for text in re.split(r"\n|\|", ANSWERS)]


def rows():
    """Every text as answer to every other as truth; or those of the file."""
    if path := os.environ.get("PALIGEMMA_MED_PREDICTIONS"):
        return [(row, row["predictions"][0]) for row in results.read_rows(path)]
    truths = [t for t in TEXTS if t and t != "..."]
    pairs = [(dict(answer=t, answer_type=k), s) for t in truths for k in ("OPEN", "CLOSED") for s in TEXTS]
    return pairs


def theirs(project, path, names, **given):
    """A module with these functions, classes and constants of a file, as they are, and what they need."""
    folder = os.environ.get("PALIGEMMA_MED_PEERS") or pytest.skip("PALIGEMMA_MED_PEERS is not set")
    file = pathlib.Path(folder, project, path)
    if not file.is_file():
        pytest.skip(f"there is no {file}")
    tree = ast.parse(file.read_text(encoding="utf-8"))

    def names_of(node):
        targets = node.targets if isinstance(node, ast.Assign) else []
        return {getattr(node, "name", "")} | {t.id for t in targets if isinstance(t, ast.Name)}

    tree.body = [node for node in tree.body if names_of(node) & names]
    module = types.ModuleType(f"of_{project.replace('-', '_')}")
    vars(module).update(given, re=re)
    loader = importlib.util.spec_from_loader(module.__name__, loader=None)
    module.__spec__ = loader
    sys.modules[module.__name__] = module
    exec(compile(tree, str(file), "exec"), vars(module))
    return module


def test_lmms_eval():
    names = {
        "normalize_answer",
        "_normalize_yes_no",
        "_normalize_medical_aliases",
        "EN_YES",
        "EN_NO",
        "ZH_YES",
        "ZH_NO",
    }
    module = theirs(
        "lmms-eval", "lmms_eval/tasks/slake/utils.py", names | {"ZH_PUNCTUATION"}, string=string, Any=object
    )
    for row, said in rows():
        for text in (said, row["answer"]):
            assert peers.lmms_eval_form(text) == module.normalize_answer(text), text


@pytest.mark.parametrize("name", ["slake", "rad"])
def test_medevalkit(name):
    # A package that MedEvalKit needs, from a folder beside it: pip install --no-deps --target mathruler mathruler
    boxed = theirs("mathruler", "mathruler/grader.py", {"extract_boxed_content"}).extract_boxed_content
    names = {"parse_response", "extract", "get_content_between_a_b", "judge_close_end_vqa", "judge_judgement"}
    given = dict(extract_boxed_content=boxed, bleu=lambda *a: 0.0)
    given["rouge"] = lambda *a: [collections.defaultdict(lambda: {"f": 0.0})]
    module = theirs("MedEvalKit", "utils/utils.py", names | {"judge_open_end_vqa", "calculate_f1"}, **given)
    score = module.calculate_f1
    # It gives one number where it should give three.
    module.calculate_f1 = lambda *a: score(*a) or (0, 0, 0)
    for row, said in rows():
        answer, kind = row["answer"], row["answer_type"]
        response = said
        if boxed(response) != "None":
            response = boxed(response)
        elif "<answer>" in response:
            response = module.extract(response, "answer")
        if name == "rad":
            answer, response = answer.lower().strip(), response.lower().strip()
            kind = "yes or no" if answer in ("yes", "no") else "OPEN"
        ours = peers.score(row, said, f"medevalkit_{'vqa_rad' if name == 'rad' else name}")
        prefix = f"medevalkit_{name}"
        if kind == "OPEN":
            found = module.judge_open_end_vqa(answer, response)
            expected = found["em"], found["precision"], found["recall"], found["f1"]
        else:
            judge = module.judge_judgement if answer in ("yes", "no") else module.judge_close_end_vqa
            expected = judge(answer, response), math.nan, math.nan, math.nan
        got = [ours[key] for key in (prefix, f"{prefix}_f1", f"{prefix}_precision", f"{prefix}_recall")]
        assert got == pytest.approx(expected, nan_ok=True), (row, said)


def test_multimedeval():
    constants = {"contractions", "manual_map", "articles", "period_strip", "comma_strip", "punct"}
    utils = theirs("MultiMedEval", "multimedeval/utils.py", constants | {"clean_str"})

    class Benchmark:
        pass

    class Bleu:
        def __init__(self, n_gram):
            pass

        def __call__(self, *texts):
            return np.float64(0)

    module = theirs(
        "MultiMedEval",
        "multimedeval/task_families.py",
        {"VQA"},
        Benchmark=Benchmark,
        BLEUScore=Bleu,
        WordNetLemmatizer=object,
        abstractmethod=lambda f: f,
        clean_str=utils.clean_str,
        EvaluationOutput=lambda answer_log, metrics: (answer_log, metrics),
    )

    class Task(module.VQA):
        def get_correct_answer(self, sample):
            return sample["answer"].lower().strip()

        def __getitem__(self, i):
            return {"sample": pairs[i][0]}

    pairs = rows()
    said = [dict(answer=types.SimpleNamespace(text=text), idx=i) for i, (_, text) in enumerate(pairs)]
    _, found = Task().evaluate(said)
    ours = [peers.multimedeval(text, row["answer"]) for row, text in pairs]
    means = {name: np.nanmean([x[name] for x in ours]) for name in ours[0]}
    assert means == pytest.approx(
        dict(
            multimedeval_f1=found["F1"],
            multimedeval_recall=found["recall"],
            multimedeval_closed=found["closedQuestionsAccuracy"],
            multimedeval_open=found["openQuestionsAccuracy"],
            multimedeval_open_recall=found["openQuestionsRecall"],
        ),
        rel=1e-12,
    )


def test_omnimedvqa():
    path = "MedicalEval/Question-answering_Score/utils/medicalqa.py"
    names = {"MedicalEval", "find_most_similar_index", "str_similarity"}
    module = theirs("Multi-Modality-Arena", path, names, difflib=difflib)
    choices = [text for text in TEXTS if text][:20]
    for n in (2, 3, 4):
        for i in range(len(choices) - n):
            some = choices[i : i + n]
            row = dict(zip(("option_A", "option_B", "option_C", "option_D"), some)) | dict(gt_answer=some[-1])
            for said in TEXTS:
                _, right = module.MedicalEval([row | dict(model_pred=said)])
                assert protocols.qa_score(said, some, some[-1]) == right, (some, said)


def test_pefomed():
    module = theirs("PeFoMed", "pefomed/common/medvqa_tools/vqa_eval.py", {"MedVQAEval"})
    judge = module.MedVQAEval(types.SimpleNamespace(getQuesIds=list), None)
    for text in judge.contractions:
        assert peers.pefomed_form(text) == judge.preprocess_answer(text), text
    for row, said in rows():
        for text in (said, row["answer"]):
            assert peers.pefomed_form(text) == judge.preprocess_answer(text), text
