"""Atomic writes: after a kill at any moment a file is the old one or the new one, never half of either."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from typing import Any

from midl.errors import MIDLError

__all__ = ["hash_file", "hash_json", "parse_json", "read_json", "write_bytes", "write_json", "write_text"]


def write_bytes(path: Path, content: bytes) -> None:
    """Replace the file at ``path`` by ``content``, atomically; missing folders are made."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with temporary.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def write_text(path: Path, text: str) -> None:
    """Replace the file at ``path`` by ``text`` in UTF-8, atomically."""
    write_bytes(path, text.encode())


def write_json(path: Path, value: Any) -> None:
    """Replace the file at ``path`` by ``value`` as indented JSON, atomically."""
    write_text(path, json.dumps(value, indent=2) + "\n")


def read_json(path: Path) -> Any:
    """Return the JSON value that a file holds.

    Raises:
        FileNotFoundError: there is no such file.
        MIDLError: it is damaged; the message names it.
    """
    return parse_json(path.read_bytes(), path)


def parse_json(text: bytes | str, path: Path) -> Any:
    """Return a JSON value of a file, or raise an error that names the file."""
    try:
        return json.loads(text)
    except ValueError as error:
        raise MIDLError(
            f"{path} is damaged ({error}), expected JSON: delete it, and what it held is done again"
        ) from error


def hash_file(path: Path) -> str:
    """Return the SHA-256 of a file, in hexadecimal."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()


def hash_json(value: Any) -> str:
    """Return the SHA-256 of a JSON value, whatever the order of its keys.

    >>> hash_json({"a": 1, "b": 2}) == hash_json({"b": 2, "a": 1})
    True
    """
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()
