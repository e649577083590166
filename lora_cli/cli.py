"""The command line: which commands there are, and that what goes wrong ends as it should."""

import typer

from lora_cli import __version__, chat_commands, config_commands, console, ending, run_commands
from lora_cli.arguments import Json

app = typer.Typer(
    help="Fine-tune Hugging Face language models with LoRA, from one YAML file.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)


def version(json: Json = False) -> None:
    """Print the version."""
    from importlib import metadata

    versions = {"lora": __version__} | {name: metadata.version(name) for name in ("torch", "transformers")}
    if json:
        console.print_json(versions)
    else:
        console.print_text(", ".join(f"{name} {number}" for name, number in versions.items()))


app.command()(config_commands.init)
app.command()(config_commands.check)
app.command()(config_commands.train)
app.command()(config_commands.tune)
app.command(name="eval")(run_commands.evaluate)
app.command()(run_commands.scale)
app.command()(run_commands.merge)
app.command()(run_commands.export)
app.command()(chat_commands.chat)
app.command()(chat_commands.serve)
app.command()(version)


def main() -> None:
    """Run a command; turn what goes wrong into an exit code and one paragraph on stderr."""
    ending.run(app)
