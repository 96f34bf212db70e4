"""Boxes through text and back, through crops and resizes, and what is refused."""

import io

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from paligemma_med.pp import boxes as boxes_lib
from paligemma_med.pp import get_preprocess_fn
from paligemma_med.pp.tokenizer import get_tokenizer

HALF = 0.5 / 1023 + 1e-6


@st.composite
def shares(draw, least=1.1 / 1023):
    """A box y0, x0, y1, x1 in 0 to 1, its sides `least` or longer."""
    low = [draw(st.floats(0, 1 - least)) for _ in range(2)]
    return [*low, *(draw(st.floats(x + least, 1)) for x in low)]


names = st.text("abcdefghijklmnopqrstuvwxyz -,()Ü肺", max_size=12).map(str.strip)
objects = st.lists(st.tuples(shares(), names), max_size=5)


@given(found=objects, answer=names)
def test_round_trip_is_within_half_a_bin(found, answer):
    boxes, labels = [b for b, _ in found], [name for _, name in found]
    text = boxes_lib.to_text(boxes, labels, answer)
    said = boxes_lib.read(text)
    assert said.answer == answer and said.labels == tuple(labels) and not said.malformed
    assert np.abs(np.reshape(said.boxes, (-1, 4)) - np.reshape(boxes, (-1, 4))).max(initial=0) <= HALF
    assert boxes_lib.to_text(said.boxes, labels, answer) == text


def test_form():
    boxes = [[0.1, 0.0, 0.5, 0.25], [0, 0.5, 1, 1]]
    text = "<loc0102><loc0000><loc0512><loc0256> liver ; <loc0000><loc0512><loc1023><loc1023> spleen"
    assert boxes_lib.to_text(boxes, ["liver", "spleen"]) == text  # 0.5 * 1023 is a half, and goes to the even 512
    assert boxes_lib.to_text(boxes[:1], (), "Left lung") == "Left lung <loc0102><loc0000><loc0512><loc0256>"
    assert boxes_lib.to_text([]) == "" and boxes_lib.to_text([], (), "No") == "No"


A = "<loc0001><loc0002><loc0003><loc0004>"


@pytest.mark.parametrize(
    "text, labels, malformed",
    [
        (f"{A} liver ; {A}", ("liver", ""), 0),
        (f"{A} liver;{A} spleen", ("liver", "spleen"), 0),
        ("<loc0001><loc0002><loc0003> liver", (), 1),
        (f"{A}<loc0005> liver", (), 1),
        (f"{A} liver ; ", ("liver",), 1),
        (f"{A} liver {A} spleen", (), 1),
        ("<loc0003><loc0002><loc0001><loc0004> liver", (), 1),
        ("<loc0001><loc0002><loc0003><loc0002> liver", (), 1),
        ("<loc0001><loc0002><loc0003><loc1024> liver", (), 1),
        ("<loc0001><loc0002><loc0003><loc٠٠٠٤> liver", (), 1),
        ("<loc1><loc2><loc3><loc4> liver", (), 1),
        (f"{A}<seg001> liver", (), 1),
        ("liver at 1, 2, 3, 4", (), 0),
    ],
)
def test_reading_is_strict(text, labels, malformed):
    said = boxes_lib.read(text)
    assert said.labels == labels and len(said.boxes) == len(labels) and len(said.malformed) == malformed


@given(st.text(st.sampled_from("<>loc0123; a"), max_size=60))
def test_reading_never_fails(text):
    assert len(boxes_lib.read(text).boxes) <= text.count("<loc") / 4


@pytest.mark.parametrize(
    "args, message",
    [
        (([[0.1, 0.2, 0.1, 0.5]],), "y0 < y1"),
        (([[0, 0, 1.1, 1]],), "in 0 to 1"),
        (([[0, 0, float("nan"), 1]],), "in 0 to 1"),
        (([[0.1, 0, 0.1001, 1]],), "thinner than"),
        (([[0, 0, 1, 1]], ["a;b"]), "';'"),
        (([[0, 0, 1, 1]], ["a", "b"]), "2 labels"),
        (([[0, 0, 1, 1]], (), "x <loc0001>"), "'<loc'"),
    ],
)
def test_what_cannot_be_written(args, message):
    with pytest.raises(ValueError, match=message):
        boxes_lib.to_text(*args)


# --- Ops ---


