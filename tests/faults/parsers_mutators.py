"""Damage to files: blind, byte by byte, and with regard to what JSON and counts are."""

import json
import random
import re
from collections.abc import Callable, Sequence
from copy import deepcopy
from typing import Any

NUMBERS: Sequence[int] = (
    *(0, 1, -1, 2, 3, 7, 63, 64, 255, 256, 4095, 65535, 65536),
    *(2**31 - 1, 2**31, 2**32 - 1, 2**32, 2**53 - 1, 2**53, 2**63 - 1, 2**63, 2**64 - 1, 2**64),
    *(-(2**31), -(2**63), -(2**63) - 1, 10**400, -(10**400)),
)
TEXTS: Sequence[str] = (
    *("", ".", "..", "../x", "a/../../x", "/etc/passwd", "/dev/zero", "a\\b", "a//b", "./a", "\0", "a\0b", "\ud800"),
    *("NaN", "Infinity", "1e999", "0x1p0", "int8", "float32", "T", "R", "decoder", "mtp", "é" * 300, "x" * 5000),
)
VALUES: Sequence[Any] = (None, True, False, 0.5, -0.0, 1e308, [], {}, [[]], [None], {"": 0}, *NUMBERS, *TEXTS)
DEPTHS = (10, 70, 200, 900, 990, 100_000)
SPELLINGS = (b"NaN", b"-Infinity", b"1e999", b"0x10", b"007", b"1" * 5000, b"'a'", b"\xff\xfe", b'"\\ud800"', b"\xc3")


def flip_bits(rng: random.Random, data: bytes) -> bytes:
    """Turn over a few bits."""
    changed = bytearray(data)
    for _ in range(rng.randint(1, 4)):
        if changed:
            changed[rng.randrange(len(changed))] ^= 1 << rng.randrange(8)
    return bytes(changed)


def cut(rng: random.Random, data: bytes) -> bytes:
    """Leave out the end, or a part of the middle."""
    start = rng.randint(0, len(data))
    return data[:start] + (data[start + rng.randint(1, 64) :] if rng.random() < 0.5 else b"")


def insert(rng: random.Random, data: bytes) -> bytes:
    """Put random bytes somewhere."""
    at = rng.randint(0, len(data))
    return data[:at] + rng.randbytes(rng.choice((1, 4, 8, 300))) + data[at:]


def splice(rng: random.Random, data: bytes) -> bytes:
    """Put one part of the file in place of another, or after it."""
    begin, size = rng.randint(0, len(data)), rng.randint(1, 200)
    at = rng.randint(0, len(data))
    return data[:at] + data[begin : begin + size] + data[at + rng.choice((0, size)) :]


def overwrite(rng: random.Random, data: bytes) -> bytes:
    """Write a number that matters over a few bytes."""
    size = rng.choice((1, 2, 4, 8))
    at = rng.randint(0, max(0, len(data) - size))
    number: int = rng.choice(NUMBERS) % 2 ** (8 * size)
    return data[:at] + number.to_bytes(size, "little") + data[at + size :]


BLIND: Sequence[Callable[[random.Random, bytes], bytes]] = (flip_bits, cut, insert, splice, overwrite)


def blind(rng: random.Random, data: bytes) -> bytes:
    """Damage bytes one to three times."""
    for _ in range(rng.randint(1, 3)):
        data = rng.choice(BLIND)(rng, data)
    return data


def _containers(value: Any) -> list[Any]:
    """Return every object and every list of a document, the document first."""
    found = [value]
    for each in found:
        parts = each.values() if isinstance(each, dict) else each
        found += [part for part in parts if isinstance(part, dict | list)]
    return found


def damage_document(rng: random.Random, document: Any) -> Any:
    """Return a document of JSON with one to three values that matter changed, removed, swapped or added."""
    for _ in range(rng.choice((1, 1, 2, 3))):
        holders = [each for each in _containers(document) if each]
        if holders:
            rng.choice(CHANGES)(rng, rng.choice(holders), holders)
    return document


def _value(rng: random.Random) -> Any:
    return deepcopy(rng.choice(VALUES))


