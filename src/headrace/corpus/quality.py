"""Quality filters of datatrove, by name: the published rules of Gopher and FineWeb, not written a second time.

An option: datatrove and what its word tokenizer needs (spacy) are the user's to install. A filter only decides here;
C4's rewrites the text by removing lines and is therefore not among them.
"""

from collections.abc import Callable, Sequence

from headrace.errors import UserError

Filter = Callable[[str], bool]
_CLASSES = {
    "gopher_quality": "GopherQualityFilter",
    "gopher_repetition": "GopherRepetitionFilter",
    "fineweb_quality": "FineWebQualityFilter",
}


def open_filters(names: Sequence[str]) -> Callable[[str], str | None]:
    """A function that names the first filter which drops a text, or None; raises `UserError` for a missing package."""
    filters = [(name, _open(name)) for name in names]

    def dropped_by(text: str) -> str | None:
        return next((name for name, keeps in filters if not keeps(text)), None)

    return dropped_by


def _open(name: str) -> Filter:
    try:
        from datatrove.data import Document
        from datatrove.pipeline import filters

        opened = getattr(filters, _CLASSES[name])()
        opened.filter(Document(text="A word, to see whether its tokenizer is there.", id=""))
    except ImportError as error:
        first = (str(error).splitlines() or [""])[0]
        raise UserError(f"corpus.quality_filters: {name} needs datatrove and spacy: {first}") from None

    def keeps(text: str) -> bool:
        verdict = opened.filter(Document(text=text, id=""))
        return bool(verdict[0] if isinstance(verdict, tuple) else verdict)

    return keeps
