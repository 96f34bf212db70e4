"""Review of pairs: a sample that doesn't depend on the file's order, a page on which nothing runs
but its own script, verdicts that come back to the pair they were given on, or are refused."""

import csv
import io
import json
import random
import re
import subprocess
import sys

import PIL.Image
import pytest

from data_prep.build import build
from data_prep.datasets.medpix2 import fake
from paligemma_med.metrics import stats
from paligemma_med.pp import rows as row_keys
from tests import chromium
from tools.review_qa import page, pictures, rows, verdicts
from tools.review_qa.__main__ import write_page

CHOICES = dict(choice_a="CT", choice_b="MR", choice_c="A film", choice_d="None", answer_letter="B")
HOSTILE = (
    '"><script>window.hit=1</script><img src="http://e.example/x" onerror="window.hit=1">'
    "</textarea></style>{{ 7*7 }} javascript:window.hit=1 \u202e\u0000 & '"
)


def pair(number, image=None, **kw):
    return (
        dict(
            question_id=f"q{number}",
            image_id=f"i{number // 2 if image is None else image}",
            question=f"What is sign {number}?",
            answer=f"Answer {number}.",
            caption="A caption.",
            mode=("caption_v1", "case_v1")[number % 3 == 0],
            quality=dict(leak=0.25, caption_leak=0.5, tags=["history", "not_in_source"]),
        )
        | kw
    )


def save(path, made):
    path.write_text("".join(json.dumps(row) + "\n" for row in made))
    return path


def write_csv(path, *lines, head="question_id,verdict,note"):
    path.write_text("\n".join([head, *lines]) + "\n", encoding="utf-8")
    return path


# --- The sample ---


def test_the_sample_depends_on_ids_and_seed_alone(tmp_path):
    made = [pair(i) for i in range(200)]
    chosen, total = rows.sample(save(tmp_path / "a", made), 40, seed=3)
    assert total == 200 and len({r["question_id"] for r in chosen}) == 40
    random.Random(0).shuffle(made)
    again, _ = rows.sample(save(tmp_path / "b", made), 40, seed=3)
    assert chosen == again
    other, _ = rows.sample(tmp_path / "a", 40, seed=4)
    assert len([r for r in other if r in chosen]) < 25
    # Of half of the rows, those that were drawn before are drawn again.
    half, _ = rows.sample(save(tmp_path / "c", made[:100]), 40, seed=3)
    assert [r for r in chosen if r in made[:100]] == [r for r in half if r in chosen]
    everything, _ = rows.sample(tmp_path / "a", 0, seed=3)
    assert everything[:40] == chosen and len(everything) == 200


def test_each_pair_is_as_likely_as_any_other(tmp_path):
    path = save(tmp_path / "a", [pair(i) for i in range(10)])
    counts = dict.fromkeys((f"q{i}" for i in range(10)), 0)
    for seed in range(400):
        for row in rows.sample(path, 3, seed)[0]:
            counts[row["question_id"]] += 1
    # 120 expected, standard deviation 9.2.
    assert all(80 < n < 160 for n in counts.values()), counts


@pytest.mark.parametrize(
    "text, message",
    [
        ("", "the file is empty"),
        ("{}\n{", "line 1: question_id is None"),
        ('{"a": \n', "line 1: not "),
        ("[1]\n", "line 1: found a list"),
        (json.dumps(pair(1, answer=3)), "line 1: answer is 3"),
        (json.dumps(pair(1)) + "\n\n" + json.dumps(pair(1)), "line 3: question_id 'q1' is used"),
        ("\udcff".encode("utf-8", "surrogateescape").decode("latin1"), "line 1: not "),
    ],
)
def test_files_of_another_form_are_refused(tmp_path, text, message):
    (tmp_path / "f.jsonl").write_text(text)
    with pytest.raises(ValueError, match=re.escape(message)) as e:
        list(rows.read(tmp_path / "f.jsonl"))
    assert "f.jsonl" in str(e.value) and "\n" not in str(e.value)
    with pytest.raises(ValueError, match="can't be read"):
        list(rows.read(tmp_path / "nowhere.jsonl"))


# --- Images ---


@pytest.fixture(scope="module")
def release(tmp_path_factory):
    return fake.write(tmp_path_factory.mktemp("raw") / "medpix2")


def test_images_of_a_folder_a_release_and_a_data_set_are_the_same(release, tmp_path):
    build("medpix2", manual_dir=release, data_dir=tmp_path, config="caption")
    image_id = fake.images_of("MPX1005")[0]  # of split validate
    content = (release / "images" / f"{image_id}.png").read_bytes()
    specs = [f"{release}/images", f"release:medpix2:{release}", "tfds:medpix2/caption"]
    specs += [f"release:medpix2:{release}:validate", "tfds:medpix2/caption:validate"]
    for spec in specs:
        find = pictures.open_pictures(spec, tmp_path)
        assert find(image_id) == content, spec
        for nothing in ("MPX9_synpic9", "../images/" + image_id, "/etc/passwd", "a\0b", "C:\\x"):
            assert find(nothing) is None, (spec, nothing)
    for spec in ("tfds:medpix2/caption:train", f"release:medpix2:{release}:train"):
        assert pictures.open_pictures(spec, tmp_path)(image_id) is None


