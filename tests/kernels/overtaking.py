"""Finds loops in which the copy of a later tile may overtake the product that still reads this buffer.

Triton gives the tiles of a pipelined loop a ring of buffers and lets products of Hopper run on behind it. It once gave a ring
of one to a tile that also passed through registers: gradients were wrong by 10%, in 16 bits and with weak gates only.
"""

from __future__ import annotations

import re
from collections import Counter

VALUE = r"(%[\w#]+)"
RING = re.compile(VALUE + r"(?::\d+)? = ttg\.local_alloc : \(\) -> !ttg\.memdesc<(\d+)x")
VIEW = re.compile(VALUE + r" = ttg\.memdesc_\w+ " + VALUE)
PRODUCT = re.compile(VALUE + rf"(?::\d+)? = ttng\.warp_group_dot {VALUE}, {VALUE}, .*isAsync = true")
WAIT = re.compile(r"ttng\.warp_group_dot_wait .*pendings = (\d+)")
COPY = re.compile(rf"async_copy_global_to_local %[\w#]+, {VALUE}")
LOOP = re.compile(r"(^|= )scf\.(for|while) ")


def overtaken(ttgir: str) -> list[str]:
    """The products of ``ttgir`` whose operand a copy may replace before anything has waited for them."""
    ring_of: dict[str, str] = {}  # of a view
    slots: dict[str, int] = {}  # of a ring
    ahead: Counter[str] = Counter()  # copies before the loop: how many turns the copies in it are ahead
    loops: list[tuple[int, list]] = []  # those open, by indentation, with what happens in a turn
    found: list[str] = []
    for line in ttgir.splitlines():
        text = line.strip()
        indent = len(line) - len(line.lstrip())
        while loops and text.startswith("}") and indent <= loops[-1][0]:
            found += run(loops.pop()[1], slots, ahead)
        events = loops[-1][1] if loops else []
        if ring := RING.match(text):
            ring_of[ring[1]], slots[ring[1]] = ring[1], int(ring[2])
        elif (view := VIEW.match(text)) and view[2] in ring_of:
            ring_of[view[1]] = ring_of[view[2]]
        elif product := PRODUCT.match(text):
            events.append((product[1], {ring_of[x] for x in (product[2], product[3]) if x in ring_of}))
        elif wait := WAIT.search(text):
            events.append(int(wait[1]))
        elif (copy := COPY.search(text)) and copy[1] in ring_of:
            events.append(ring_of[copy[1]])
            ahead[ring_of[copy[1]]] += not loops
        if LOOP.search(text):
            loops.append((indent, []))
    return found


def run(events: list, slots: dict[str, int], ahead: Counter) -> list[str]:
    """Four turns of a loop: a wait leaves the last products pending, a copy fills the slot of some turn before."""
    pending: list[tuple[int, str, set[str]]] = []
    found: dict[str, None] = {}
    for turn in range(4):
        for event in events:
            if isinstance(event, tuple):
                pending.append((turn, *event))
            elif isinstance(event, int):
                pending = pending[len(pending) - event :] if event else []
            else:
                filled = turn + ahead[event] - slots[event]  # the turn whose tile the copy replaces
                found |= {name: None for then, name, rings in pending if event in rings and then <= filled}
    return list(found)
