"""Fuzz a loader by coverage: `python tests/fuzz_atheris.py LOADER -runs=20000` (pip install atheris; Linux).

The loaders, what they must not do and the sound files to start from are those of test_fuzz.py. An option that starts
with a dash is libFuzzer's; a file in its place runs that one input again, such as one that made it crash.
"""

import sys
import tempfile
from pathlib import Path

import atheris

with atheris.instrument_imports(include=["capszoo", "yaml", "csv", "PIL", "timm.models._hub", "timm.models._builder"]):
    import test_fuzz


def main() -> None:
    loader, *options = sys.argv[1:]
    with test_fuzz.place(loader) as (folder, seeds), tempfile.TemporaryDirectory() as corpus:
        for number, data in enumerate(seeds):
            (Path(corpus) / str(number)).write_bytes(data)

        def run(data: bytes) -> None:
            test_fuzz.attempt(loader, folder, data)

        def mutate(data: bytes, max_size: int, number: int) -> bytes:
            # Half of the time as libFuzzer does, else with the fields of a sound file set to hostile values.
            if number % 2:
                return atheris.Mutate(data, max_size)
            return test_fuzz.make_case(loader, seeds, number)[:max_size]

        inputs = [] if any(not option.startswith("-") for option in options) else [corpus]
        atheris.Setup(
            [sys.argv[0], "-rss_limit_mb=6000", "-timeout=60", "-max_len=20000", *options, *inputs],
            run,
            custom_mutator=mutate,
        )
        with test_fuzz.limits():
            atheris.Fuzz()


if __name__ == "__main__":
    main()
