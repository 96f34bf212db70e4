"""Each rule drops what it is for and keeps its near misses; settings are checked."""

import pytest

from data_prep.curate import rules
from data_prep.files import DataError


def check(rule, question="What is seen?", answer="A mass.", settings=None, **row):
    (made,) = rules.make_rules([{"rule": rule, **(settings or {})}])
    row = {"question": question, "answer": answer, "image_id": "i1", **row}
    return made.check(row)


def drops(rule, **kw):
    why, _ = check(rule, **kw)
    assert why is None or (isinstance(why, str) and why)
    return why is not None


@pytest.mark.parametrize("text", ["", "  ", "N/A", "n/a.", "None", "NULL", "...", "--", "**"])
def test_empty(text):
    assert drops("empty", answer=text)
    assert drops("empty", question=text)
    assert not drops("empty") and drops("empty", image_id=None)


def test_empty_keeps_answers_that_only_look_so():
    for text in ("No", "0", "A", "没有", "None of these"):
        assert not drops("empty", answer=text)


def test_length():
    settings = {"max_answer_words": 5, "min_question_words": 2}
    assert not drops("length", answer="one two three four five", settings=settings)
    assert drops("length", answer="one two three four five six", settings=settings)
    assert drops("length", question="Why?", settings=settings)
    assert drops("length", answer="x" * 601)


@pytest.mark.parametrize(
    "question, dropped",
    [
        ("Is it big?", False),
        ('Is it "big?"', False),
        ("Describe the finding.", False),
        ("The finding is", True),
        ("What is it?\nWhere is it?", True),
        ("If so, describe it.", True),
        ("Is there a mass? ", False),
        ("", True),
    ],
)
def test_question_form(question, dropped):
    assert drops("question_form", question=question) == dropped


@pytest.mark.parametrize(
    "question",
    [
        "How large is the mass?",
        "What is the approximate size of the mass?",
        "What size is it?",
        "How many lesions are there?",
        "What is the diameter of the aorta?",
        "What are the dimensions of the cyst?",
        "Is it larger than 3 cm?",
    ],
)
def test_measurement_questions(question):
    assert drops("measurement", question=question)


@pytest.mark.parametrize(
    "answer",
    [
        "It measures 2.9 cm.",
        "A 6.1x4.5cm mass",
        "3 x 4",
        "About 40 HU",
        "in 35-40% of cases",
        "a 5-mm nodule",
        "12 µm",
        "3cm³",
        "45 degrees",
        "after 6 days",
        "120 mmHg",
        "10°",
    ],
)
def test_measurement_values(answer):
    assert drops("measurement", answer=answer)


@pytest.mark.parametrize(
    "text",
    [
        "T2-weighted MRI",
        "Fracture of L4",
        "Stage 3",
        "C5-C6",
        "18F-FDG PET",
        "Mass in segment 6",
        "Neurofibromatosis type 1",
        "Measles",
        "The mass is large",
        "3 masses",
        "3 lesions",
        "Grade 4 minimal change",
        "2 hyperdense foci",
    ],
)
def test_measurement_keeps(text):
    assert not drops("measurement", question=f"Is it {text}?", answer=text)


@pytest.mark.parametrize("answer", ["3", "There are 7.", "a ratio > 2.3", "1 in 18,000", "in 2006"])
def test_numbers(answer):
    assert drops("numbers", answer=answer)


@pytest.mark.parametrize(
    "answer",
    [
        "T2-weighted",
        "T1",
        "L4-L5",
        "C5/C6",
        "L4",
        "CD20",
        "IL-6",
        "18F-FDG",
        "99mTc",
        "third rib",
        "3rd rib",
        "stage 3",
        "Type 2 diabetes",
        "grade 3b",
        "segment 6",
        "3D",
        "Two masses",
        "vertebra 5",
        "COVID-19",
        "T12",
        "L5-S1",
        "Figure 2",
        "Trisomy 13",
        "apical 4-chamber view",
    ],
)
def test_numbers_keeps_names(answer):
    assert not drops("numbers", answer=answer)
    assert drops("numbers", answer=answer + " with 7 lesions")


