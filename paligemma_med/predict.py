"""Answers questions about an image:

    python -m paligemma_med.predict --workdir=out/s1 --image=film.jpg --question="Any nodule?"

With --config and --checkpoint instead of --workdir, weights of any form that `load_params` takes.
"""

import numpy as np
from absl import app, flags, logging

from paligemma_med import cli, decode, weights
from paligemma_med.page import shown
from paligemma_med.parallel import distributed, notes, sharding
from paligemma_med.pp import command_line, get_preprocess_fn, image_cells, own_rows


def predict(config, checkpoint, image, questions, *, choices=None, **decoding) -> list[dict]:
    """Answers questions about one image.

    Args:
      config: ConfigDict of an experiment, for its prompt and model; not changed.
      checkpoint: anything `checkpoints.load_params` takes.
      image: encoded bytes (JPEG, PNG, DICOM, …: docs/images.md) or uint8[H, W, 3].
      questions: list of str, one at least.
      choices: {"choice_a": text, …} that the questions offer, for prompts that show them.
      **decoding: for `decode.generate`; max_new_tokens is 64 by default.

    Returns:
      A dict for each question: question, prompt (as the model reads it), answers: a list of
      dict(answer=str, logprob=float), the sum over the answer's tokens.

    Raises:
      ValueError: no question, an empty one, or an image that can't be read.
    """
    if isinstance(questions, str) or not questions or not all(isinstance(q, str) and q.strip() for q in questions):
        raise ValueError(
            f"questions is {questions!r:.80}; expected a list of one question at least, none of them empty."
        )
    if not config.get("predict_pp"):
        raise ValueError("config has no predict_pp, which makes a prompt of a question.")
    model, tok, mesh, params = weights.load(config, checkpoint)
    pp = get_preprocess_fn(config.predict_pp)
    rows = [own_rows.prompted(pp, {"image": image, "question": q}, choices) for q in questions]
    for question, row in zip(questions, rows):
        if cut := row.get("_truncated"):
            logging.warning("The prompt lost its last %d tokens: %s", cut, question)
    batch = decode.batch_of(rows)
    with sharding.rules(config, mesh), notes.stage("compiling the program, and answering"):
        tokens, logprobs = decode.generate(
            model, params, batch, eos_token=tok.stop_tokens, **{"max_new_tokens": 64, **decoding}
        )
        tokens, logprobs = distributed.to_host((tokens, logprobs))
    out = []
    for i, question in enumerate(questions):
        prompt = tok.to_str(batch["text"][i][batch["mask_input"][i] > 0].tolist(), stop_at_eos=False)
        answers = [
            dict(answer=tok.to_str(t.tolist()), logprob=float(np.sum(p)))
            for t, p in zip(tokens[i], logprobs[i], strict=True)
        ]
        out.append(dict(question=question, prompt=prompt, answers=answers))
    return out


@cli.command
def main(argv) -> None:
    del argv
    values = flags.FLAGS
    distributed.start_from_flags(awaits_sigterm=False)
    if values.num_samples > 1 and not values.temperature:
        raise app.UsageError(
            f"--num_samples={values.num_samples} at --temperature=0 is one answer so many times; give --temperature=1."
        )
    if not values.question or not all(q.strip() for q in values.question):
        raise app.UsageError('--question is empty; expected a question such as --question="Any nodule?".')
    choices = own_rows.choices_of_flag(values.choices)
    image = image_cells.read(values.image, "--image")  # before the weights, which take long
    config, checkpoint = cli.from_flags()
    decoding = {k: values[k].value for k in _DECODING}
    rows = predict(config, checkpoint, image, values.question, choices=choices, **decoding)
    for row in rows if distributed.is_main() else ():
        print(row["question"])
        for answer in row["answers"]:
            print(f"  {shown(answer['answer'])}   (log-probability {answer['logprob']:.2f})")


_DECODING = ("max_new_tokens", "num_samples", "temperature", "top_k", "top_p", "seed")

if __name__ == "__main__":
    cli.define_source_flags()
    distributed.define_flags()
    command_line.define_path(
        "image", None, "Image file: JPEG, PNG, TIFF, DICOM, a folder of slices, … (docs/images.md).", required=True
    )
    flags.DEFINE_multi_string("question", None, "Question; may be given often.", required=True)
    command_line.define_choices()
    flags.DEFINE_integer("max_new_tokens", 64, "Length of an answer, at most.")
    flags.DEFINE_integer("num_samples", 1, "Answers for each question.")
    flags.DEFINE_float("temperature", 0.0, "0 gives the most probable answer.")
    flags.DEFINE_integer("top_k", 0, "Sampling from so many of the most probable tokens; 0: all.")
    flags.DEFINE_float("top_p", 1.0, "Nucleus sampling.")
    flags.DEFINE_integer("seed", 0, "Seed of the samples.")
    app.run(main, flags_parser=cli.parse_flags)
