"""The command line: which commands there are, and that what goes wrong ends as it should."""

from typing import Annotated

import typer

from lora_cli import chat_commands, config_commands, ending, run_commands, tool_commands

app = typer.Typer(
    help="Fine-tune Hugging Face language models with LoRA, from one YAML file.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)


@app.callback()
def options(
    version: Annotated[
        bool,
        typer.Option(
            "--version",
            help="Print the version, as the command does.",
            is_eager=True,
            show_default=False,
            callback=tool_commands.leave_with_version,
        ),
    ] = False,
) -> None:
    """Take what stands before a command."""


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
app.command()(run_commands.report)
app.command()(tool_commands.doctor)
app.command()(tool_commands.version)


def main() -> None:
    """Run a command; turn what goes wrong into an exit code and one paragraph on stderr."""
    ending.run(app)
