"""python -m models.generate: see ``models.hub.cli``. On CPU every core is a device with some of the heads."""

from models.cores import core_mesh
from models.hub.cli import main

main(mesh=core_mesh())
