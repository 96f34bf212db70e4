"""configs/slake_grounded.py: what its three kinds of rows become, and its arguments."""

import io

import numpy as np
import pytest
from PIL import Image

from configs import common_boxes, slake_grounded
from paligemma_med.pp import boxes as boxes_lib
from paligemma_med.pp import get_preprocess_fn
from paligemma_med.pp.tokenizer import get_tokenizer


def row(question, answer, boxes=()):
    """A row on an image of 40 x 80 pixels with boxes x, y, w, h of the liver."""
    out = io.BytesIO()
    Image.new("RGB", (80, 40)).save(out, "PNG")
    found = dict(label=["Liver"] * len(boxes), bbox=np.reshape(boxes, (-1, 4)))
    return dict(image=out.getvalue(), question=question, answer=answer, boxes=found)


@pytest.mark.parametrize(
    "question, answer, boxes, prompt, said",
    [
        ("Is it a CT?", "Yes", [[0, 0, 40, 20]], "answer en Is it a CT?\n", "Yes"),
        ("detect liver", "<loc0000>", [[0, 0, 40, 20]], "detect liver\n", "<loc0000><loc0000><loc0512><loc0512> liver"),
        (
            "ground Where?",
            "Left <loc0000>",
            [[0, 0, 40, 20]],
            "ground Where?\n",
            "Left <loc0000><loc0000><loc0512><loc0512>",
        ),
    ],
)
def test_rows_of_each_task(question, answer, boxes, prompt, said):
    c = slake_grounded.get_config("tiny,crop=100")
    tokenizer = get_tokenizer(c.tokenizer)
    out = get_preprocess_fn(c.input.pp)(row(question, answer, boxes), np.random.default_rng(0))
    first = int(out["mask_loss"].argmax())
    assert tokenizer.to_str(out["text"][:first], stop_at_eos=False) == prompt
    assert tokenizer.to_str(out["text"][first:]) == said
    assert (out["text"] >= 1024).sum() == 4 * said.count("<loc") / 4
    asked = get_preprocess_fn(c.predict_pp)(row(question, answer))
    assert out["text"][:first].tolist() == asked["text"][asked["mask_input"] > 0].tolist()
    for name, section in c.evals.items():
        if name.endswith("_loss"):  # sees what training does, the answer with its boxes
            again = get_preprocess_fn(section.pp_fn)(row(question, answer, boxes) | dict(question_id="1"))
            for key in ("text", "mask_loss"):
                np.testing.assert_array_equal(np.trim_zeros(again[key], "b"), np.trim_zeros(out[key], "b"))
        else:
            again = get_preprocess_fn(section.pp_fn)(row(question, answer) | dict(question_id="1"))
            assert again["text"][again["mask_input"] > 0].tolist() == out["text"][:first].tolist()


def test_crops_move_the_boxes_of_a_row():
    c = slake_grounded.get_config("tiny,crop=50")
    tokenizer, seen = get_tokenizer(c.tokenizer), set()
    for seed in range(5):
        out = get_preprocess_fn(c.input.pp)(
            row("detect liver", "<loc0000>", [[20, 10, 40, 20]]), np.random.default_rng(seed)
        )
        (box,) = boxes_lib.read(tokenizer.to_str(out["text"][int(out["mask_loss"].argmax()) :])).boxes
        seen.add(box)
    assert len(seen) > 1


def test_arguments():
    full, tiny = slake_grounded.get_config(), slake_grounded.get_config("tiny,eval=test,vqa=0.5,detect=0.5,ground=0")
    assert full.model.llm.vocab_size == 257_152 and full.input.batch_size == 96 and full.lora
    assert tiny.model.llm.vocab_size == common_boxes.TINY_VOCAB == get_tokenizer(tiny.tokenizer).vocab_size
    sets = {"slake_en_test", "slake_detect_test", "slake_ground_test"}
    assert set(tiny.evals) == sets | {f"{name}_loss" for name in sets}
    assert tiny.input.data.to_dict() == dict(vqa=0.5, detect=0.5, ground=0.0)
    with pytest.raises(ValueError, match="multiple of 6"):
        slake_grounded.get_config("batch=32")
