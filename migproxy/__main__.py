"""`python -m migproxy`: the same as the `migproxy` command."""

from migproxy.cli import main

main()
