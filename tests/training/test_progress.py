"""What the trainer tells is shown with loss and speed."""

import io

from headrace.training.progress import progress_on


def test_loss_and_speed_are_shown() -> None:
    stream = io.StringIO()
    shown = progress_on(stream)
    shown.update(16, 100, 32768, {"loss": 5.1234, "tokens_per_second": 9876.0})
    shown.close()
    assert stream.getvalue() == "pretrain: step 16 of 100 (16 %), loss 5.123, 9,876 tokens/s\n"
