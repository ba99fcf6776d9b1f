"""Forks processes that train, kills each at a random moment, and looks at what it left; prints facts as JSON.

`python tests/faults/kills.py FOLDER KILLS SEED`, as test_kills.py runs it.
"""

import json
import os
import random
import signal
import sys
import time
from pathlib import Path

import torch
from small_runs import EPOCHS, make_splits, make_trainer

from capszoo.checkpoint import load_tensors
from capszoo.data import Split


def train_and_tell(splits: tuple[Split, Split], folder: Path, writing: int) -> None:
    """Train, and write to a pipe where the run stood each time that its state was saved."""
    trainer = make_trainer(splits, folder, save_every=1)
    trainer.resume()
    save = trainer.save

    def save_and_tell() -> None:
        save()
        os.write(writing, b"%d %d\n" % (trainer.position.epoch, trainer.position.step))

    trainer.save = save_and_tell
    trainer.fit()


def main() -> None:
    torch.set_num_threads(1)
    root, kills, seed = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
    rng = random.Random(seed)
    splits = make_splits()
    begin = time.monotonic()
    whole = make_trainer(splits, root / "whole", save_every=1)
    whole.fit()
    longest = 1.2 * (time.monotonic() - begin)
    expected = load_tensors(root / "whole/last.safetensors")[0]
    facts = {"killed": 0, "finished": 0, "previous": 0, "between": 0}
    run, saved = 0, (0, 0)
    while facts["killed"] < kills:
        folder = root / f"run{run}"
        reading, writing = os.pipe()
        pid = os.fork()
        if not pid:
            train_and_tell(splits, folder, writing)
            os._exit(0)
        os.close(writing)
        time.sleep(longest * rng.random())
        os.kill(pid, signal.SIGKILL)
        _, status = os.waitpid(pid, 0)
        with open(reading, "rb") as file:
            lines = file.read().decode().split("\n")[:-1]
        saved = max([saved, *(tuple(map(int, line.split())) for line in lines)])
        for path in folder.glob("[!.]*.safetensors"):
            load_tensors(path)  # what has its own name is whole
        trainer = make_trainer(splits, folder)
        path, state = trainer.run_folder.find_state()
        found = (0, 0) if state is None else (state["position"]["epoch"], state["position"]["step"])
        assert found >= saved, f"{saved} was saved, {found} is found"
        if os.WIFSIGNALED(status):
            facts["killed"] += 1
            facts["previous"] += path is not None and "previous" in path.name
            facts["between"] += bool(list(folder.glob(".*.tmp")))
            continue
        assert status == 0
        trainer.resume()
        last = load_tensors(folder / "last.safetensors")[0]
        assert trainer.position.epoch == EPOCHS and all(torch.equal(last[key], expected[key]) for key in expected)
        facts["finished"] += 1
        run, saved = run + 1, (0, 0)
    print(json.dumps(facts))


if __name__ == "__main__":
    main()
