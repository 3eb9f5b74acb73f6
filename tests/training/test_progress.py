"""What a person sees: a bar on a terminal, sparse lines elsewhere."""

import io

from headrace.training.progress import Bar, Lines, progress_on

METRICS = {"loss": 5.1234, "tokens_per_second": 9876.0}


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_lines_come_first_every_15_seconds_and_last() -> None:
    now, stream = [0.0], io.StringIO()
    lines = Lines(stream, lambda: now[0])
    for step in range(1, 101):
        lines.update(step, 100, step * 2048, METRICS)
        now[0] += 1.0
    shown = stream.getvalue().splitlines()
    steps = (1, 16, 31, 46, 61, 76, 91, 100)
    assert [line.split(" of ")[0] for line in shown] == [f"pretrain: step {step}" for step in steps]
    assert shown[1] == "pretrain: step 16 of 100 (16 %), loss 5.123, 9,876 tokens/s, 1 min 24 s left"


def test_time_left_counts_from_where_this_process_began() -> None:
    now, stream = [100.0], io.StringIO()
    lines = Lines(stream, lambda: now[0])
    lines.update(901, 1000, 0, METRICS)  # resumed after step 900
    now[0] += 20.0
    lines.update(911, 1000, 0, METRICS)
    assert "2 min 58 s left" in stream.getvalue()


def test_a_step_told_again_after_a_restart_is_shown_without_a_time_left() -> None:
    now, stream = [0.0], io.StringIO()
    lines = Lines(stream, lambda: now[0])
    for step in (7, 9, 7, 5, 20):
        lines.update(step, 20, 0, METRICS)
        now[0] += 60.0
    assert [" left" in line for line in stream.getvalue().splitlines()] == [False, True, False, False, True]


def test_a_terminal_gets_a_bar_with_loss_and_speed() -> None:
    terminal = Terminal()
    bar = progress_on(terminal)
    assert isinstance(bar, Bar)
    for step in range(5, 11):
        bar.update(step, 10, step * 2048, METRICS)
    bar.close()
    assert "10/10" in terminal.getvalue()
    assert "loss 5.123, 9,876 tokens/s" in terminal.getvalue()
    assert isinstance(progress_on(io.StringIO()), Lines)
