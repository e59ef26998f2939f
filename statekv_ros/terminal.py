"""Tables that fit a terminal of 80 columns."""
from rich.box import SIMPLE
from rich.table import Table


def narrow_table(title: str, *columns: str, text: int = 1) -> Table:
    """An empty table no wider than what is in it, with one space between columns.

    Args:
        columns: their headers; one of several lines keeps its column as narrow as the numbers below.
        text: so many columns from the left on are text, cut to further lines where there is no room; the others are numbers.
    """
    table = Table(title=title, title_justify='left', box=SIMPLE, padding=0, show_edge=False)
    for at, column in enumerate(columns):
        if at < text:
            table.add_column(column, overflow='fold')
        else:
            table.add_column(column, justify='right', no_wrap=True)
    return table
