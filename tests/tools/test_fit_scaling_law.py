"""The scaling-law fit: known parameters come back, and what data cannot tell is refused."""

import json
import subprocess
import sys

import numpy as np
import pytest

from paligemma_med.config import files as config_files
from tests import tiny
from tools import fit_scaling_law as fsl

TRUE = dict(A=40.0, alpha=0.12, beta=0.15, E=1.2)


def law(x, d):
    return TRUE["A"] * x ** -TRUE["alpha"] * d ** -TRUE["beta"] + TRUE["E"]


def grid(xs=3, ds=6):
    x, d = np.meshgrid(np.geomspace(2e6, 4e7, xs), np.geomspace(1e6, 2e8, ds))
    return x.ravel(), d.ravel()


def test_recovers_the_parameters_of_exact_losses():
    x, d = grid()
    found = fsl.fit(x, d, law(x, d))
    assert {k: e.value for k, e in found.estimates.items()} == pytest.approx(TRUE, rel=1e-4)
    assert not any(e.verdict for e in found.estimates.values())
    assert found.rmse < 1e-8


def test_scale_of_x_and_d_changes_a_alone():
    x, d = grid()
    noisy = law(x, d) + np.random.default_rng(1).normal(0, 0.01, x.shape)
    a, b = fsl.fit(x, d, noisy).estimates, fsl.fit(x / 1e6, d / 1e3, noisy).estimates
    for name in ("alpha", "beta", "E"):
        assert b[name].value == pytest.approx(a[name].value, rel=1e-3)
        assert b[name].high == pytest.approx(a[name].high, rel=1e-2)
    shift = 1e6 ** a["alpha"].value * 1e3 ** a["beta"].value
    assert b["A"].value == pytest.approx(a["A"].value / shift, rel=1e-2)


def _covered(seeds):
    x, d = grid()
    hits = []
    for seed in seeds:
        noise = np.random.default_rng(seed).normal(0, 0.01, x.shape)
        estimates = fsl.fit(x, d, law(x, d) + noise).estimates
        hits.append([e.low <= TRUE[k] <= e.high for k, e in estimates.items()])
    return np.mean(hits, axis=0)


def test_intervals_hold_the_truth_and_are_not_wide():
    x, d = grid()
    assert (_covered(range(3)) >= 2 / 3).all()
    noisy = law(x, d) + np.random.default_rng(0).normal(0, 0.01, x.shape)
    beta = fsl.fit(x, d, noisy).estimates["beta"]
    assert 0.01 < beta.high - beta.low < 0.1


@pytest.mark.slow
def test_intervals_hold_the_truth_95_times_of_100():
    # 30 draws: 95 % of them, give or take three standard deviations of the binomial.
    covered = _covered(range(30))
    assert (covered > 0.95 - 3 * (0.95 * 0.05 / 30) ** 0.5).all(), covered


def test_an_exponent_whose_variable_never_varies_is_left_out():
    d = np.geomspace(1e6, 1e9, 12)
    x = np.full_like(d, 2e6)
    found = fsl.fit(x, d, law(x, d)).estimates
    assert found["alpha"].value is None
    assert "X never varies" in found["alpha"].verdict
    assert found["beta"].value == pytest.approx(TRUE["beta"], rel=1e-4)
    # What stays of A is A · X^-α.
    assert found["A"].value == pytest.approx(TRUE["A"] * 2e6 ** -TRUE["alpha"], rel=1e-3)


def test_exponents_that_can_be_traded_for_each_other_are_not_identified():
    d = np.geomspace(1e6, 2e8, 12)
    noise = np.random.default_rng(0).normal(0, 0.01, 12)
    found = fsl.fit(3 * d, d, law(3 * d, d) + noise).estimates
    for name in ("alpha", "beta"):
        assert "not identified" in found[name].verdict and "vary together" in found[name].verdict
        assert found[name].low == 0 and found[name].high > 0.2


def test_losses_that_hardly_fall_identify_no_exponent():
    d = np.geomspace(1e6, 2e6, 8)
    noise = np.random.default_rng(0).normal(0, 0.05, 8)
    found = fsl.fit(np.ones(8), d, 2.0 + noise).estimates
    assert found["beta"].verdict


@pytest.mark.parametrize(
    "x, d, loss, said",
    [
        ([1, 1, 1, 1, 1], [2, 2, 2, 2, 2], [3, 3, 3, 3, 3], "no exponent can be fitted"),
        ([1, 1, 1], [1, 2, 3], [3, 2, 1], "found 3 rows for 3 parameters"),
        ([1, 0, 1], [1, 2, 3], [3, 2, 1], "row 2: X is 0"),
        ([1, 1, 1], [1, 2, 3], [3, 2, float("nan")], "row 3: the loss is nan"),
    ],
)
def test_what_cannot_be_fitted_is_refused(x, d, loss, said):
    with pytest.raises(ValueError, match=said):
        fsl.fit(x, d, loss)