@pytest.mark.parametrize(
    "spec",
    [
        "{0}/nowhere",
        "release:slake:{0}",
        "release:medpix2",
        "release:medpix2:{0}/nowhere",
        "tfds:medpix2/captoin",
        "tfds:../x",
    ],
)
def test_images_that_aren_t_there_are_told(release, tmp_path, spec):
    with pytest.raises(ValueError) as e:
        pictures.open_pictures(spec.format(release), tmp_path)
    assert "\n" not in str(e.value) and ("expected" in str(e.value) or "not built" in str(e.value))


def test_images_are_shrunk():
    out = io.BytesIO()
    PIL.Image.new("I;16", (1600, 900), 40000).save(out, "PNG")
    with PIL.Image.open(io.BytesIO(pictures.shrunk(out.getvalue()))) as image:
        assert image.format == "JPEG" and image.size == (512, 288)
        assert abs(image.convert("L").getpixel((9, 9)) - 40000 / 257) < 2
    with pytest.raises(ValueError, match="not a readable image"):
        pictures.shrunk(b"nothing")


# --- The page ---


def test_the_page_needs_nothing_and_holds_every_pair(release, tmp_path):
    ids = fake.images_of("MPX1001")
    made = [pair(i, image=0, image_id=ids[i % 2]) for i in range(6)] + [pair(9, **CHOICES)]
    path, out = save(tmp_path / "qa.jsonl", made), tmp_path / "review.html"
    find = [f"release:medpix2:{release}"]
    assert write_page(path, out, images=find) == (7, 7, 1)
    text = out.read_text()
    assert text.count('class="card"') == 3 and text.count("<article") == 7
    assert text.count('src="data:image/jpeg;base64,') == 2 and "image not found" in text
    assert re.findall(r'(?:src|href|action)="(?!data:)[^"]*"', text) == []
    assert not re.search(r'(?:url\(|@import|style=|\son\w+=")', text)
    assert all(text.count(f"Answer {i}.") == 1 for i in range(6)) and "leak 0.25" in text
    assert "B: MR ✓" in text and "None" in text and "not in source" in text
    assert write_page(path, out, count=2) == (2, 7, len({r["image_id"] for r in rows.sample(path, 2)[0]}))


@chromium.needed
def test_verdicts_by_mouse_and_keys_are_remembered_and_come_back(release, tmp_path):
    ids = ["=1+1", "'@x", '__proto__", "y', "a,b\nc", "zü", "last"]
    image = fake.images_of("MPX1001")[0]
    made = [pair(i, question_id=q, image_id=image) for i, q in enumerate(ids)]
    path, out = save(tmp_path / "qa.v1.jsonl", made), tmp_path / "review.html"
    write_page(path, out, images=[str(release / "images")])
    order = [r["question_id"] for r in rows.sample(path, 100)[0]]
    with chromium.browser(tmp_path / "c") as tab:
        tab.downloads()
        tab.open(out)
        assert tab.js("document.querySelector('img').naturalWidth") > 0
        tab.click("article:nth-of-type(1) button[value=discard]")
        tab.key("t")
        tab.write('=SUM(1), "no"\nkd')
        assert tab.text("#told") == "1 of 6 reviewed: 0 keep, 1 discard, 0 unsure"
        tab.key("Escape")
        for key in ("n", "k", "u", "d", "ArrowUp", "d", "k", "x", "k"):  # the fourth: d, then none
            tab.key(key)
        assert tab.text("#told").startswith("5 of 6 reviewed: 3 keep, 1 discard, 1 unsure")
        tab.set("#show", "open")
        assert tab.js("[...document.querySelectorAll('.pair')].filter(p => !p.hidden).length") == 1
        tab.click("#save")
        name, content = tab.downloaded()
        for _ in range(5):  # again: what was said is still there, once Chromium has it written
            tab.open(out)
            if tab.text("#told")[0] != "0":
                break
        assert tab.text("#told").startswith("5 of 6 reviewed: 3 keep, 1 discard, 1 unsure")
        assert tab.js("document.querySelector('textarea').value") == '=SUM(1), "no"\nkd'
        tab.click("article:nth-of-type(1) button[value=discard]")  # taken back
        assert tab.text("#told").startswith("4 of 6 reviewed: 3 keep, 0 discard")
        assert tab.problems == [] and tab.outside == []
    assert name == "review_qa.v1.csv"
    (tmp_path / name).write_bytes(content)
    found = verdicts.read(tmp_path / name)
    said = {q: v for q, (v, _, _, _) in found.items()}
    expected = zip(order, ("discard", "keep", "unsure", "keep", "keep"), strict=False)
    assert said == dict(expected)
    assert found[order[0]][1] == '=SUM(1), "no"\nkd'
    table = csv.reader(io.StringIO(content.decode("utf-8-sig"), newline=""))
    assert not any(re.match(r"[=+@-]", cell) for line in table for cell in line)
    report = verdicts.apply(path, found, tmp_path / name, tmp_path / "out.jsonl")
    left = [json.loads(x)["question_id"] for x in (tmp_path / "out.jsonl").open()]
    assert left == [q for q in ids if q != order[0]]
    assert report["templates"]["all"]["keep_rate"] == 3 / 4


