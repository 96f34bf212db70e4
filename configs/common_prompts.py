"""Prompts of other systems than PaliGemma: their words, and where the image stands in them.

A prompt is a list of parts. A part with a {field} is filled in from the row, and whatever is in it is plain text. A
part without one is a constant: names of special tokens in it, such as <start_of_turn>, are tokens. Parts are tokenised
one by one, in the words that weights were trained with; docs/prompts.md has them in a table.
"""

import dataclasses

OPTIONS = " A: {choice_a} B: {choice_b} C: {choice_c} D: {choice_d}"
_START_OF_IMAGE = "<start_of_image>"


@dataclasses.dataclass(frozen=True)
class Prompt:
    """How a question is put, and its answer in training.

    Attributes:
      before: parts of the text before the image; none: the image is in front of all text.
      after: parts after it.
      answer: parts of the answer; the tokenizer's EOS follows.
      bos: whether the tokenizer's BOS is the first token.
      clean: pp op that makes {asked} of the row's question, and {said} of its answer; "": as they are.
      answer_prefix: what stands before the answer in its part, for the scoring of options.
      learns_all: whether training is on the prompt's tokens, too; <start_of_image> never is learnt.
    """

    before: tuple = ()
    after: tuple = ("{asked}",)
    answer: tuple = ("{said}",)
    bos: bool = True
    clean: str = ""
    answer_prefix: str = ""
    learns_all: bool = False


def medgemma(version="1.5", *, system="", options=False, learns_all=False) -> Prompt:
    """MedGemma's: version 1.0 reads the question, then the image; 1.5 the image first. Template: Gemma 3's, as Hugging
    Face's processor fills it in; the order: the models' cards.

    Args:
      system: instructions before the question, which 1.0's card has and 1.5's doesn't.
      options: whether the row's four choices follow the question.
      learns_all: as in Google's fine-tuning notebook.
    """
    asked = "{asked}" + (OPTIONS if options else "")
    user, model = "<start_of_turn>user\n", "<end_of_turn>\n<start_of_turn>model\n"
    if version == "1.0":
        system = system.strip().replace("{", "{{").replace("}", "}}")
        asked = f"{system}\n\n{asked}" if system else asked
        before, after = (user, asked, "\n\n", _START_OF_IMAGE), (f"<end_of_image>\n\n{model}",)
    elif version == "1.5":
        if system:
            raise ValueError("MedGemma 1.5 has no system prompt; only version=1.0 takes one.")
        # One token for three line breaks, as in Hugging Face's files: they are tokenised with what they follow.
        before, after = (f"{user}\n\n", _START_OF_IMAGE), ("<end_of_image>\n\n", asked, model)
    else:
        raise ValueError(f"version={version!r}: expected '1.0' or '1.5'.")
    return Prompt(before, after, clean="strip()", learns_all=learns_all)


def llama_clip(options=False) -> Prompt:
    """Ours: the paper gives none."""
    asked = "{asked}" + (OPTIONS if options else "")
    return Prompt(("",), (f"{asked}\nAnswer:",), (" {said}",), answer_prefix=" ")


def bloom_qformer(stage, options=False) -> Prompt:
    """Ours, since the paper gives none: stage 1 says captions unasked; 2 and 3 have PMC-VQA's words (its
    PMC_QA_Dataset.py), with the blanks that are missing there."""
    if stage == 1:
        return Prompt(after=(), bos=False)
    choices = " Choices: {choice_a} {choice_b} {choice_c} {choice_d}" if options else ""
    return Prompt((), (f"Question: {{asked}}{choices} Answer:",), (" {said}",), bos=False, answer_prefix=" ")


# One instruction where theirs draws one of 17 or 15: the pools of its ROCO, MIMIC-CXR and IU-Xray sets.
_PEFOMED = {
    "caption": "[caption] briefly describe this image",
    "findings": "[caption] describe the given chest x-ray image in detail",
    "report": "[report] describe the given chest x-ray image in detail",
}


def pefomed(task="vqa", as_released=False) -> Prompt:
    """MiniGPT-v2's, as PeFoMed trains on it: whole instructions are in BLIP's form, lower-case tags included.

    Args:
      task: "vqa"; "caption" of figures; "findings", the caption of a chest X-ray in stage 1; "report".
      as_released: the prompt of their evaluation, which isn't that of training: upper-case tags, two BOS, and before
        a question, which isn't cleaned, an instruction; reports under the tag of captions.
    """
    if task == "vqa" and as_released:
        instruction = "Based on the image, respond to this question with a short answer: {asked}"
        return Prompt(("<s>[INST] <Img>",), (f"</Img> [vqa] {instruction} [/INST]",))
    if task == "report" and as_released:
        return Prompt(("<s>[INST] <Img>",), (f"</Img> {_PEFOMED['findings']} [/INST]",), clean="blip_text()")
    return Prompt(("[INST] <img>",), (f"</img> {_PEFOMED.get(task, '[vqa] {asked}')} [/INST]",), clean="blip_text()")


def op(name, *args, **kw) -> str:
    """A pp op with its arguments."""
    parts = [repr(a) for a in args] + [f"{k}={v!r}" for k, v in kw.items()]
    return f"{name}({', '.join(parts)})"


def to_ops(prompt, tokenizer, answer=None) -> list[str]:
    """The pp ops that make text, its masks and image_at of a row.

    Args:
      prompt: `Prompt`.
      tokenizer: its spec.
      answer: key of the answer, for training, which also gives mask_loss; None for a prompt alone, which gives
        mask_input.
    """
    asked = [*prompt.before, *prompt.after]
    parts = [*asked, *(prompt.answer if answer else ())]
    ops = [_cleaned(prompt, "question", "asked")] if any("{asked}" in part for part in asked) else []
    if answer:
        ops.append(_cleaned(prompt, answer, "said"))
    keys = [f"part{i}" for i in range(len(parts))]
    for i, (key, part) in enumerate(zip(keys, parts)):
        ends = dict(bos="yes") if prompt.bos and i == 0 else {}
        if answer and i == len(parts) - 1:
            ends["eos"] = "yes"
        if "{" in part:
            ops += [op("strfmt", part, outkey=key), op("tok", model=tokenizer, key=key, **ends)]
        else:
            ops.append(op("tok", model=tokenizer, key=key, text=part, special="yes", **ends))
    learnt = [i >= len(asked) or (prompt.learns_all and part != _START_OF_IMAGE) for i, part in enumerate(parts)]
    masks = dict(mask_ar=[1] * len(keys))
    masks |= dict(mask_loss=list(map(int, learnt))) if answer else dict(mask_input=[1] * len(keys))
    place = dict(image_after=keys[len(prompt.before) - 1]) if prompt.before else {}
    return [*ops, op("masked_concat", keys, outkey="text", **place, **masks)]


def _cleaned(prompt, inkey, outkey):
    if prompt.clean:
        return prompt.clean.replace("()", f"(inkey={inkey!r}, outkey={outkey!r})")
    return op("copy", inkey=inkey, outkey=outkey)
