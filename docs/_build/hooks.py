"""MkDocs' hooks of the site. What is generated takes the place of `<!-- generated: NAME -->` in its page when the site is
built, and lies in no file of the repository."""
import re
from pathlib import Path

import command_page
import home_page
import parameter_page
import rooms
import type_page
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

GENERATED = {'parameters': parameter_page.sections, 'types': type_page.sections, 'commands': command_page.sections,
             'rooms': rooms.picture}
PLACE = re.compile(r'^<!-- generated: (.*) -->$', re.MULTILINE)
MORE = 'How-to'     # where pages of docs/ stand that mkdocs.yml does not name


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """Name every page in the navigation."""
    docs = Path(config.docs_dir)
    named = set(re.findall(r"'([\w./-]+\.md)'", repr(config.nav)))
    section = next(entry[MORE] for entry in config.nav if MORE in entry)
    section += sorted({str(path.relative_to(docs)) for path in docs.rglob('*.md')} - named)
    if project := [path for path in home_page.outside() if path not in named]:
        config.nav.append({'Project': project})
    return config


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the pages that lie outside of docs/."""
    for path, source in home_page.outside().items():
        files.append(File.generated(config, path, content=source.read_text()))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Put in what is generated, and turn links to where things lie on the site."""
    if unknown := set(PLACE.findall(markdown)) - set(GENERATED):
        raise PluginError(f'{page.file.src_uri}: nothing is generated under the names {", ".join(unknown)}')
    markdown = PLACE.sub(lambda place: GENERATED[place[1]](), markdown)
    return home_page.on_site(markdown, page.file.src_uri)
