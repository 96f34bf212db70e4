"""What a person watches: the figures, the lines of a log, the bar of a terminal."""

import io
import os
import types

import jax
import pytest

from paligemma_med.models import flops
from paligemma_med.training import progress

FLOPS = flops.Flops(6 * 10**12, 0, 0)


class Clock:
    """Time that passes when told so."""

    def __init__(self):
        self.now = 1000.0

    def monotonic(self):
        return self.now


class Loss(float):
    """A step's loss on a device, there once `done`."""

    done = True

    def is_ready(self):
        return self.done


class Terminal(io.StringIO):
    def isatty(self):
        return True


@pytest.fixture
def clock(monkeypatch):
    out = Clock()
    monkeypatch.setattr(progress, "time", out)
    return out


def terminal(monkeypatch):
    """(what stands on the screen's stderr, its stdout). No fixture: pytest puts its own files there
    between set-up and test."""
    err, out = Terminal(), Terminal()
    monkeypatch.setattr("sys.stderr", err)
    monkeypatch.setattr("sys.stdout", out)
    return err, out


def batches(wait=0.0):
    return types.SimpleNamespace(wait_seconds=wait)


def row(bar, step, inputs):
    return {"training_loss": 1.5, "l2_grads": 0.25, "lr": 1e-3, **bar.measure(step, inputs)}


def test_a_terminal_without_width_gets_lines(monkeypatch):
    """As containers have them: a bar of zero columns would show nothing."""
    err, out = terminal(monkeypatch)
    monkeypatch.setattr(err, "fileno", lambda: 2, raising=False)
    monkeypatch.setattr(os, "get_terminal_size", lambda fd: os.terminal_size((0, 0)))
    bar = progress.Progress(0, 4, 8)
    bar.step(1, Loss(1.5))
    bar.print(row(bar, 1, batches()))
    bar.close()
    assert "step 1/4  loss 1.5" in out.getvalue() and not err.getvalue()


def shown(screen):
    """The bar as it stands, after all that was drawn over it."""
    return [s for s in screen.getvalue().replace("\n", "\r").split("\r") if s.strip()][-1]


def test_figures(clock):
    peak = 3e12 / jax.device_count()
    bar = progress.Progress(10, 100, 16, flops=FLOPS, peak=peak)
    inputs = batches()
    clock.now += 20
    inputs.wait_seconds += 5
    assert bar.measure(20, inputs) == pytest.approx(
        # 8 examples a second of 6 TFLOP, on devices that could do 3 together.
        {"examples_per_second": 8, "input_wait": 0.25, "eta_seconds": 160, "mfu": 16}
    )
    clock.now += 5
    assert bar.measure(25, inputs) == pytest.approx(
        {"examples_per_second": 16, "input_wait": 0, "eta_seconds": 75, "mfu": 32}
    )
    assert set(bar.measure(25, inputs)) == progress.TIMING


def test_pauses_do_not_count(clock):
    bar = progress.Progress(0, 10, 2)
    clock.now += 4
    with pytest.raises(KeyError), bar.paused():  # one that fails counts no more
        clock.now += 1000
        raise KeyError
    with bar.paused():
        clock.now += 500
    assert bar.measure(4, batches())["examples_per_second"] == pytest.approx(2)
    with bar.paused():
        clock.now += 500
    clock.now += 2
    assert bar.measure(5, batches())["eta_seconds"] == pytest.approx(10)


@pytest.mark.parametrize("kw", [dict(), dict(peak=1e12), dict(flops=FLOPS)])
def test_no_mfu_where_it_is_not_known(kw, capsys):
    bar = progress.Progress(0, 10, 2, **kw)
    found = row(bar, 1, batches())
    bar.print(found)
    bar.print(row(bar, 2, batches()))
    assert "mfu" not in found
    out = capsys.readouterr().out
    assert out.count("MFU") == ("flops" in kw)
    assert ("No MFU: the peak of 8 × cpu isn't known (config.peak_tflops" in out) == ("flops" in kw)


def test_lines_of_a_log(clock, capsys):
    bar = progress.Progress(0, 4000, 16, flops=FLOPS, peak=2e12)
    inputs = batches()
    clock.now += 60
    bar.step(1, Loss(1.5))
    bar.print(row(bar, 1, inputs))
    clock.now += 8
    inputs.wait_seconds += 2
    bar.step(3, Loss(1.5), wait=True)
    bar.print(row(bar, 3, inputs))
    bar.say("step 3/4000  val: acc 0.5")
    bar.close()
    captured = capsys.readouterr()
    first, second, third, fourth = captured.out.splitlines()
    assert first == (f"MFU is of 2 TFLOP/s each of 8 × cpu, at 6 TFLOP an example: {flops.ACCOUNTING}.")
    assert second == "step 1/4000  loss 1.5000  grad 0.25  lr 1.00e-03  compiled and run once"
    assert third == (
        "step 3/4000  loss 1.5000  grad 0.25  lr 1.00e-03  4.0 images/s  MFU 150.0%  wait 25%  ETA 4:26:28"
    )
    assert fourth == "step 3/4000  val: acc 0.5"
    assert captured.err == ""


