"""The other systems' configs: a tiny model of each trains, is evaluated, and answers; their prompts and what they train
at the true size."""

import contextlib
import importlib
import io
import json

import numpy as np
import pytest

from configs import common_prompts
from paligemma_med import checkpoints, evaluate, experiment, explain, predict, train
from paligemma_med.config import files as config_files
from paligemma_med.explain import files as explain_files
from paligemma_med.input_pipeline import open_source
from paligemma_med.models.leaves import flatten_tree, unflatten_tree
from paligemma_med.pp import get_preprocess_fn
from paligemma_med.pp.tokenizer import get_tokenizer
from paligemma_med.setup import TrainingSetup
from paligemma_med.training import dry_run, optim
from tests.pp import sentencepiece_files
from tools import convert_checkpoint

# A preset's config, with arguments that take its further paths.
RUNS = {
    "medgemma_4b": "version=1.0,micro=8,accum=2",
    "llama_clip": "stage=2,micro=8,accum=1",
    "bloom_qformer": "stage=2,micro=8,accum=1",
    "pefomed": "stage=2,micro=8,accum=1",
}
QUESTION = "Is there a fracture?"


def get_config(name, arg=None):
    return importlib.import_module(f"configs.{name}").get_config(arg)


def random_weights(c, path):
    """Writes weights of a config's model without adapters: drawing them in a JAX program takes as long as training."""
    rng = np.random.default_rng(0)
    abstract = experiment.abstract_params(c, experiment.make_model(c).clone(lora=()))
    tree = unflatten_tree({n: rng.normal(0, 0.1, x.shape).astype(np.float32) for n, x in abstract.items()})
    checkpoints.save_npz(path, tree)


@pytest.fixture(scope="module", params=RUNS)
def run(request, tiny_data, tmp_path_factory):
    """(name, config, workdir) of three steps of training."""
    name, folder = request.param, str(tmp_path_factory.mktemp("runs") / request.param)
    where = f"data=phantom,data_dir={tiny_data}"
    c = get_config(name, f"tiny,{RUNS[name]},{where},steps=3,lr=1e-2,max_new_tokens=4,init={folder}.npz")
    c.log_training_steps = 1
    random_weights(c, f"{folder}.npz")
    section = c.evals.phantom_validate
    section.data.split, section.batch_size, section.controls = "validate[:3]", 8, ("echo", "shuffled_images")
    evals, c.evals = dict(phantom_validate=section), {}
    said = io.StringIO()
    with contextlib.redirect_stdout(said):
        train.train(c, folder)
    assert c.notes in said.getvalue()
    c.evals = evals
    return name, c, folder


def test_it_trains_is_evaluated_and_answers(run, tiny_data, tmp_path):
    name, c, folder = run
    steps = [json.loads(line) for line in open(f"{folder}/metrics.jsonl", encoding="utf-8")]
    losses = [step["training_loss"] for step in steps]
    assert len(losses) == 3 and np.isfinite(losses).all()
    trained = TrainingSetup.without_data(c).trained_names
    found = flatten_tree(checkpoints.load_params(folder))
    assert {*trained} <= {*found} and any("lora_a" in n for n in trained)

    again = config_files.from_json(checkpoints.workdir.read_config(folder))
    again.evals = c.evals
    results = evaluate.evaluate(again, folder, str(tmp_path))
    assert results["phantom_validate"]["n"] == 3
    rows = [json.loads(line) for line in open(tmp_path / "eval/phantom_validate/predictions.jsonl", encoding="utf-8")]
    image = next(iter(open_source(dict(name="phantom", split="validate", data_dir=str(tiny_data)))))["image"]
    first = predict.predict(again, folder, image, [rows[0]["question"], QUESTION], max_new_tokens=4)
    assert [r["question"] for r in first] == [rows[0]["question"], QUESTION]
    assert first[0]["prompt"] == rows[0]["prompt"] and rows[0]["question"].lower()[:10] in rows[0]["prompt"].lower()
    # The same answer, whatever the batch, the bucket and what else is asked.
    assert first[0]["answers"][0]["answer"] == rows[0]["predictions"][0]
    assert first[0]["answers"][0]["logprob"] == pytest.approx(sum(rows[0]["logprobs"]), abs=1e-3)


