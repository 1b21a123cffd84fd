"""Tables of a page that commands write."""

from pathlib import Path


def write_between(page: Path, name: str, text: str) -> None:
    """Replace what stands between the marks `<!-- name: start -->` and `<!-- name: end -->`.

    Raises:
        ValueError: the page has no such marks.
    """
    start, end = f"<!-- {name}: start -->", f"<!-- {name}: end -->"
    before, opened, rest = page.read_text(encoding="utf-8").partition(start)
    _, closed, after = rest.partition(end)
    if not opened or not closed:
        raise ValueError(f"{page}: the marks {start} and {end} are missing")
    page.write_text(f"{before}{start}\n{text}\n{end}{after}", encoding="utf-8")
