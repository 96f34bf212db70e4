# ---
# jupyter:
#   jupytext:
#     formats: py:percent
#     text_representation:
#       extension: .py
#       format_name: percent
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # Notebook: a model on a server
#
# Any model behind an OpenAI-compatible server (vLLM, Ollama, LM Studio, a service) is asked the same questions as a
# model of ours, with the same controls, and stands beside it in a report
# ([evaluation](../evaluation.md#a-model-behind-a-server)). Here a few lines of Python stand in for the server. Set
# `SERVER` and `MODEL` to ask a real one, such as `SERVER=http://127.0.0.1:8000/v1 MODEL=google/medgemma-4b-it` behind
# `vllm serve google/medgemma-4b-it`.
#
# This page is a script, `docs/notebooks/served_model.py`. `python served_model.py` runs it from top to bottom, as the
# project's tests do; with Jupytext installed, Jupyter opens it as a notebook. It writes to the folder
# `served_model_out`. It needs `pip install 'paligemma_med[judge,report]'`.

# %%
import base64
import csv
import http.server
import io
import json
import os
import pathlib
import subprocess
import sys
import threading

import numpy as np
from PIL import Image

from paligemma_med.pp import command_line

OUT = pathlib.Path("served_model_out")
TINY = os.path.join(command_line.programs_folder(), "tools", "tiny_base.npz")


def paligemma_med(*words):
    """The command of the same name; in a terminal: paligemma_med evaluate --server=…"""
    subprocess.run([sys.executable, "-m", "paligemma_med", *map(str, words)], check=True)


# %% [markdown]
# ## Questions
# Drawn images, half of them bright, with two questions on each: one that needs the image, and one whose answer is
# always the same.

# %%
rng = np.random.default_rng(0)
films = OUT / "films"
films.mkdir(parents=True, exist_ok=True)
table = OUT / "q.csv"
with open(table, "w", newline="", encoding="utf-8") as f:
    writer = csv.writer(f)
    writer.writerow(["image", "question", "answer"])
    for i in range(40):
        is_bright = i % 2 == 0
        pixels = rng.normal(190 if is_bright else 60, 10, (64, 64)).clip(0, 255).astype(np.uint8)
        Image.fromarray(pixels).save(films / f"{i:02}.png")
        writer.writerow([f"{i:02}.png", "Is the image bright?", "Yes" if is_bright else "No"])
        writer.writerow([f"{i:02}.png", "Is this a radiograph?", "Yes"])

# %% [markdown]
# ## A server
# It answers from the mean of the pixels, if there are any, and always "Yes" to the other question. That is all a
# server has to do: take `POST /v1/chat/completions` with text and image, and say something.


# %%
class Model(http.server.BaseHTTPRequestHandler):
    def do_POST(self):
        asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        content = asked["messages"][-1]["content"]
        parts = [{"type": "text", "text": content}] if isinstance(content, str) else content
        text = " ".join(part["text"] for part in parts if part["type"] == "text")
        urls = [part["image_url"]["url"] for part in parts if part["type"] == "image_url"]
        answer = "Yes"
        if "bright" in text and urls:
            picture = Image.open(io.BytesIO(base64.b64decode(urls[0].partition(",")[2])))
            answer = "Yes" if np.asarray(picture.convert("L")).mean() > 128 else "No"
        message = {"role": "assistant", "content": answer}
        usage = {"prompt_tokens": 0, "completion_tokens": 1, "total_tokens": 1}
        choice = {"index": 0, "message": message, "finish_reason": "stop"}
        reply = {"id": "0", "object": "chat.completion", "created": 0, "model": "brightness", "choices": [choice]}
        body = json.dumps(reply | {"usage": usage}).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *args):
        pass


stand_in = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Model)
threading.Thread(target=stand_in.serve_forever, daemon=True).start()
SERVER = os.environ.get("SERVER", f"http://127.0.0.1:{stand_in.server_port}/v1")
MODEL = os.environ.get("MODEL", "brightness")

# %% [markdown]
# ## Ask it, with all controls
# The same questions again with another question's image, grey, noise, and no image at all. Images leave this machine
# only for a host named by `--send_images_to`. Each reply is on the disk before the next step; killed, the command
# asks nothing twice.

# %%
data = [f"--table={table}", f"--images={films}", f"--train_table={table}"]
paligemma_med("evaluate", f"--server={SERVER}", f"--model={MODEL}", *data, f"--out={OUT}/served")

# %% [markdown]
# ## Ours, on the same questions

# %%
config = "configs/own_data.py:tiny,text_len=32"
paligemma_med("evaluate", f"--config={config}", f"--checkpoint={TINY}", *data, f"--out={OUT}/ours")

# %% [markdown]
# ## What stands beside the accuracy
# A model that reads the image loses what it read when the image is another's: here the questions about brightness.
# The other half it answers without looking, and no accuracy would tell.

# %%
for name in ("served", "ours"):
    metrics = json.loads(next((OUT / name / "eval").glob("*/metrics.json")).read_text("utf-8"))
    for who in ("model", "majority", "shuffled_images", "blank_image", "question_only"):
        if f"{who}/overall/acc" in metrics:
            print(f"{name:8} {who:16} {metrics[f'{who}/overall/acc']:.2f}")

# %% [markdown]
# ## Both in one report
# `report.html` has both with their controls, paired tests on the same questions, and where they differ.

# %%
paligemma_med("report", OUT / "served", OUT / "ours", f"--out={OUT}/report")
stand_in.shutdown()
