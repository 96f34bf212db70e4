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
# # Notebook: own data
#
# A folder of images and a table of questions: ask a model, measure it beside its controls, train it, measure again.
# Here the images are drawn and the model is the tiny one, which has seen no radiology, so that everything takes a few
# minutes on a CPU; with your own table and weights the commands are the same ([a table and a
# folder](../own_data.md)).
#
# This page is a script, `docs/notebooks/own_data.py`. `python own_data.py` runs it from top to bottom, as the
# project's tests do; with Jupytext installed, Jupyter opens it as a notebook. It writes to the folder `own_data_out`.
# It needs `pip install 'paligemma_med[report]'`.

# %%
import csv
import json
import os
import pathlib
import subprocess
import sys

import numpy as np
from PIL import Image

from paligemma_med.pp import command_line

OUT = pathlib.Path("own_data_out")
TINY = os.path.join(command_line.programs_folder(), "tools", "tiny_base.npz")


def paligemma_med(*words):
    """The command of the same name; in a terminal: paligemma_med ask --table=…"""
    subprocess.run([sys.executable, "-m", "paligemma_med", *map(str, words)], check=True)


# %% [markdown]
# ## A folder and a table
# Bodies of grey noise with a bright spot (let it be a nodule), a dark one (a cyst), or none. Your own table has at
# least the columns `image` and `question`, and `answer` to measure or train; `patient_id` keeps a patient's images on
# one side of every split.

# %%
rng = np.random.default_rng(0)
films = OUT / "films"
films.mkdir(parents=True, exist_ok=True)
y, x = np.mgrid[:96, :96]
rows = []
for i in range(200):
    finding = ("Nodule", "Cyst", "None")[i % 3]
    pixels = 90 * (((x - 48) / 38) ** 2 + ((y - 48) / 44) ** 2 < 1) + rng.normal(30, 6, (96, 96))
    if finding != "None":
        column, row = rng.uniform(28, 68), rng.uniform(28, 68)
        pixels[(x - column) ** 2 + (y - row) ** 2 < 11**2] += 90 if finding == "Nodule" else -80
    Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(films / f"{i:03}.png")
    of_image = {"image": f"{i:03}.png", "patient_id": f"p{i // 2}"}
    rows.append(of_image | {"question": "What is the finding?", "answer": finding})
    rows.append(of_image | {"question": "Is there a cyst?", "answer": "Yes" if finding == "Cyst" else "No"})
table = OUT / "q.csv"
with open(table, "w", newline="", encoding="utf-8") as f:
    writer = csv.DictWriter(f, rows[0], delimiter=";")
    writer.writeheader()
    writer.writerows(rows)
print(f"{len(rows)} questions on 200 images")

# %% [markdown]
# ## Ask
# `answers.csv` has the table's own columns and what the model says. Killed, the same command goes on where it was.
# Your own weights: `--workdir=RUN`, or `--config=configs/own_data.py --checkpoint=paligemma-3b-mix-448.npz`.

# %%
config = "configs/own_data.py:tiny,text_len=32"
paligemma_med(
    "ask", f"--config={config}", f"--checkpoint={TINY}", f"--table={table}", f"--images={films}", f"--out={OUT}/asked"
)
print(*(OUT / "asked" / "answers.csv").read_text("utf-8-sig").splitlines()[:5], sep="\n")

# %% [markdown]
# ## Train
# The projection head and LoRA in both towers at once (`stage=both`). The table has no column `split`: training,
# validation and test are drawn by patient, always the same ones, and that is said. Started again, training goes on
# where it was.

# %%
paligemma_med(
    "train",
    f"--config={config},train={table},images={films},stage=both,epochs=12,answer=4",
    f"--workdir={OUT}/run",
)

# %% [markdown]
# ## Measure
# On the patients that training never saw, before and after. Beside the model stands what needs no image: majority
# answers, an echo of the question, and the same model with images shuffled, grey, or noise. A model that reads images
# is well above all of them.

# %%
data = [f"--table={table}", f"--images={films}", "--split=test", f"--train_table={table}"]
paligemma_med("evaluate", f"--config={config}", f"--checkpoint={TINY}", *data, f"--out={OUT}/before")
paligemma_med("evaluate", f"--workdir={OUT}/run", *data, f"--out={OUT}/after")

# %%
after = json.loads(next((OUT / "after" / "eval").glob("*/metrics.json")).read_text("utf-8"))
for who in ("model", "majority", "shuffled_images", "blank_image"):
    print(f"{who:16} {after[f'{who}/overall/acc']:.2f}")

# %% [markdown]
# ## A report
# `report.html`: both side by side, with paired tests, plots, and the questions that went wrong with their images.

# %%
paligemma_med("report", OUT / "before", OUT / "after", f"--out={OUT}/report")

# %% [markdown]
# ## What an answer was read from
# One page without network: maps of attention, relevancy and occlusion, with a warning where the answer hardly depends
# on the image.

# %%
question = "What is the finding?"
paligemma_med(
    "explain", f"--workdir={OUT}/run", f"--image={films}/000.png", f"--question={question}", f"--out={OUT}/page.html"
)
print("pages:", OUT / "report" / "report.html", OUT / "page.html")
