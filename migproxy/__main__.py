"""`migproxy`, and `python -m migproxy`: the same."""

import sys

from migproxy import output
from migproxy.imports import uncollected


def main() -> None:
    """Runs the command line."""
    output.begin()
    sys.stdout = output.open_stdout()
    with uncollected():
        from migproxy.cli import app
    try:
        try:
            app()
        finally:
            sys.stdout.flush()
    except output.OutputError as error:
        sys.exit(f"migproxy: {error}")


if __name__ == "__main__":
    main()
