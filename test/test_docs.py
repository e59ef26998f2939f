"""The documentation: the built site, what must stand in it once, and what pages say about the sources."""
import ast
import collections
import re
import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest
import yaml

for package in ('mkdocs', 'material', 'mkdocstrings'):
    pytest.importorskip(package, reason=f'{package} is not installed (the extra docs)')

from mkdocs.commands.build import build  # noqa: E402
from mkdocs.config import load_config  # noqa: E402

from doc_commands import PAGES, ROOT  # noqa: E402
from statekv_ros.bench.cli import BENCHMARKS  # noqa: E402
from statekv_ros.node.parameters import NODE, camera_specs, watch_specs  # noqa: E402
from test_packaging import PYPROJECT  # noqa: E402

sys.path.append(str(ROOT / 'docs/_build'))
import home_page  # noqa: E402

pytestmark = pytest.mark.timeout(240)

SPECS = {spec.name: spec for spec in (*NODE, *camera_specs('camera', 2.0, 'best_effort'), *watch_specs('watch'))}
# heldout.py is a module to run, and no command.
SOURCES = [path for folder in ('statekv_ros', 'kernels') for path in (ROOT / folder).rglob('*.py')
           if path.name != 'heldout.py']


class Page(HTMLParser):
    """What a built page has.

    Attributes:
        ids: of its headings, in order.
        texts: of each heading's section, by id; up to the next heading.
        fetched: addresses that a browser fetches by itself.
    """

    def __init__(self, file: Path):
        super().__init__()
        self.ids, self.fetched, self.texts = [], [], collections.defaultdict(str)
        self.feed(file.read_text())

    def handle_starttag(self, tag, attributes):
        given = dict(attributes)
        if re.fullmatch('h[1-6]', tag) and 'id' in given:
            self.ids.append(given['id'])
        if tag in ('script', 'img', 'iframe', 'source', 'video', 'embed', 'object') or \
                tag == 'link' and given.get('rel') not in ('canonical', 'next', 'prev'):
            self.fetched += [given[name] for name in ('src', 'href', 'data') if given.get(name)]

    def handle_data(self, data):
        if self.ids:
            self.texts[self.ids[-1]] += data


@pytest.fixture(scope='module')
def written() -> tuple[str, set[str]]:
    """What the sources may print, line by line, with `...` for what is put in; and the options that their parsers declare."""
    texts, options = [], set()
    for node in (node for path in SOURCES for node in ast.walk(ast.parse(path.read_text()))):
        if isinstance(node, ast.JoinedStr):
            texts.append(''.join(part.value if isinstance(part, ast.Constant) else '...' for part in node.values))
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            texts.append(node.value)
        elif isinstance(node, ast.Call) and getattr(node.func, 'attr', '') == 'add_argument':
            options |= {argument.value for argument in node.args
                        if isinstance(argument, ast.Constant) and argument.value.startswith('--')}
    return '\n'.join(texts), options


@pytest.fixture(scope='module')
def site(tmp_path_factory) -> Path:
    """The site, built as `make docs` does: any warning of MkDocs, a broken link or anchor among them, ends it."""
    folder = tmp_path_factory.mktemp('site')
    config = load_config(str(ROOT / 'mkdocs.yml'), site_dir=str(folder))
    assert config.strict
    build(config)
    return folder


# --- the site ---------------------------------------------------------------------------------------------------------

def test_every_page_is_on_the_site_and_in_its_navigation(site):
    pages = {str(path.relative_to(ROOT / 'docs').with_suffix('.html')).replace('README', 'index')
             for path in PAGES if path.parent != ROOT}
    assert all((site / page).is_file() for page in pages)
    home = (site / 'index.html').read_text()
    assert 'Does it fit my robot?' in home
    assert [page for page in pages if f'href="{page}"' not in home] == []


def test_nothing_is_fetched_from_anywhere_else(site):
    for page in site.rglob('*.html'):
        if 'reports' not in page.parts:
            fetched = Page(page).fetched
            assert [address for address in fetched if address.startswith(('http:', 'https:', '//'))] == [], page.name
            assert 'class="mermaid"' not in page.read_text(), 'its program would come from another server'
    for sheet in site.rglob('*.css'):
        assert not re.search(r'(url\(|@import )["\']?(https?:)?//', sheet.read_text()), sheet.name


def test_every_parameter_is_documented_once_with_its_default_and_what_it_may_be(site):
    page = Page(site / 'reference/parameters.html')
    documented = [name for name in page.ids if name in SPECS or '.' in name or '_' in name]
    assert sorted(documented) == sorted(SPECS)
    for name, spec in SPECS.items():
        about, text = spec.description.replace('camera camera', 'camera <camera>'), ' '.join(page.texts[name].split())
        assert about[1:] in text, name
        if not name.startswith('camera.'):
            default = str(spec.default).lower() if isinstance(spec.default, bool) else str(spec.default).replace("'", '')
            assert f'default {default}'.strip() in text, name
        assert ('at start' if spec.fixed else 'at any time' if spec.runtime else 'while unconfigured') in text, name
        assert all(choice in text for choice in spec.choices), name