def test_it_is_explained(run, tiny_data, tmp_path):
    name, c, folder = run
    loaded = explain.load(c, folder)
    image = next(iter(open_source(dict(name="phantom", split="validate", data_dir=str(tiny_data)))))["image"]
    kw = dict(num_samples=0, max_new_tokens=3, methods=("rollout",))
    made, _ = explain.explain(loaded, image, QUESTION, title=name, **kw)
    assert made.grid == (4, 4) and len(made.tokens) <= 3
    for found in made.maps:
        assert np.isfinite(found.values).all()
    assert made.raw.shape[-1] >= 16 and made.raw[..., :16].sum() > 0
    assert "fracture" in "".join(made.prompt)
    explain_files.write_page(made, tmp_path / "page.html")
    assert (tmp_path / "page.html").stat().st_size > 10_000


def test_it_is_converted(run, tmp_path):
    name, c, folder = run
    whole = name == "medgemma_4b"  # transformers has a class for it, and for the parts of the others
    convert_checkpoint.convert(folder, str(tmp_path / "hf"), "hf", merge=whole)
    found = {str(path.relative_to(tmp_path / "hf")) for path in tmp_path.rglob("*.safetensors")}
    adapters = {f"{part}/adapter_model.safetensors" for part in ("decoder", "tower")}
    if name != "llama_clip":  # its tower alone has adapters
        adapters.remove("tower/adapter_model.safetensors")
    assert found == ({"model.safetensors"} if whole else {"connector.safetensors", *adapters})


# --- Prompts ---

ROW = dict(question=f" {QUESTION}\n", answer="Yes.", image=np.zeros((4, 4, 3), np.uint8))


@pytest.fixture(scope="module")
def gemma3(tmp_path_factory):
    """Its spec."""
    pytest.importorskip("sentencepiece.sentencepiece_model_pb2")
    file = tmp_path_factory.mktemp("tokenizers") / "gemma3.model"
    sentencepiece_files.gemma3(file)
    return f"gemma3(model={str(file)!r})"


def made(prompt, spec, answer="answer"):
    """(tokens of a prompt, image_at, tokens that are learnt) of a row."""
    ops = common_prompts.to_ops(prompt, spec, answer)
    out = get_preprocess_fn("|".join(ops))(ROW)
    asked = get_preprocess_fn("|".join(common_prompts.to_ops(prompt, spec)))(ROW)
    text, learnt = out["text"], out["mask_loss"] > 0
    assert asked["text"].tolist() == text[: len(asked["text"])].tolist() and asked["mask_input"].all()
    assert asked.get("image_at") == out.get("image_at") and out["mask_ar"].all() and asked["mask_ar"].all()
    return asked["text"].tolist(), out.get("image_at"), text[learnt].tolist()


def test_medgemmas_prompts_have_the_ids_of_its_own_processor(gemma3):
    """Of one question through Hugging Face's template (composable.md 8), by a tokenizer with Gemma 3's ids."""
    asked, ends = [4602, 993, 496, 34_164, 236_881], [106, 107, 105, 4368, 107]
    yes = [*get_tokenizer(gemma3).to_int("Yes."), 106]
    old = [2, 105, 2364, 107, *asked, 108, 255_999, 256_000, 108, *ends]
    assert made(common_prompts.medgemma("1.0"), gemma3) == (old, 11, yes)
    new = [2, 105, 2364, 109, 255_999, 256_000, 108, *asked, *ends]
    assert made(common_prompts.medgemma("1.5"), gemma3) == (new, 5, yes)
    # As in Google's notebook: all but the image's tokens, of which this is the one in the text.
    learnt = made(common_prompts.medgemma("1.5", learns_all=True), gemma3)[2]
    assert learnt == [token for token in [*new, *yes] if token != 255_999]
    system = made(common_prompts.medgemma("1.0", system="user {x}"), gemma3)[0]
    assert (
        get_tokenizer(gemma3)
        .to_str(system, stop_at_eos=False)
        .startswith(f"<start_of_turn>user\nuser {{x}}\n\n{QUESTION}")
    )
    with pytest.raises(ValueError, match="version='2': expected '1.0' or '1.5'"):
        get_config("medgemma_4b", "version='2'")
    with pytest.raises(ValueError, match="MedGemma 1.5 has no system prompt"):
        get_config("medgemma_4b", "system=You are a radiologist.")


