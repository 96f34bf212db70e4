"""Windows by name: which grey values of a CT are shown as black and as white.

A window is a centre and a width. Those by name are in Hounsfield units, in which every CT measures air as
-1000 and water as 0, so that the same name shows the same tissue in each.
"""

import math
from typing import NamedTuple

# (centre, width) in HU, all of them Radiopaedia's (radiopaedia.org/articles/windowing-ct). Where it gives two values
# or a range: of stroke the wider (the other, W 8, leaves eight levels of grey), of subdural the middle of W 130 to 300
# and L 50 to 100. Its soft tissues are W 400, L 50 in the abdomen, which lies in its range for head and neck, too.
PRESETS = {
    "brain": (40, 80),
    "subdural": (75, 215),
    "stroke": (40, 40),
    "lung": (-600, 1500),
    "mediastinum": (50, 350),
    "abdomen": (50, 400),
    "soft tissue": (50, 400),
    "liver": (30, 150),
    "spine": (50, 250),
    "bone": (400, 1800),
}

NO_CT = "a window in Hounsfield units was passed over, as it is no CT in these units; its own was used"
NO_GREY = "a window was passed over, as it has colours"


class Window(NamedTuple):
    """Attributes:
    center, width: in the units of the file's values after its rescale.
    name: that of a preset, whose units are HU; "" of numbers, which are in whatever units the file has.
    """

    center: float
    width: float
    name: str = ""


def parse(window: object) -> Window | None:
    """A window as configs, pp strings, flags and cells of tables give it.

    Args:
      window: a key of `PRESETS`; (centre, width), or both as text, "40,400"; None or "" for the file's own.

    Raises:
      ValueError: anything else, or a width that isn't above 0.
    """
    if window is None or isinstance(window, Window) or window == "":
        return window or None
    name = window.strip().lower().replace("_", " ") if isinstance(window, str) else ""
    if name in PRESETS:
        return Window(*map(float, PRESETS[name]), name)
    try:
        center, width = map(float, window.split(",") if isinstance(window, str) else window)
    except (TypeError, ValueError):
        center = width = math.nan
    if not (abs(center) <= 1e9 and 0 < width <= 1e9):
        raise ValueError(
            f"window {window!r:.100}; expected centre and width (such as 40,400; a width above 0) or one of "
            f"{', '.join(PRESETS)}"
        )
    return Window(center, width)
