"""Messages of protobuf's wire format, read off their bytes: a box that runs bundles has no onnx package.

A message is fields, each a key, its number times 8 plus its kind, then a varint or a length and as many bytes.
"""

from collections.abc import Iterator

VARINT, EIGHT_BYTES, BYTES, FOUR_BYTES = 0, 1, 2, 5  # kinds of fields
MOST_VARINT_BYTES = 10  # of a number of 64 bits
MOST_KEY = 2**32 - 1

Value = int | memoryview


def fields(message: memoryview) -> Iterator[tuple[int, Value]]:
    """Yield numbers and values of a message's fields; of those of fixed size, which nothing here wants, none.

    Raises:
        ValueError: this is no message.
    """
    at = 0
    while at < len(message):
        key, after = _varint(message, at)
        if key > MOST_KEY:  # of which readers in C++ drop bits, and take the field for another one
            raise ValueError(f"the key at byte {at} has more than 32 bits")
        at = after
        number, kind = key >> 3, key & 7
        if kind == VARINT:
            value, at = _varint(message, at)
            yield number, value
        elif kind == BYTES:
            size, at = _varint(message, at)
            if size > len(message) - at:
                raise ValueError(f"field {number} has {size} bytes of the {len(message) - at} that are left")
            yield number, message[at : at + size]
            at += size
        elif kind in (EIGHT_BYTES, FOUR_BYTES):
            at += 8 if kind == EIGHT_BYTES else 4
        else:
            raise ValueError(f"field {number} is of kind {kind}")
    if at > len(message):
        raise ValueError("its last field is cut short")


def messages(message: memoryview, *wanted: int) -> Iterator[memoryview]:
    """Yield the contents of the fields of these numbers that hold bytes, such as messages and texts."""
    return (value for number, value in fields(message) if number in wanted and isinstance(value, memoryview))


def _varint(message: memoryview, at: int) -> tuple[int, int]:
    """Return a number and where what follows it begins."""
    value = 0
    for place, byte in enumerate(message[at : at + MOST_VARINT_BYTES]):
        value |= (byte & 127) << 7 * place
        if byte < 128:
            return value, at + place + 1
    raise ValueError(f"the number at byte {at} has no end")