@pytest.mark.parametrize(
    "prompt, before, after, answer",
    [
        (common_prompts.llama_clip(), "", f" {QUESTION}\n\nAnswer:", " Yes."),
        (common_prompts.bloom_qformer(1), None, "", "Yes."),
        (common_prompts.bloom_qformer(3), None, f"Question:  {QUESTION}\n Answer:", " Yes."),
        (common_prompts.pefomed(), "[INST] <img>", "</img> [vqa] is there a fracture? [/INST]", "yes"),
        (
            common_prompts.pefomed("caption"),
            "[INST] <img>",
            "</img> [caption] briefly describe this image [/INST]",
            "yes",
        ),
        (
            common_prompts.pefomed("report"),
            "[INST] <img>",
            "</img> [report] describe the given chest x-ray image in detail [/INST]",
            "yes",
        ),
    ],
    ids=["002", "003 stage 1", "003", "004", "004 stage 1", "004 reports"],
)
def test_prompts_of_the_papers_systems(prompt, before, after, answer):
    tiny = get_tokenizer("tiny")
    parts = [
        tiny.to_int(x, bos=prompt.bos and i == 0) for i, x in enumerate(x for x in (before, after) if x is not None)
    ]
    at = None if before is None else len(parts[0])
    assert made(prompt, "tiny") == (sum(parts, []), at, tiny.to_int(answer, eos=True))


def test_pefomeds_evaluation_as_released_has_two_bos(tmp_path):
    pytest.importorskip("sentencepiece.sentencepiece_model_pb2")
    sentencepiece_files.llama(tmp_path / "llama.model")
    spec = f'llama(model="{tmp_path}/llama.model")'
    ids, at, learnt = made(common_prompts.pefomed(as_released=True), spec)
    llama = get_tokenizer(spec)
    assert ids[:at] == [1, 1, *llama.to_int("[INST] <Img>")] and learnt == llama.to_int("Yes.", eos=True)
    said = f"</Img> [vqa] Based on the image, respond to this question with a short answer:  {QUESTION}\n [/INST]"
    assert ids[at:] == llama.to_int(said)
    trained = get_config("pefomed", "strict_repro")
    assert "<img>" in trained.input.pp and "<Img>" in trained.predict_pp and "<Img>" not in trained.input.pp
    reports = get_config("pefomed", "task=report,strict_repro")
    assert "[report]" in reports.input.pp and "<Img> [caption]" in reports.predict_pp.replace("</Img>", "<Img>")


def test_pefomeds_evaluation_as_released_counts_as_theirs():
    def section(arg):
        return next(iter(get_config("pefomed", f"tiny,{arg}").evals.values()))

    assert (section("").protocol, section("strict_repro").protocol) == ("vqa", "pefomed")
    long = dict(ROW, answer="Heart: " + "word. " * 60, question_id="1", image_id="1", answer_type="OPEN")
    plain, cut = (get_preprocess_fn(section(f"task=report{x}").pp_fn)(dict(long)) for x in ("", ",strict_repro"))
    assert plain["answer"] == long["answer"] and cut["answer"] == "heart " + " ".join(["word"] * 49)
    assert section("task=report,strict_repro").protocol == "report"


def test_a_question_that_spells_tokens_out_is_text_in_every_prompt(gemma3):
    said = "a<end_of_turn><start_of_image><eos>b"
    for prompt in (common_prompts.medgemma("1.0"), common_prompts.llama_clip()):
        fn = get_preprocess_fn("|".join(common_prompts.to_ops(prompt, gemma3, "answer")))
        ids = {said: fn({**ROW, "question": said, "answer": said})["text"].tolist() for said in (said, "ab")}
        for token in (1, 2, 105, 106, 255_999):
            assert ids[said].count(token) == ids["ab"].count(token)


# --- At the true size ---


@pytest.mark.parametrize(
    "name, arg, trained",
    [
        ("medgemma_4b", "", 38_497_792),
        ("medgemma_4b", "projector", 38_497_792 + 2_950_272),
        ("llama_clip", "stage=1", 1_081_344 + 3_149_824),
        ("llama_clip", "stage=2", 1_081_344 + 3_149_824 + 13_631_488),
        ("llama_clip", "stage=1,link=mlp", 1_081_344 + 768 * 4096 + 4096 + 4096 * 4096 + 4096),
        ("bloom_qformer", "stage=3", 99_264_000 + 3_149_824 + 7_864_320),
        ("pefomed", "", 56_627_200),
        ("vision_ablation", "tower=siglip_448", 1152 * 2048 + 2048),
        ("vision_ablation", "tower=biomedclip_224", 768 * 2048 + 2048),
        ("vision_ablation", "tower=eva_448,stage=2", 39 * 4 * 2 * 8 * 1408 + 1_843_200),
        ("stage1_slake", "base=paligemma2_10b", 1152 * 3584 + 3584),
        ("stage2_rocov2", "base=paligemma2_3b", 5_185_536),
    ],
)
def test_what_is_trained(name, arg, trained):
    setup = TrainingSetup.without_data(get_config(name, arg))
    assert sum(setup.abstract[n].size for n in setup.trained_names) == trained


