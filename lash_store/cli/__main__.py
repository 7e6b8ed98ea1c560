"""Owns ``python -m lash_store.cli``."""

import sys

from . import main

sys.exit(main())
