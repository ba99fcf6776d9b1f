"""Text made hostile: JSON, YAML, tables, and values of a command line."""

import json
import random

import yaml

# Too large to build for every case: put into the text at the end.
BIG = "@BIG@"
DEEP = "@DEEP@"
FLAT = "@FLAT@"
_TEXTS = {BIG: "9" * 5000, DEEP: "[" * 20_000 + "]" * 20_000, FLAT: "[" + "0," * 5_000 + "0]"}
_LEAVES = [
    *(
        None,
        True,
        False,
        0,
        1,
        2,
        3,
        -1,
        -2,
        7,
        28,
        100,
        10**5,
        10**6,
        10**9,
        10**12,
        2**31,
        2**32,
        2**62,
        2**63,
        2**64,
    ),
    *(-(2**63), 10**30, 0.5, -0.0, 1e308, 1e-320, float("nan"), float("inf"), float("-inf")),
    *("", "x", "0", "../canary", "/etc/passwd", "../../canary.safetensors", "local-dir:..", "hf-hub:a/b", "cuda:99"),
    *(
        "meta",
        "__tensor__",
        "__dict__",
        "float16",
        "é\n\x00\u2028",
        "a" * 3000,
        "*a",
        "!!python/object:os.system",
        "file:///etc",
    ),
    *([], {}, [[]], [0], [1, 2, 3], [10**9, 10**9], [0, 2**62], [-1, 5], ["a"], [None], {"a": 1}, {"__tensor__": "x"}),
    *({"__dict__": 3}, {"__dict__": [[[], 1]]}, {"__dict__": [["a", 1], ["a", 2]]}, list(range(40)), BIG, DEEP, FLAT),
]
KEYS = [
    *("model", "model_args", "num_classes", "img_size", "in_chans", "conv_dim", "num_types", "caps_dim", "class_dim"),
    *("kernel_size", "keep_types", "keep_capsules", "share_weights", "decoder", "decoder_dims", "num_routing", "dtype"),
    *(
        "device",
        "drop_rate",
        "global_pool",
        "pretrained",
        "pretrained_cfg",
        "pretrained_cfg_overlay",
        "checkpoint_path",
    ),
    *(
        "file",
        "url",
        "hf_hub_id",
        "hf_hub_filename",
        "custom_load",
        "source",
        "state_dict",
        "architecture",
        "input_size",
    ),
    *(
        "fixed_input_size",
        "first_conv",
        "classifier",
        "label_offset",
        "features_only",
        "out_indices",
        "feature_cls",
        "name",
    ),
    *(
        "__metadata__",
        "shape",
        "data_offsets",
        "capszoo",
        "state",
        "cache_dir",
        "path",
        "self",
        "x",
        "",
        "..",
        "config",
    ),
    *("resume", "output", "epochs", "lr", "sha256", "label_names", "pool_size", "../../x.y", "capsnet_tiny.x/../y"),
]
LENGTHS = [
    0,
    1,
    2,
    7,
    8,
    100,
    10**8,
    10**8 + 1,
    2**31 - 1,
    2**31,
    2**32,
    2**62,
    2**63 - 1,
    2**63,
    2**64 - 8,
    2**64 - 1,
]


def places(tree) -> list[tuple]:
    """All places of a tree of JSON, as (container, key)."""
    found, left = [], [tree]
    while left:
        node = left.pop()
        if isinstance(node, (dict, list)):
            for key in node if isinstance(node, dict) else range(len(node)):
                found.append((node, key))
                left.append(node[key])
    return found


def edit(tree, rng: random.Random):
    """Make some places of a tree of JSON hostile."""
    box = [tree]
    for _ in range(rng.choice((1, 1, 1, 2, 3, 6))):
        node, key = rng.choice(places(box))
        job = rng.random()
        leaf = json.loads(json.dumps(rng.choice(_LEAVES)))
        if job < 0.55 or node is box:
            node[key] = leaf if node is not box or rng.random() < 0.05 else node[key]
        elif job < 0.7:
            del node[key]
        elif job < 0.85:
            other, name = rng.choice(places(box))
            node[key] = json.loads(json.dumps(other[name]))
        elif isinstance(node, dict):
            node[rng.choice(KEYS)] = leaf
        else:
            node.insert(rng.randrange(len(node) + 1), leaf)
    return box[0]


def dump(tree) -> str:
    text = json.dumps(tree)
    for mark, meaning in _TEXTS.items():
        text = text.replace(f'"{mark}"', meaning)
    return text


