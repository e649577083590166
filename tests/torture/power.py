"""Power cuts replayed: every state of the disk that the recorded operations of a scene could leave behind.

The model is POSIX's, as in Pillai et al. (OSDI 2014): what was written to a file since its last fsync may be there, in
part, as zeros or not at all; each entry of a folder that was made, renamed or deleted since the folder's last fsync may
have reached the medium or not, in any combination. A rename is one such change.
"""

import os
import pickle
import random
import shutil
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lora_cli import checkpoint, config_file, disk, metrics, run_dir, storage, train
from lora_cli.interrupt import StopRequest
from lora_cli.records import Saved
from lora_cli.run_dir import RunDir
from torture import scenes
from torture.scenes import Scene, facts_of, forked

METRICS = "run/metrics.jsonl"


@dataclass(frozen=True)
class Event:
    """An operation on a path; or a promise: what somebody was told is kept, by the files' contents at that time."""

    operation: str
    path: str = ""
    what: Any = None
    site: str = ""  # of a sync: which line of storage asked for it


# --- recording ---


def record(scene: Scene, base: Path, folder: Path) -> list[Event]:
    """Play a scene and return what it did to the disk, with a promise after each thing that it said."""
    place = scenes.prepared(scene, base, folder)
    trace = folder.parent / f"{folder.name}.trace"

    def act() -> None:
        events: list[Event] = []
        known = set[str]()
        announced = [""]

        def inside(path: Any) -> str | None:
            found = os.path.relpath(os.fspath(path), place)
            return None if found.startswith("..") else found

        def watch(operation: str, path: Path, what: Any) -> None:
            announced[0] = os.fspath(path)
            name = inside(path.absolute())
            if name is None:
                return
            if operation == "create":
                known.add(name)
            if operation == "sync" and path.is_file() and name not in known:  # a library wrote it
                known.add(name)
                events[:] = [event for event in events if event != Event("unannounced", name)]
                events.extend([Event("create", name), Event("write", name, path.read_bytes())])
            if operation in ("rename", "link"):
                what = inside(Path(what).absolute())
                known.update({what} if name in known else ())
            elif what is not None:
                what = bytes(what)
            frame = sys._getframe(3)
            events.append(Event(operation, name, what, f"{frame.f_code.co_name}:{frame.f_lineno}"))

        def audit(event: str, arguments: tuple[Any, ...]) -> None:
            if event == "open" and isinstance(arguments[0], str) and arguments[2] & (os.O_WRONLY | os.O_RDWR):
                name = inside(os.path.abspath(arguments[0]))
                if name and os.path.abspath(arguments[0]) != os.path.abspath(announced[0]):
                    events.append(Event("unannounced", name))

        sys.addaudithook(audit)
        disk.watch = watch
        if scene.facts is scenes.run_facts:
            for said in train.train(config_file.load(Path("config.yaml")), StopRequest()):
                events.append(Event("promise", what=_promised(isinstance(said, Saved))))
        else:
            scene.act()
            events.append(Event("promise", what=_promised(False)))
        disk.watch = None
        trace.write_bytes(pickle.dumps(events))

    if forked(act, place):
        raise RuntimeError(f"{scene.name}: fails undisturbed")
    return list(pickle.loads(trace.read_bytes()))


def _promised(with_metrics: bool) -> dict[str, bytes]:
    """What is there now by its final name; appended lines only once a checkpoint was saved after them."""
    here = {name: raw for name, raw in scenes.files(Path()).items() if name != "config.yaml"}
    return {
        name: raw
        for name, raw in here.items()
        if not any(storage.is_temporary(part) for part in (Path(name), *Path(name).parents))
        and (with_metrics or name != METRICS)
    }


# --- the disk ---


@dataclass
class Node:
    """A file, with what is on the medium and what was written since; or a folder, with changes that may be lost."""

    is_folder: bool
    kept: Any = None  # bytes, or entries by name
    now: Any = None
    pending: list[Mapping[str, "Node | None"]] = field(default_factory=list)  # of a folder: changes, each whole or not

    @classmethod
    def new(cls, is_folder: bool) -> "Node":
        """Return an empty file or folder."""
        return cls(is_folder, {}, {}) if is_folder else cls(is_folder, b"", b"")


