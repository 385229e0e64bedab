"""``python -m secateur`` is the command line."""

import sys

from secateur.cli.commands import main

sys.exit(main())
