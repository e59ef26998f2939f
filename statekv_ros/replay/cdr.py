"""The header stamp of a serialised message, read and changed without deserialising the image behind it."""
import struct

# CDR: 4 bytes of encapsulation, the second of which tells the byte order, then the message's fields. A message that
# begins with a std_msgs/Header therefore has its stamp at byte 4: int32 sec, uint32 nanosec.
_STAMP_AT = 4
MINIMUM_BYTES = _STAMP_AT + 8


def _stamp_format(cdr) -> str:
    return '<iI' if cdr[1] & 1 else '>iI'


def header_stamp_ns(cdr: bytes) -> int:
    """Header stamp in ns of a serialised message that begins with a std_msgs/Header."""
    seconds, nanoseconds = struct.unpack_from(_stamp_format(cdr), cdr, _STAMP_AT)
    return seconds * 10**9 + nanoseconds


def restamped(cdr: bytes, stamp_ns: int) -> bytes:
    """A copy of a serialised message with another header stamp."""
    changed = bytearray(cdr)
    struct.pack_into(_stamp_format(cdr), changed, _STAMP_AT, *divmod(stamp_ns, 10**9))
    return bytes(changed)
