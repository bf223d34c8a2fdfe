"""The command line's application. Each command imports its dependencies when it runs, so that `--help` is quick."""

from typing import Annotated

import typer

from .. import __version__
from .audit import audit
from .demo.command import demo
from .demo.replica import replica
from .doctor.command import doctor
from .fanout import fanout
from .masking import MaskingGroup
from .namespaces import namespaces
from .publish import publish
from .replicas import replicas
from .serve import serve
from .watch import watch

__all__ = ["app"]

app: typer.Typer = typer.Typer(
    name="broadcache",
    cls=MaskingGroup,
    help="Cache invalidation across replicas: one publish, every replica forgets.",
    epilog="Exit codes: 0 success, 1 failure, 2 wrong usage or a missing package, 130 interrupted.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

for _command in (demo, serve, publish, watch, replicas, namespaces, audit, doctor, fanout, replica):
    app.command()(_command)


def _show_version(is_asked: bool) -> None:
    if is_asked:
        print(f"broadcache {__version__}")
        raise typer.Exit


@app.callback()
def root(
    version: Annotated[
        bool, typer.Option("--version", help="Show the version and exit.", callback=_show_version, is_eager=True)
    ] = False,
) -> None:
    """Cache invalidation across replicas: one publish, every replica forgets."""
