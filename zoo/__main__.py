"""`python -m zoo`, for where the command is not on the path: torchrun, another interpreter."""

import sys

from zoo.cli.main import main

sys.exit(main())
