"""`migproxy`, and `python -m migproxy`: the same."""

from migproxy.imports import uncollected


def main() -> None:
    """Runs the command line."""
    with uncollected():
        from migproxy.cli import app
    app()


if __name__ == "__main__":
    main()
