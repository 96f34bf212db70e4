"""The quickstart's second stage for a few steps, evaluated by ours and by big_vision's own: what
test_evaluators trains. Arguments: data_dir, steps."""

from configs import common, quickstart


def get_config(arg=None):
    args = common.parse_arg(arg, data_dir="", steps=4)
    c = quickstart.get_config(f"stage=2,rank=2,eval=validate,data_dir={args.data_dir}")
    c.model.img.scan = c.model.llm.scan = True  # compiles faster
    del c["total_epochs"], c["ckpt_percent"]
    c.total_steps = args.steps
    c.input.batch_size = 8
    c.compilation_cache = False
    where = dict(data_dir=args.data_dir)
    kw = dict(max_new_tokens=12, batch_size=16)
    # Half of the questions don't fit: what is cut off must be counted alike.
    short = common.vqa_eval(c, "phantom", "validate", text_len=11, controls=("echo",), **kw)
    talks = common.dialogue_eval(c, "phantom", "validate", turns=2, text_len=48, **kw)
    own = common.big_vision_vqa_eval(c, "phantom", "validate", text_len=c.text_len, **kw)
    c.evals.phantom_validate.controls = ("majority", "majority_type", "echo", "shuffled_images")
    c.evals.update(short=short, talks=talks, own=own)
    for section in c.evals.values():
        section.batch_size = 16
        section.data.update(where)
        if "train_data" in section:
            section.train_data.update(where)
    return c
