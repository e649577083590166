"""SIGKILL at every operation of storage, before it and in the middle of a write; the same command then goes on.

For each point a process really does the work and is really killed. What must hold: nothing half-made stands under a
final name; the same command ends with the bytes of a run that nothing disturbed; nothing temporary is left.
"""

import contextlib
import os
import shutil
import signal
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from lora_cli import checkpoint, disk, storage
from lora_cli.checkpoint import TrainState
from torture import scenes
from torture.scenes import Scene, facts_of, forked


@dataclass(frozen=True)
class Point:
    """Where a process is killed: before the operation of this number, or, `torn`, with half of its bytes written."""

    number: int
    operation: str
    path: str
    torn: bool

    def __str__(self) -> str:
        return f"{'in' if self.torn else 'before'} {self.operation} {self.number} ({self.path})"


def enumerate_points(scene: Scene, base: Path, folder: Path) -> list[Point]:
    """Play a scene undisturbed and return every point of it."""
    place = scenes.prepared(scene, base, folder)
    journal = folder.parent / f"{folder.name}.journal"

    def act() -> None:
        with journal.open("w") as file:

            def watch(operation: str, path: Path, _: Any) -> None:
                file.write(f"{operation}\t{path.name}\n")
                file.flush()

            disk.watch = watch
            scene.act()

    if forked(act, place):
        raise RuntimeError(f"{scene.name}: fails undisturbed")
    lines = [line.split("\t") for line in journal.read_text().splitlines()]
    points = [Point(number, operation, path, False) for number, (operation, path) in enumerate(lines)]
    return sorted(
        [*points, *(Point(p.number, p.operation, p.path, True) for p in points if p.operation == "write")],
        key=lambda point: (point.number, point.torn),
    )


def killed_at(scene: Scene, point: Point) -> Callable[[], None]:
    """Return what plays a scene and is killed at a point."""

    def act() -> None:
        seen = 0

        def watch(operation: str, path: Path, what: Any) -> None:
            nonlocal seen
            if seen == point.number:
                if point.torn:
                    with path.open("ab") as file:
                        file.write(bytes(what)[: len(bytes(what)) // 2])
                os.kill(os.getpid(), signal.SIGKILL)
            seen += 1

        disk.watch = watch
        scene.act()

    return act


def try_point(scene: Scene, base: Path, folder: Path, point: Point, expected: Any, plant: str | None) -> list[str]:
    """Kill at a point, go on, and return what is wrong then."""
    place = scenes.prepared(scene, base, folder)
    status = forked(_planted(killed_at(scene, point), plant), place)
    problems = [] if status == -signal.SIGKILL else [f"was not killed but ended with {status}"]
    problems += scenes.half_made(place)

    done = bool(scene.output) and (place / scene.output).exists()  # then nothing is written there again

    def again() -> None:
        storage._SECONDS_UNTIL_HELD = 0  # what the killed process left is new, and swept all the same
        scene.act()

    if facts_of(scene, place, _planted(again, plant)) != expected:
        problems.append("ends otherwise than undisturbed")
    problems += [f"{left} is left" for left in scenes.left_over(place) if not done]
    shutil.rmtree(place)
    return [f"{scene.name}, killed {point}: {problem}" for problem in problems]


def run(seed: int, count: int, folder: Path, workers: int = 1, planted: int = 20) -> dict[str, Any]:
    """Try `count` points of all scenes (0: every one), spread evenly from a start that `seed` gives.

    Then `planted` points with each of PLANTS, faults that must be noticed.
    """
    figures = try_points(seed, count, folder / "points", None, workers=workers)
    for plant in PLANTS:
        noticed = len(try_points(seed, planted, folder / plant, plant, [PLANTED_SCENE], workers)["failures"])
        figures[f"noticed: {plant}"] = noticed
        if not noticed:
            figures["failures"].append(f"{plant}: is not noticed")
    return figures


def try_points(
    seed: int, count: int, folder: Path, plant: str | None, names: Sequence[str] | None = None, workers: int = 1
) -> dict[str, Any]:
    """Try points of some scenes, of all without `names`; `plant` breaks the program on purpose."""
    base = folder / "base"
    scenes.build(base)
    if forked(lambda: _finish_a_run(base), base):
        raise RuntimeError("the run that is merged and exported fails")
    chosen = [scene for scene in scenes.SCENES if names is None or scene.name in names]
    points = [
        (scene, point)
        for number, scene in enumerate(chosen)
        for point in enumerate_points(scene, base, folder / f"whole-{number}")
    ]
    places = {scene.name: folder / f"whole-{number}" for number, scene in enumerate(chosen)}
    _warm(chosen, base, folder)
    expected = {scene.name: facts_of(scene, places[scene.name], lambda: None) for scene in chosen}
    step = max(1, len(points) // count) if count else 1
    tried = points[seed % step :: step]
    failures = _in_parallel(
        lambda number: try_point(
            tried[number][0], base, folder / f"point-{number}", tried[number][1], expected[tried[number][0].name], plant
        ),
        len(tried),
        workers,
    )
    by_scene = {scene.name: sum(one is scene for one, _ in tried) for scene in chosen}
    return {"points": len(points), "tried": len(tried), "by_scene": by_scene, "failures": failures}


def _warm(chosen: Sequence[Scene], base: Path, folder: Path) -> None:
    """Play every scene once in this process: those forked from it find everything imported."""
    before = Path.cwd()
    torch.set_num_threads(1)
    for number, scene in enumerate(chosen):
        os.chdir(scenes.prepared(scene, base, folder / f"warm-{number}"))
        scene.act()
        os.chdir(before)


def _finish_a_run(base: Path) -> None:
    scenes.write_config(base, base)
    scenes.train_to_end()


def _in_parallel(act: Callable[[int], list[str]], count: int, workers: int) -> list[str]:
    """Call a function for each number in some processes forked here; return all that they found."""
    pipes = []
    for worker in range(workers):
        read, write = os.pipe()
        if os.fork() == 0:
            os.close(read)
            with os.fdopen(write, "w") as pipe:
                for number in range(worker, count, workers):
                    pipe.writelines(problem.replace("\n", " ") + "\n" for problem in act(number))
                    pipe.flush()
            os._exit(0)
        os.close(write)
        pipes.append(read)
    found = []
    for read in pipes:
        with os.fdopen(read) as pipe:
            found += pipe.read().splitlines()
    for _ in pipes:
        os.wait()
    return found


# --- faults planted on purpose ---


@contextlib.contextmanager
def _renamed_first(path: Path) -> Iterator[Path]:
    """A directory that is written under its final name: `storage.new_directory` without its order."""
    storage.make_folder(path.parent)
    disk.make_folder(path)
    yield path
    storage._seal(path)


def _without_patience(path: Path, state: TrainState, load: Any = checkpoint.load) -> None:
    load(path, state)
    state.stopping.without_improvement = 0


PLANTED_SCENE = "run with forgetting"  # it stops early
PLANTS = {
    "renamed first": (storage, "new_directory", _renamed_first),
    "patience forgotten": (checkpoint, "load", _without_patience),
}


def _planted(act: Callable[[], None], plant: str | None) -> Callable[[], None]:
    def planted() -> None:
        if plant is not None:
            module, name, fault = PLANTS[plant]
            setattr(module, name, fault)
        act()

    return planted
