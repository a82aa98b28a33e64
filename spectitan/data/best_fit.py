"""Which documents share a row: best-fit decreasing over counts per length, so that time and memory do not hang on their number."""

from bisect import bisect_left, insort
from typing import NamedTuple

import numpy as np


class Placed(NamedTuple):
    """Items of one length that go into consecutive rows, as many into each. Items are numbered longest first, rows as they are begun."""

    length: int
    first_item: int
    first_row: int
    rows: int
    each: int


def one_a_row(counts: np.ndarray, capacity: int) -> tuple[list[Placed], int]:
    """Every item in a row of its own. Arguments and result: see `best_fit`."""
    placed, items = [], 0
    for length in np.flatnonzero(counts)[::-1].tolist():
        placed.append(Placed(length, items, items, int(counts[length]), 1))
        items += int(counts[length])
    return placed, items


def best_fit(counts: np.ndarray, capacity: int) -> tuple[list[Placed], int]:
    """Each item, longest first, goes where it leaves the least room, into a new row where there is none (Johnson 1973).

    Rows with as much room are alike, and a row that fits best still does after it took an item, if another one goes in: so all
    items of a length that a class of rows takes are placed at once. A class that is used up leaves one of less than half the room,
    hence there are O(capacity log capacity) steps for any number of items.

    Args:
        counts: int64 [capacity + 1], how many items have each length; counts[0] is 0.
        capacity: of a row.

    Returns:
        What goes where, and the number of rows.
    """
    assert counts[0] == 0 and len(counts) == capacity + 1
    placed, items, rows = [], 0, 0
    classes: dict[int, list[tuple[int, int]]] = {}  # room -> rows that have it: (first row, rows)
    rooms: list[int] = []  # the keys, sorted

    def put(room: int, first_row: int, count: int) -> None:
        if room not in classes:
            insort(rooms, room)
        classes.setdefault(room, []).append((first_row, count))

    for length in np.flatnonzero(counts)[::-1].tolist():
        left = int(counts[length])
        while left:
            place = bisect_left(rooms, length)
            if place == len(rooms):
                new = -(-left // (capacity // length))
                put(capacity, rows, new)
                rows += new
            room = rooms[place]
            first_row, count = classes[room].pop()
            if not classes[room]:
                del classes[room], rooms[place]
            each = min(room // length, left)
            used = min(count, left // each)
            placed.append(Placed(length, items, first_row, used, each))
            items, left = items + used * each, left - used * each
            put(room - each * length, first_row, used)
            if used < count:
                put(room, first_row + used, count - used)
    return placed, rows
