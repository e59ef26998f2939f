"""The picture of the rooms: folders of statekv_ros/ and kernels/, and who imports whom, read from the sources."""
import ast
from collections.abc import Iterator
from html import escape
from pathlib import Path

import networkx

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = 'statekv_ros'
GENERATED = {'msg', 'srv', 'action'}
WIDE, TALL, GAP_X, GAP_Y, MARGIN = 124, 46, 26, 44, 12


def imports() -> networkx.DiGraph:
    """An edge from each room to each other one that it imports when it runs; a room is a folder with its own modules."""
    folders = {path.parent.name: path.parent for path in (ROOT / PACKAGE).glob('*/__init__.py')
               if path.parent.name not in GENERATED}
    folders['kernels'] = ROOT / 'kernels'
    graph = networkx.DiGraph()
    graph.add_nodes_from(sorted(folders))
    for room, folder in sorted(folders.items()):
        for file in sorted(folder.rglob('*.py')):
            for module in _modules(ast.parse(file.read_text())):
                other = module.split('.')[1] if module.startswith(f'{PACKAGE}.') else None
                if other in folders and other != room:
                    graph.add_edge(room, other)
    return graph


def _modules(tree: ast.AST) -> Iterator[str]:
    """Of all imports but those for type checkers."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.expr) or isinstance(node, ast.If) and 'TYPE_CHECKING' in ast.unparse(node.test):
            continue
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield node.module or ''
            yield from (f'{node.module}.{alias.name}' for alias in node.names)
        yield from _modules(node)


def layers(graph: networkx.DiGraph) -> list[list[str]]:
    """Rooms from top to bottom: each stands just below the lowest of those that import it.

    Raises:
        networkx.NetworkXUnfeasible: rooms import each other in a circle.
    """
    return [sorted(row) for row in networkx.topological_generations(graph)]


def picture() -> str:
    """SVG, in the colours of the page around it; an arrow that follows from two others is left out."""
    graph = imports()
    rows, lines = _with_passages(layers(graph), networkx.transitive_reduction(graph))
    _untangle(rows, lines)
    span = [sum(_width(cell) + GAP_X for cell in row) - GAP_X for row in rows]
    width, height = max(span) + 2 * MARGIN, len(rows) * (TALL + GAP_Y) - GAP_Y + 2 * MARGIN
    centres = {}
    for level, row in enumerate(rows):
        x = (width - span[level]) / 2
        for cell in row:
            centres[cell] = x + _width(cell) / 2, MARGIN + level * (TALL + GAP_Y)
            x += _width(cell) + GAP_X
    drawn = [_line([centres[cell] for cell in line]) for line in lines]
    drawn += [_box(cell, *centres[cell]) for row in rows for cell in row if isinstance(cell, str)]
    return (f'<div class="rooms"><svg viewBox="0 0 {width:g} {height}" role="img" aria-label="rooms and their imports">'
            f'<defs><marker id="head" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="7" markerHeight="7" orient="auto">'
            f'<path d="M0 0L8 4L0 8"/></marker></defs>{"".join(drawn)}</svg></div>')


def _with_passages(rows: list[list], arrows: networkx.DiGraph) -> tuple[list[list], list[list]]:
    """Rows with a place kept free where an arrow passes one, (user, used, row), and the cells that each arrow goes through."""
    level = {room: number for number, row in enumerate(rows) for room in row}
    lines = []
    for user, used in sorted(arrows.edges):
        between = [(user, used, row) for row in range(level[user] + 1, level[used])]
        lines.append([user, *between, used])
        for cell in between:
            rows[cell[2]].append(cell)
    return rows, lines


def _untangle(rows: list[list], lines: list[list]) -> None:
    """Sort each row by where its neighbours stand (Sugiyama's barycentres), down and up some times."""
    neighbours = {cell: [] for row in rows for cell in row}
    for line in lines:
        for one, other in zip(line, line[1:]):
            neighbours[one].append(other)
            neighbours[other].append(one)
    for sweep in range(12):
        place = {cell: (number + 0.5) / len(row) for row in rows for number, cell in enumerate(row)}
        for row in rows if sweep % 2 else rows[::-1]:
            row.sort(key=lambda cell: sum(place[each] for each in neighbours[cell]) / (len(neighbours[cell]) or 1))
            place.update({cell: (number + 0.5) / len(row) for number, cell in enumerate(row)})


def _width(cell: str | tuple) -> int:
    return WIDE if isinstance(cell, str) else 0


def _line(points: list[tuple[float, float]]) -> str:
    """From the foot of the first box to the head of the last, straight through the places between."""
    (x, y), bend = points[0], GAP_Y * 0.7
    y += TALL
    path = f'M{x} {y}'
    for number, (to_x, to_y) in enumerate(points[1:], 2):
        path += f'C{x} {y + bend} {to_x} {to_y - bend} {to_x} {to_y}'
        if number < len(points):
            path += f'V{to_y + TALL}'
        x, y = to_x, to_y + TALL
    return f'<path d="{path}" marker-end="url(#head)"/>'


def _box(room: str, x: float, y: float) -> str:
    return (f'<rect x="{x - WIDE / 2}" y="{y}" width="{WIDE}" height="{TALL}" rx="6"/>'
            f'<text x="{x}" y="{y + TALL / 2 + 5}">{escape(room)}</text>')