def test_bar_shows_the_steps_that_are_done(clock, monkeypatch):
    err, out = terminal(monkeypatch)
    bar = progress.Progress(100, 200, 16)
    losses = [Loss(2 - i / 10) for i in range(6)]
    for loss in losses[2:]:
        loss.done = False
    for i in range(4):  # sent off without waiting
        clock.now += 1
        bar.step(101 + i, losses[i])
    bar._bar.refresh()
    assert "102/200" in shown(err) and "loss 1.9000  16.0 images/s  ETA 1:38" in shown(err)
    losses[3].done = True  # but not the one before
    bar.step(105, losses[4])
    bar._bar.refresh()
    assert "102/200" in shown(err)
    clock.now += 4
    bar.step(106, losses[5], wait=True)
    bar._bar.refresh()
    assert "106/200" in shown(err) and "loss 1.5000" in shown(err)
    assert out.getvalue() == ""


def test_steps_sent_off_before_a_pause_count(clock, monkeypatch):
    """An eval waits for them first: without care their time would be taken for its own."""

    def wait(loss):
        if loss is not None:
            clock.now += 6

    monkeypatch.setattr(jax, "block_until_ready", wait)
    bar = progress.Progress(0, 10, 2)
    bar.step(3, Loss(1))
    with bar.paused():
        clock.now += 100
    assert bar.measure(3, batches())["examples_per_second"] == pytest.approx(1)


@pytest.mark.parametrize(
    "number, text",
    [(0.5, "0.5 FLOP"), (1.31e7, "13.1 MFLOP"), (9.894e14, "989.4 TFLOP"), (2e18, "2000 PFLOP")],
)
def test_units(number, text):
    assert progress._flops(number) == text


def test_bar_has_the_logged_figures_and_no_pauses_in_its_speed(clock, monkeypatch):
    err, out = terminal(monkeypatch)
    bar = progress.Progress(0, 100, 16, flops=FLOPS, peak=96e12 / jax.device_count())
    inputs = batches()
    bar.step(1, Loss(2))
    bar.print(row(bar, 1, inputs))
    clock.now += 10
    inputs.wait_seconds = 5
    bar.step(2, Loss(2), wait=True)
    bar.print(row(bar, 2, inputs))
    with bar.paused():
        clock.now += 7000
    clock.now += 10
    bar.step(3, Loss(1), wait=True)
    bar._bar.refresh()
    assert "loss 1.0000  1.6 images/s  MFU 10.0%  wait 50%  ETA 16:10" in shown(err)
    bar.say("a line")  # above the bar, which is drawn again
    assert out.getvalue().splitlines()[1:] == ["a line"]
    assert "3/100" in shown(err)
    bar.step(100, Loss(0.5), wait=True)
    assert "100/100" in shown(err)
    waiting = Loss(0.5)
    waiting.done = False
    bar.step(101, waiting)
    bar.close()
    bar.close()
    with bar.paused():  # what is saved after Ctrl-C
        pass
    bar.say("the end")
    assert out.getvalue().endswith("the end\n")


@pytest.mark.parametrize(
    "per_second, said",
    [(4.0, "4.0 images/s"), (0.5, "0.5 images/s"), (0.04, "25 s an image"), (1 / 123.4, "123 s an image")],
)
def test_a_speed_of_minutes_an_image_is_not_0(per_second, said):
    assert progress._speed(dict(examples_per_second=per_second, eta_seconds=0)).startswith(said + "  ETA")


def test_speed_is_of_late(clock, monkeypatch):
    err, _ = terminal(monkeypatch)
    bar = progress.Progress(0, 1000, 1)
    for i in range(100):
        clock.now += 100 if i < 50 else 2
        bar.step(i + 1, Loss(1))
    bar._bar.refresh()
    assert "0.5 images/s" in shown(err)


def test_log_beside_a_bar(clock, monkeypatch):
    """`train > log` on a terminal: the file gets its lines, the screen its bar."""
    err, _ = terminal(monkeypatch)
    log = io.StringIO()
    monkeypatch.setattr("sys.stdout", log)
    bar = progress.Progress(0, 10, 16)
    bar.step(1, Loss(2))
    bar.print(row(bar, 1, batches()))
    assert log.getvalue().startswith("step 1/10  loss 1.5") and "\r" not in log.getvalue()
    assert "1/10" in shown(err)


def test_other_processes_show_nothing(monkeypatch):
    screen = terminal(monkeypatch)
    monkeypatch.setattr(progress.distributed, "is_main", lambda: False)
    bar = progress.Progress(0, 10, 16, flops=FLOPS)
    bar.step(1, Loss(2))
    bar.print(row(bar, 1, batches()))
    bar.say("x")
    bar.close()
    assert [s.getvalue() for s in screen] == ["", ""]


def test_real_arrays_move_the_bar(monkeypatch):
    err, _ = terminal(monkeypatch)
    bar = progress.Progress(0, 2, 16)
    bar.step(1, jax.numpy.float32(2.5), wait=True)
    bar.step(2, jax.numpy.float32(1.5), wait=True)
    assert "2/2" in shown(err) and "loss 1.5000" in shown(err)
    bar.close()
