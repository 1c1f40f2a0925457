"""``python -m latentdm``, the same as the command ``latentdm``."""

from latentdm.cli import main

raise SystemExit(main())
