"""What a config means, worked out once and shared by all code that needs it.

`Setup` has the model, the tokenizer, the mesh, and the type, kind and sharding of every leaf; `TrainingSetup` also has
which leaves are trained, on which data, for how long, and by which optimizer. No weights are read here.

Each of these is computed on first use and cached. So a dry run opens no data, and reading a run of eight devices on a
laptop needs no mesh.
"""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax

from paligemma_med import experiment, input_pipeline, quantise
from paligemma_med.config import durations
from paligemma_med.config import values as config_values
from paligemma_med.models import flops, parts, vlm
from paligemma_med.models.leaves import Leaf
from paligemma_med.parallel import sharding
from paligemma_med.pp.tokenizer import Tokenizer
from paligemma_med.training import optim


class Setup:
    """What answering questions needs from a config; nothing is trained.

    Attributes:
      config: a checked copy; the caller's isn't changed.
    """

    trained_names = ()

    def __init__(self, config, *, mesh=None):
        """
        Args:
          mesh: replaces that of config.mesh.

        Raises:
          ValueError: a mistake in the config; mistakes that only show later are raised by the attribute concerned.
        """
        self.config = self._check(config)
        if mesh is not None:
            self.mesh = mesh

    _check = staticmethod(config_values.checked)

    @functools.cached_property
    def model(self) -> vlm.Model:
        return experiment.make_model(self.config)

    @functools.cached_property
    def tokenizer(self) -> Tokenizer:
        return experiment.make_tokenizer(self.config, self.model)

    @functools.cached_property
    def mesh(self) -> jax.sharding.Mesh:
        return experiment.make_mesh(self.config)

    @functools.cached_property
    def abstract(self) -> dict[str, jax.ShapeDtypeStruct]:
        """{name: shape, float32} of all parameters."""
        return experiment.abstract_params(self.config, self.model)

    @functools.cached_property
    def leaves(self) -> dict[str, Leaf]:
        """The model's table of leaves, from `parts.leaves_of`."""
        return parts.leaves_of(self.config.model)

    @functools.cached_property
    def dtypes(self) -> dict[str, jnp.dtype]:
        """{name: type on the devices}: trained leaves float32, frozen ones config.frozen_dtype. If that quantises
        (`kinds`), quantised leaves have the type of the unquantised ones here."""
        frozen = self.config.get("frozen_dtype", "float32")
        frozen = jnp.dtype(quantise.REST if frozen in quantise.KINDS else frozen)
        trained = set(self.trained_names)
        return {n: jnp.dtype("float32") if n in trained else frozen for n in self.abstract}

    @functools.cached_property
    def kinds(self) -> dict[str, str]:
        """{name: kind, from `quantise.kind_of`} of the frozen leaves that config.frozen_dtype quantises."""
        wanted, trained = self.config.get("frozen_dtype"), set(self.trained_names)
        if wanted not in quantise.KINDS:
            return {}
        kinds = {
            n: quantise.kind_of(n, x.shape, wanted, self.leaves) for n, x in self.abstract.items() if n not in trained
        }
        return {n: kind for n, kind in kinds.items() if kind}

    @functools.cached_property
    def shardings(self) -> dict[str, jax.sharding.NamedSharding]:
        """{name: sharding} by config.sharding_strategy; by default a copy on every device."""
        return {n: place for n, (place, _) in self.placement.items()}

    @functools.cached_property
    def placement(self) -> dict[str, tuple[jax.sharding.NamedSharding, str]]:
        """{name: (sharding, note on what stayed whole against its rule)}, from `sharding.plan`."""
        strategy = self.config.get("sharding_strategy") or [(".*", "replicate")]
        return sharding.plan(self.abstract, strategy, self.mesh, self.leaves)


class TrainingSetup(Setup):
    """What training needs from a config."""

    _check = staticmethod(config_values.checked_for_training)

    @classmethod
    def without_data(cls, config, *, mesh=None) -> "TrainingSetup":
        """A setup without the run's length, so that no data set is opened to count its examples. The shapes of
        everything that a step reads and changes don't depend on it."""
        setup = cls(config, mesh=mesh)
        setup.num_examples, setup.total_steps = 10**6, 10**9
        return setup

    @functools.cached_property
    def batch_sharding(self) -> jax.sharding.NamedSharding:
        """The sharding of a batch, which divides into micro-batches and devices."""
        _check_batch_size(self.config, self.mesh)
        return sharding.batch_sharding(self.mesh)

    @functools.cached_property
    def trained_names(self) -> list[str]:
        """The leaves that config.schedule doesn't freeze."""
        return optim.trained_names(self.config, list(self.abstract))

    @functools.cached_property
    def data(self) -> input_pipeline.TrainingSets:
        """The opened data sets of config.input."""
        return input_pipeline.TrainingSets(self.config.input)

    @functools.cached_property
    def num_examples(self) -> int:
        """Examples in an epoch."""
        return self.data.num_examples

    @functools.cached_property
    def total_steps(self) -> int:
        """Length of the run in steps."""
        total = durations.to_steps(
            self.config, "total", num_examples=self.num_examples, batch_size=self.config.input.batch_size
        )
        if total is None:
            raise ValueError("config says nothing about total_steps, total_epochs or total_examples.")
        return total

    def to_steps(self, section, name, default=None) -> int | None:
        """The duration `name` of a section of the config in steps (`durations.to_steps`)."""
        return durations.to_steps(
            section,
            name,
            num_examples=self.num_examples,
            batch_size=self.config.input.batch_size,
            total_steps=self.total_steps,
            default=default,
        )

    @property
    def tx(self) -> optax.GradientTransformation:
        """The optimizer: an optax.GradientTransformation over {trained name: array}."""
        return self._optimizer[0]

    @property
    def learning_rate(self) -> Callable:
        """step → float32[], of the first schedule."""
        return self._optimizer[1]

    @functools.cached_property
    def _optimizer(self):
        return optim.make(
            self.config,
            self.trained_names,
            all_names=list(self.abstract),
            total_steps=self.total_steps,
            num_examples=self.num_examples,
            batch_size=self.config.input.batch_size,
        )

    @functools.cached_property
    def flops_per_example(self) -> flops.Flops:
        """What a step computes for one example."""
        return flops.count(
            self.model,
            self.trained_names,
            res=self.config.res,
            text_len=self.config.text_len,
            supervised_len=self.config.get("supervised_len"),
            loss_chunk=self.config.get("loss_chunk"),
        )


def _check_batch_size(config, mesh):
    """Raises ValueError unless a batch divides into micro-batches, and those over devices."""
    size, accum = config.input.batch_size, config.get("grad_accum_steps") or 1
    shards = sharding.batch_sharding(mesh).mesh.shape[sharding.DATA_AXIS]
    if size % (accum * shards):
        more = -(-size // (accum * shards)) * accum * shards
        what = f"{accum} microbatches (config.grad_accum_steps) on " if accum > 1 else ""
        raise ValueError(
            f"config.input.batch_size = {size} doesn't divide into {what}{shards} devices along "
            f'the mesh axis "{sharding.DATA_AXIS}"; {more} does'
            + (", or fewer accumulated steps." if accum > 1 else ".")
        )
