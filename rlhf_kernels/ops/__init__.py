"""One room per family. A room's `__init__.py` holds the public functions; nothing is re-exported here."""