@pytest.mark.parametrize("name, stages", [("llama_clip", 2), ("bloom_qformer", 3), ("pefomed", 2)])
def test_a_stage_has_the_leaves_of_the_one_before(name, stages):
    """Weights that have some of a model's adapters are refused."""
    of_stages = [TrainingSetup.without_data(get_config(name, f"tiny,stage={i + 1}")).abstract for i in range(stages)]
    for later in of_stages[1:]:
        assert {n: x.shape for n, x in later.items()} == {n: x.shape for n, x in of_stages[0].items()}


def test_a_dry_runs_batch_is_that_of_training():
    for name, arg in (("medgemma_4b", "tiny"), ("bloom_qformer", "tiny,stage=3")):
        c = get_config(name, arg)
        row = get_preprocess_fn(c.input.pp)({**ROW, "image": np.zeros((9, 9, 3), np.uint8)})
        batch = dry_run.abstract_batch(c, 2)
        assert {k: x.shape for k, x in batch.items()} == {k: (2, *np.shape(x)) for k, x in row.items() if k[0] != "_"}


def test_chips_share_an_example():
    """Stage 2 of PeFoMed has four examples in a step, which eight chips can't take by themselves."""
    with pytest.raises(ValueError, match="batch_size = 4 doesn't divide into 8 devices"):
        TrainingSetup.without_data(get_config("pefomed", "tiny")).batch_sharding  # noqa: B018
    c = get_config("pefomed", "tiny,tp=2")
    setup = TrainingSetup.without_data(c)
    assert setup.mesh.shape == {"data": 4, "model": 2} and c.input.batch_size == 4
    assert setup.shardings["llm/embedder/input_embedding"].spec[0] == "model"
    with pytest.raises(ValueError, match="sizes must be positive"):
        TrainingSetup.without_data(get_config("pefomed", "tiny,tp=0")).mesh  # noqa: B018


def test_medgemmas_recipes():
    ours, google = get_config("medgemma_4b"), get_config("medgemma_4b", "recipe=google")
    assert (ours.frozen_dtype, ours.loss_norm) == ("bfloat16", "example")
    assert (google.frozen_dtype, google.loss_norm) == ("nf4", "token")
    assert google.lora == ours.lora and google.lr == ours.lr == 2e-4 and google.input.pp != ours.input.pp
    evals = get_config("medgemma_4b", "data=pmc_vqa/v1").evals
    section = evals.pmc_vqa_validate
    assert section.protocol == "multiple_choice" and "{choice_a}" in section.pp_fn
    assert "inkey='answer_letter'" in evals.pmc_vqa_validate_loss.pp_fn
    assert get_config("medgemma_4b", "data=medpix2/qa").evals.medpix2_validate.protocol == "open"
    for name, arg in (("medgemma_4b", "recipe=x"), ("vision_ablation", "tower=x"), ("stage1_slake", "base=x")):
        with pytest.raises(ValueError, match="'x': expected"):
            get_config(name, arg)


def test_pefomeds_captions_are_mixed_and_sets_can_be_left_out():
    c = get_config("pefomed", "stage=1")
    assert c.input.data.to_dict() == dict(roco=60, clef=60, medicat=20, mimic=60) and c.input.batch_size == 400
    assert "chest x-ray" in c.input.mimic.pp and "briefly" in c.input.roco.pp == c.input.clef.pp
    assert len(c.evals) == 8 and "briefly" in c.predict_pp
    asked, loss = c.evals.mimic_cxr_validate, c.evals.mimic_cxr_validate_loss
    assert loss.data == asked.data and loss.pp_fn.startswith(c.input.mimic.pp.partition("keep(")[0])
    c = get_config("pefomed", "stage=1,sets=medicat+roco")
    assert c.input.data.to_dict() == dict(roco=60, medicat=20) and "mimic" not in c.input
    for arg, message in (
        ("stage=1,sets=roco+x", "'x' is unknown; expected some of roco"),
        ("sets=roco", "is of stage 1"),
        ("stage=1,strict_repro", "is of stage 2"),
        ("stage=1,task=report", "is of stage 2"),
        ("task=reports", "expected one of"),
    ):
        with pytest.raises(ValueError, match=message):
            get_config("pefomed", arg)


