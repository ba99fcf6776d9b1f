"""Fuzz a loader by coverage: `python tests/fuzz/fuzz_atheris.py LOADER -runs=20000` (pip install atheris; Linux).

The loaders, what they must not do and the sound files to start from are those of harness.py. An option that starts
with a dash is libFuzzer's; a file in its place runs that one input again, such as one that made it crash.
"""

import sys
import tempfile
from pathlib import Path

import atheris

with atheris.instrument_imports(include=["capszoo", "yaml", "csv", "PIL", "timm.models._hub", "timm.models._builder"]):
    import harness


def main() -> None:
    loader, *options = sys.argv[1:]
    with harness.place(loader) as (folder, seeds), tempfile.TemporaryDirectory() as corpus:
        for number, data in enumerate(seeds):
            (Path(corpus) / str(number)).write_bytes(data)

        def run(data: bytes) -> None:
            harness.attempt(loader, folder, data)

        def mutate(data: bytes, max_size: int, number: int) -> bytes:
            # Half of the time as libFuzzer does, else with the fields of a sound file set to hostile values.
            if number % 2:
                return atheris.Mutate(data, max_size)
            return harness.make_case(loader, seeds, number)[:max_size]

        inputs = [] if any(not option.startswith("-") for option in options) else [corpus]
        atheris.Setup(
            [sys.argv[0], "-rss_limit_mb=6000", "-timeout=60", "-max_len=20000", *options, *inputs],
            run,
            custom_mutator=mutate,
        )
        with harness.limits():
            atheris.Fuzz()


if __name__ == "__main__":
    main()
