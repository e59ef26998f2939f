"""The commands that README and the pages of docs/ show, line by line."""
import re
import shlex
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[1]
PAGES = [ROOT / 'README.md', *sorted((ROOT / 'docs').rglob('*.md'))]
BLOCK = re.compile(r'^```(?:console)?\n(\$ .*?)^```$', re.DOTALL | re.MULTILINE)


class Shown(NamedTuple):
    """A command of a page, its words as the shell reads them."""

    page: str
    words: list[str]

    def __str__(self) -> str:
        return f'{self.page}: {shlex.join(self.words)}'


def shown_commands() -> list[Shown]:
    """Of all blocks with prompts, in order; lines that go on are joined, and what is joined by && is taken apart."""
    found = []
    for page in PAGES:
        for block in BLOCK.findall(page.read_text()):
            for line in re.sub(r'\\\n\s*', ' ', block).splitlines():
                assert line.startswith('$ '), f'{page}: {line!r} is no command'
                words = shlex.split(line[2:], comments=True)
                while '&&' in words:
                    found.append(Shown(str(page.relative_to(ROOT)), words[:words.index('&&')]))
                    words = words[words.index('&&') + 1:]
                found.append(Shown(str(page.relative_to(ROOT)), words[3:] if words[0] == 'nice' else words))
    return found