def test_pefomeds_schedule_and_decay_are_its_codes():
    """1e-5 to 1e-6 (reports 3e-5 to 1e-5), constant in an epoch; decay of matrices alone."""
    for arg, last, epochs, steps in (("stage=1", 1e-6, 5, 1000), ("", 1e-6, 50, 100), ("task=report", 1e-5, 4, 100)):
        c = get_config("pefomed", arg)
        rates = optim.make_schedule(c.schedule[0][1], total_steps=c.total_steps, num_examples=1, batch_size=1)
        epoch = np.arange(1, epochs)
        theirs = (c.lr - last) * 0.5 * (1 + np.cos(np.pi * epoch / epochs)) + last
        for step in (epoch * steps, epoch * steps + steps - 1):
            np.testing.assert_allclose(c.lr * rates(step), theirs, rtol=1e-5)
        np.testing.assert_allclose(c.lr * rates(0), 1e-6, rtol=1e-5)
        np.testing.assert_allclose(c.lr * rates(steps), theirs[0], rtol=1e-5)
    setup = TrainingSetup.without_data(get_config("pefomed", "tiny"))
    tx, _ = optim.make(setup.config, setup.trained_names, total_steps=9, num_examples=9, batch_size=1)
    weights = {n: np.ones(setup.abstract[n].shape, np.float32) for n in setup.trained_names}
    none = {n: np.zeros_like(x) for n, x in weights.items()}
    updates, _ = tx.update(none, tx.init(weights), weights)
    assert {n for n, x in updates.items() if np.any(x)} == {n for n, x in weights.items() if not n.endswith("/bias")}


def test_the_stages_of_002_and_003_have_their_papers_data():
    def sections(name, arg):
        c = get_config(name, arg)
        return c, {k: (s.data.name, s.get("protocol", s.type)) for k, s in c.evals.items()}

    for stage in (1, 2):
        c, found = sections("llama_clip", f"stage={stage}")
        asked, choices, loss = (c.evals[f"omnimedvqa_validate{x}"] for x in ("", "_choices", "_loss"))
        assert c.input.data.name == asked.data.name == loss.data.name == "omnimedvqa/open_access_open"
        assert [*found.values()].count(("omnimedvqa/open_access", "multiple_choice")) == 1 and len(found) == 3
        # Asked as the open questions are, without the options, and only at the end.
        assert "choice_a" not in choices.pp_fn.partition("keep(")[0] and "choice_a" in choices.pp_fn
        assert choices.options == "text" and not any(key.startswith("log_") for key in choices)
    assert {*sections("llama_clip", "choices=False,split=test")[1]} == {"omnimedvqa_test", "omnimedvqa_test_loss"}
    assert {*sections("llama_clip", "data=slake/en")[1]} == {"slake_validate", "slake_validate_loss"}
    for arg, data, key, protocol in (
        ("stage=1", "pmc_oa/split_captions", "pmc_oa_validate", "report"),
        ("stage=2", "pmc_vqa/v1_open", "pmc_vqa_validate", "open"),
        ("stage=3", "slake/en", "slake_validate", "vqa"),
        ("stage=3,split=test", "slake/en", "slake_test", "vqa"),
        ("stage=3,data=vqa_rad/public", "vqa_rad/public", "vqa_rad_validate", "vqa"),
    ):
        c, found = sections("bloom_qformer", arg)
        assert c.input.data.name == data and found == {key: (data, protocol), f"{key}_loss": (data, "perplexity")}


def test_weights_and_tokenizer_are_named_by_arguments():
    c = get_config("bloom_qformer", "img=/a,llm=/b,tokenizer=/t.json")
    assert c.model_init.to_dict() == dict(img="/a", llm="/b")
    assert c.tokenizer == "bpe(model='/t.json', size=250880)" and repr(c.tokenizer) in c.input.pp
    assert get_config("pefomed", "init=/w").model_init == "/w"
    with pytest.raises(ValueError, match="Give init=… .a whole model. or img=… .its parts., not both"):
        get_config("pefomed", "init=/w,img=/a")
    for name, stage in (("llama_clip", 3), ("bloom_qformer", 4), ("pefomed", 3)):
        with pytest.raises(ValueError, match=f"Config argument stage={stage}: expected 1"):
            get_config(name, f"stage={stage}")


@pytest.mark.parametrize("name", [*RUNS, "vision_ablation"])
def test_papers_gaps_are_named(name):
    doc = importlib.import_module(f"configs.{name}").__doc__
    assert "ot from" in doc and "Arguments:" in doc
    said = get_config(name, "tiny").notes
    assert said.startswith("Not from the paper") and len(said) > 200 and "Arguments:" not in said
    assert said.splitlines()[-1] in doc
