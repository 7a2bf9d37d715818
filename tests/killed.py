"""Run one job again and again, killing it after each new chunk; python tests/killed.py MODEL FOLDER.

Prints the number of kills, after comparing all files with those of a job that nobody killed.
"""

import os
import signal
import sys
import time
from pathlib import Path

import torch

import steer_utils as su

PROMPTS = ["The cat said", "A dog barked", "Once upon a time", "I said that"]
PAIR = su.get_x_vector("Love", "Hatred", coeff=1.5, act_name=1)


def sweep(model_folder: str, folder: Path) -> None:
    grid = {"act_names": [0, 1, 2], "coeffs": [1.0, -2.0], "num_samples": 2, "batch_size": 4}
    su.sweep(*su.load(model_folder, device="cpu"), PROMPTS, PAIR, folder=folder, max_new_tokens=20, **grid)


def chunks(folder: Path) -> int:
    return len([*folder.glob("chunk-*")])


def killed(model_folder: str, folder: Path) -> bool:
    """Run the job in a child process and kill it after one more chunk; False if it ended by itself."""
    before, child = chunks(folder), os.fork()
    if not child:
        sweep(model_folder, folder)
        os._exit(0)
    while os.waitpid(child, os.WNOHANG) == (0, 0):
        if chunks(folder) > before:
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
            return True
        time.sleep(0.001)
    return False


def main() -> None:
    model_folder, folder = sys.argv[1], Path(sys.argv[2])
    torch.set_num_threads(1)
    kills = 0
    while kills < 10 and killed(model_folder, folder / "killed"):
        kills += 1
    sweep(model_folder, folder / "killed")
    sweep(model_folder, folder / "whole")
    for path in (folder / "whole").iterdir():
        assert path.read_bytes() == (folder / "killed" / path.name).read_bytes(), path.name
    print(kills, "kills")


if __name__ == "__main__":
    main()