class Disk:
    """The state of a folder after some events."""

    def __init__(self) -> None:
        self.root = Node.new(is_folder=True)

    def find(self, path: str) -> Node:
        """Return what a path names; a folder that the scene found there is made, already kept."""
        node = self.root
        for part in Path(path).parts:
            node = node.now[part]
        return node

    def _parent(self, path: str) -> tuple[Node, str]:
        *above, name = Path(path).parts
        return self.find("/".join(above)), name

    def _change(self, folder: Node, change: Mapping[str, Node | None]) -> None:
        for name, node in change.items():
            folder.now[name] = node
        folder.pending.append(change)

    def apply(self, event: Event) -> None:
        """Do what an event did."""
        match event.operation:
            case "create" | "mkdir":
                folder, name = self._parent(event.path)
                self._change(folder, {name: Node.new(event.operation == "mkdir")})
            case "write":
                self.find(event.path).now += event.what
            case "sync":
                node = self.find(event.path)
                node.kept = dict(node.now) if node.is_folder else node.now
                node.pending = []
            case "rename" | "link":
                (folder, name), (target, new) = self._parent(event.path), self._parent(event.what)
                node = folder.now[name]
                away = {name: None} if event.operation == "rename" else {}
                if folder is target:
                    self._change(folder, {**away, new: node})
                else:
                    self._change(target, {new: node})
                    self._change(folder, away)
            case "unlink" | "rmdir":
                folder, name = self._parent(event.path)
                self._change(folder, {name: None})
            case "open" | "utime" | "promise":
                pass
            case other:
                raise RuntimeError(f"{other} {event.path}: what does that do?")

    def folders(self) -> list[Node]:
        """Return every folder that is or was reachable and has changes that may be lost."""
        found, waiting, seen = [], [self.root], set[int]()
        while waiting:
            node = waiting.pop()
            if id(node) in seen or not node.is_folder:
                continue
            seen.add(id(node))
            found += [node] if node.pending else []
            for entries in (node.kept, node.now, *node.pending):
                waiting += [entry for entry in entries.values() if entry is not None]
        return found


# How much of a file's unsynced bytes is there.
def _none(node: Node) -> bytes:
    return bytes(node.kept)


def _all(node: Node) -> bytes:
    return bytes(node.now)


