"""How far apart the results of two programs may lie that compute the same.

XLA sums in another order, and fuses other multiplications with additions, for each processor, shape
and neighbourhood: two programs that compute the same agree to a few units of rounding, and not to
the bit. How much a unit is goes by the size of what is added up, so bounds are stated relative to
the largest number of an array: a bound like 1e-6 holds on the machine where it was tried, and fails
on the next. Measured over the tests of models and decoding, with AVX2 and with SSE4.2: up to 4 units
for activations, 10 for gradients and log-probabilities. Mistakes are larger: inputs rounded to TF32
move a product by up to 4,000 units, to bfloat16 by 30,000.
"""

import numpy as np

UNIT = 2.0**-23  # spacing of float32 between 1 and 2


def distance(got, want):
    """The largest difference of two float32 arrays, in units of rounding of the largest |want|."""
    got, want = (np.asarray(x, np.float64) for x in (got, want))
    return np.abs(got - want).max(initial=0) / (UNIT * np.abs(want).max(initial=1e-30))


def assert_close(got, want, units=16, err_msg=""):
    """Whether two programs' float32 results are the same but for rounding.

    Args:
      got, want: arrays of one shape, or `want` one number; where one is infinite, the other must be.
      units: of rounding, of the largest finite |want|.
    """
    got, want = np.asarray(got), np.asarray(want)
    assert not want.ndim or got.shape == want.shape, f"{got.shape} is not {want.shape}"
    size = np.abs(want[np.isfinite(want)]).max(initial=0)
    np.testing.assert_allclose(got, want, rtol=0, atol=units * UNIT * size, err_msg=err_msg)
