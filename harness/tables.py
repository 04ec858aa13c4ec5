"""Rows of strings as text: aligned columns for a screen, or a table in Markdown."""


def aligned(rows):
    """Lines in which the columns of `rows` stand below each other.

    The first row is the heading, and every row has as many cells. The first column is flush left,
    the others are flush right. Returns a list with one line for each row.
    """
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return [
        "  ".join(
            cell.ljust(width) if i == 0 else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(row, widths))
        ).rstrip()
        for row in rows
    ]


def markdown(rows):
    """The lines of a Markdown table; the first of `rows` is its heading."""
    heading, *body = [f"| {' | '.join(row)} |" for row in rows]
    return [heading, "|" + "---|" * len(rows[0]), *body]
