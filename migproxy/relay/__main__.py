"""`python -m migproxy.relay SOCKET`: what `migproxy relay` becomes, without what only the command line needs."""

import sys

from migproxy.relay.process import main

sys.exit(main(sys.argv[1:]))
