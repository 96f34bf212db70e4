"""Our configs in big_vision's words: `translate` is the one place where they differ.

Most keys are big_vision's to begin with. `KEYS` says of each key of ours what becomes of it.
"""


def translate(config, *, note=print):
    """Our config as big_vision's trainer reads it.

    Args:
      config: ConfigDict of a config file of ours, with flags applied.
      note: is told what upstream's trainer does otherwise, a sentence each.

    Returns:
      A new ConfigDict; `config` is left as it is. Each of `evals` becomes
      dict(type="paligemma_med", pred="logits", section=<our section>, tokenizer=config.tokenizer,
      name=<its name>, log_…=…, skip_first=True), which `upstream.evaluators.Evaluator` is made of;
      one whose type has a dot in it is big_vision's own and stays as it is.

    Raises:
      ValueError: a key asks for something that upstream's trainer can't do.
    """
    raise NotImplementedError
