"""People and their doors: the ``studio`` command, its doctor and its demo. Nothing imports this room."""
