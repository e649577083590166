"""A few of the hostile artefacts of `torture.hostile`, and the commands of a user, all under an audit hook."""

from pathlib import Path

from torture import hostile

SOME = (
    "adapter: polyglot", "adapter: pickles beside", "model: index names .bin", "checkpoint: pickled optimizer",
    "data: pickle as parquet", "code: tokenizer auto_map", "secrets: arguments", "secrets: broken row",
    "template: power", "template: globals", "yaml: object",
)  # fmt: skip


def test_hostile_artefacts_do_nothing(tmp_path: Path):
    """No pickle is read, nothing is run, no network is asked, no secret comes out, nothing hangs or takes memory."""
    figures = hostile.try_out([artefact for artefact in hostile.ARTEFACTS if artefact.name in SOME], tmp_path)

    assert figures["failures"] == []
    assert (figures["tried"], figures["ordinary_commands"]) == (len(SOME), 10)
    assert figures["between_our_processes"] > 0  # the hook sees what our own processes send each other
