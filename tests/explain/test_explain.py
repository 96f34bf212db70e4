"""Reports from Python and from the command line: answers, masks, many images, files, mistakes."""

import json
import re
import subprocess
import sys

import jax
import numpy as np
import PIL.Image
import pytest

from paligemma_med import explain, predict
from paligemma_med.checkpoints import workdir as workdirs
from paligemma_med.config import files as config_files
from paligemma_med.explain import answer, page
from paligemma_med.pp import ops_image
from paligemma_med.pp.tokenizer import Tokenizer
from paligemma_med.saliency import checks
from paligemma_med.saliency.methods import KINDS
from tests import chromium, tiny
from tests.explain import reports

QUESTION = "Is this an MRI?"
KW = dict(max_new_tokens=3, num_samples=2, seed=5)
LEFT = np.arange(50) < np.full((40, 1), 25)  # a mask; all reports here have one: one program for all


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """(workdir, what is loaded of it, pixels, their file)."""
    folder = tmp_path_factory.mktemp("explain")
    tiny.write_workdir(folder / "w", tiny.config(evals={}))
    config = config_files.from_json(workdirs.read_config(folder / "w"))
    pixels = np.random.default_rng(0).integers(0, 256, (40, 50, 3), np.uint8)
    PIL.Image.fromarray(pixels).save(folder / "film.png")
    return folder / "w", explain.load(config, str(folder / "w")), pixels, folder / "film.png"


@pytest.fixture(scope="module")
def made(run):
    """A report with a mask on the image's left half."""
    _, loaded, pixels, file = run
    content = file.read_bytes()
    return explain.explain(loaded, content, QUESTION, title=file.name, mask=LEFT, **KW)


def test_the_answer_and_its_parts(run, made):
    _, loaded, pixels, _ = run
    made, _ = made
    # Greedy, and teacher-forced afterwards: each token is the most probable one at its place.
    for token, others, logprob in zip(made.tokens, made.others, made.logprobs):
        assert others[0][0] == token
        np.testing.assert_allclose(np.log(others[0][1]), logprob, atol=1e-4)
    prompt = "".join(made.prompt).replace("‹start›", "").replace("↵", "\n")
    assert prompt.lstrip() == f"answer en {QUESTION}\n"
    assert len(made.samples) == 2 and made.title == "film.png"
    np.testing.assert_array_equal(made.picture, pixels)
    assert made.seen.shape == (tiny.RES, tiny.RES, 3)
    # Which weights: the folder's name, and a number of what they are.
    assert re.fullmatch(r"w \([0-9a-f]{16}\)", dict(made.about)["Weights"])


def test_of_equally_probable_tokens_the_answer_has_the_one_that_predict_takes(run):
    """The first of them, which a draw from the most probable token gives in half of all cases."""
    _, loaded, _, file = run
    old = loaded.params["llm"]["embedder"]["input_embedding"]
    table, half = np.array(old), len(old) // 2
    table[half:] = table[:half]
    # Placed as the old one is, the programs of the other tests do.
    llm = {**loaded.params["llm"], "embedder": {"input_embedding": jax.device_put(table, old.sharding)}}
    tied = loaded._replace(params={**loaded.params, "llm": llm})
    for seed in range(3):
        made, _ = explain.explain(tied, file.read_bytes(), QUESTION, mask=LEFT, **{**KW, "seed": seed})
        assert (made.rivals[0][:, 0] + half == made.rivals[0][:, 1]).all()
        assert made.tokens == [others[0][0] for others in made.others]


@pytest.mark.slow  # another program to compile
def test_the_answer_is_the_one_that_predict_gives(run, made):
    workdir, loaded, pixels, _ = run
    (row,) = predict.predict(loaded.config, str(workdir), pixels, [QUESTION], max_new_tokens=3)
    (answer,) = row["answers"]
    assert made[0].answer == answer["answer"]
    np.testing.assert_allclose(made[0].logprobs.sum(), answer["logprob"], atol=1e-3)


def test_what_the_model_is_asked_without_the_image(run, made):
    _, loaded, pixels, _ = run
    made, raised = made
    blank = 0 * pixels + 127  # a little below the mid-grey of the control
    other, _ = explain.explain(loaded, blank, QUESTION, mask=LEFT, **KW)
    nothing = made.controls[0]
    assert nothing["answer"] == other.answer
    assert {f.name for f in raised} >= {"image_ignored", "low_image_mass", "samples_disagree"}
    assert [f["says"] for f in made.flags] == [f.says for f in raised if f.raised]