@chromium.needed
def test_hostile_texts_are_inert(tmp_path):
    made = [
        pair(
            1,
            question=HOSTILE,
            answer=HOSTILE,
            caption=HOSTILE,
            mode=HOSTILE,
            case_id=HOSTILE,
            image_id=HOSTILE,
            question_id=HOSTILE,
            quality={HOSTILE: 0.5, "tags": [HOSTILE]},
        ),
        pair(2, **dict.fromkeys(row_keys.CHOICES, HOSTILE), answer_letter="A", quality=[HOSTILE]),
        pair(3, caption=None, mode=7, quality=None, case_id={}),
        pair(4, question="half \ud800 of a character"),
    ]
    path = save(tmp_path / "<img src=x onerror=hit=1>&amp;.jsonl", made)
    write_page(path, tmp_path / "review.html")
    with chromium.browser(tmp_path / "c") as tab:
        tab.open(tmp_path / "review.html")
        for key in "kduk":
            tab.key(key)
        assert tab.text("#told").startswith("4 of 4 reviewed: 2 keep, 1 discard, 1 unsure")
        assert tab.js("window.hit === undefined && document.images.length === 0")
        assert tab.count("script") == tab.count("style") == 1 and tab.count("article") == 4
        shown = tab.js("[...document.querySelectorAll('article')].map(a => a.dataset.id)")
        # HTML knows no zero byte: it is shown as U+FFFD in an attribute, and as nothing in a text.
        number = shown.index(HOSTILE.replace("\0", "\ufffd"))
        title = tab.js(f"document.querySelectorAll('h3')[{number}].textContent")
        assert title == HOSTILE.replace("\0", "")
        assert tab.problems == [] and tab.outside == []
        # Even a script that got in wouldn't run; and none can be made of a text.
        tab.js("(s => {s.append('window.hit = 1'); document.body.append(s)})(document.createElement('script'))")
        assert tab.js("window.hit === undefined") and "will not be executed" in str(tab.problems)
        with pytest.raises(RuntimeError, match="TrustedScript"):
            tab.js("Object.assign(document.createElement('script'), {textContent: 'window.hit = 1'})")


# --- Verdicts ---


def test_verdicts_take_out_what_was_discarded(tmp_path):
    made = [pair(i) for i in range(12)]
    made[3]["extra"] = {"kept": [1, "ü"]}
    path = save(tmp_path / "qa.jsonl", made)
    lines = path.read_bytes().splitlines(keepends=True)
    said = ["keep"] * 4 + ["discard"] * 2 + ["unsure", "", "Keep "]
    table = write_csv(tmp_path / "v.csv", *(f'q{i},{v},"n, {i}"' for i, v in enumerate(said)), ",,")
    out = tmp_path / "out.jsonl"
    report = verdicts.apply(path, verdicts.read(table), table, out)
    got = out.read_bytes().splitlines(keepends=True)
    assert len(got) == report["written"] == 10 and got[-3:] == lines[-3:]
    assert json.loads(got[3]) == made[3] | {"review": {"verdict": "keep", "note": "n, 3"}}
    assert json.loads(got[5])["review"] == {"verdict": "", "note": "n, 7"}
    drops = [json.loads(x) for x in (tmp_path / "out.drops.jsonl").open()]
    assert drops[0] == {"reason": "review: discard", "note": "n, 4", "row": made[4]}
    rates = report["templates"]
    assert rates["all"] | {"low": 0, "high": 0} == dict(
        reviewed=8, keep=5, discard=2, unsure=1, keep_rate=5 / 7, low=0, high=0
    )
    # q0, q3, q6 are of case_v1: kept, kept, unsure. Each has an image of its own.
    assert rates["case_v1"] | {"high": 1} == dict(
        reviewed=3, keep=2, discard=0, unsure=1, keep_rate=1.0, low=stats.wilson(2, 2)[0], high=1
    )
    kept = [1, 1, 1, 1, 0, 0, 1]
    images = [0, 0, 1, 1, 2, 2, 4]
    assert (rates["all"]["low"], rates["all"]["high"]) == stats.wilson_clustered(kept, images)
    assert json.loads((tmp_path / "out.report.json").read_text()) == report
    assert any("71.4 %" in line for line in verdicts.describe(report))
    report = verdicts.apply(path, verdicts.read(table), table, out, drop_unsure=True)
    assert report["written"] == 9 == len(out.read_bytes().splitlines())


