"""The files follow from units and replies alone: which rows they hold, what the report counts."""

import collections
import json
import os
import types

import pytest

from data_prep import qa_files
from data_prep.curate.run import curate
from data_prep.files import DataError
from tools.synthesize_qa import sources, units, write
from tools.synthesize_qa.configs import default

ABOUT = dict(
    model="m",
    weights="w" * 64,
    backend="transformers",
    settings={"temperature": 0},
    seed=3,
    pairs=2,
    examples="",
)
CAPTION = "Axial CT shows a hypodense mass in the left lobe of the liver"
CONFIG = default.get_config().to_dict()


def unit(number, image="i{}", kind="pairs", name="caption", caption=CAPTION, case="c1"):
    image = image.format(number)
    row = sources.Row(image, image, case, "train", {"caption": caption}, f"{number:064}", "test")
    template = types.SimpleNamespace(name=name, version=1, kind=kind, digest="d" * 64)
    return units.Unit(number, units.key_of(row, template, ABOUT), row, template, 2)


def record(unit, reply, score=1, finish="stop", **kw):
    usage = kw.pop("usage", [10, 20])
    return dict(key=unit.key, score=score, reply=reply, finish=finish, usage=usage, **kw)


def pairs(*found):
    return json.dumps({"pairs": [dict(zip(("question", "answer"), x, strict=True)) for x in found]})


def journal(*records):
    by_key = collections.defaultdict(list)
    for x in records:
        by_key[x["key"]].append(x)
    return types.SimpleNamespace(replies=lambda key: by_key[key])


def lines(path):
    return [json.loads(x) for x in path.read_bytes().splitlines()]


GOOD = ("Which organ is abnormal?", "The liver")
OTHER = ("Is the abnormality on the left?", "Yes")
BAD = ("What is the size of the mass?", "It measures 3 cm, as the caption says")
LEAK = ("Is there a hypodense mass in the left hepatic lobe?", "A hypodense mass in the left lobe")


def test_rows_drops_and_failures(tmp_path):
    a, b, c, d = (unit(n) for n in range(4))
    found = journal(
        record(a, "no idea", None, problem="it was odd"),
        record(a, pairs(GOOD, BAD), 2, model="served"),
        record(b, "Q: " + OTHER[0] + "\nA: " + OTHER[1] + "\n\nQ: Cut?\nA: of", 2, "length"),
        record(c, "no", None, problem="it was odd"),
        record(c, "1. What?", None),
        record(d, "not yet", None),
    )
    report = write.write([a, b, c, d], found, tmp_path / "qa.jsonl", CONFIG, about=ABOUT)
    paths = write.paths_of(tmp_path / "qa.jsonl")
    kept, (dropped,), (failed,) = lines(paths.output), lines(paths.drops), lines(paths.failed)

    assert [r["question_id"] for r in kept] == ["i0_caption_v1_1", "i1_caption_v1_1"]
    assert [(r["question"], r["answer"]) for r in kept] == [GOOD, OTHER]
    assert [r["answer_type"] for r in kept] == ["OPEN", "CLOSED"]
    assert kept[0]["quality"] == {"leak": 0.0, "caption_leak": 0.0, "tags": []}
    about = kept[0]["provenance"]
    assert about["reply"] == pairs(GOOD, BAD) and about["attempt"] == 1 and about["form"] == "json"
    assert about["model"] == "served" and kept[1]["provenance"]["model"] == "m"
    assert about["seed"] == 3 and about["row_digest"] == a.row.digest and about["key"] == a.key
    assert about["weights"] == ABOUT["weights"] and about["template_digest"] == "d" * 64

    assert dropped["reason"] == "meta_talk" and dropped["row"]["question_id"] == "i0_caption_v1_2"
    assert [r for r, _ in dropped["all_reasons"]] == ["meta_talk", "measurement", "numbers"]
    assert dropped["row"]["quality"]["tags"][:3] == ["meta_talk", "measurement", "numbers"]

    assert failed["row_id"] == "i2" and [r["reply"] for r in failed["replies"]] == [
        "no",
        "1. What?",
    ]
    assert failed["replies"][1]["problem"] == "it held no usable pair: question without an answer"

    assert report["units"] == dict(
        units=4,
        answered=2,
        failed=1,
        waiting=1,
        answered_at_once=1,
        asked_again=2,
        answered_when_asked_again=1,
    )
    assert report["parse_rate"] == round(2 / 3, 4)
    assert report["replies"] == dict(replies=6, usable=2, unfinished=1, too_long=0)
    assert report["forms"] == {"none": 4, "json": 1, "Q:": 1}
    assert report["pairs"] == {"all": 3, "kept": 2} and report["pairs_per_reply"] == {
        "1": 1,
        "2": 1,
    }
    assert report["tokens"] == dict(prompt=60, completion=120, replies_without=0)
    rules = report["rules"]
    assert rules["meta_talk"]["dropped"] == 1 and rules["meta_talk"]["only_this_one"] == 0
    assert rules["numbers"]["dropped"] == 0 and rules["numbers"]["fail_it"] == 1
    assert json.loads(paths.report.read_text())["units"] == report["units"]
    text = "\n".join(write.describe(report))
    assert "WARNING: 1 units have no reply yet" in text and "3 pairs (1.50 a reply" in text