@pytest.mark.parametrize(
    "text",
    [
        "What is the patient's history?",
        "History of trauma",
        "A 45-year-old man",
        "a 3 month old",
        "What is the age of the woman?",
        "How old is the patient?",
        "What is the patient's age?",
        "What is the sex of the patient?",
        "Is the patient male or female?",
        "Why did the patient initially present with pain?",
        "What is the chief complaint?",
        "the patient denies pain",
    ],
)
def test_patient_history(text):
    assert drops("patient_history", question=text) and drops("patient_history", answer=text)


@pytest.mark.parametrize(
    "text",
    [
        "Is the natural course benign?",
        "Prehistory",
        "old fracture",
        "Is this an old infarct?",
        "What is presented here?",
        "How is the patient treated?",
    ],
)
def test_patient_history_keeps(text):
    assert not drops("patient_history", question=text)


@pytest.mark.parametrize(
    "text",
    [
        "As an AI language model, I can only see text.",
        "I'm sorry, but I can't help.",
        "I cannot determine this from the image.",
        "I don't have access to it.",
        "Here are 5 open-ended question-answer pairs:",
        "Sure! The mass is benign.",
        "Certainly, it is.",
        "I hope this helps",
        "Let me know if you need more.",
        "Note: the image is small.",
        "**Mass**",
        "Q: What is it?",
        "1. Question: What is it?",
        "Answer: mass",
        "<|end|>",
        "What is mentioned in the caption?",
        "according to the text",
        "Based on the provided case information, it is a mass.",
        "What does this caption say?",
        "Not a substitute for professional medical advice",
        "as described in the case report",
    ],
)
def test_chatter(text):
    assert drops("chatter", question=text) and drops("chatter", answer=text)


@pytest.mark.parametrize(
    "text",
    [
        "Surely a cyst",
        "The greater trochanter",
        "Here the ureter bends.",
        "a notebook-like stripe",
        "Is an air bronchogram seen in the image?",
        "Vitamin A: deficiency",
        "Great vessels",
        "in the context of trauma",
        "In this context it is benign.",
        "The contextual enhancement",
        "Can I see the apex here?",
        "A mass",
        "Captions",
        "Okay sign",
        "I can see a fracture.",
    ],
)
def test_chatter_keeps(text):
    assert not drops("chatter", answer=text)


def test_pattern_and_names():
    settings = {"patterns": ["replace this"], "fields": ["caption"], "name": "placeholder"}
    (made,) = rules.make_rules([{"rule": "pattern", **settings}])
    assert made.name == "placeholder"
    assert made.check({"caption": "Replace  this"})[0] is None
    why, _ = made.check({"caption": "REPLACE THIS - DESCRIPTION"})
    assert why == "caption: 'REPLACE THIS'"
    assert made.check({})[0] is None


def test_answer_leak():
    question = "What causes the diffuse bladder wall infiltration with catheter?"
    why, share = check("answer_leak", question=question, answer="Diffuse bladder wall infiltration")
    assert share == 1 and why
    why, share = check("answer_leak", question=question, answer="Wall infiltration by urothelial CA")
    assert share == 0.5 and why is None  # wall, infiltration of these and urothelial, CA
    assert drops(
        "answer_leak", question=question, answer="Wall infiltration by urothelial CA", settings={"max_share": 0.5}
    )


@pytest.mark.parametrize(
    "question, answer, leaks",
    [
        ("Which leg is the opposite of the one on the left?", "The left leg", True),
        ("What is the origin of the brachialis muscle?", "The brachialis muscle.", True),
        ("What is the type of the type 1 canal?", "Type 1 canal", True),
        ("Which leg is the leg of the image?", "It is the leg of the image.", True),
        ("Which leg has the blood?", "The leg with the blood is the one with the blood", True),
        ("What is the type of lung CT?", "PET-CT", False),
        ("Which lobe of the lung is dark?", "The left lobe", False),
        ("Which kidney is it, left or right?", "Left kidney", False),
        ("Is the left lung clear?", "The lung is clear", False),
        ("What is it?", "It is", False),
    ],
)
def test_a_short_answer_leaks_as_a_whole(question, answer, leaks):
    assert drops("answer_leak", question=question, answer=answer) == leaks


