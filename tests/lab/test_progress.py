"""Progress: what a line says, a line every half minute, and who draws a bar."""

import io
import sys
import time

import pytest

import tiny_model
from stem_attn import cli
from stem_attn.lab import progress
from stem_attn.lab.bench import limit
from stem_attn.lab.progress import LINE_SECONDS, Progress, show_progress, write_lines


class Clock:
    """Stands still unless told; `wait` passes the time in which a script of steps happens."""

    def __init__(self, *steps):
        self.now, self.steps, self.waited = 1000.0, list(steps), []

    def __call__(self):
        return self.now

    def wait(self, seconds):
        self.waited.append(seconds)
        if not self.steps:
            return True
        self.now += seconds
        self.steps.pop(0)()
        return False


def test_a_line_says_what_is_done_and_what_is_left():
    clock = Clock()
    work = Progress("tune", "forwards", 40, at_most=True, now=clock)
    assert work.line() == "tune: 0 of at most 40 forwards done in 0 s"
    work.starts("dense forward 1/2")
    clock.now += 42
    assert work.line() == "tune, dense forward 1/2: 0 of at most 40 forwards done in 42 s"
    work.starts("uniform")
    assert work.line() == "tune, uniform: 1 of at most 40 forwards done in 42 s, about 27 min 18 s left"


def test_long_times_are_told_in_hours_and_nothing_is_left_in_the_end():
    clock = Clock()
    work = Progress("ruler", "prompts", 3, now=clock)
    clock.now += 3 * 3600
    work.finishes("vt 4096 dense")
    assert work.line() == "ruler, vt 4096 dense: 1 of 3 prompts done in 3 h 00 min, about 6 h 00 min left"
    for _ in range(3):  # more steps than were foreseen
        work.finishes("fwe 4096 dense")
    assert work.line().endswith("4 of 3 prompts done in 3 h 00 min, about 0 s left")


def test_a_line_comes_every_half_minute_however_long_a_step_takes(capsys):
    clock = Clock()
    work = Progress("bench", "steps", 4, now=clock)
    work.starts("checking sdpa")
    clock.steps = [lambda: None, lambda: None, lambda: work.starts("checking cpu"), lambda: None]
    write_lines(work, clock.wait)
    assert set(clock.waited) == {LINE_SECONDS} == {30.0}
    assert capsys.readouterr().err.splitlines() == [
        "bench, checking sdpa: 0 of 4 steps done in 30 s",
        "bench, checking sdpa: 0 of 4 steps done in 1 min 00 s",
        "bench, checking cpu: 1 of 4 steps done in 1 min 30 s, about 4 min 30 s left",
        "bench, checking cpu: 1 of 4 steps done in 2 min 00 s, about 6 min 00 s left",
    ]


def test_a_reader_that_has_gone_does_not_end_the_work(monkeypatch):
    class Gone(io.StringIO):
        def write(self, text):
            raise BrokenPipeError

    clock = Clock(lambda: None, lambda: None)
    monkeypatch.setattr(sys, "stderr", Gone())
    write_lines(Progress("bench", "steps", 4, now=clock), clock.wait)
    assert len(clock.waited) == 1


def test_lines_come_while_the_work_goes_on_and_end_with_it(monkeypatch, capsys):
    monkeypatch.setattr(progress, "LINE_SECONDS", 0.02)
    expected, said = "tune, uniform: 0 of 2 forwards", ""

    def work():
        nonlocal said
        with show_progress("tune", "forwards", 2) as shown:
            shown.starts("uniform")
            until = time.monotonic() + 20
            while expected not in said and time.monotonic() < until:
                time.sleep(0.01)
                said += capsys.readouterr().err
            raise RuntimeError("broke")

    with pytest.raises(RuntimeError, match="broke"):
        work()
    assert expected in said
    capsys.readouterr()
    time.sleep(0.1)
    assert capsys.readouterr().err == ""


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_a_terminal_shows_a_bar_that_is_gone_in_the_end(monkeypatch):
    screen = Terminal()
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setattr(sys, "stderr", screen)
    monkeypatch.setattr(progress, "write_lines", None)  # no lines beside the bar
    with show_progress("ruler", "prompts", 3) as work:
        work.finishes("vt 4096 dense")
        work.finishes("fwe 4096 dense")
        print("a warning", file=sys.stderr)
    shown = screen.getvalue()
    assert sys.stderr is screen
    assert "ruler, fwe 4096 dense" in shown
    assert "2/3" in shown
    assert "a warning" in shown
    assert shown.endswith("\x1b[1A\x1b[2K")  # a line up, and that line empty


# --- every command that takes minutes --------------------------------------------------------------------------------

SMALL = ["--set", "block_size=16", "--set", "min_seq_len=0", "--set", "budget_ratio=0.1"]
MODEL = ["--model", "{model}", "--device", "cpu"]
COMMANDS = {
    "prefill": ["prefill", *MODEL, "--max-tokens", "400", "--new-tokens", "1", *SMALL],
    "bench": ["bench", "--device", "cpu", "--heads", "2", "--kv-heads", "1", "--head-dim", "16", "--methods",
              "sdpa,cpu", "--lengths", "200,300", "--repeats", "3", *SMALL],
    "tune": ["tune", *MODEL, "--length", "256", "--prompts", "2", "--held-out", "1", "--out", "{tmp}/o.json", *SMALL],
    "tune, dense": ["tune", *MODEL, "--length", "256", "--prompts", "1", "--held-out", "1", "--out", "{tmp}/o.json",
                    "--target", "kl=1e-9", *SMALL],
    "fidelity": ["eval", "fidelity", *MODEL, "--length", "512", "--block-size", "16", "--prompts", "2", "--densities",
                 "0.6,0.7", "--methods", "stem-official,oracle,dense", "--out", "{tmp}"],
    "inspect": ["inspect", *MODEL, "--max-tokens", "400", "--block-size", "16", "--out", "{tmp}", "--methods", "oracle",
                "--variant", "small=stem-default,min_seq_len=0,budget_ratio=0.1"],
    "ruler": ["eval", "ruler", *MODEL, "--tasks", "fwe", "--lengths", "1536", "--samples", "2", "--methods",
              "dense,a_shape", "--block-size", "16"],
}  # fmt: skip


@pytest.mark.parametrize("name", COMMANDS)
def test_every_step_is_counted(name, tmp_path, monkeypatch):
    """The steps that were foreseen are those that came; where fewer may come, no more do."""
    monkeypatch.setattr(limit, "_SIZE", {"cuda": 64, "cpu": 64})
    works = []

    class Seen(Progress):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs)
            works.append((self, kwargs.get("at_most", False)))

    monkeypatch.setattr(progress, "Progress", Seen)
    folder = tiny_model.save(str(tmp_path / "model"))
    arguments = [text.replace("{model}", folder).replace("{tmp}", str(tmp_path)) for text in COMMANDS[name]]
    assert cli.run(arguments) == 0
    ((work, at_most),) = works
    done = work.done + work._running
    assert work.step
    assert done <= work.total if at_most else done == work.total
    assert done >= (work.total if name == "fidelity" else work.total / 3)
