"""From a data set on disk to batches on the devices: TFDS data source -> Grain -> `jax.Array`.

Records are read in random order from TFDS' array_record files (no TensorFlow), reshuffled each epoch,
preprocessed by a pp string, batched, and put on the mesh ahead of their use. A batch's rows, and the random
numbers that pp draws for them, only depend on the seed and the step: not on threads, worker processes, the
number of JAX processes, or where a run was resumed.

  sources     records on disk: TFDS; by other names table_source, jsonl_source
  splits      those of an own table
  rows        one record through pp, several rows to a batch
  sets        what config.input draws from: one set, or several and their shares
  mixture     which of several data sets each example comes from
  devices     which rows of a batch this process loads, and onto which devices they go
  workers     the processes or threads that make batches ahead of their use
  training    endless shuffled batches
  evaluation  one split in order

Faults: a record that can't be used ends the run with an error that names it, or with `on_error="skip"` is
replaced by another and listed. A worker that dies ends the run within seconds.
In an evaluation no question may be skipped, and an error in one process is raised in all of them.
"""

from paligemma_med.input_pipeline.errors import InputError
from paligemma_med.input_pipeline.evaluation import EvalBatch, EvalInput, evaluation
from paligemma_med.input_pipeline.rows import Preprocess
from paligemma_med.input_pipeline.sets import TrainingSets, num_examples
from paligemma_med.input_pipeline.sources import Source, folder_of, open_source
from paligemma_med.input_pipeline.training import IGNORED_KEYS, KEYS, TrainingInput, training

__all__ = [
    "IGNORED_KEYS",
    "KEYS",
    "EvalBatch",
    "EvalInput",
    "InputError",
    "Preprocess",
    "Source",
    "TrainingInput",
    "TrainingSets",
    "evaluation",
    "folder_of",
    "num_examples",
    "open_source",
    "training",
]