def test_answer_leak_lets_choices_pass():
    assert not drops("answer_leak", question="Is it the left or right kidney?", answer="Left kidney")
    assert check("answer_leak", answer="Yes") == (None, 0.0)
    assert check("answer_leak", answer="MRI", question="Is it CT or MRI?") == (None, 1.0)


@pytest.mark.parametrize(
    "text, code",
    [
        ("Radiographie de face du thorax montrant une opacité dans le lobe", "fr"),
        ("Röntgenbild der Lunge mit einer Verschattung und dem Herz", "de"),
        ("Imagen de la lesión en el hígado con contraste", "es"),
        ("图像里有肺吗", "zh"),
        ("Рентген грудной клетки", "ru"),
    ],
)
def test_language(text, code):
    why, _ = check("language", answer=text)
    assert why == f"answer: {code}"
    assert not drops("language", answer=text, settings={"allowed": ["en", code]})


@pytest.mark.parametrize(
    "text",
    [
        "Axial CT of the chest",
        "Chiari malformation",
        "Cor pulmonale",
        "Arc de Triomphe sign",
        "Hutch diverticulum des Blasenhalses",
        "Mass",
        "CT",
        "",
        "5 µm",
        "The lesion of the left lobe and la region les vessels",
    ],
)
def test_language_keeps(text):
    assert not drops("language", answer=text)


@pytest.mark.parametrize(
    "specs, message",
    [
        ([{"rule": "no_such"}], r"rules\[0\] is 'no_such'; known rules: .*chatter"),
        ([{"patterns": ["x"]}], r"rules\[0\] is None"),
        ([{"rule": "empty"}, {"rule": "length", "most": 3}], r"rules\[1\] \(length\): .*most"),
        ([{"rule": "empty"}, {"rule": "empty"}], "a second rule 'empty'"),
        ([{"rule": "pattern", "patterns": ["("]}], r"rules\[0\] \(pattern\)"),
        ([{"rule": "pattern", "patterns": []}], "no patterns"),
        ([{"rule": "pattern"}], r"missing .*'patterns'"),
        ([{"rule": "answer_leak", "max_share": 0}], "max_share is 0"),
        ([{"rule": "language", "allowed": ["xx"]}], "unknown language xx"),
    ],
)
def test_wrong_settings(specs, message):
    with pytest.raises(DataError, match=message):
        rules.make_rules(specs)


def test_every_rule_takes_any_row():
    specs = [{"rule": name} for name in rules.RULES if name != "pattern"]
    specs.append({"rule": "pattern", "patterns": "x"})
    odd = [
        {},
        {"question": None, "answer": None},
        {"question": 3, "answer": 4.5, "image_id": 1},
        {"question": "\ud800", "answer": "\0" * 10},
    ]
    for made in rules.make_rules(specs):
        for row in odd:
            why, score = made.check(row)
            assert why is None or isinstance(why, str)
            assert score is None or 0 <= score <= 1


def test_not_in_source():
    caption = "Axial CT with calcified nodules in the spleen"
    score = rules.make_rules([{"rule": "not_in_source"}])[0].check
    row = {"question": "Where are the lesions?", "answer": "Splenic calcifications and a fracture"}
    # splen(ic) isn't sple(en) to five letters; calci(fied) is there, fract(ure) is not.
    why, share = score({**row, "caption": caption})
    assert share == round(1 / 3, 4) and "0.33" in why
    assert score({**row, "caption": caption + " after splenic fracture"}) == (None, 1.0)
    assert score({**row, "question": "Is it splenic, or a fracture?", "caption": caption})[1] == 1.0
    assert score({**row, "answer": "Yes", "caption": caption}) == (None, 1.0)
    assert not drops("not_in_source", answer="Fracture")  # one word is too few to tell
    assert drops("not_in_source", answer="A fracture", settings={"min_words": 1})
    with pytest.raises(DataError, match="min_share is 2"):
        rules.make_rules([{"rule": "not_in_source", "min_share": 2}])
