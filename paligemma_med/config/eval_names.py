"""Names of evaluations: what one may be called, and which one a metric belongs to.

A name is a path below <workdir>/eval, and the beginning of its metrics' names. Like big_vision's,
it may have several parts ("vqav2/minival"), and may begin with another one's
("vqav2/minival/pplx").
"""

import re


def check(name) -> None:
    """ValueError for a name that can't be a path below a folder."""
    parts = name.split("/")
    if not all(parts) or {".", ".."} & {*parts} or re.search(r"[\\\0\n]", name):
        raise ValueError(
            f"config.evals has the name {name!r}; expected one like 'slake_validate' or 'vqav2/minival', "
            "a path below the run's eval folder."
        )


def split_metric(metric, names) -> tuple[str, str]:
    """Which evaluation a metric of metrics.jsonl is of, and what that calls it.

    Args:
      metric: "vqav2/minival/model/overall/acc".
      names: of the evaluations there are; the longest that fits is the one.

    Returns:
      ("vqav2/minival", "model/overall/acc"), or ("", metric) if it is of none of them.
    """
    name = max((n for n in names if metric.startswith(f"{n}/")), key=len, default="")
    return name, metric[len(name) + 1 :] if name else metric