def _key(rng: random.Random, holder: Any) -> Any:
    return rng.choice(list(holder)) if isinstance(holder, dict) else rng.randrange(len(holder))


def _replace(rng: random.Random, holder: Any, holders: list[Any]) -> None:
    holder[_key(rng, holder)] = _value(rng)


def _recount(rng: random.Random, holder: Any, holders: list[Any]) -> None:
    """Change a number a little or a lot, another value to its neighbour in kind."""
    key = _key(rng, holder)
    value = holder[key]
    if type(value) in (int, float):
        holder[key] = rng.choice((value + 1, value - 1, -value, 2 * value, value * 2**32, value % 7 + 0.5, str(value)))
    elif isinstance(value, str):
        holder[key] = rng.choice((value + "x", value[:-1], value.upper(), f"../{value}", f"/{value}", value * 50))
    else:
        holder[key] = [value]


def _remove(rng: random.Random, holder: Any, holders: list[Any]) -> None:
    del holder[_key(rng, holder)]


def _add(rng: random.Random, holder: Any, holders: list[Any]) -> None:
    if isinstance(holder, list):
        holder.insert(rng.randint(0, len(holder)), rng.choice((rng.choice(holder), _value(rng))))
    else:
        name = rng.choice(("unknown", "__class__", "", "x" * 1000, str(_key(rng, holder)) + " "))
        holder[name] = _value(rng)


def _swap(rng: random.Random, holder: Any, holders: list[Any]) -> None:
    """Exchange two values, of the same type if there are such."""
    other = rng.choice(holders)
    key, place = _key(rng, holder), _key(rng, other)
    alike = [(each, at) for each in holders for at in _keys(each) if type(each[at]) is type(holder[key])]
    if alike and rng.random() < 0.8:
        other, place = rng.choice(alike)
    holder[key], other[place] = deepcopy(other[place]), deepcopy(holder[key])  # copies, as one may hold the other


def _keys(holder: Any) -> list[Any]:
    return list(holder) if isinstance(holder, dict) else list(range(len(holder)))


def _repeat(rng: random.Random, holder: Any, holders: list[Any]) -> None:
    """Make a list long."""
    if isinstance(holder, list):
        holder *= rng.choice((2, 3, 300))
        holder[:] = holder[:5000]


CHANGES: Sequence[Callable[[random.Random, Any, list[Any]], None]] = (
    *(_replace, _replace, _recount, _recount, _remove, _add, _swap, _repeat),
)
NUMBER = re.compile(rb"(?<=[:,\[ ])-?[0-9]+(?=[,\]}\n])")
KEY = re.compile(rb'"[a-z_0-9]+": ')


def damage_text(rng: random.Random, text: bytes) -> bytes:
    """Damage the spelling of JSON: what `json.dumps` would never write."""
    kind = rng.randrange(6)
    if kind == 0 and (places := list(NUMBER.finditer(text))):
        place = rng.choice(places)
        return text[: place.start()] + rng.choice(SPELLINGS) + text[place.end() :]
    if kind == 1 and (places := list(KEY.finditer(text))):  # a key twice
        place = rng.choice(places)
        return text[: place.start()] + place[0] + b"0, " + text[place.start() :]
    if kind == 2 and (places := list(NUMBER.finditer(text))):
        place, depth = rng.choice(places), rng.choice(DEPTHS)
        opening, closing = rng.choice(((b"[", b"]"), (b'{"a":', b"}")))
        return text[: place.start()] + opening * depth + b"1" + closing * depth + text[place.end() :]
    if kind == 3:
        return rng.choice(
            (b"\xef\xbb\xbf" + text, text.decode("utf-8", "replace").encode("utf-16"), b"[" + text + b"]")
        )
    return blind(rng, text)


def damage_json(rng: random.Random, sound: bytes) -> bytes:
    """Return a damaged file of JSON: its document in three of four, then its spelling in some."""
    text = sound
    if rng.random() < 0.75:
        text = json.dumps(damage_document(rng, json.loads(sound))).encode()
    return damage_text(rng, text) if rng.random() < 0.3 or text == sound else text
