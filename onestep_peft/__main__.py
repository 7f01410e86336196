"""`python -m onestep_peft` is the command `onestep`."""

import sys

from onestep_peft.cli import main

sys.exit(main())