def damage(data: bytes, rng: random.Random) -> bytes:
    """Flip, cut, insert, repeat or overwrite bytes."""
    data = bytearray(data)
    for _ in range(rng.choice((1, 1, 2, 4, 16))):
        at = rng.randrange(len(data) + 1) if rng.random() < 0.5 else rng.randrange(min(len(data), 64) + 1)
        job = rng.randrange(7)
        if job == 0 and at < len(data):
            data[at] ^= 1 << rng.randrange(8)
        elif job == 1:
            del data[at:]
        elif job == 2:
            data[at:at] = rng.randbytes(rng.randrange(1, 20))
        elif job == 3:
            del data[at : at + rng.randrange(1, 20)]
        elif job == 4:
            end = at + rng.randrange(1, 50)
            data[at:at] = data[at:end] * rng.choice((1, 2, 50))
        else:
            size, order = rng.choice((1, 2, 4, 8)), rng.choice(("little", "big"))
            data[at : at + size] = (rng.choice(LENGTHS) % 256**size).to_bytes(size, order)
    return bytes(data)


def hostile_json(data: bytes, rng: random.Random) -> bytes:
    return dump(edit(json.loads(data), rng)).encode()


_YAML = [
    *(
        "a: &a [x, x]\n",
        "b: &b [*a, *a]\n",
        "model: *a\n",
        "<<: *a\n",
        "model: &x [*x]\n",
        "lr: !!python/object/apply:os.system [ls]\n",
    ),
    *(
        "lr: !!timestamp x\n",
        "epochs: !!int x\n",
        "lr: !!float x\n",
        "decoder: !!bool x\n",
        "model: !!binary '*'\n",
        "lr: .nan\n",
    ),
    *(
        "epochs: 0x_\n",
        "epochs: 0b_\n",
        "epochs: 1:99:99\n",
        "model: 2001-99-99\n",
        "model: 2001-01-01T99:99:99Z\n",
        "epochs: ._\n",
    ),
    *(
        "? [a, b]\n: 1\n",
        "1: 2\n",
        "null: x\n",
        "model_kwargs: {conv_dim: {a: [1, {b: 2}]}}\n",
        "--- \n",
        "...\n",
        "%YAML 9.9\n",
    ),
    *(
        "%TAG ! tag:yaml.org,2002:python/\n--- !object:x\n",
        "config: x\n",
        "resume: ..\n",
        "output: ../x\n",
        "model: |\n",
        "\t",
        "\x00",
    ),
    *(
        "model: " + "[" * 900 + "\n",
        "- " * 2000 + "\n",
        "model: " + "{a: " * 1000,
        "epochs: " + "9" * 6000 + "\n",
        "? " * 1500,
    ),
    *(
        "epochs: " + "1:" * 3000 + "1\n",
        "model: '" + "a\n" * 500,
        "lr: 1e" + "9" * 400 + "\n",
        "k" * 5000 + ": 1\n",
        "#" * 9999,
    ),
    *(
        "model_kwargs: [" + "a=1, " * 2000 + "]\n",
        "model_kwargs: ['a=[[[', 'b=*x', 'c=!!int x']\n",
        "decoder: [true]\n",
    ),
]


def hostile_text(data: bytes, rng: random.Random) -> bytes:
    """Lines of YAML among those of a sound file."""
    if rng.random() < 0.4:
        tree = yaml.safe_load(data)
        return dump(edit(tree, rng)).encode()  # JSON is YAML
    lines = data.decode("utf-8", "replace").splitlines(keepends=True)
    for _ in range(rng.choice((1, 1, 2, 5))):
        lines.insert(rng.randrange(len(lines) + 1), rng.choice(_YAML))
    return "".join(lines).encode()


def hostile_value(data: bytes, rng: random.Random) -> bytes:
    """A value as a command line has it: text that means something to YAML."""
    pieces = [
        *"[]{},:&*!|>'\"%@`?-#\n \t",
        "&a ",
        "*a",
        "!!int ",
        "!!timestamp ",
        "<<: ",
        "0x",
        "1:",
        "2001-01-",
        "9" * 50,
        "a",
        "[" * 999,
    ]
    text = data.decode() if rng.random() < 0.5 else rng.choice(_YAML).partition(": ")[2]
    for _ in range(rng.randrange(6)):
        at = rng.randrange(len(text) + 1)
        text = text[:at] + rng.choice(pieces) + text[at:]
    return text.encode()


def hostile_table(data: bytes, rng: random.Random) -> bytes:
    pieces = [
        b'"',
        b",",
        b"\n",
        b"\r",
        b"\x00",
        b'""',
        b"\xff",
        b"a" * 140_000,
        b",,,,,,",
        b"=cmd()",
        b"top1,top1\n",
        "é".encode(),
    ]
    for _ in range(rng.choice((1, 1, 2, 4))):
        at = rng.randrange(len(data) + 1)
        data = data[:at] + rng.choice(pieces) + data[at:]
    return data
