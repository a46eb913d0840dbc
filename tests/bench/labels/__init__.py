"""Generated pictures and what a person saw in them, blind to the prompts; see ``__main__.py``."""
