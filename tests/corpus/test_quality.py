"""Quality filters: datatrove's verdicts under their names, where it is installed."""

import importlib.util
import sys

import pytest

from headrace.corpus.quality import open_filters
from headrace.errors import UserError

needs_datatrove = pytest.mark.skipif(
    any(importlib.util.find_spec(name) is None for name in ("datatrove", "spacy")),
    reason="datatrove and spacy are not installed",
)


def test_without_datatrove_the_error_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datatrove.data", None)
    with pytest.raises(
        UserError, match=r"^corpus\.quality_filters: gopher_quality needs datatrove and spacy: "
    ) as error:
        open_filters(["gopher_quality"])
    assert "\n" not in str(error.value)


@needs_datatrove
def test_the_filters_drop_what_they_are_published_to_drop() -> None:
    prose = (
        "The river had been rising since the morning, and by noon the lower road was gone. We carried what we could "
        "to the school on the hill, where the teacher of my sister had already opened the doors to the families.\n"
        "Nobody talked of leaving that day. It was only when the bridge fell that some of the older men began to say "
        "that we should have gone with the first boats, as the people of the next village had done.\n"
        "That evening they lit a fire in the yard, cooked the last of the meat, and waited for the water to turn."
    )
    dropped_by = open_filters(["gopher_quality", "gopher_repetition"])
    assert dropped_by(prose) is None
    assert dropped_by("too short") == "gopher_quality"
    assert dropped_by((prose.split("\n")[0] + "\n") * 20) == "gopher_repetition"
