"""The filter from end to end: every row accounted for, the same result however often stopped."""

import json
import os
import random
import signal
import subprocess
import sys
import time

import pytest

from data_prep.build import build
from data_prep.curate import run as run_lib
from data_prep.curate.configs import paper
from data_prep.curate.relevance import Relevance, repeats
from data_prep.curate.run import curate, describe, paths_of
from data_prep.files import DataError
from data_prep.qa_files import read_qa

CONFIG = {
    "rules": [
        {"rule": "empty"},
        {"rule": "chatter"},
        {"rule": "measurement"},
        {"rule": "answer_leak"},
        {"rule": "near_duplicate", "within": "image"},
    ],
    "relevance": {"min_cases": 3, "power": 1.0},
}


def lines(path):
    return [json.loads(line) for line in path.read_bytes().splitlines()]


def make_rows(n=60, seed=0):
    """Rows of which each kind of fault has some."""
    rng = random.Random(seed)
    rows = []
    for i in range(n):
        row = {
            "question_id": f"q{i}",
            "image_id": f"i{i // 3}",
            "case_id": f"c{i // 6}",
            "category": ["Chest", "Brain", "Chest", "Rare"][i // 6 % 4],
            "question": f"What does the {rng.choice(['arrow', 'star', 'circle'])} {i} point at?",
            "answer": rng.choice(["A mass", "Fluid é", "胸水"]) + f" number{i % 5}",
        }
        match i % 10:
            case 3:
                row["answer"] = ""
            case 5:
                row["answer"] = "As an AI language model, I cannot see 3 cm"
            case 7:
                row["question"], row["answer"] = rows[-1]["question"], rows[-1]["answer"]
        rows.append(row)
    return rows


def write(path, rows):
    path.write_text("".join(json.dumps(r, ensure_ascii=False) + "\n" for r in rows), "utf-8")
    return path


@pytest.fixture
def rows_file(tmp_path):
    return write(tmp_path / "rows.jsonl", make_rows())


def results(output):
    """Bytes of all three files."""
    paths = paths_of(output)
    return [p.read_bytes() for p in (paths.output, paths.drops, paths.report)]


def test_every_row_is_kept_or_dropped_with_its_reasons(rows_file, tmp_path):
    report = curate(CONFIG, [str(rows_file)], tmp_path / "out" / "kept.jsonl")
    paths = paths_of(tmp_path / "out" / "kept.jsonl")
    rows, kept, drops = make_rows(), lines(paths.output), lines(paths.drops)
    assert report["rows_read"] == 60 == len(kept) + len(drops)
    assert report["rows_kept"] == len(kept) == report["rows_written"]
    assert report == json.loads(paths.report.read_bytes())
    # Rows come out as they went in, with where they came from.
    for row in kept:
        where = row.pop("curation")
        assert row == rows[where["number"] - 1] and where["file"] == str(rows_file)
        assert set(where["scores"]) == {"answer_leak", "near_duplicate"}
        passed = ["empty", "chatter", "measurement", "answer_leak", "near_duplicate", "category"]
        assert where["rules_passed"] == passed
    for drop in drops:
        assert drop["row"] == rows[drop["number"] - 1]
        assert drop["all_reasons"][0] == [drop["reason"], drop["why"]]
        compared = drop["reason"] in ("near_duplicate", "category")
        assert ("near_duplicate" in drop["scores"]) == compared
    by_reason = {}
    for drop in drops:
        by_reason.setdefault(drop["reason"], []).append(drop["number"] - 1)
    assert by_reason["empty"] == [3, 13, 23, 33, 43, 53]
    assert by_reason["chatter"] == [5, 15, 25, 35, 45, 55]  # all fail "measurement" as well
    assert by_reason["near_duplicate"] == [7, 17, 37, 47]  # 27 and 57 are about another image
    assert {rows[i]["category"] for i in by_reason["category"]} == {"Rare"}
    assert {r["category"] for r in kept} == {"Chest", "Brain"}
    rules = report["rules"]
    assert rules["measurement"] | {"first": 0} == {
        "dropped": 0,
        "would_drop": 6,
        "only_this_one": 0,
        "first": 0,
    }
    assert sum(r["dropped"] for r in rules.values()) == len(drops)
    assert rules["empty"]["first"][0]["row"] == "q3"


def test_categories_are_counted_in_cases_and_the_common_ones_weigh_more(rows_file, tmp_path):
    report = curate(CONFIG, [str(rows_file)], tmp_path / "kept.jsonl")
    found = report["categories"]
    assert {name: (c["cases"], c["weight"]) for name, c in found.items()} == {
        "Chest": (5, round(5 / 3, 4)),
        "Brain": (3, 1.0),
        "Rare": (2, 1.0),
    }
    assert list(found) == ["Chest", "Brain", "Rare"]
    assert found["Rare"]["rows_written"] == 0 < found["Rare"]["rows"]
    for row in lines(tmp_path / "kept.jsonl"):
        assert row["curation"]["weight"] == found[row["category"]]["weight"]


def test_repeats(rows_file, tmp_path):
    config = {**CONFIG, "relevance": {"min_cases": 1, "power": 1.0, "reinforce": "repeat", "max_weight": 2.5}}
    report = curate(config, [str(rows_file)], tmp_path / "kept.jsonl")
    kept = lines(tmp_path / "kept.jsonl")
    assert report["rows_written"] == len(kept) > report["rows_kept"]
    ids = [r["question_id"] for r in kept]
    assert len(ids) == len(set(ids)) and any(i.endswith("_again1") for i in ids)
    chest = [r for r in kept if r["category"] == "Chest"]
    originals = [r for r in chest if "repeat" not in r]
    assert {ids.count(r["question_id"]) for r in originals} == {1}
    assert 2 * len(originals) <= len(chest) <= 3 * len(originals)
    # A builder's --qa drops what a file says twice, but not what is repeated on purpose.
    assert [p.question_id for p in read_qa(tmp_path / "kept.jsonl")] == ids


def test_repeats_are_right_on_average():
    shares = [i / 1000 for i in range(1000)]
    for weight in (1, 1.25, 2.0, 2.999):
        assert sum(repeats(weight, s) for s in shares) / 1000 == pytest.approx(weight, abs=0.002)


def test_weight_and_category():
    r = Relevance(
        min_cases=100,
        power=0.5,
        max_weight=2.0,
        missing="drop",
        keywords=[["Chest", r"\blungs?\b"], ["Brain", "cerebr"]],
    )
    assert [r.weight("x", n) for n in (50, 100, 225, 900)] == [1.0, 1.0, 1.5, 2.0]
    assert r.weight("", 900) == 1.0
    assert r.category({"category": " Spine "}) == "Spine"
    assert r.category({"caption": "Left LUNG and cerebrum"}) == "Chest"
    assert r.category({"question": "Is the cerebrum seen?", "category": ""}) == "Brain"
    assert r.category({"question": "Is it?"}) == "" and r.reason("", 10) == "no category"
    assert r.reason("Chest", 99) == "Chest: 99 cases, fewer than 100" and not r.reason("Chest", 100)
    row = {"image_id": "x", "case_id": "c"}
    assert r.counted(row) != r.counted({"image_id": "c"}) != Relevance(count="images").counted(row)
    assert Relevance(count="images").reason("A", 3) == "A: 3 images, fewer than 100"
    keep = Relevance(below="keep")
    assert keep.reason("Chest", 1) is None and keep.reason("", 1) is None


# --- Stopping and going on ---


def test_same_input_same_bytes(rows_file, tmp_path):
    for name in ("a", "b"):
        curate(CONFIG, [str(rows_file)], tmp_path / name / "kept.jsonl")
    assert results(tmp_path / "a" / "kept.jsonl") == results(tmp_path / "b" / "kept.jsonl")


def test_cut_anywhere_it_goes_on_to_the_same_result(rows_file, tmp_path, monkeypatch):
    output = tmp_path / "kept.jsonl"

    def stop(*args):
        raise KeyboardInterrupt

    with monkeypatch.context() as m:
        m.setattr(run_lib, "_finish", stop)
        with pytest.raises(KeyboardInterrupt):
            curate(CONFIG, [str(rows_file)], output)
    journal = paths_of(output).journal.read_bytes()
    assert not output.exists() and len(journal.splitlines()) == 61
    curate(CONFIG, [str(rows_file)], output)
    whole = results(output)
    left = [journal[:cut] for cut in (0, 1, 40, *range(70, len(journal), 997), len(journal) - 1)]
    # As a power cut leaves it.
    left += [journal[:at] + bytes(64) + journal[at + 64 :] for at in range(100, len(journal) - 64, 3001)]
    for cut, found in enumerate(left):
        for path in tmp_path.glob("kept*"):
            path.unlink()
        paths_of(output).journal.write_bytes(found)
        curate(CONFIG, [str(rows_file)], output)
        assert results(output) == whole, f"case {cut}"
        assert not paths_of(output).journal.exists() and not list(tmp_path.glob("*.part"))


@pytest.mark.parametrize("at", ["kept.report.json", "kept.drops.jsonl", "kept.jsonl"])
def test_stopped_while_renaming(rows_file, tmp_path, monkeypatch, at):
    output, replace = tmp_path / "kept.jsonl", os.replace

    def stop(part, path):
        if path.name == at:
            raise KeyboardInterrupt
        replace(part, path)

    with monkeypatch.context() as m:
        m.setattr(os, "replace", stop)
        with pytest.raises(KeyboardInterrupt):
            curate(CONFIG, [str(rows_file)], output)
    assert not output.exists()
    curate(CONFIG, [str(rows_file)], output)
    curate(CONFIG, [str(rows_file)], tmp_path / "b" / "kept.jsonl")
    assert results(output) == results(tmp_path / "b" / "kept.jsonl")


def test_rows_judged_before_are_not_judged_again(rows_file, tmp_path, monkeypatch):
    judged, real = [], run_lib.Judge.judge

    def judge(self, row, name):
        if len(judged) == 25:
            raise KeyboardInterrupt
        judged.append(name)
        return real(self, row, name)

    monkeypatch.setattr(run_lib.Judge, "judge", judge)
    with pytest.raises(KeyboardInterrupt):
        curate(CONFIG, [str(rows_file)], tmp_path / "kept.jsonl")
    monkeypatch.setattr(run_lib.Judge, "judge", lambda s, r, n: judged.append(n) or real(s, r, n))
    curate(CONFIG, [str(rows_file)], tmp_path / "kept.jsonl")
    assert judged == [f"q{i}" for i in range(60)]


def test_done_already(rows_file, tmp_path, monkeypatch):
    curate(CONFIG, [str(rows_file)], tmp_path / "kept.jsonl")
    before = results(tmp_path / "kept.jsonl")
    monkeypatch.setattr(run_lib, "_judge_rest", None)
    assert curate(CONFIG, [str(rows_file)], tmp_path / "kept.jsonl")["already_there"]
    assert results(tmp_path / "kept.jsonl") == before


def test_other_rules_or_other_input_are_not_mixed(rows_file, tmp_path):
    output, other = tmp_path / "kept.jsonl", {**CONFIG, "relevance": None}
    curate(CONFIG, [str(rows_file)], output)
    before = results(output)
    with pytest.raises(DataError, match="made from other rules or other input"):
        curate(other, [str(rows_file)], output)
    assert results(output) == before
    curate(other, [str(rows_file)], output, overwrite=True)
    assert results(output) != before
    write(rows_file, make_rows(seed=1))
    with pytest.raises(DataError, match="made from other rules or other input"):
        curate(other, [str(rows_file)], output)
    output.unlink()
    paths_of(output).journal.write_bytes(b'{"made_by": "another"}\n')
    with pytest.raises(DataError, match="a run with other rules or other input was stopped"):
        curate(other, [str(rows_file)], output)
    curate(other, [str(rows_file)], output, overwrite=True)
    assert len(lines(output)) > 20


def test_overwrite_goes_on_too(rows_file, tmp_path, monkeypatch):
    output = tmp_path / "kept.jsonl"
    curate({**CONFIG, "relevance": None}, [str(rows_file)], output)

    def stop(*args):
        raise KeyboardInterrupt

    with monkeypatch.context() as m:
        m.setattr(run_lib, "_finish", stop)
        with pytest.raises(KeyboardInterrupt):
            curate(CONFIG, [str(rows_file)], output, overwrite=True)
    monkeypatch.setattr(run_lib.Judge, "judge", None)
    assert curate(CONFIG, [str(rows_file)], output, overwrite=True)["rows_read"] == 60


def _command(*args):
    return [sys.executable, "-m", "data_prep.curate", *map(str, args)]


@pytest.mark.slow
def test_command_stopped_by_ctrl_c_goes_on(tmp_path, repo_root):
    rows = write(tmp_path / "rows.jsonl", make_rows(15_000))
    config = repo_root / "data_prep/curate/configs/paper.py"
    command = _command(f"--config={config}", f"--input={rows}", f"--output={tmp_path}/kept.jsonl")
    child = subprocess.Popen(command, cwd=repo_root, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    journal, deadline = tmp_path / "kept.journal", time.monotonic() + 60
    while not journal.exists() or journal.stat().st_size < 10_000:
        assert time.monotonic() < deadline and child.poll() is None
        time.sleep(0.01)
    child.send_signal(signal.SIGINT)
    _, err = child.communicate(timeout=60)
    assert child.returncode == 130 and "the same command resumes" in err, err
    assert journal.exists() and not (tmp_path / "kept.jsonl").exists()
    run = subprocess.run(command, cwd=repo_root, capture_output=True, text=True, timeout=100)
    assert run.returncode == 0, run.stderr
    assert "going on after" in run.stdout and "15,000 rows read" in run.stdout
    again = subprocess.run(command, cwd=repo_root, capture_output=True, text=True, timeout=100)
    assert again.returncode == 0 and "was already there" in again.stdout


# --- Inputs ---


def test_lines_that_are_no_rows_are_dropped_with_their_place(tmp_path):
    path = tmp_path / "rows.jsonl"
    good = json.dumps(make_rows(1)[0]).encode()
    odd = [
        b'{"question": "half',
        b"[1]",
        b'{"question": "a?", "answer": "b"}',
        b"\xff\xfe",
        b'{"question": ["a"], "answer": "b", "image_id": "i"}',
        b"[" * 100_000,
    ]
    path.write_bytes(b"\xef\xbb\xbf" + good + b"\n\n" + b"\n".join(odd) + b"\n" + good)
    config = {"rules": []}
    report = curate(config, [str(path)], tmp_path / "kept.jsonl")
    assert (report["rows_read"], report["rows_kept"]) == (8, 2)
    drops = lines(tmp_path / "kept.drops.jsonl")
    assert [d["number"] for d in drops] == [3, 4, 5, 6, 7, 8]
    assert {d["reason"] for d in drops} == {"malformed"}
    assert drops[2]["why"] == "no key image_id"


def test_numbers_as_answers_and_half_a_surrogate_pair(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text('{"question": "How?", "answer": 3, "image_id": 7, "x": "\\ud800"}\n')
    curate({"rules": []}, [str(path)], tmp_path / "kept.jsonl")
    (row,) = lines(tmp_path / "kept.jsonl")
    assert (row["answer"], row["image_id"], row["x"]) == ("3", "7", "\ud800")
    (tmp_path / "kept.jsonl").read_text("utf-8")


def test_several_inputs_are_one_corpus(tmp_path):
    rows = make_rows(30)
    parts = [write(tmp_path / "a.jsonl", rows[:17]), write(tmp_path / "b.jsonl", rows[17:])]
    one = curate(CONFIG, [str(write(tmp_path / "all.jsonl", rows))], tmp_path / "one" / "k.jsonl")
    two = curate(CONFIG, [str(p) for p in parts], tmp_path / "two" / "k.jsonl")
    assert one["rules"] == two["rules"] and one["categories"] == two["categories"]
    assert sum(two["files"][str(parts[0])].values()) == 17


def test_medm_file(tmp_path):
    raw = "Here are pairs:\n\nQ: What is it?\nA: A mass.\n\nQ: How large is it?\nA: 3 cm"
    objects = [{"U_id": f"M{i}", "image_id": f"M{i}_a", "qa_pairs_raw": raw} for i in range(2)]
    path = tmp_path / "qa.json"
    path.write_text("\n".join(json.dumps(o, indent=1) for o in objects))
    report = curate(CONFIG, [str(path)], tmp_path / "kept.jsonl")
    assert (report["rows_read"], report["rows_kept"]) == (4, 2)
    assert {r["case_id"] for r in lines(tmp_path / "kept.jsonl")} == {"M0", "M1"}
    assert any("2,052" in n or "2 rows read" in n for n in report["notes"])


def test_built_data_set(slake, tmp_path):
    slake.write()
    build("slake", manual_dir=slake.root, data_dir=tmp_path / "d", config="en")
    spec = "tfds:slake/en:train"
    report = curate({"rules": [{"rule": "empty"}]}, [spec], tmp_path / "k.jsonl", data_dir=tmp_path / "d")
    assert report["rows_kept"] == 4
    row = lines(tmp_path / "k.jsonl")[0]
    assert row["question"] and row["modality"] == "CT" and "image" not in row
    assert row["curation"]["file"] == spec
    for wrong in ("tfds:slake/en:trian", "tfds:slake/fr:train", "tfds:slake"):
        with pytest.raises(DataError, match="^tfds:"):
            curate({"rules": []}, [wrong], tmp_path / "x.jsonl", data_dir=tmp_path / "d")


@pytest.mark.parametrize(
    "content, message",
    [
        (None, "can't be read"),
        ("", "empty"),
        ("[{}]", "found a JSON list"),
        ("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n", "git-LFS pointer"),
    ],
)
def test_input_refused(tmp_path, content, message):
    path = tmp_path / "rows.jsonl"
    if content is not None:
        path.write_text(content)
    with pytest.raises(DataError, match=message) as e:
        curate(CONFIG, [str(path)], tmp_path / "kept.jsonl")
    assert str(path) in str(e.value)
    assert not (tmp_path / "kept.jsonl").exists()


@pytest.mark.parametrize(
    "config, message",
    [
        ({"rules": [{"rule": "near_duplicate"}, {"rule": "empty"}]}, "as the last one"),
        ({"rules": [{"rule": "near_duplicate", "within": "x"}]}, "within is 'x'"),
        ({"rules": [{"rule": "near_duplicate", "what": 1}]}, "what"),
        ({"rules": [], "relevance": {"below": "x"}}, "relevance.below is 'x'"),
        ({"rules": [], "relevance": {"min_cases": 0}}, "min_cases 0"),
        ({"rules": [], "relevance": {"count": "rows"}}, "relevance.count is 'rows'"),
        ({"rules": [], "relevance": {"keywords": [["a", "("]]}}, "relevance.keywords"),
        ({"rules": [], "relevance": {"what": 1}}, "what"),
    ],
)
def test_config_refused(rows_file, tmp_path, config, message):
    with pytest.raises(DataError, match=message):
        curate(config, [str(rows_file)], tmp_path / "kept.jsonl")


def test_two_runs_at_once(rows_file, tmp_path):
    import fcntl

    with open(tmp_path / "kept.journal", "ab") as journal:
        fcntl.flock(journal, fcntl.LOCK_EX)
        with pytest.raises(DataError, match="another run is writing it"):
            curate(CONFIG, [str(rows_file)], tmp_path / "kept.jsonl")


# --- The paper's config ---


def test_paper_config(rows_file, tmp_path):
    config = json.loads(json.dumps(paper.get_config("min_cases=3,reinforce=repeat").to_dict()))
    assert [r["rule"] for r in config["rules"]][-1] == "near_duplicate"
    report = curate(config, [str(rows_file)], tmp_path / "kept.jsonl")
    text = "\n".join(describe(report))
    assert "60 rows read" in text and "category Chest" in text
    with pytest.raises(ValueError, match="'min' is unknown"):
        paper.get_config("min=3")


@pytest.mark.real_data
@pytest.mark.slow
def test_the_authors_medpix_questions(real_data, tmp_path):
    config = json.loads(json.dumps(paper.get_config().to_dict()))
    path = real_data / "medm" / "qa_pairs_generated_all.json"
    report = curate(config, [str(path)], tmp_path / "kept.jsonl")
    assert report["rows_read"] == 10_260
    assert 7_000 < report["rows_kept"] < 8_500
    assert report["rules"]["patient_history"]["would_drop"] > 400
    assert report["rules"]["near_duplicate"]["dropped"] > 50
