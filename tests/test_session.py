"""Several runs on one base in memory: each is what it would be alone."""

from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import facts, opened

from lora_cli import config_file, run_dir
from lora_cli.interrupt import StopRequest
from lora_cli.train import train


@pytest.mark.parametrize("other", [{"train.activation_checkpointing": True}, {"lora.target_modules": ["q_proj"]}, {}])
def test_a_run_after_another_is_what_it_would_be_alone(
    other: dict[str, object], make_config: Callable[..., Path], tmp_path: Path
):
    """To the bit, whatever the first one adapted, and did to the blocks."""
    settings = {"lora.dropout": 0.1, "train.max_steps": 6}
    first = config_file.load(make_config(**settings | other | {"lora.rank": 2, "output_dir": f"{tmp_path}/first"}))
    second = config_file.load(make_config(**settings, output_dir=f"{tmp_path}/second"))
    session = opened(first)
    for config in (first, second):
        assert list(session.run(config, run_dir.of(config)))
    alone = config_file.load(make_config(**settings, output_dir=f"{tmp_path}/alone"))
    assert list(train(alone, StopRequest()))

    assert facts(tmp_path / "second") == facts(tmp_path / "alone")
    assert facts(tmp_path / "first") != facts(tmp_path / "alone")
