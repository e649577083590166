"""What lies beside a path that is not there, under a name much like it."""

import difflib
from collections.abc import Callable
from pathlib import Path


def did_you_mean(path: Path, fits: Callable[[Path], bool] = Path.exists) -> str:
    """Return " Did you mean ...?" with up to three paths that fit; nothing where there are none.

    Names that begin as the path does count as near; hidden ones, as the schema beside a config, do not.
    """
    beside = sorted(found.name for found in path.parent.glob("[!.]*") if fits(found))
    longer = [name for name in beside if path.name and name.startswith(path.name)]
    near = dict.fromkeys([*difflib.get_close_matches(path.name, beside, n=3, cutoff=0.5), *longer])
    return f" Did you mean {' or '.join(str(path.parent / name) for name in list(near)[:3])}?" if near else ""