def _half(node: Node) -> bytes:
    return bytes(node.now[: len(node.kept) + (len(node.now) - len(node.kept)) // 2])


def _zeros(node: Node) -> bytes:
    return bytes(node.kept) + bytes(len(node.now) - len(node.kept))


Kept = dict[str, bytes | None]  # a path's content; None for a folder


def _state(disk_now: Disk, dropped: set[int], content: Any) -> Kept:
    """Return the files of a disk on which some changes, by their identity, did not happen."""
    state: Kept = {}

    def walk(node: Node, path: str) -> None:
        entries = dict(node.kept)
        for change in node.pending:
            if id(change) not in dropped:
                entries.update(change)
        for name, entry in entries.items():
            if entry is None:
                continue
            where = f"{path}{name}"
            state[where] = None if entry.is_folder else content(entry)
            if entry.is_folder:
                walk(entry, f"{where}/")

    walk(disk_now.root, "")
    return state


def states_after(disk_now: Disk, chance: random.Random, draws: int) -> Iterator[Kept]:
    """Yield the states that a power cut now may leave: the extremes, each change alone lost or kept, and draws."""
    changes = [id(change) for folder in disk_now.folders() for change in folder.pending]
    everything = set(changes)
    for content in (_none, _all, _half, _zeros):
        yield _state(disk_now, set(), content)
    yield _state(disk_now, everything, _all)
    for change in changes:
        yield _state(disk_now, {change}, _all)
        yield _state(disk_now, everything - {change}, _all)
    for _ in range(draws):
        lost = {change for change in changes if chance.random() < 0.5}
        kinds = {True: chance.choice((_none, _half, _zeros)), False: _all}
        yield _state(disk_now, lost, lambda node, kinds=kinds: kinds[chance.random() < 0.5](node))


# --- what must hold ---


def _touched(events: Sequence[Event]) -> set[str]:
    """Paths that events may have changed, with what is in them."""
    return {path for event in events for path in (event.path, event.what) if isinstance(path, str) and path}


def wrong_with(
    state: Kept, place: Path, promised: Mapping[str, bytes], since: Sequence[Event], final: Any
) -> list[str]:
    """Return what is wrong with a state of the disk, laid out in a folder."""
    problems = scenes.half_made(place)
    touched = _touched(since)
    for name, raw in promised.items():
        found = state.get(name)
        if name == METRICS:
            if found is None or not found.startswith(raw):
                problems.append(f"{name}: lines before the last checkpoint are lost")
        elif found != raw and not any(name == path or name.startswith(f"{path}/") for path in touched):
            problems.append(f"{name}: was there, and {'is gone' if found is None else 'is another'}")
    run = RunDir(place / "run")
    if run.path.is_dir():
        newest, _ = checkpoint.latest(run)
        steps = {record["step"] for record in metrics.read(run)}
        if newest is not None and (missing := set(range(1, checkpoint.read_numbers(newest)[0] + 1)) - steps):
            problems.append(f"{METRICS}: steps {sorted(missing)[:3]} are not there, and {newest.name} is")
        finished = run.status.exists() and run_dir.read_status(run).get("status") == "finished"
        if finished and not run.adapter.is_dir():
            problems.append("run.json: says finished, and there is no adapter")
    for name, raw in (final or {}).items():
        if "/" not in name and name.startswith("out") and state.get(name) not in (None, raw):
            problems.append(f"{name}: is not whole")
    return problems


def lay_out(state: Kept, place: Path, before: Kept) -> None:
    """Write a state of the disk into a folder that holds another one."""
    for name in sorted(before.keys() - state.keys(), reverse=True):
        path = place / name
        if before[name] is None:
            path.rmdir()
        else:
            path.unlink()
    for name, raw in sorted(state.items()):
        if name in before and before[name] == raw:
            continue
        path = place / name
        if raw is None:
            path.mkdir()
        else:
            path.write_bytes(raw)


def replay(
    events: Sequence[Event], place: Path, final: Any, seed: int, draws: int, without: str | None = None
) -> Iterator[tuple[str, Kept, list[str]]]:
    """Yield (where, state, what is wrong with it) for every different state; `without` leaves out a line's fsyncs."""
    chance, now, seen = random.Random(seed), Disk(), set[int]()
    promised: Mapping[str, bytes] = {}
    since: list[Event] = []
    before: Kept = {}
    shutil.rmtree(place, ignore_errors=True)
    place.mkdir()
    for number, event in enumerate(events):
        if event.operation == "promise":
            lost_metrics = METRICS not in event.what
            promised = {**({METRICS: promised[METRICS]} if lost_metrics and METRICS in promised else {}), **event.what}
            since = []
        elif event.operation != "sync" or event.site != without:
            now.apply(event)
        since.append(event)
        for state in states_after(now, chance, draws):
            key = hash((frozenset(state.items()), tuple(sorted(promised)), len(since)))
            if key in seen:
                continue
            seen.add(key)
            lay_out(state, place, before)
            before = state
            yield (
                f"after {number} ({event.operation} {event.path})",
                state,
                wrong_with(state, place, promised, since, final),
            )


SCENES = ("run", "export gguf", "merge", "data cache")


def run(seed: int, count: int, folder: Path, names: Sequence[str] = SCENES) -> dict[str, Any]:
    """Replay power cuts in the scenes that write in all ways, about `count` states of them drawn by chance.

    From some states the run is continued. Then once more without each line's fsyncs, which must be noticed.
    """
    base = folder / "base"
    scenes.build(base)
    if forked(lambda: (scenes.write_config(base, base), scenes.train_to_end()), base):
        raise RuntimeError("the run that is exported fails")
    failures, tried, resumed, sites = list[str](), 0, 0, {}
    for name in names:
        scene = next(scene for scene in scenes.SCENES if scene.name == name)
        whole = folder / f"whole {name}"
        events = record(scene, base, whole)
        failures += [f"{name}: {e.path} is written unannounced" for e in events if e.operation == "unannounced"]
        events = [event for event in events if event.operation != "unannounced"]
        final = {path.name: path.read_bytes() for path in whole.glob("out*") if path.is_file()}
        draws = count // len(names) // len(events)
        expected = facts_of(scene, whole, lambda: None) if name == "run" else None
        for where, _, problems in replay(events, folder / "cut", final, seed, draws):
            tried += 1
            if expected is not None and tried % 50 == seed % 50:
                resumed += 1
                again = Path(shutil.copytree(folder / "cut", folder / "again"))
                shutil.copy(whole / "config.yaml", again)
                if facts_of(scene, again, scene.act) != expected:
                    problems.append("the run ends otherwise than undisturbed")
                shutil.rmtree(again)
            failures += [f"{name}, power cut {where}: {problem}" for problem in problems[:1]]
        for site in {event.site for event in events if event.operation == "sync"}:
            found = next(
                (w for w, _, problems in replay(events, folder / "cut", final, seed, 0, site) if problems), None
            )
            sites[site] = sites.get(site) or found
    failures += [f"{site}: without its fsync nothing is noticed" for site, found in sites.items() if not found]
    return {"tried": tried, "resumed": resumed, "fsyncs_proven": sorted(sites), "failures": failures}
