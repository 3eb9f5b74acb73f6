"""What a person sees: a bar on a terminal, sparse lines elsewhere."""

import io

from headrace.tracking.progress import Bar, Lines, by_rule, progress_on

SAID = "loss 5.123, 9,876 tokens/s"


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_lines_come_first_every_15_seconds_and_last() -> None:
    now, stream = [0.0], io.StringIO()
    lines = Lines(stream, lambda: now[0], name="pretrain")
    for step in range(1, 101):
        lines.show(step, 100, SAID)
        now[0] += 1.0
    shown = stream.getvalue().splitlines()
    steps = (1, 16, 31, 46, 61, 76, 91, 100)
    assert [line.split(" of ")[0] for line in shown] == [f"pretrain: step {step}" for step in steps]
    assert shown[1] == "pretrain: step 16 of 100 (16 %), loss 5.123, 9,876 tokens/s, 1 min 24 s left"


def test_time_left_counts_from_where_this_process_began() -> None:
    now, stream = [100.0], io.StringIO()
    lines = Lines(stream, lambda: now[0], name="pretrain")
    lines.show(901, 1000, SAID)  # resumed after step 900
    now[0] += 20.0
    lines.show(911, 1000, SAID)
    assert "2 min 58 s left" in stream.getvalue()


def test_a_step_told_again_after_a_restart_is_shown_without_a_time_left() -> None:
    now, stream = [0.0], io.StringIO()
    lines = Lines(stream, lambda: now[0], name="pretrain")
    for step in (7, 9, 7, 5, 20):
        lines.show(step, 20, SAID)
        now[0] += 60.0
    assert [" left" in line for line in stream.getvalue().splitlines()] == [False, True, False, False, True]


def test_a_terminal_gets_a_bar_with_what_is_said() -> None:
    terminal = Terminal()
    bar = progress_on(terminal, "pretrain")
    assert isinstance(bar, Bar)
    for step in range(5, 11):
        bar.show(step, 10, SAID)
    bar.close()
    assert "10/10" in terminal.getvalue()
    assert SAID in terminal.getvalue()
    assert isinstance(progress_on(io.StringIO(), "pretrain"), Lines)


def test_what_was_left_out_is_said_most_first_and_briefly() -> None:
    counts = {"not UTF-8": 20, "exact duplicate": 1900, "shorter": 3}
    assert by_rule(counts) == "1,900 exact duplicate, 20 not UTF-8, 3 shorter"
    assert by_rule({**counts, "a": 1}) == "1,900 exact duplicate, 20 not UTF-8, 3 shorter, 1 a"
    assert by_rule({**counts, "a": 1, "b": 2}).endswith(", 3 by 2 other rules")
    assert by_rule({}) == ""