def row(pixels, height=60, width=90, **more):
    """A row with boxes [x, y, w, h] in pixels, each of which is white in the image."""
    image = np.zeros((height, width), np.uint8)
    for x, y, w, h in pixels:
        image[y : y + h, x : x + w] = 255
    out = io.BytesIO()
    Image.fromarray(image).save(out, "PNG")
    found = dict(label=[f"Thing {i}" for i in range(len(pixels))], bbox=np.array(pixels, np.float32).reshape(-1, 4))
    return dict(image=out.getvalue(), boxes=found, **more)


def white(image, share=128):
    """y0, x0, y1, x1 of the white part of an image, in shares."""
    ys, xs = np.nonzero(image[..., 0] >= share)
    low, high = np.array([ys.min(), xs.min()]), np.array([ys.max(), xs.max()]) + 1
    return np.concatenate([low, high]) / np.tile(image.shape[:2], 2)


def test_objects_are_shares_in_reading_order():
    found = row([[50, 40, 60, 30], [10, 5, 20, 10], [0, 5, 5, 5], [95, 0, 5, 5]])
    out = get_preprocess_fn("objects|decode")(found)
    assert out["image"].shape == (60, 90, 3) and out["objects"]["label"] == ["Thing 2", "Thing 1", "Thing 0"]
    np.testing.assert_allclose(out["objects"]["bbox"][2], [40 / 60, 50 / 90, 1, 1], rtol=1e-6)  # cut at the edge
    assert out["objects"]["bbox"].dtype == np.float32


@settings(max_examples=40)
@given(x=st.integers(0, 70), y=st.integers(0, 40), w=st.integers(8, 20), h=st.integers(8, 20), seed=st.integers(0, 99))
def test_boxes_move_with_the_image(x, y, w, h, seed):
    found = row([[x, y, w, h]], answer="<loc0000> thing 0")
    pp = 'objects|decode|inception_crop(None, 40, 80, 0.7, 1.4, min_cover=0.6)|loc_text(outkey="said")'
    out = get_preprocess_fn(pp)(found, np.random.default_rng(seed))
    box = out["objects"]["bbox"][0]
    np.testing.assert_allclose(box, white(out["image"]), atol=1e-5)
    left = np.prod((box[2:] - box[:2]) * out["image"].shape[:2])
    assert left >= 0.6 * w * h - 1e-3
    (read,) = boxes_lib.read(out["said"]).boxes
    assert np.abs(read - box).max() <= HALF and out["said"].endswith("> thing 0")
    big = get_preprocess_fn(pp + "|resize((120, 70), antialias=True)")(found, np.random.default_rng(seed))
    np.testing.assert_array_equal(big["objects"]["bbox"][0], box)
    np.testing.assert_allclose(box, white(big["image"]), atol=0.03)


def test_crops_without_boxes_are_as_before():
    found = row([[10, 10, 30, 30]])
    pp = "inception_crop(None, 40, 80)"
    a = get_preprocess_fn("decode|" + pp)(found, np.random.default_rng(3))
    b = get_preprocess_fn(f'objects|decode|drop("objects")|{pp}')(found, np.random.default_rng(3))
    np.testing.assert_array_equal(a["image"], b["image"])
    with pytest.raises(ValueError, match="min_cover"):
        get_preprocess_fn("inception_crop(min_cover=0)")


def test_answers_with_boxes_keep_their_words():
    found = row([[10, 10, 30, 30], [50, 10, 30, 30]])
    pp = get_preprocess_fn('objects|loc_text(outkey="suffix")')
    both = "<loc0170><loc0114><loc0682><loc0455>", "<loc0170><loc0568><loc0682><loc0909>"
    assert pp(found | {"answer": "Left lung <loc0000>"})["suffix"] == f"Left lung {both[0]} ; {both[1]}"
    assert pp(found | {"answer": A})["suffix"] == f"{both[0]} thing 0 ; {both[1]} thing 1"
    assert pp(found | {"answer": "No"})["suffix"] == "No"


def test_boxes_of_a_table():
    pp = get_preprocess_fn('objects|loc_text(outkey="suffix")')
    found = row([[10, 10, 30, 30]]) | {"boxes": '[{"Liver": [9, 6, 36, 24]}]', "answer": "Left"}
    box = "<loc0102><loc0102><loc0512><loc0512>"
    assert pp(found | {"question": "detect liver"})["suffix"] == f"{box} liver"
    assert pp(found | {"question": "ground Where is it?"})["suffix"] == f"Left {box}"
    assert pp(found | {"question": "Where is it?"})["suffix"] == "Left"
    assert pp(found | {"question": "detect liver", "boxes": ""})["suffix"] == "Left"


