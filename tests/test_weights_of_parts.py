"""Systems put together from the weights of others: tower, connector, language model and adapter from four sources."""

import functools

import numpy as np
import pytest
import safetensors.numpy
import torch
import transformers

from paligemma_med import checkpoints, experiment, weights
from paligemma_med.checkpoints import hf, lazy
from paligemma_med.config import files as config_files
from paligemma_med.models.layers import lora
from paligemma_med.models.leaves import flatten_tree, unflatten_tree
from paligemma_med.setup import TrainingSetup
from tests import tiny
from tests.checkpoints.hf import test_originals as originals
from tests.models import test_connectors as connectors
from tests.models import test_towers as towers
from tools.convert_checkpoint import convert

F32 = np.dtype("float32")
WIDTH, VOCAB, RANK = 32, 1024, 2
# 002's form: what layer 2 of 3 gives, without norm and class token.
TOWER = dict(towers.SMALL, variant=None, depth=2, cls=True, gelu="exact", final_norm=None)
WHOLE = dict(towers.SMALL, variant=None, cls=True, keep_cls=True, gelu="exact")
LLAMA = dict(
    variant=None,
    width=WIDTH,
    depth=2,
    mlp_dim=40,
    num_heads=4,
    num_kv_heads=4,
    head_dim=8,
    vocab_size=VOCAB,
    norm="rms",
    norm_eps=1e-5,
    act="silu",
    embed_scale=False,
    tie=False,
)
SCHEDULE = [("img/head/.*|.*/lora_[ab]", dict(decay_type="constant")), (".*", None)]


reference = functools.cache(connectors.qformer_reference)  # which draws its queries anew each time


def llama():
    config = transformers.LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=WIDTH,
        intermediate_size=40,
        num_hidden_layers=2,
        num_attention_heads=4,
        rms_norm_eps=1e-5,
    )
    return towers.randomise(transformers.LlamaForCausalLM(config), 9)


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    """Paths: a ViTModel's and a LlamaForCausalLM's folder, LLaVA-Med's projection, MiniGPT-v2's adapter, LAVIS'
    Q-Former of another tower."""
    at, rng = tmp_path_factory.mktemp("sources"), np.random.default_rng(0)
    towers.theirs_of("vit").save_pretrained(at / "vit")
    llama().save_pretrained(at / "llama")

    def write(name, **state):
        safetensors.numpy.save_file(state, at / name)

    def random(*shape):
        return rng.normal(size=shape).astype(F32)

    write("proj.safetensors", **{"mm_projector.weight": random(WIDTH, 24), "mm_projector.bias": random(WIDTH)})
    attn = "llama_model.base_model.model.model.layers.{}.self_attn.{}_proj.lora_{}.weight"
    shapes = {"A": (RANK, WIDTH), "B": (WIDTH, RANK)}
    write("lora.safetensors", **{attn.format(i, n, f): random(*shapes[f]) for i in (0, 1) for n in "qv" for f in "AB"})
    names = dict(own="self", at="Qformer.bert.", norm="Qformer.bert.embeddings.LayerNorm", proj="opt_proj")
    write("lavis.safetensors", **originals.as_blip2(*reference(), **names))
    return at


def config(img=TOWER, **kw):
    connector = kw.pop("connector", None)
    model = dict(img=img, llm=LLAMA, image_ar="causal", **(dict(connector=connector) if connector else {}))
    return tiny.config(res=28, model=model, schedule=SCHEDULE, **kw)


def expected(sources):
    """Our leaves of the tower and the language model, cut by hand."""
    vit = {f"img/{n}": x for n, x in flatten_tree(towers.to_tree(towers.theirs_of("vit"), "vit")).items()}
    vit = {n: x[:2] if "/encoderblock/" in n else x for n, x in vit.items() if "/encoder_norm/" not in n}
    return vit | flatten_tree(lazy.read_all(hf.open_hf(sources / "llama")))


@functools.cache
def start(sources):
    c = config(model_init=dict(img=f"{sources}/vit", llm=f"{sources}/llama"))
    with c.unlocked():
        c.adapter_init = f"{sources}/lora.safetensors"
    setup = TrainingSetup.without_data(c)
    return setup, *weights.initial_params(setup)


