"""Binary files made hostile: tensors, IDX files, NORB's matrices and images."""

import gzip
import json
import random
import struct

from texts import KEYS, LENGTHS, damage, dump, edit

_DTYPES = "F64 F32 F16 BF16 F8_E4M3 F8_E5M2 F8_E8M0 F4 F6_E2M3 F6_E3M2 I64 I32 I16 I8 U64 U32 U16 U8 BOOL C64 X".split()


def hostile_tensors(data: bytes, rng: random.Random) -> bytes:
    """A safetensors file with a hostile header."""
    length = int.from_bytes(data[:8], "little")
    header, body = json.loads(data[8 : 8 + length]), data[8 + length :]
    job = rng.random()
    if job < 0.45:  # what capszoo reads of the header
        metadata = header["__metadata__"]
        inner = [key for key in ("model_args", "state", "mean", "std") if key in metadata]
        if inner and rng.random() < 0.8:
            key = inner[0] if rng.random() < 0.8 else rng.choice(inner)
            metadata[key] = dump(edit(json.loads(metadata[key]), rng))
        else:
            edit(metadata, rng)
            header["__metadata__"] = {
                key: value if isinstance(value, str) else dump(value) for key, value in metadata.items()
            }
    elif job < 0.75:  # tensors of other names, types and shapes, for which the file has room
        names = [name for name in header if name != "__metadata__"]
        for _ in range(rng.choice((1, 1, 2, 5))):
            name = rng.choice(names)
            if rng.random() < 0.2:
                header[rng.choice((*KEYS, *names))] = header.get(name, {"dtype": "F32", "shape": [2]})
            elif rng.random() < 0.3:
                header.pop(name, None)
            elif name in header:
                shape = header[name]["shape"]
                if rng.random() < 0.5:
                    header[name]["dtype"] = rng.choice(_DTYPES)
                elif shape:
                    shape[rng.randrange(len(shape))] = rng.choice((0, 1, 2, 9, 2**40))
                else:
                    shape.append(rng.choice((0, 1, 2)))
        at = 0
        for name, entry in header.items():
            if name != "__metadata__":
                bits = {"F4": 4, "F6": 6, "F8": 8}.get(entry["dtype"][:2]) or int(
                    "".join(c for c in entry["dtype"] if c.isdigit()) or 8
                )
                size = bits
                for side in entry["shape"]:
                    size *= side
                header[name] = {**entry, "data_offsets": [at, at + size // 8]}
                at += size // 8
        body = (body + bytes(max(0, min(at, 1 << 16) - len(body))))[: min(at, 1 << 16)]
    else:
        header = edit(header, rng)
    text = dump(header).encode()
    if rng.random() < 0.1:
        text = damage(text, rng)
    length = len(text) if rng.random() < 0.93 else rng.choice((*LENGTHS, max(0, len(text) - 1), len(text) + 1))
    return length.to_bytes(8, "little") + text + body


def hostile_idx(data: bytes, rng: random.Random) -> bytes:
    """One of MNIST's files with other types and sizes, some of which agree with its length."""
    count = data[4]
    shape = list(struct.unpack(f">{count}I", data[5 : 5 + 4 * count]))
    body = data[5 + 4 * count :]
    job = rng.randrange(4)
    if job == 0:
        shape[rng.randrange(count)] = rng.choice((0, 1, 2, 9, 11, 2**31, 2**32 - 1))
    elif job == 1:
        shape = rng.choice(
            [[len(body)], [1, len(body)], [len(body), 1, 1], [1, 1, len(body)], [20, 3, 10], [20, 30, 1], [0, 0, 0]]
        )
    elif job == 2:
        body = bytes(rng.choice((0, 9, 10, 11, 255)) for _ in body)
    else:
        shape = [rng.choice((1, 9, 2**16, 2**20)) for _ in range(rng.choice((0, 1, 2, 3, 4, 255)))]
    kind = 8 if rng.random() < 0.8 else rng.choice((0, 9, 10, 11, 12, 13, 14, 255))
    ndim = len(shape) if rng.random() < 0.9 else rng.randrange(256)
    return data[:1] + struct.pack(f">HBB{len(shape)}I", 0, kind, ndim, *shape) + body


def hostile_matrix(data: bytes, rng: random.Random) -> bytes:
    """One of NORB's files with another type or other sizes, some of which agree with its length, packed or not."""
    is_packed = data[0] > 3
    content = bytearray(gzip.decompress(data[1:]) if is_packed else data[1:])
    job = rng.randrange(4)
    if job == 0:
        content[0] = rng.choice((0x51, 0x52, 0x53, 0x54, 0x55, 0x56, 0))
    elif job == 1:
        content[4:8] = rng.choice((-1, 0, 1, 3, 4, 5, 2**31 - 1)).to_bytes(4, "little", signed=True)
    elif job == 2:
        at = 8 + 4 * rng.randrange(3)
        size = rng.choice((-(2**31), -1, 0, 1, 2, 9, 20, 2**16, 2**30, 2**31 - 1))
        content[at : at + 4] = size.to_bytes(4, "little", signed=True)
    else:
        shape = rng.choice(
            [(600, 1, 1, 1), (1, 2, 300, 1), (1, 2, 1, 300), (5, 4, 6, 5), (0, 0, 0, 0), (2**31 - 1,) * 4]
        )
        content[8:24] = struct.pack("<4i", *shape)
    content = bytes(content) if rng.random() < 0.9 else damage(bytes(content), rng)
    return data[:1] + (gzip.compress(content, mtime=0) if is_packed else content)


def hostile_image(data: bytes, rng: random.Random) -> bytes:
    """An image whose header claims other sizes; PNG with its checksums set right."""
    import zlib

    choose, data = data[:1], bytearray(data[1:])
    size = rng.choice((0, 1, 7, 300, 9000, 9500, 20_000, 65_535, 2**24, 2**31 - 1, 2**31, 2**32 - 1))
    if data[:4] == b"\x89PNG":
        at = rng.choice((16, 20))
        data[at : at + 4] = size.to_bytes(4, "big")
        if rng.random() < 0.3:
            data[rng.choice((24, 25, 28))] = rng.choice((0, 1, 2, 3, 4, 6, 8, 16))
        data[29:33] = zlib.crc32(data[12:29]).to_bytes(4, "big")
    elif data[:2] == b"BM":
        at = rng.choice((18, 22, 14, 28, 30, 46))
        data[at : at + 4] = size.to_bytes(4, "little")
    elif data[:2] == b"P6":
        return (
            choose
            + f"P{rng.randrange(9)} {size} {rng.choice((size, 5))} {rng.choice((255, 65535, 0, -1, 9))}\n".encode()
            + data[11:]
        )
    elif data[:3] == b"GIF":
        at = rng.choice((6, 8))
        data[at : at + 2] = (size % 65536).to_bytes(2, "little")
    elif data[:2] == b"\xff\xd8" and (at := data.find(b"\xff\xc0")) > 0:
        at += rng.choice((5, 7))
        data[at : at + 2] = (size % 65536).to_bytes(2, "big")
    elif data[:2] in (b"II", b"MM"):  # an entry of the directory
        start = int.from_bytes(data[4:8], "little")
        count = int.from_bytes(data[start : start + 2], "little")
        at = start + 2 + 12 * rng.randrange(max(1, count)) + rng.choice((0, 2, 4, 8))
        data[at : at + 4] = size.to_bytes(4, "little")
    else:
        return choose + damage(bytes(data), rng)
    return choose + bytes(data)
