"""What the HTML pages have in common: one file that loads nothing from the network, legible on a phone."""

import base64
import html
from collections.abc import Iterable

# Width in pixels up to which a page counts as narrow
NARROW = 640
# Elements of these classes are on narrow, or on wide, pages only
STYLE = f""".narrow {{ display: none }}
@media (max-width: {NARROW}px) {{ .narrow {{ display: block }} .wide {{ display: none }} body {{ margin: 1em auto }} }}
body {{ max-width: 1100px; margin: 2em auto; padding: 0 1em }} h1, h2 {{ line-height: 1.2 }}
tr {{ background: white }} tr:nth-child(even) {{ background: #f2f2f2 }} table {{ border-collapse: collapse }}"""


def page(title: str, style: str, parts: Iterable[str]) -> str:
    """
    Return an HTML page.

    :param title: title of the page, as text
    :param style: CSS in addition to ``STYLE``
    :param parts: contents, as HTML
    :return: the page
    """
    head = (
        "<!DOCTYPE html><html lang='en'><head><meta charset='utf-8'>"
        "<meta name='viewport' content='width=device-width, initial-scale=1'>"
        f"<title>{html.escape(title)}</title><style>{STYLE}\n{style}</style></head>"
    )
    return f"{head}<body><h1>{html.escape(title)}</h1>{''.join(parts)}</body></html>"


def data_url(data: bytes, mime: str) -> str:
    """Return a URL that holds the data itself, so that a page needs no other file."""
    return f"data:{mime};base64,{base64.b64encode(data).decode()}"