def test_training_starts_from_four_sources(sources):
    """The head, for which there is none, begins afresh."""
    setup, params, given = start(sources)
    head = {"img/head/kernel", "img/head/bias"}
    assert {n for n in given if not lora.is_factor(n)} == head
    want = expected(sources)
    assert {n for n in params if not lora.is_factor(n)} == want.keys() | head
    for name, x in want.items():
        np.testing.assert_array_equal(np.asarray(params[name]), x, err_msg=name)
    assert np.asarray(params["img/head/kernel"]).std() > 0
    file = safetensors.numpy.load_file(sources / "lora.safetensors")
    a = file["llama_model.base_model.model.model.layers.1.self_attn.v_proj.lora_A.weight"]
    np.testing.assert_array_equal(np.asarray(params["llm/layers/attn/qkv_einsum/v/lora_a"])[1], a.T)
    assert {spec.scale for spec in experiment.adapted(setup.config, setup.model).values()} == {16 / RANK}


def test_a_run_is_read_with_its_sources(sources, tmp_path):
    """What it trained replaces what its sources have, or lack."""
    setup, params, _ = start(sources)
    trained = {n: np.asarray(params[n]) + 1 for n in setup.trained_names}
    tiny.write_workdir(str(tmp_path / "run"), setup.config, trained)
    *_, loaded = weights.load(setup.config, str(tmp_path / "run"))
    flat = flatten_tree(loaded)
    assert flat.keys() == params.keys()
    for name, x in flat.items():
        np.testing.assert_array_equal(np.asarray(x), trained.get(name, np.asarray(params[name])), err_msg=name)


def test_answering_takes_all_weights(sources):
    """A projection of another system's is the head; without one there is nothing to answer with."""
    parts = f"img={sources}/vit,llm={sources}/llama"
    with pytest.raises(checkpoints.CheckpointError, match="img=.*2 of 31 keys differ\n  img/head/bias: missing"):
        weights.load(config(), parts)
    *_, params = weights.load(config(), f"{parts},connector={sources}/proj.safetensors")
    file = safetensors.numpy.load_file(sources / "proj.safetensors")
    np.testing.assert_array_equal(params["img"]["head"]["kernel"], file["mm_projector.weight"].T)
    np.testing.assert_array_equal(params["img"]["head"]["bias"], file["mm_projector.bias"])


def test_a_query_transformer_of_another_tower(sources, caplog):
    """Its keys and values of the image, and what leads into the other language model, begin afresh; nothing else."""
    kw = dict(kind="qformer", queries=5, inner=24, depth=4, mlp_dim=40, num_heads=3)
    c = config(WHOLE, connector=kw)
    abstract = experiment.abstract_params(c, experiment.make_model(c))
    spec = dict(img=f"{sources}/vit", connector=f"{sources}/lavis.safetensors", llm=f"{sources}/llama")
    host = weights.load_host_params(spec, abstract, may_begin_afresh=True)
    assert all(isinstance(x, lazy.Lazy) for x in host.values())  # one leaf at a time, at any size
    cross = {f"connector/layers/block_0/cross/{n}/kernel" for n in ("key", "value")}
    assert abstract.keys() - host.keys() == cross | {"connector/proj/kernel", "connector/proj/bias"}
    assert "lavis.safetensors was made for parts of other widths: trained from fresh weights are" in caplog.text
    _, params = reference()
    for name, x in flatten_tree({"connector": params}).items():
        if name in host:
            np.testing.assert_array_equal(np.asarray(host[name]), x, err_msg=name)
    with pytest.raises(
        checkpoints.CheckpointError, match=r"cross/key/kernel: expected \(2, 24, 3, 8\), found \(2, 16, "
    ):
        weights.load_host_params(spec, abstract)
    c.model.connector.num_heads = 5  # 24 = 3 × 8 isn't cut into five heads
    with pytest.raises(ValueError, match="multiple of num_heads=5"):
        experiment.make_model(c)


def test_positions_of_a_tower_with_a_class_token(sources):
    c = config(model_init=dict(img=f"{sources}/vit", llm=f"{sources}/llama"))
    c.res = 56
    abstract = experiment.abstract_params(c, experiment.make_model(c))
    kw = dict(may_begin_afresh=True)
    with pytest.raises(checkpoints.CheckpointError, match="was made for images of 28 px .* but config.res = 56"):
        weights.load_host_params(c.model_init, abstract, **kw)
    found = {m: weights.load_host_params(c.model_init, abstract, m, **kw) for m in (True, "bicubic")}
    old = flatten_tree(towers.to_tree(towers.theirs_of("vit"), "vit"))["pos_embedding"]
    for method, host in found.items():
        got = np.asarray(host["img/pos_embedding"])
        assert got.shape == (1, 65, 24)
        want = checkpoints.resample_posemb(old, 65, method="linear" if method is True else method)
        np.testing.assert_array_equal(got, want)


