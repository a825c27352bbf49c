"""Packages of Debian as data: fetched by their hash, and the files in them."""

from __future__ import annotations

import hashlib
import io
import re
import tarfile
import urllib.request
from collections.abc import Iterator
from pathlib import Path

MIRROR = "https://deb.debian.org/debian/pool/main"


def fetch(name: str, digest: str, folder: Path) -> bytes:
    """A package, from the folder or the mirror. Raises ValueError if its SHA-256 is another."""
    path = folder / name.rpartition("/")[2]
    if not path.exists():
        with urllib.request.urlopen(f"{MIRROR}/{name.replace('+', '%2B')}") as response:
            content = response.read()
        check(content, digest, path)
        path.write_bytes(content)
    content = path.read_bytes()
    check(content, digest, path)
    return content


def check(content: bytes, digest: str, path: Path) -> None:
    found = hashlib.sha256(content).hexdigest()
    if found != digest:
        raise ValueError(f"{path.name} must have the SHA-256 {digest}: got {found}")


def files(package: bytes, names: re.Pattern[str]) -> Iterator[tuple[str, bytes]]:
    """(path, content) of the files in a package whose path has ``names``.

    A package is an ar archive with a tar archive in it.
    """
    position = 8  # behind "!<arch>\n"
    while position < len(package):
        header = package[position : position + 60]
        name, size = header[:16].decode().strip().rstrip("/"), int(header[48:58])
        if name.startswith("data.tar"):
            member = package[position + 60 : position + 60 + size]
            with tarfile.open(fileobj=io.BytesIO(member)) as archive:
                for entry in sorted(archive.getmembers(), key=lambda entry: entry.name):
                    file = archive.extractfile(entry) if entry.isfile() and names.search(entry.name) else None
                    if file is not None:
                        yield entry.name, file.read()
        position += 60 + size + size % 2
