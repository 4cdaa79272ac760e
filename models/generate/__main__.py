"""python -m models.generate: see ``models.hub.cli``."""

from models.hub.cli import main

main()