@pytest.mark.parametrize(
    "text", ["liver", "{}", "[1]", '[{"a": [1, 2, 3]}]', '[{"a": [1, 2, 3, "4"]}]', '[{"a": [1, 2, 3, NaN]}]']
)
def test_boxes_of_a_table_that_are_refused(text):
    with pytest.raises(ValueError, match="key 'boxes'"):
        get_preprocess_fn("objects")(row([]) | {"boxes": text})


def test_prompts_by_task():
    pp = get_preprocess_fn('task_prompt("answer en {question}")')
    assert pp({"question": "detect liver"})["prefix"] == "detect liver"
    assert pp({"question": "Can you detect {liver}?"})["prefix"] == "answer en Can you detect {liver}?"
    with pytest.raises(ValueError, match="once"):
        get_preprocess_fn('task_prompt("answer en")')


@pytest.mark.parametrize(
    "pp, change, message",
    [
        ("decode|objects", {}, "before decode"),
        ("objects", {"boxes": [[0, 0, 1, 1]]}, "label and bbox"),
        ("objects", {"boxes": dict(label=["a"], bbox=[[0, 0, 1, float("inf")]])}, "expected one each"),
        ("objects", {"boxes": dict(label=[], bbox=[[0, 0, 1, 1]])}, "expected one each"),
        ('decode|loc_text("answer")', {"answer": A}, "no key 'objects'"),
    ],
)
def test_rows_that_are_refused(pp, change, message):
    with pytest.raises(ValueError, match=message):
        get_preprocess_fn(pp)(row([[10, 10, 30, 30]]) | change)


@pytest.mark.parametrize("pp, message", [("flip_lr", "left and right"), ("refcoco_mask2str", "codebook")])
def test_ops_that_are_refused(pp, message):
    with pytest.raises(ValueError, match=message):
        get_preprocess_fn(pp)


# --- Tokens ---


def test_tiny_has_loc_tokens():
    plain, loc = get_tokenizer("tiny"), get_tokenizer('tiny(tokensets=("loc",))')
    assert plain.vocab_size == 1024 and loc.vocab_size == 2048 and not plain.tokensets
    text = f"Left lung {A}"
    ids = loc.to_int(text, special=loc.tokensets)
    assert ids == [*plain.to_int("Left lung "), 1025, 1026, 1027, 1028] and loc.to_str(ids) == text
    assert loc.to_int(text) == plain.to_int(text)
    with pytest.raises(ValueError, match="unknown token sets"):
        get_tokenizer('tiny(tokensets=("lok",))')


@pytest.mark.slow
@pytest.mark.real_data
@settings(max_examples=20, deadline=None)
@given(
    found=st.lists(st.tuples(shares(), st.sampled_from(["liver", "left lung", "brain edema"])), min_size=1, max_size=4)
)
def test_same_ids_as_the_processor_of_hugging_face(processor, real_file, found):
    ours = get_tokenizer(f'gemma(tokensets=("loc", "seg"), model="{real_file}")')
    boxes, labels = [b for b, _ in found], [name for _, name in found]
    for text in (boxes_lib.to_text(boxes, labels), boxes_lib.to_text(boxes, (), "Left lung")):
        made = processor(text="<image>detect liver", suffix=text, images=Image.new("RGB", (8, 8)))
        ids = [i for i, t in zip(made["input_ids"][0], made["token_type_ids"][0]) if t]
        assert ids == ours.to_int(text, eos=True, special=ours.tokensets)


@pytest.fixture(scope="module")
def real_file(real_data):
    return real_data / "gemma_tokenizer.json.gz"


@pytest.fixture(scope="module")
def processor(real_file, tmp_path_factory):
    import gzip

    transformers = pytest.importorskip("transformers")
    from transformers.models.paligemma import processing_paligemma

    path = tmp_path_factory.mktemp("gemma") / "tokenizer.json"
    path.write_bytes(gzip.decompress(real_file.read_bytes()))
    special = dict(bos_token="<bos>", eos_token="<eos>", pad_token="<pad>", unk_token="<unk>")
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_file=str(path), **special)
    # As in the released files: <loc> and <seg> from 256,000 on, and <image> after them.
    tokenizer.add_tokens(processing_paligemma.EXTRA_TOKENS)
    images = transformers.SiglipImageProcessor(size=dict(height=8, width=8), image_seq_length=1)
    images.image_seq_length = 1
    return transformers.PaliGemmaProcessor(image_processor=images, tokenizer=tokenizer)
