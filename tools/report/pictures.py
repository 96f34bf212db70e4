"""What the built data set adds to predictions.jsonl: a question's image and its location.

If the set can't be opened, the report is made without it and says so.
"""

import io

import PIL.Image

from paligemma_med import input_pipeline
from paligemma_med.pp import images

SIDE = 320  # pixels, at most


class Lookup:
    """Questions of a split by id.

    note: why nothing can be looked up, or "".
    """

    def __init__(self, data, data_dir=None):
        """data: dict(name=…, split=…, …) as in a config; data_dir: instead of its own."""
        self.note, self._source, self._index = "", None, {}
        data = {k: data[k] for k in ("name", "split", "data_dir", "images", "columns", "choose") if data.get(k)}
        if data_dir and not str(data.get("name")).startswith("table:"):
            data["data_dir"] = str(data_dir)
        if "name" not in data:
            self.note = "neither metrics.json nor config.json says which data set this was"
            return
        try:
            self._source = input_pipeline.open_source(data)
            self._ids = [str(r["question_id"]) for r in self._columns("question_id")]
        except Exception as e:  # array_record and TFDS raise whatever they like
            self.note = f"the data set can't be opened: {e}"
            return
        self._index = {question: i for i, question in enumerate(self._ids)}

    def _columns(self, *keys):
        return self._source.columns(keys)

    def column(self, key) -> dict:
        """{question id: value}, {} if the set has no such key."""
        if self._source is None or key not in self._source.features:
            return {}
        return {q: str(r[key]) for q, r in zip(self._ids, self._columns(key))}

    def image(self, question_id) -> bytes | None:
        """The image of a question as JPEG, at most SIDE pixels wide and high; None without one."""
        index = self._index.get(str(question_id))
        if index is None:
            return None
        try:
            image = PIL.Image.fromarray(images.to_rgb(self._source[index]["image"]))
            image.thumbnail((SIDE, SIDE))
            out = io.BytesIO()
            image.save(out, "JPEG", quality=80)
        except (OSError, ValueError, KeyError):
            return None
        return out.getvalue()