def test_leak_figures_by_hand(tmp_path):
    a = unit(0)
    report = write.write([a], journal(record(a, pairs(LEAK, OTHER))), tmp_path / "qa.jsonl", CONFIG, about=ABOUT)
    # LEAK's answer: hypodense, mass, left, lobe; all four in its question. OTHER's: none.
    # The caption's: axial, shows, hypodense, mass, left, lobe, liver (seven); four and one of them.
    assert report["leaks"]["all"]["leak"] == {"mean": 0.5, "at_least_half": 0.5}
    assert report["leaks"]["all"]["caption_leak"] == {
        "mean": pytest.approx((4 / 7 + 1 / 7) / 2, abs=1e-4),
        "at_least_half": 0.5,
    }
    assert report["leaks"]["kept"]["leak"] == {"mean": 0.0, "at_least_half": 0.0}
    assert report["rules"]["leak"]["dropped"] == 1


def test_a_pair_is_not_asked_twice_about_a_case(tmp_path):
    """Nor kept for being like a pair that was dropped."""
    many = [unit(0), unit(1), unit(2, case="c2"), unit(3, case=""), unit(4, case="")]
    found = journal(*(record(u, pairs(GOOD, LEAK)) for u in many))
    report = write.write(many, found, tmp_path / "qa.jsonl", CONFIG, about=ABOUT)
    kept = [r["question_id"] for r in lines(tmp_path / "qa.jsonl")]
    assert kept == [f"i{n}_caption_v1_1" for n in (0, 2, 3, 4)]
    drops = lines(tmp_path / "qa.drops.jsonl")
    assert [d["reason"] for d in drops] == ["leak", "near_duplicate", *["leak"] * 4]
    assert "i0_caption_v1_1" in drops[1]["why"]
    assert report["rules"]["near_duplicate"] == report["rules"]["near_duplicate"] | {
        "dropped": 1,
        "fail_it": 1,
        "only_this_one": 1,
    }


def test_options_are_drawn_and_the_letter_follows_its_text(tmp_path):
    reply = json.dumps({"question": "Which organ?", "choices": ["Liver", "Lung", "Heart", "Skin"], "answer": "A"})
    many = [unit(n, kind="choices", name="choice", case="") for n in range(400)]
    found = journal(*(record(u, reply) for u in many))
    report = write.write(many, found, tmp_path / "qa.jsonl", CONFIG, about=ABOUT)
    rows = lines(tmp_path / "qa.jsonl")
    orders = collections.Counter()
    for row in rows:
        options = [row[f"choice_{x}"] for x in "abcd"]
        assert sorted(options) == ["Heart", "Liver", "Lung", "Skin"]
        assert options["ABCD".index(row["answer_letter"])] == row["answer"] == "Liver"
        assert row["answer_type"] == "CLOSED"
        orders[tuple(options)] += 1
    assert len(orders) == 24
    # 100 of each letter within 4.5 standard deviations (8.7).
    assert all(60 < n < 140 for n in report["answer_letters"].values())
    # Another seed, other orders; the same seed, the same.
    again = [{}, {}]
    for table, seed in zip(again, (3, 4), strict=True):
        write.write(many, found, tmp_path / "b.jsonl", CONFIG, about=ABOUT | {"seed": seed})
        table.update((r["question_id"], r["answer_letter"]) for r in lines(tmp_path / "b.jsonl"))
    assert again[0] == {r["question_id"]: r["answer_letter"] for r in rows} != again[1]


def test_the_same_bytes_whatever_was_there_and_however_long_it_took(tmp_path):
    many = [unit(n) for n in range(6)]
    replies = [pairs(GOOD), "no", pairs(LEAK, OTHER), pairs(BAD), "", pairs(("a b?", "c \u2028 d"))]

    def files(folder, seconds):
        found = journal(*(record(u, r, seconds=seconds) for u, r in zip(many, replies, strict=True)))
        report = write.write(many, found, folder / "qa.jsonl", CONFIG, about=ABOUT)
        assert report.pop("speed") == {
            "seconds": 6 * seconds,
            "new_tokens_per_second": 20 / seconds,
        }
        paths = write.paths_of(folder / "qa.jsonl")
        return report, [p.read_bytes() for p in (paths.output, paths.drops, paths.failed)]

    once = files(tmp_path / "a", 1.0)
    assert files(tmp_path / "a", 2.0) == once == files(tmp_path / "b", 4.0)
    assert sorted(os.listdir(tmp_path / "a")) == [
        "qa.drops.jsonl",
        "qa.failed.jsonl",
        "qa.jsonl",
        "qa.report.json",
    ]


