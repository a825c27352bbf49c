"""Finds products of Hopper's tensor cores whose place in shared memory may be something else's number.

The assembler of Triton 3.6 once made the places of a loop's operands in a branch before the loop, and took them for made on the
way around the branch too. There the products read uniform registers that held addresses and constants: gradients were wrong by
10%, and some reads were illegal. A place is computed from an address; it is never a constant of the launch as it is, nor a
special register.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from pathlib import Path

import triton

LABEL = re.compile(r"\s*\.(L_x_\d+):")
INSTRUCTION = re.compile(r"\s+/\*[0-9a-f]+\*/\s+(.*?)\s*;")
PARTS = re.compile(r"(?:(@!?U?P\w+)\s+)?(\S+)\s*(.*)")
TARGET = re.compile(r"`\(\.(L_x_\d+)\)")
PLACE = re.compile(r"gdesc\[UR(\d+)\]")
FOREIGN = ("S2UR", "ULDC", "LDC")  # what no place comes from


def assembly(cubin: bytes) -> str:
    """The instructions of a kernel, by the disassembler that Triton carries."""
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "nvdisasm"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        return subprocess.run([tool, "-c", file.name], capture_output=True, text=True, check=True).stdout


def astray(text: str) -> list[str]:
    """The products of a kernel in which, on some path, a register of a place holds what a foreign instruction left."""
    code, labels = parse(text)
    before: list[dict[int, frozenset[int]] | None] = [None] * len(code)
    before[:1] = [{}]
    work = [0] if code else []
    while work:
        i = work.pop()
        after = dict(before[i] or {})
        for register in written(code[i]):
            after[register] = frozenset({i}) | (
                after.get(register, frozenset()) if PARTS.match(code[i])[1] else frozenset()
            )
        for following in successors(code, labels, i):
            known = before[following]
            if known is None:
                before[following] = after
                work.append(following)
                continue
            more = {r: known.get(r, frozenset()) | found for r, found in after.items()}
            if any(found != known.get(r) for r, found in more.items()):
                before[following] = known | more
                work.append(following)
    return [
        f"{code[i]} after {code[j]}"
        for i, known in enumerate(before)
        for register in read_as_place(code[i])
        for j in sorted((known or {}).get(register, ()))
        if PARTS.match(code[j])[2].split(".")[0] in FOREIGN
    ]


def parse(text: str) -> tuple[list[str], dict[str, int]]:
    """(instructions, the index of the instruction behind each label)."""
    code: list[str] = []
    labels: dict[str, int] = {}
    for line in text.splitlines():
        if label := LABEL.match(line):
            labels[label[1]] = len(code)
        elif found := INSTRUCTION.match(line):
            code.append(found[1])
    return code, labels


def written(instruction: str) -> range:
    """The uniform registers that an instruction writes."""
    _, name, rest = PARTS.match(instruction).groups()
    first = re.match(r"UR(\d+)\b", rest)
    if first is None or not (name.startswith("U") or name.split(".")[0] in ("R2UR", "S2UR", "LDC")):
        return range(0)
    return range(int(first[1]), int(first[1]) + (2 if ".64" in name else 1))


def read_as_place(instruction: str) -> range:
    """The uniform registers of a product's places: of both operands, or of the second if registers hold the first."""
    place = PLACE.search(instruction)
    if place is None or "HGMMA" not in instruction:
        return range(0)
    operands = PARTS.match(instruction)[3].split(", ")
    return range(int(place[1]) + 2 * operands[1].startswith("R"), int(place[1]) + 4)


def successors(code: list[str], labels: dict[str, int], i: int) -> list[int]:
    """The instructions that may come next."""
    condition, name, rest = PARTS.match(code[i]).groups()
    name, target = name.split(".")[0], TARGET.search(rest)
    falls = name not in ("BRA", "EXIT", "RET") or condition is not None or (name == "BRA" and "P" in rest.split("`")[0])
    found = [i + 1] * falls + ([] if target is None else [labels[target[1]]])
    return [index for index in found if index < len(code)]
