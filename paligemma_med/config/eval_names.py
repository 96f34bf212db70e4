"""Names of evaluations: which names are allowed, and which evaluation a metric belongs to.

A name is a path below <workdir>/eval, and the prefix of its metrics' names. As in big_vision, it may
have several parts ("vqav2/minival"), and may begin with another evaluation's name
("vqav2/minival/pplx").
"""

from paligemma_med.pp.files import path_inside


def check(name) -> None:
    """Raises ValueError for a name that can't be a path below a folder."""
    try:
        path_inside("eval", name)
        good = all(part not in ("", ".") for part in name.split("/")) and "\\" not in name and name.isprintable()
    except ValueError:
        good = False
    if not good:
        raise ValueError(
            f"config.evals has the name {name!r}; expected one like 'slake_validate' or 'vqav2/minival', "
            "a path below the run's eval folder."
        )


def split_metric(metric, names) -> tuple[str, str]:
    """The evaluation that a metric of metrics.jsonl belongs to, and the metric's name within it.

    Args:
      metric: "vqav2/minival/model/overall/acc".
      names: the evaluations' names; the longest that fits wins.

    Returns:
      ("vqav2/minival", "model/overall/acc"), or ("", metric) if it belongs to none of them.
    """
    name = max((n for n in names if metric.startswith(f"{n}/")), key=len, default="")
    return name, metric[len(name) + 1 :] if name else metric
