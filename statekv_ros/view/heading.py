"""Headings."""
from nicegui.elements.mixins.text_element import TextElement


class Heading(TextElement):
    """A heading of the page (level 1) or of a part of it."""

    def __init__(self, text: str = '', level: int = 2):
        super().__init__(tag=f'h{level}', text=text)