def test_paths_of_parts_become_absolute(sources, monkeypatch):
    monkeypatch.chdir(sources)
    assert config_files.absolute("img=vit,llm=llama") == f"img={sources}/vit,llm={sources}/llama"
    c = config(model_init="img=vit,llm=llama")
    assert f"img={sources}/vit,llm={sources}/llama" in config_files.to_json(c)


def test_torch_gives_the_same_features(sources):
    """The tower of four sources' system, from pixels on."""
    setup, params, _ = start(sources)
    tower = setup.model.parts["img"]
    img = unflatten_tree({n: np.asarray(x) for n, x in params.items()})["img"]
    ours = tower.apply({"params": img}, towers.PIXELS)[1]["encoded"]
    with torch.no_grad():
        want = towers.theirs_of("vit")(towers.torch_pixels(), output_hidden_states=True).hidden_states[2].numpy()[:, 1:]
    np.testing.assert_allclose(ours, want, rtol=0, atol=1e-5 * np.abs(want).max())


def test_parts_are_converted_to_one_file(sources, tmp_path):
    """Fitted to a config's model; without one, the heads of a tower that doesn't say them are asked for."""
    spec, file = f"img={sources}/vit,llm={sources}/llama,connector={sources}/proj.safetensors", str(tmp_path / "w.npz")
    with pytest.raises(checkpoints.CheckpointError, match="are parts of a model: say of which with --config"):
        convert(spec, file, "npz")
    convert(spec, file, "npz", config=config())
    *_, direct = weights.load(config(), spec)
    *_, back = weights.load(config(), file)
    tiny.assert_trees_equal(direct, back)
    with pytest.raises(checkpoints.CheckpointError, match="doesn't say how many heads connector/layers/block_0/self"):
        convert(f"{sources}/lavis.safetensors", str(tmp_path / "q.npz"), "npz")
    setup, params, _ = start(sources)
    run = str(tmp_path / "run")
    tiny.write_workdir(run, setup.config, {n: np.asarray(params[n]) for n in setup.trained_names})
    convert(run, str(tmp_path / "merged.npz"), "npz", merge=True)
    *_, merged = weights.load(config(), str(tmp_path / "merged.npz"))
    assert "lora_a" not in str(flatten_tree(merged).keys())
    assert flatten_tree(merged)["img/cls"].shape == (1, 1, 24)


@pytest.mark.parametrize(
    "part, key, value, says",
    [
        ("llm", "norm_eps", 1e-6, "llama/config.json says norm_eps=1e-05, but config.model.llm has 1e-06"),
        ("llm", "rope_theta", 5e5, "llama/config.json says rope_theta=10000.0, but config.model.llm has 500000.0"),
        ("img", "gelu", "tanh", "vit/config.json says gelu='exact', but config.model.img has 'tanh'"),
    ],
)
def test_what_shapes_do_not_show_is_compared(sources, part, key, value, says):
    c = config(model_init=dict(img=f"{sources}/vit", llm=f"{sources}/llama"))
    c.model[part][key] = value
    with pytest.raises(checkpoints.CheckpointError, match=says):
        weights.initial_params(TrainingSetup.without_data(c))


def test_another_eps_of_a_tower_is_said(sources, caplog):
    """ViTConfig's default of 1e-12 stands in files of towers that were trained with 1e-6."""
    model = experiment.make_model(config(dict(TOWER, norm_eps=1e-12)))
    weights.check_described(f"img={sources}/vit,llm={sources}/llama", model)
    assert "vit/config.json says norm_eps=1e-06, but config.model.img has 1e-12, which is kept" in caplog.text


def test_what_begins_afresh_is_trained(sources):
    c = config(model_init=dict(img=f"{sources}/vit", llm=f"{sources}/llama"))
    c.schedule = [("llm/final_norm/scale", dict(decay_type="constant")), (".*", None)]
    with pytest.raises(ValueError, match="config.schedule freezes img/head/.*, for which config.model_init names no"):
        weights.initial_params(TrainingSetup.without_data(c))