def test_columns_leaves_out_rows_without_a_loss_and_names_what_is_missing():
    rows = [dict(step=1, loss=2.0), dict(step=2), dict(step="3", loss="1.0"), dict(step=4, loss="")]
    x, d, loss = fsl.columns(rows, "f", 7.0, "step", "loss", d_scale=10.0)
    assert x.tolist() == [7, 7] and d.tolist() == [10, 30] and loss.tolist() == [2, 1]
    with pytest.raises(ValueError, match="f has no column 'lose'; it has loss, step"):
        fsl.columns(rows, "f", 7.0, "step", "lose")
    with pytest.raises(ValueError, match="f, row 1: expected numbers"):
        fsl.columns([dict(step="a", loss=1)], "f", 7.0, "step", "loss")


def test_reads_csv_and_jsonl(tmp_path):
    (tmp_path / "a.csv").write_text("step,loss\n1,2\n")
    (tmp_path / "a.jsonl").write_text('{"step": 1, "loss": 2}\n\n')
    (tmp_path / "b.jsonl").write_text('{"step": 1, "note": "a\u2028b"}\n', encoding="utf-8")
    assert fsl.read_rows(tmp_path / "b.jsonl") == [dict(step=1, note="a\u2028b")]
    assert fsl.read_rows(tmp_path / "a.csv") == [dict(step="1", loss="2")]
    (tmp_path / "a.csv").write_text("step;loss\n1;2\n")
    assert fsl.read_rows(tmp_path / "a.csv") == [dict(step="1", loss="2")]
    assert fsl.read_rows(tmp_path / "a.jsonl") == [dict(step=1, loss=2)]
    (tmp_path / "a.jsonl").write_text('{"step": 1}\n[1]\n')
    with pytest.raises(ValueError, match="line 2: .*expected a JSON object"):
        fsl.read_rows(tmp_path / "a.jsonl")
    with pytest.raises(ValueError, match="expected a .csv or .jsonl"):
        fsl.read_rows(tmp_path / "a.txt")


def test_the_program_fits_two_runs(tmp_path):
    for name, x in (("a", 2e6), ("b", 2e7)):
        lines = [json.dumps(dict(step=s, training_loss=law(x, 1000 * s))) for s in range(100, 4000, 300)]
        (tmp_path / f"{name}.jsonl").write_text("\n".join(lines))
    run = subprocess.run(
        [
            sys.executable,
            "-m",
            "tools.fit_scaling_law",
            tmp_path / "a.jsonl",
            tmp_path / "b.jsonl",
            "--x=2e6,2e7",
            "--d_scale=1000",
        ],
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stderr
    assert "| alpha | 0.12 |" in run.stdout and "| E | 1.2 |" in run.stdout
    assert "L is the column training_loss, D is 1000 · step." in run.stdout


def test_a_workdir_is_read_by_its_own_columns(tmp_path):
    c = tiny.config("nowhere", schedule=[("img/head/.*", dict(decay_type="constant")), (".*", None)])
    (tmp_path / "config.json").write_text(config_files.to_json(c))
    row = {"step": 3, "tokens_seen": 80, "val/avg": 1.0, "val/per_token": 2.0, "val/per_token/answer_type/OPEN": 3.0}

    def write(*rows):
        (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))

    write({"step": 1, "tokens_seen": 40}, row)
    rows, x, d, loss = fsl.of_workdir(str(tmp_path))
    assert (len(rows), x, d, loss) == (2, 32 * 64 + 64, "tokens_seen", "val/per_token")  # the head's kernel and bias
    assert fsl.columns(rows, "w", x, d, loss)[2].tolist() == [2.0]
    write(row | {"own/per_token": 1.0})
    with pytest.raises(ValueError, match=r"losses \['own/per_token', 'val/per_token'\]; expected one, or --loss"):
        fsl.of_workdir(str(tmp_path), 1.0)
    assert fsl.of_workdir(str(tmp_path), 7.0, "step", "own/per_token")[1:] == (7.0, "step", "own/per_token")
    write({"step": 1, "tokens_seen": 40})
    with pytest.raises(ValueError, match="no evaluation loss.*perplexity"):
        fsl.of_workdir(str(tmp_path), 1.0)