def test_no_spreadsheet_takes_a_digest_for_a_number():
    found = [rows.digest(pair(i)) for i in range(300)]
    assert len(set(found)) == 300 and all(x[0] == "p" and x.isalnum() for x in found)


def test_verdicts_of_spreadsheets_are_read(tmp_path):
    (tmp_path / "v.csv").write_bytes("\ufeffVerdict;Question_ID\r\nKEEP;q1\r\n;q2\r\n".encode())
    assert {q: v[0] for q, v in verdicts.read(tmp_path / "v.csv").items()} == {
        "q1": "keep",
        "q2": "",
    }
    empty = verdicts.apply(save(tmp_path / "f", [pair(1), pair(2)]), {}, "v", tmp_path / "o")
    assert empty["templates"]["all"]["keep_rate"] is None and list(verdicts.describe(empty))


@pytest.mark.parametrize(
    "lines, message",
    [
        (["q1,keep,", "q7,discard,"], "v.csv line 3: question_id 'q7' isn't in"),
        (["q1,kept,"], "v.csv line 2: verdict 'kept'"),
        (["q1,keep,", "q1,keep,"], "v.csv line 3: question_id 'q1' has a verdict in line 2"),
        (["q1,keep"], "v.csv line 2: another number of cells than the header"),
        (['q1,keep,"a'], "v.csv line 2: a quote opens there and is never closed"),
        (["q1,keep,old"], "v.csv line 2: question_id 'q1' has another question or answer"),
        ([], "isn't"),
    ],
)
def test_verdicts_that_can_t_be_placed_are_refused(tmp_path, lines, message):
    path, out = save(tmp_path / "qa.jsonl", [pair(1), pair(2)]), tmp_path / "out.jsonl"
    head = "question_id,verdict," + ("pair" if lines[-1:] == ["q1,keep,old"] else "note")
    table = write_csv(tmp_path / "v.csv", *lines, head=head)
    if not lines:
        assert verdicts.read(table) == {}
        return
    with pytest.raises(ValueError, match=re.escape(message)) as e:
        verdicts.apply(path, verdicts.read(table), table, out)
    assert "\n" not in str(e.value) and not out.exists()


@pytest.mark.parametrize("text", ["", "a,b\n1,2\n", "question_id,verdict,verdict\n", "\x89PNG\xff"])
def test_tables_of_another_form_are_refused(tmp_path, text):
    (tmp_path / "v.csv").write_bytes(text.encode("latin1"))
    with pytest.raises(ValueError, match="expected a CSV with the columns question_id and verdict"):
        verdicts.read(tmp_path / "v.csv")


def test_nothing_that_is_read_is_overwritten(tmp_path):
    path = save(tmp_path / "qa.jsonl", [pair(1)])
    table = write_csv(tmp_path / "v.csv", "q1,keep,")
    for out in (path, table):
        with pytest.raises(ValueError, match="would be overwritten"):
            verdicts.apply(path, verdicts.read(table), table, out)
    before = path.read_bytes()
    with pytest.raises(ValueError, match="qa.jsonl is an input and would be overwritten"):
        write_page(path, tmp_path / "." / "qa.jsonl")
    for out in (tmp_path / "nosuch" / "r.html", path / "r.html"):
        with pytest.raises(ValueError, match="r.html can't be written: "):
            write_page(path, out)
    assert path.read_bytes() == before


@pytest.mark.slow
def test_command_line(tmp_path):
    path = save(tmp_path / "qa.jsonl", [pair(1)])
    write_csv(tmp_path / "v.csv", "q2,keep,")

    def run(*args):
        command = [sys.executable, "-m", "tools.review_qa", str(path), *args]
        return subprocess.run(command, capture_output=True, text=True)

    done = run(f"--verdicts={tmp_path}/v.csv", f"--output={tmp_path}/out.jsonl")
    assert done.returncode == 1 and done.stderr.startswith("error: ") and "q2" in done.stderr
    assert "Traceback" not in done.stderr and not (tmp_path / "out.jsonl").exists()


def test_without_jinja2_it_says_so(monkeypatch):
    monkeypatch.setitem(sys.modules, "jinja2", None)
    with pytest.raises(ValueError, match="pip install"):
        page.make([], 0, name="x", seed=0)
