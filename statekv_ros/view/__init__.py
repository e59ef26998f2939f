"""A web page of a live memory node: what it sees, what it remembers, questions and answers. A ROS client like any other.

`state`, `history` and `pictures` hold what was heard, `listener` hears it on a thread of its own; the widgets of `page` read them. See
docs/view.md.
"""