def test_no_page_has_a_table_of_parameters_of_its_own():
    """A row with a parameter's name and its default would be one."""
    row = re.compile(r'^\| `([\w.<>]+)`[^|]* \| `([^`|]*)`', re.MULTILINE)
    rows = [f'{page.name}: {name}' for page in PAGES if page.name != 'lmms.md'     # its table is of the harness's --model_args
            for name, default in row.findall(page.read_text()) if name in SPECS and default == str(SPECS[name].default)]
    assert rows == []


def test_every_command_and_option_is_documented_once(site, written):
    page = Page(site / 'reference/commands.html')
    assert len(set(page.ids)) == len(page.ids)
    scripts = PYPROJECT['project']['scripts']
    assert set(scripts) == {name for name in page.ids if name in scripts}
    parts = {'bench': BENCHMARKS, 'bag': ('make', 'info', 'play'), 'memory': ('info', 'export', 'check'), 'patrol': ('make',)}
    subcommands = {f'statekv-{name}-{part}' for name, each in parts.items() for part in each}
    assert {name for name in page.ids if name.startswith('statekv-')} == set(scripts) | subcommands
    text = '\n'.join(page.texts.values())
    declared = written[1]
    assert len(declared) > 60 and [option for option in declared if not re.search(re.escape(option) + r'\b', text)] == []


def test_every_type_and_field_is_documented_once(site):
    page = Page(site / 'reference/types.html')
    folders = 'msg', 'srv', 'action'
    files = {f'{folder}-{file.stem}'.lower(): file for folder in folders for file in (ROOT / folder).iterdir()}
    assert sorted(name for name in page.ids if name.startswith(('msg-', 'srv-', 'action-'))) == sorted(files)
    for name, file in files.items():
        declared = re.findall(r'^[\w/\[\]]+ +(\w+)', file.read_text(), re.MULTILINE)
        words = collections.Counter(re.findall(r'^(\w+)$', page.texts[name], re.MULTILINE))
        assert {field: words[field] for field in declared} == dict(collections.Counter(declared)), name
        for comment in re.findall(r'^[^#\n]+# (.*)$', file.read_text(), re.MULTILINE):
            assert comment.strip().replace('`', '') in page.texts[name], f'{name}: {comment}'


def test_what_the_client_offers_is_documented_once(site):
    page = Page(site / 'reference/python.html')
    from statekv_ros import client, memory, store, trees
    for module in (client, memory, store, trees):
        for name in module.__all__:
            found = [each for each in page.ids if re.fullmatch(rf'{module.__name__}\.(\w+\.)*{name}', each)]
            assert len(found) == 1 or name == 'StepRecord', (name, found)


# --- what pages say -----------------------------------------------------------------------------------------------------

def test_readme_fits_a_screen():
    assert len((ROOT / 'README.md').read_text().splitlines()) <= 120


@pytest.mark.parametrize('page', PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_between_files_lead_somewhere(page):
    """MkDocs looks at links within docs/; here those out of it, too, as they are followed in the repository."""
    text = re.sub(r'```.*?```|<!--.*?-->', '', page.read_text(), flags=re.DOTALL)
    for _, path, _ in home_page.LINK.findall(text):
        assert (page.parent / path).exists(), path


def test_the_picture_of_the_rooms_has_all_of_them_and_an_arrow_down_for_each_import(site):
    """That there is no circle is seen when it is drawn."""
    page = (site / 'design.html').read_text()
    boxes = {name: float(y) for y, name in re.findall(r'<rect x="[\d.]+" y="([\d.]+)"[^>]*/><text[^>]*>(\w+)</text>', page)}
    folders = {path.parent.name for path in (ROOT / 'statekv_ros').glob('*/__init__.py')} - {'msg', 'srv', 'action'}
    assert set(boxes) == folders | {'kernels'}
    for user in folders:
        for file in (ROOT / 'statekv_ros' / user).rglob('*.py'):
            used = re.findall(r'^from statekv_ros\.(\w+)[. ].*import', file.read_text(), re.MULTILINE)
            assert all(boxes[room] > boxes[user] for room in used if room in boxes and room != user), file


def test_errors_of_the_page_on_trouble_are_those_that_the_sources_print(written):
    told = re.findall(r'^\| `(.+?)` \|', (ROOT / 'docs/troubleshooting.md').read_text(), re.MULTILINE)
    missing = [sentence for sentence in told
               if not re.search('.*?'.join(re.escape(part) for part in sentence.split('...')), written[0])]
    assert len(told) > 30 and missing == []


def test_programs_on_pages_are_python_and_parameter_files_name_parameters():
    for page in PAGES:
        for program in re.findall(r'```python\n(.*?)```', page.read_text(), re.DOTALL):
            ast.parse(program)
        for block in re.findall(r'```yaml\n(.*?)```', page.read_text(), re.DOTALL):
            given = yaml.safe_load(block).get('statekv', {}).get('ros__parameters', {})
            for name, value in given.items():
                for watch in value.values() if name == 'watch' else ():
                    assert {f'watch.watch.{field}' for field in watch} <= set(SPECS), page.name
                assert name == 'watch' or name in SPECS, f'{page.name}: {name}'