def test_the_rows_are_read_and_curated(tmp_path):
    """By those who come next, each row whole."""
    a, b = unit(0), unit(1, kind="choices", name="choice")
    choice = {"question": "Which organ?", "choices": ["Liver", "Lung", "Heart", "Skin"]}
    found = journal(record(a, pairs(GOOD, OTHER)), record(b, json.dumps({**choice, "answer": "C"})))
    write.write([a, b], found, tmp_path / "qa.jsonl", CONFIG, about=ABOUT)
    curate({"rules": [{"rule": "empty"}]}, [str(tmp_path / "qa.jsonl")], tmp_path / "curated.jsonl")
    for name in ("qa.jsonl", "curated.jsonl"):
        rows, read = lines(tmp_path / name), list(qa_files.read_qa(tmp_path / name))
        assert len(read) == 3
        for row, pair in zip(rows, read, strict=True):
            assert pair.question_id == row["question_id"] and pair.answer == row["answer"]
            assert pair.answer_type == row["answer_type"] and pair.extra["mode"] == row["mode"]
        assert read[2].extra["choice_a"] == rows[2]["choice_a"]
        assert "reply" not in read[0].extra


def test_an_odd_reply_and_image_id_do_no_harm(tmp_path):
    many = [unit(0, image="../../x\ud800/{}"), unit(1, image="<b>\n{}")]
    found = journal(
        record(many[0], pairs(GOOD) + "\ud800"), record(many[1], "\ud800\x00", None), record(many[1], "{" * 100, None)
    )
    write.write(many, found, tmp_path / "qa.jsonl", CONFIG, about=ABOUT)
    (row,) = lines(tmp_path / "qa.jsonl")
    assert row["provenance"]["reply"] == pairs(GOOD) + "\ud800"
    assert len(lines(tmp_path / "qa.failed.jsonl")) == 1


def test_nothing_is_left_of_a_run_that_fails(tmp_path):
    a = unit(0)
    found = journal(record(a, pairs(GOOD)))
    with pytest.raises(ValueError, match="i0 comes twice with caption_v1"):
        write.write([a, a], found, tmp_path / "qa.jsonl", CONFIG, about=ABOUT)
    assert os.listdir(tmp_path) == []
    (tmp_path / "qa.jsonl").write_text("somebody's")
    with pytest.raises(ValueError, match="expected a new name"):
        write.write([a], found, tmp_path / "qa.jsonl", CONFIG, about=ABOUT)
    with pytest.raises(ValueError, match="can't be written"):
        write.write([a], found, tmp_path / "qa.jsonl" / "x.jsonl", CONFIG, about=ABOUT)
    assert (tmp_path / "qa.jsonl").read_text() == "somebody's"


@pytest.mark.parametrize(
    "config, message",
    [
        ({"rules": [{"rule": "lenght"}]}, "rules\\[0\\] is 'lenght'"),
        ({"rules": [{"rule": "length", "max": 3}]}, "unknown setting max"),
        ({"rules": [{"rule": "length", "drop": "no"}]}, "drop is 'no'"),
        ({"rules": [{"rule": "near_duplicate"}, {"rule": "empty"}]}, "as the last one"),
        ({"rules": [{"rule": "near_duplicate", "within": "split"}]}, "within is 'split'"),
        ({"rules": [], "relevance": {}}, "config has 'relevance'"),
    ],
)
def test_a_bad_config_is_refused_before_anything_is_read(tmp_path, config, message):
    with pytest.raises(DataError, match=message):
        write.write([], journal(), tmp_path / "qa.jsonl", config, about=ABOUT)
    assert os.listdir(tmp_path) == []


def test_nothing_is_dropped_where_the_config_says_so(tmp_path):
    a = unit(0)
    config = default.get_config("drop=no").to_dict()
    write.write([a], journal(record(a, pairs(GOOD, BAD, LEAK))), tmp_path / "qa.jsonl", config, about=ABOUT)
    rows = lines(tmp_path / "qa.jsonl")
    assert len(rows) == 3 and lines(tmp_path / "qa.drops.jsonl") == []
    assert [r["quality"]["tags"][:1] for r in rows] == [[], ["meta_talk"], ["leak"]]
    with pytest.raises(ValueError, match="known: max_share, within, drop"):
        default.get_config("max=1")