def test_the_mask(run, made):
    made, _ = made
    found = made.mask
    width = tiny.RES
    same = (made.seen == found.picture).all(-1)
    assert same[:, width // 2 :].all() and not same[:, : width // 2].all()
    assert found.logprobs.shape == made.logprobs.shape
    # The rectangle that is the left half has been computed with the other regions, too.
    box = [0, 0, made.grid[0], made.grid[1] // 2]
    at = made.regions.boxes.tolist().index(box)
    np.testing.assert_allclose(found.logprobs, made.regions.logprobs[at], atol=1e-3)


def test_masks_of_other_sizes_are_refused():
    whole = np.ones((40, 50), bool)
    image, seen = (40, 50, 3), (32, 32, 3)
    assert explain.fit_mask(whole, image, seen, True).shape == (32, 32)
    assert explain.fit_mask(whole[:32, :32], image, seen, True).all()
    with pytest.raises(ValueError, match=r"50 x 39 pixels; expected 50 x 40 .the image's. or 32 x"):
        explain.fit_mask(whole[:39], image, seen, True)
    with pytest.raises(ValueError, match=r"50 x 40 pixels; expected 32 x 32 .the model's"):
        explain.fit_mask(whole, image, seen, False)
    with pytest.raises(ValueError, match="covers nothing"):
        explain.fit_mask(~whole, image, seen, True)


def test_files(made, tmp_path):
    made, _ = made
    explain.write_npz(made, tmp_path / "a.npz")
    with np.load(tmp_path / "a.npz", allow_pickle=False) as arrays:
        np.testing.assert_array_equal(arrays["raw"], made.raw)
        for m in made.maps:
            name = explain.slug("_".join(filter(None, (m.method, m.variant))))
            np.testing.assert_array_equal(arrays[name], m.values)
        texts = json.loads(bytes(arrays["texts"]))
    assert texts["question"] == QUESTION and texts["tokens"] == made.tokens
    explain.write_pngs(made, tmp_path / "maps", "x_")
    names = {p.name for p in (tmp_path / "maps").iterdir()}
    assert names == {f"x_{m}_{t}.png" for m in KINDS for t in ("all", *(f"{r:02d}" for r in range(len(made.tokens))))}
    with PIL.Image.open(tmp_path / "maps" / "x_raw_all.png") as image:
        assert image.size == (50, 40)


@chromium.needed
def test_the_page_works(made, tmp_path):
    made, _ = made
    explain.write_page(made, tmp_path / "r.html")
    with chromium.browser(tmp_path) as browser:
        browser.open(tmp_path / "r.html")
        shown = {browser.js("document.getElementById('map').toDataURL()")}
        for selector in ("#tokens .chip", "#stage", "#overview button"):
            browser.click(selector)
            shown.add(browser.js("document.getElementById('map').toDataURL()"))
        assert len(shown) > 2
        assert "the given mask" in browser.text("main").lower()
        assert browser.problems == [] and browser.outside == []


def test_many(run, tmp_path, capsys):
    _, loaded, pixels, _ = run
    films = tmp_path / "films"
    (films / "a").mkdir(parents=True)
    hostile = "<img src=x onerror=alert(1)>'&.png"
    PIL.Image.fromarray(pixels).save(films / "a" / "film one.png")
    PIL.Image.fromarray(pixels[::-1]).save(films / hostile)
    (films / "broken.png").write_bytes(b"no image")
    asked = [one._replace(given="<i>left</i>") for one in explain.about_images(films, [QUESTION])]
    assert [n for n, *_ in asked] == [hostile, "a/film one.png", "broken.png"]
    failed = explain.explain_many(loaded, "films", asked, str(tmp_path / "out"), mask=LEFT, **KW)
    assert failed == 1
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == [
        "0001_img_src_x_onerror_alert_1.html",
        "0002_film_one.html",
        "index.html",
    ]
    index = (tmp_path / "out" / "index.html").read_text(encoding="utf-8")
    assert "<img src=x" not in index
    shown = (tmp_path / "out" / "0002_film_one.html").read_text(encoding="utf-8")
    assert "The answer given in the table: <b><bdi>&lt;i&gt;left&lt;/i&gt;</bdi>" in shown
    assert index.count("given: <bdi>&lt;i&gt;left&lt;/i&gt;</bdi>") == 3
    rows = index.split("<tr")[2:]
    assert "No report." in rows[0] and "broken.png" in rows[0]
    assert 'href="0002_film_one.html"' in index
    assert "broken.png: not a readable image" in capsys.readouterr().err


def test_many_go_on_where_they_were(run, tmp_path, monkeypatch, capsys):
    _, loaded, pixels, _ = run
    films = tmp_path / "films"
    films.mkdir()
    for i in range(3):
        PIL.Image.fromarray(pixels[i:]).save(films / f"{i}\x1b[31m.png")
    asked = explain.about_images(films, [QUESTION])
    made, kw = [], dict(mask=np.ones((tiny.RES,) * 2, bool), **KW)

    def counted(loaded, content, question, *, title, **kw):
        if stops and len(made) == stops:
            raise KeyboardInterrupt
        made.append(title)
        return explain_one(loaded, content, question, title=title, **kw)

    explain_one = explain.explain
    monkeypatch.setattr(explain.many, "explain", counted)
    stops = None
    explain.explain_many(loaded, "films", asked, str(tmp_path / "a"), **kw)
    made.clear()
    stops = 2
    with pytest.raises(KeyboardInterrupt):
        explain.explain_many(loaded, "films", asked, str(tmp_path / "b"), **kw)
    assert len(made) == 2 and not (tmp_path / "b" / "index.html").exists()
    # A file that has changed meanwhile, or whose page is gone, is asked about again.
    (tmp_path / "b" / "0001_0_31m.html").unlink()
    made.clear()
    stops = None
    explain.explain_many(loaded, "films", asked, str(tmp_path / "b"), **kw)
    assert made == [asked[0][0], asked[2][0]]
    assert "\x1b" not in capsys.readouterr().out
    # The same files as without an interruption, to the byte.
    a, b = ({p.name: p.read_bytes() for p in (tmp_path / d).iterdir()} for d in "ab")
    assert a == b and "index.html" in a and len(a) == 4


def test_questions_that_cannot_be_asked(run):
    _, loaded, pixels, _ = run
    with pytest.raises(ValueError, match="the question is empty"):
        explain.explain(loaded, pixels, "  ")
    with pytest.raises(ValueError, match="num_samples is -1; expected 0 or more"):
        explain.explain(loaded, pixels, QUESTION, num_samples=-1)
    with pytest.raises(ValueError, match="temperature is 0; expected more than 0"):
        explain.explain(loaded, pixels, QUESTION, temperature=0.0)
    cut = loaded._replace(pp=lambda row: {**loaded.pp(row), "_truncated": 3})
    made, _ = explain.explain(cut, pixels, QUESTION, mask=LEFT, **KW)
    assert made.flags[0]["name"] == "Question cut" and "last 3" in made.flags[0]["says"]


def test_the_index_begins_with_the_worst():
    def flags(*severities):
        return [checks.Flag("x", s > 0, 0.0, 0.0, s, "") for s in severities]

    rows = [dict(error=None, probability=p) for p in (0.9, 0.9, 0.2, 0.5)]
    rows.append(dict(error="unreadable", probability=None))
    raised = [flags(0, 0), flags(0.2, 0.2), flags(0, 0), flags(0.9, 0), []]
    # Unreadable; two flags; one; then the less probable answer.
    assert explain.worst_first(rows, raised) == [4, 1, 3, 2, 0]


@pytest.mark.parametrize(
    "text, message",
    [
        ("image,text\na.png,x\n", "no column question; found"),
        ("image,question\n", "has no rows"),
        ("image,question\na.png, \n", "the first, line 2: empty question"),
    ],
)
def test_question_files_that_cannot_be_read(tmp_path, text, message):
    path = tmp_path / "q.csv"
    path.write_text(text)
    with pytest.raises(ValueError, match=message):
        explain.read_questions(path, tmp_path)


def test_question_files(tmp_path, capsys):
    (tmp_path / "b.png").write_bytes(b"b")
    path = tmp_path / "q.csv"
    cells = ["../a.png", "/etc/passwd", "a.png#slce=1", "c.png", "b.png"]
    path.write_text("Image;Question;Answer\n" + "".join(f"{x};What, then?; no \n" for x in cells) + "b.png;;\n")
    *wrong, good = explain.read_questions(path, tmp_path)
    assert [one[:3] for one in [*wrong, good]] == [(x, "What, then?", "no") for x in cells]
    assert good.content() == b"b"
    for one, says in zip(wrong, [*["leaves the folder"] * 2, "slce=1: expected slice=", "No such file"]):
        with pytest.raises(ValueError, match=says):
            one.content()
    assert "1 of 6 rows can't be used" in capsys.readouterr().err
    path = tmp_path / "q.jsonl"
    path.write_text('{"file": "b.png", "question": "What?", "choices": ["a lung", "a liver"]}\n')
    (one,) = explain.read_questions(path, tmp_path, columns="image=file")
    assert one.choices == dict(choice_a="a lung", choice_b="a liver")
    assert one[:3] == ("b.png", "What?", "") and one.content() == b"b"


def test_dicom_is_read_as_its_pixels(run):
    pytest.importorskip("pydicom")
    from tests.pp.dicom_files import make

    _, loaded, pixels, _ = run
    content = make(pixels[..., 0], bits=8)
    kw = dict(mask=LEFT, **KW)
    a, _ = explain.explain(loaded, content, QUESTION, **kw)
    b, _ = explain.explain(loaded, np.repeat(pixels[..., :1], 3, axis=2), QUESTION, **kw)
    np.testing.assert_array_equal(a.raw, b.raw)
    assert "Jane" not in page.render(a)


@pytest.mark.parametrize("method", ops_image.METHODS)
def test_the_whole_image_is_shown_however_it_was_resized(method):
    """Noise, in which the two methods differ the most."""
    image = np.random.default_rng(0).integers(0, 256, (50, 40, 3), np.uint8)
    seen = ops_image.resize_image(image, 32, 32, antialias=True, method=method) / 127.5 - 1
    assert answer._is_stretched(image, seen) and not answer._is_stretched(image[:40], seen)


def test_tokens_that_can_be_seen(run):
    tok = run[1].tokenizer
    assert [explain.piece(tok, t) for t in (1, 2)] == ["‹end›", "‹start›"]
    assert explain.piece(tok, tok.to_int("\n")[0]) == "↵"
    byte = tok.to_int("é" if len(tok.to_int("é")) > 1 else "\u4e00")[-1]
    assert explain.piece(tok, byte) == f"‹{byte}›"
    # LLaMA 3's token 0 is a character, and it has several ends; a token with a name is shown by it.
    surfaces = [b"!", b"<s>", b"</s>", b"<end>", b"<turn>", b" a"]
    names = {x.decode(): i for i, x in enumerate(surfaces[1:5], 1)}
    ends = dict(pad_token=0, bos_token=1, eos_token=2, stops=[3], hidden=[1, 2])
    other = Tokenizer(lambda text: [5] * len(text), surfaces, names, **ends)
    assert [explain.piece(other, t) for t in range(6)] == ["!", "‹start›", "‹end›", "‹end›", "<turn>", " a"]


def program(root, *args):
    command = [sys.executable, "-m", "paligemma_med.explain", *map(str, args)]
    return subprocess.run(command, cwd=root, capture_output=True, text=True, timeout=300)


def test_programs_say_what_they_do_and_define_no_flags_when_imported():
    from paligemma_med.explain import __main__ as program

    assert "python -m paligemma_med.explain --workdir=" in program.__doc__
    assert "image_dir" not in program.flags.FLAGS


@pytest.mark.slow  # a process each
def test_mistakes_of_the_command_line(run, repo_root, tmp_path):
    workdir, _, _, file = run
    out, question = f"--out={tmp_path / 'r.html'}", f"--question={QUESTION}"
    for args, message in [
        ((question,), "Give --image or --image_dir."),
        ((f"--image={file}",), "Give --question."),
        ((f"--image={file}", question, "--questions=q.csv"), "--questions goes with --image_dir"),
        (("--serve",), "--out doesn't go with --serve."),
        ((f"--image={file}", question, "--port=0"), "--port and --keep go with --serve."),
        ((f"--image={tmp_path / 'no.png'}", question), "No such file or directory"),
        ((f"--image={file}", question, f"--out={tmp_path}"), "a folder; expected a file"),
        ((f"--image={file}", question, "--methods=magic"), "methods has ['magic']"),
        ((f"--image={file}", question, f"--mask={workdir / 'config.json'}"), "not a readable image"),
    ]:
        done = program(repo_root, f"--workdir={workdir}", out, *args)
        assert done.returncode != 0 and message in done.stdout + done.stderr
        assert "Traceback" not in done.stderr


@pytest.mark.slow
def test_command_line(run, repo_root, tmp_path):
    workdir, _, _, file = run
    args = [f"--workdir={workdir}", f"--question={reports.HOSTILE[:200]}", "--max_new_tokens=3"]
    args = [a.replace("\x00", "").replace("\ud800", "") for a in args]
    out = tmp_path / "r.html"
    done = program(
        repo_root, *args, f"--image={file}", f"--out={out}", f"--npz={tmp_path}/a.npz", f"--png={tmp_path}/maps"
    )
    assert done.returncode == 0, done.stderr
    assert f"Written to {out}" in done.stdout
    assert out.stat().st_size < 2_000_000 and "<img src=x" not in out.read_text("utf-8")
    assert (tmp_path / "a.npz").exists() and (tmp_path / "maps" / "raw_all.png").exists()
    done = program(repo_root, *args, f"--image_dir={file.parent}", f"--out={tmp_path}/many")
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "many" / "index.html").exists()
