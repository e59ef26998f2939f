"""Pages that lie outside of docs/, as the home page, which is README.md, and links to and from them."""
import posixpath
import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
# Their places on the site.
OUTSIDE = {'index.md': 'README.md', 'changelog.md': 'CHANGELOG.md', 'contributing.md': 'CONTRIBUTING.md',
           'reporting.md': 'SECURITY.md', 'patrol_card.md': 'models/patrol/README.md'}
PLACES = {source: path for path, source in OUTSIDE.items()}
LINK = re.compile(r'\[([^][]*)\]\(([^)\s:#]+)(#[^)\s]*)?\)')


def outside() -> dict[str, Path]:
    """Those of OUTSIDE that there are, with their sources."""
    return {path: ROOT / source for path, source in OUTSIDE.items() if (ROOT / source).is_file()}


def on_site(markdown: str, page: str) -> str:
    """The text with its relative links as they are on the site; where that has no such file only the words stay.

    page: its path on the site, or for one of OUTSIDE that of its source.
    """
    folder = posixpath.dirname('docs/' + page)
    source = posixpath.dirname(OUTSIDE[page]) if page in OUTSIDE else folder

    def turned(link: re.Match) -> str:
        words, path, anchor = link.groups(default='')
        target = posixpath.normpath(posixpath.join(source, path))
        place = 'docs/' + PLACES[target] if target in PLACES else target
        if not place.startswith('docs/'):
            return words
        return f'[{words}]({posixpath.relpath(place, folder)}{anchor})'

    return LINK.sub(turned, markdown)
